"""The two models under measurement: the embedded one, and a random Llama of 110 M parameters."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

RAND110: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 32000,
}
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
PACKAGED = Path(__file__).parents[1] / "src" / "weft" / "assets" / "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchModel:
    """A checkpoint directory and the arithmetic that its shape implies."""

    name: str
    path: Path
    config: dict[str, Any]

    @property
    def num_linear_params(self) -> int:
        """Weights of the decoder's linears, without the vocabulary."""
        c = self.config
        hidden, heads = c["hidden_size"], c["num_attention_heads"]
        head_dim = c.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * c["num_key_value_heads"])
        return c["num_hidden_layers"] * (attention + 3 * hidden * c["intermediate_size"])

    @property
    def num_head_params(self) -> int:
        """Weights of the output projection, which every decode step reads."""
        return self.config["hidden_size"] * self.config["vocab_size"]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        c = self.config
        head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        num_values = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * head_dim
        return BYTES_PER_VALUE[dtype] * num_values

    def decode_bytes(self, context_len: float, dtype: str) -> float:
        """What one decode step of one sequence must read: weights, and its keys and values."""
        weights = BYTES_PER_VALUE[dtype] * (self.num_linear_params + self.num_head_params)
        return weights + self.kv_bytes_per_token(dtype) * context_len

    def prefill_flop(self, num_tokens: int) -> float:
        """Linears and causal attention of a prompt; the vocabulary only at its last position."""
        c = self.config
        heads = c["num_attention_heads"]
        head_dim = c.get("head_dim") or c["hidden_size"] // heads
        pairs = num_tokens * (num_tokens + 1) / 2
        attention = 4.0 * c["num_hidden_layers"] * heads * head_dim * pairs
        return self.linear_flop(num_tokens) + attention

    def linear_flop(self, num_tokens: int) -> float:
        """The linears' part of `prefill_flop`."""
        return 2.0 * self.num_linear_params * num_tokens + 2.0 * self.num_head_params


def open_model(name: str, cache: Path, embedded: Path | None) -> BenchModel:
    """`embedded` or `rand110`; the latter is written to `cache` on first use."""
    if name == "rand110":
        path = write_random_llama(cache / "rand110")
    elif name == "embedded":
        path = embedded or PACKAGED
    else:
        raise ValueError(f"model {name!r} is not one of: embedded, rand110")
    config_path = path / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(f"{config_path} is missing; pass --embedded-model DIR")
    config: dict[str, Any] = json.loads(config_path.read_text())
    return BenchModel(name=name, path=path, config=config)


def write_random_llama(path: Path) -> Path:
    """Seeded normal weights in float32, and a tokenizer of placeholders that loaders ask for."""
    if (path / "model.safetensors").exists():
        return path
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(110)
    hidden, inner = RAND110["hidden_size"], RAND110["intermediate_size"]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(RAND110["initializer_range"])

    tensors = {
        "model.embed_tokens.weight": normal(RAND110["vocab_size"], hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(RAND110["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(hidden, np.float32)
        for part in "qkvo":
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = normal(hidden, hidden)
        tensors[f"{prefix}mlp.gate_proj.weight"] = normal(inner, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = normal(inner, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = normal(hidden, inner)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(RAND110, indent=1))
    words = {f"<{index}>": index for index in range(RAND110["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="<3>")).save(str(partial / "tokenizer.json"))
    (partial / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<0>"})
    )
    partial.rename(path)
    return path


def convert_for(
    script: str, interpreter: str, model: BenchModel, out: Path, arguments: list[str], log: Path
) -> Path:
    """Run a converter once in a peer's interpreter; its output is cached by name.

    Raises:
        RuntimeError: the converter failed; the message names its log.
    """
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name("partial-" + out.name)
    command = [interpreter, str(Path(__file__).parent / "peers" / script), str(model.path)]
    with log.open("ab") as file:
        done = subprocess.run(
            [*command, str(partial), *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{script} failed with status {done.returncode}; see {log}")
    partial.rename(out)
    return out
