"""Decoder models as plain numbers: enough to price an iteration and to size a KV cache."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.base.errors import ConfigError, ModelLoadError
from weft.graph.graph import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The dimensions of a dense decoder with gated feed-forward blocks (Llama, Mistral, Qwen)."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    tied_embeddings: bool = False
    window: int | None = None
    """A token attends to itself and `window - 1` before it, in every layer; None means all."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_model_len",
        ):
            value: int = getattr(self, name)
            if value < 1:
                raise ConfigError(f"model shape {self.name!r}: {name} is {value}; it must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model shape {self.name!r}: num_heads is {self.num_heads}, which is not a "
                f"multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"model shape {self.name!r}: window is {self.window}; it must be >= 1"
            )

    @property
    def num_linear_params(self) -> int:
        """Weights of the layers' linears: read once an iteration, two FLOP a token each."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.ffn_size)

    @property
    def num_head_params(self) -> int:
        """Weights of the output projection, which only sampled rows pass."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        """All weights that occupy memory, norms and biases left out."""
        return self.num_linear_params + self.num_head_params * (1 if self.tied_embeddings else 2)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token keeps in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes(dtype)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights in `dtype`."""
        return self.num_params * dtype_bytes(dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element; ConfigError lists the known dtypes."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise ConfigError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPE_BYTES)}") from None


def _shape(
    name: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: tuple[int, int, int],
    vocab: int,
    max_len: int,
    tied: bool = False,
) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        vocab_size=vocab,
        max_model_len=max_len,
        tied_embeddings=tied,
    )


MODEL_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        # The two that run on a laptop: the model in the package, and the benchmark's random one.
        _shape("embedded", 6, 256, 768, (8, 4, 32), 2048, 1024, tied=True),
        _shape("110m", 12, 768, 2048, (12, 12, 64), 32000, 2048, tied=True),
        # From the config.json of the released checkpoints.
        _shape("llama-3.2-1b", 16, 2048, 8192, (32, 8, 64), 128256, 131072, tied=True),
        _shape("llama-3.2-3b", 28, 3072, 8192, (24, 8, 128), 128256, 131072, tied=True),
        _shape("llama-3.1-8b", 32, 4096, 14336, (32, 8, 128), 128256, 131072),
        _shape("llama-3.1-70b", 80, 8192, 28672, (64, 8, 128), 128256, 131072),
        _shape("qwen2.5-0.5b", 24, 896, 4864, (14, 2, 64), 151936, 32768, tied=True),
        _shape("qwen2.5-1.5b", 28, 1536, 8960, (12, 2, 128), 151936, 32768, tied=True),
        _shape("qwen2.5-7b", 28, 3584, 18944, (28, 4, 128), 152064, 32768),
        _shape("qwen2.5-14b", 48, 5120, 13824, (40, 8, 128), 152064, 32768),
        _shape("qwen2.5-32b", 64, 5120, 27648, (40, 8, 128), 152064, 32768),
        _shape("qwen3-8b", 36, 4096, 12288, (32, 8, 128), 151936, 40960),
        _shape("mistral-7b", 32, 4096, 14336, (32, 8, 128), 32768, 32768),
    )
}
"""Model shape by name."""


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Read a shape from the contents of a Hugging Face `config.json`.

    Raises:
        ModelLoadError: a key is missing or no whole number, or the model is a mixture of experts,
            whose iterations this shape cannot price.
    """
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise ModelLoadError(
                f"{name}: {key} is {config[key]}; only dense decoders can be priced by their shape"
            )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelLoadError(f"{name}: {key} is {value!r}; it must be a whole number")
        return value

    num_heads = number("num_attention_heads")
    hidden_size = number("hidden_size")
    # Qwen2 writes a window and a switch that says whether it is used.
    has_window = bool(config.get("use_sliding_window", config.get("sliding_window") is not None))
    return ModelShape(
        name=name,
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=number("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", num_heads),
        head_dim=number("head_dim", hidden_size // max(num_heads, 1)),
        vocab_size=number("vocab_size"),
        max_model_len=number("max_position_embeddings", 2048),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        window=number("sliding_window") if has_window else None,
    )


def load_shape(name_or_path: str) -> ModelShape:
    """The shape of this name, or of a model directory or `config.json` file.

    Raises:
        ConfigError: neither a known name nor a path; the message lists the names.
        ModelLoadError: the file is not a usable configuration.
    """
    if name_or_path in MODEL_SHAPES:
        return MODEL_SHAPES[name_or_path]
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, MODEL_SHAPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"model shape {name_or_path!r} is neither a known name nor a model directory{hint} "
            f"(known: {', '.join(MODEL_SHAPES)})"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} holds {type(config).__name__}; it must hold an object")
    return shape_from_config(config, name_or_path)
