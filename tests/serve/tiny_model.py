"""A Llama with random weights that knows the tokens of bytes: small enough for any test."""

from __future__ import annotations

from pathlib import Path

from serve.fake_engine import BOS, EOS, VOCAB_SIZE, write_model_directory

NUM_LAYERS = 2


def write_tiny_model(directory: Path) -> Path:
    """A model directory, tokenizer and chat template included."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_model_directory(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory
