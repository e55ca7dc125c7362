"""A small Llama over this machine's Python standard library: model and data by name.

`weft train --module stdlib_gpt:model --data stdlib_gpt:data --data-option path=DIR` finds both;
`prepare` writes DIR: a byte-level BPE and windows of token ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from train_embedded import encode, library_files, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from weft.model.zoo.huggingface import logits_loss
from weft.model.zoo.layers import token_ids
from weft.model.zoo.registry import ZooModel
from weft.train.data import TrainData


def llama_config(vocab: int, hidden: int, layers: int, length: int) -> LlamaConfig:
    """A Llama with tied embeddings; `length` tokens are trained, twice as many allowed."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=2 * length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        use_cache=False,
    )


def model(vocab: int = 1024, hidden: int = 128, layers: int = 4, length: int = 128) -> ZooModel:
    """The model with what it takes to train it."""
    return ZooModel(
        name=f"stdlib-gpt-{layers}",
        module=LlamaForCausalLM(llama_config(vocab, hidden, layers, length)),
        example_inputs=(token_ids(2, length),),
        targets=(token_ids(2, length),),
        loss=logits_loss,
        batch_size=32,
    )


def prepare(path: Path, *, vocab: int, length: int, max_files: int | None = None) -> int:
    """Write tokenizer.json, train.npy and held-out.npy (windows of length + 1); counts tokens."""
    path.mkdir(parents=True, exist_ok=True)
    train, held_out = library_files()
    train = train[:max_files]
    tokenizer = train_tokenizer(train, vocab)
    tokenizer.save(str(path / "tokenizer.json"))
    num_tokens = 0
    for name, files in (("train", train), ("held-out", held_out[:20])):
        stream = encode(tokenizer, files).numpy().astype(np.uint16)
        count = (len(stream) - 1) // length
        starts = np.arange(count)[:, None] * length + np.arange(length + 1)
        np.save(path / f"{name}.npy", stream[starts])
        num_tokens += len(stream)
    return num_tokens


def data(path: str) -> TrainData:
    """Windows of `prepare`, of which a rank reads only the samples that it is asked for."""

    def columns(name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = np.load(Path(path) / f"{name}.npy", mmap_mode="r")
        return rows[:, :-1], rows[:, 1:]

    (ids, wanted), (held_ids, held_wanted) = columns("train"), columns("held-out")
    held = TrainData(inputs=(held_ids,), targets=(held_wanted,))
    return TrainData(inputs=(ids,), targets=(wanted,), validation=held)
