"""Random small checkpoints of every family, written by transformers: the reference in tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1000.0,
}
# Head sizes of 16 run on the native kernels of every processor that has them, the others on torch.
CONFIGS: dict[str, Any] = {
    "llama2-mha": LlamaConfig(**{**COMMON, "num_key_value_heads": 4}),
    "llama3-gqa": LlamaConfig(**COMMON, rope_parameters=dict(LLAMA3), tie_word_embeddings=True),
    "llama-mqa-biases": LlamaConfig(
        **{**COMMON, "num_key_value_heads": 1, "head_dim": 12},
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "llama-wide-heads": LlamaConfig(**{**COMMON, "head_dim": 32}),
    "llama-yarn": LlamaConfig(**COMMON, rope_parameters=dict(YARN)),
    "mistral-window": MistralConfig(**COMMON, head_dim=6, sliding_window=9),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2-mixed-windows": Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**COMMON, head_dim=32),
    "qwen3-layer-types": Qwen3Config(
        **COMMON,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
"""Name to transformers configuration; between them every variation that a decoder knows."""


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A float64 transformers model with biases and norms away from their neutral values."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])  # saving a model writes its dtype into it
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    for key, parameter in model.named_parameters():
        if key.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif key.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def write_checkpoint(name: str, directory: Path, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """Save `random_model` and return it."""
    model = random_model(name, seed)
    model.save_pretrained(directory, **kwargs)
    return model
