"""What a model directory's `config.json` says, as one frozen object, or a refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from weft.base.errors import ModelLoadError, UnsupportedError
from weft.model.rope import RopeConfig, parse_rope


class ModelFamily(StrEnum):
    """The decoder families; the value is `model_type` in config.json."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


_CAUSAL_LM = {
    ModelFamily.LLAMA: "LlamaForCausalLM",
    ModelFamily.MISTRAL: "MistralForCausalLM",
    ModelFamily.QWEN2: "Qwen2ForCausalLM",
    ModelFamily.QWEN3: "Qwen3ForCausalLM",
}
_SUPPORTED = "supported are " + ", ".join(
    f"{family.value} ({architecture})" for family, architecture in _CAUSAL_LM.items()
)
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_DEFAULT_WINDOW = 4096
"""transformers' own where the key is absent; null means no window."""
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one decoder and its named variations."""

    family: ModelFamily
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """For each layer: a token sees itself and the `window - 1` before it; None means all."""
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys pass an RMS norm over head_dim before RoPE (Qwen3)."""
    dtype: str = "float32"
    """Of the checkpoint: float64, float32, bfloat16 or float16."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def max_context(self) -> int:
        """Tokens of a sequence for which the positions are meant, RoPE scaling applied."""
        return self.rope.max_context(self.max_position_embeddings)

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, a tied output layer counted once."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        attention += self.qkv_bias * (self.query_size + 2 * self.kv_size)
        attention += self.output_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        layer = attention + mlp + 2 * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read `config.json`.

        Raises:
            ModelLoadError: it is missing, malformed or inconsistent.
            UnsupportedError: it asks for something that Weft does not run.
        """
        path = Path(directory) / "config.json"
        if not Path(directory).is_dir():
            raise ModelLoadError(f"{directory} is not a directory; give a model directory")
        return cls.from_dict(read_json_object(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Interpret a parsed `config.json`; raises as `from_directory` does."""
        family = _family(raw, source)
        _refuse_variants(raw, source)
        reader = _Reader(raw, source)
        hidden_size = reader.integer("hidden_size")
        num_layers = reader.integer("num_hidden_layers")
        num_heads = reader.integer("num_attention_heads")
        head_dim = reader.integer("head_dim", _default_head_dim(family, hidden_size, num_heads))
        max_position_embeddings = reader.integer("max_position_embeddings")
        attention_bias = reader.flag("attention_bias") and family in (
            ModelFamily.LLAMA,
            ModelFamily.QWEN3,
        )
        config = cls(
            family=family,
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(family, reader, num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope=parse_rope(raw, max_position_embeddings, source),
            windows=_windows(family, raw, num_layers, reader),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            qkv_bias=family is ModelFamily.QWEN2 or attention_bias,
            output_bias=attention_bias,
            mlp_bias=reader.flag("mlp_bias") and family is ModelFamily.LLAMA,
            qk_norm=family is ModelFamily.QWEN3,
            dtype=_dtype(raw, source),
            bos_token_id=_first(token_ids(raw.get("bos_token_id"), source, "bos_token_id")),
            eos_token_ids=token_ids(raw.get("eos_token_id"), source, "eos_token_id"),
        )
        _check_consistent(config, source)
        return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ModelLoadError: the file is missing, unreadable or holds something else.
    """
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing; is this a complete Hugging Face model directory?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value


def token_ids(value: Any, source: str, key: str) -> tuple[int, ...]:
    """One id, a list of ids or null, as a tuple.

    Raises:
        ModelLoadError: it is something else.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ModelLoadError(f"{source}: {key} is {value!r}; token ids are integers of 0 or more")
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed look-ups whose errors name the file, the key and the value."""

    raw: Mapping[str, Any]
    source: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(
                f"{self.source}: {key} is {value!r}; a whole number of 1 or more is needed"
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise ModelLoadError(f"{self.source}: {key} is {value!r}; a number above 0 is needed")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise ModelLoadError(f"{self.source}: {key} is {value!r}; true or false is needed")
        return bool(value)


def _family(raw: Mapping[str, Any], source: str) -> ModelFamily:
    model_type = raw.get("model_type")
    experts = [key for key in _EXPERT_KEYS if raw.get(key)]
    if experts or "moe" in str(model_type) or model_type == "mixtral":
        raise UnsupportedError(
            f"{source}: {model_type!r} is a mixture of experts, which is not supported; "
            f"{_SUPPORTED}, all dense"
        )
    try:
        family = ModelFamily(str(model_type))
    except ValueError:
        raise UnsupportedError(
            f"{source}: model_type is {model_type!r}, which is not supported; {_SUPPORTED}"
        ) from None
    architectures = raw.get("architectures") or [_CAUSAL_LM[family]]
    if not isinstance(architectures, list):
        raise ModelLoadError(
            f"{source}: architectures is {architectures!r}; a list such as "
            f'["{_CAUSAL_LM[family]}"] is needed'
        )
    if _CAUSAL_LM[family] not in architectures:
        raise UnsupportedError(
            f"{source}: architectures is {architectures}, which is not supported; {_SUPPORTED}"
        )
    return family


def _refuse_variants(raw: Mapping[str, Any], source: str) -> None:
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedError(
            f"{source}: the checkpoint is quantised ({method or 'unnamed method'}), which is not "
            f"supported; supported dtypes are {', '.join(_DTYPES)}"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"{source}: hidden_act is {activation!r}, which is not supported; supported is silu"
        )


def _default_head_dim(family: ModelFamily, hidden_size: int, num_heads: int) -> int:
    return 128 if family is ModelFamily.QWEN3 else hidden_size // num_heads


def _num_kv_heads(family: ModelFamily, reader: _Reader, num_heads: int) -> int:
    if "num_key_value_heads" not in reader.raw and family is not ModelFamily.LLAMA:
        raise ModelLoadError(
            f"{reader.source}: num_key_value_heads is missing; {family} models need it"
        )
    return reader.integer("num_key_value_heads", num_heads)


def _windows(
    family: ModelFamily, raw: Mapping[str, Any], num_layers: int, reader: _Reader
) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if family is ModelFamily.LLAMA:
        if window is not None:
            raise UnsupportedError(
                f"{reader.source}: sliding_window is {window} on a llama model, whose layers see "
                "everything; mistral, qwen2 and qwen3 models may have windows"
            )
        return (None,) * num_layers
    if family is not ModelFamily.MISTRAL and not reader.flag("use_sliding_window"):
        window = None
    elif window is not None or "sliding_window" not in raw:
        window = reader.integer("sliding_window", _DEFAULT_WINDOW)
    sliding = _sliding_layers(family, raw, num_layers, reader.source)
    if window is None and raw.get("layer_types") and any(sliding):
        raise ModelLoadError(
            f"{reader.source}: layer_types names sliding_attention, but no sliding_window is in "
            "use; set sliding_window (and use_sliding_window)"
        )
    return tuple(window if slides else None for slides in sliding)


def _sliding_layers(
    family: ModelFamily, raw: Mapping[str, Any], num_layers: int, source: str
) -> list[bool]:
    kinds = raw.get("layer_types")
    if kinds is None:
        first: Any = 0 if family is ModelFamily.MISTRAL else raw.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool):
            raise ModelLoadError(
                f"{source}: max_window_layers is {first!r}; a whole number is needed"
            )
        return [layer >= first for layer in range(num_layers)]
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ModelLoadError(
            f"{source}: layer_types must be a list of {num_layers} kinds, one a layer; got {kinds}"
        )
    unknown = sorted({str(kind) for kind in kinds} - set(known))
    if unknown:
        raise UnsupportedError(
            f"{source}: layer_types holds {', '.join(unknown)}, which is not supported; supported "
            f"are {', '.join(known)}"
        )
    if family is ModelFamily.MISTRAL:
        raise UnsupportedError(
            f"{source}: layer_types on a mistral model is not supported (one sliding_window holds "
            "for all its layers)"
        )
    return [known[kind] for kind in kinds]


def _dtype(raw: Mapping[str, Any], source: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedError(
            f"{source}: dtype is {name}, which is not supported; supported are {', '.join(_DTYPES)}"
        )
    return name


def _check_consistent(config: ModelConfig, source: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelLoadError(
            f"{source}: num_attention_heads ({config.num_heads}) is no multiple of "
            f"num_key_value_heads ({config.num_kv_heads})"
        )
    if config.head_dim % 2:
        raise ModelLoadError(f"{source}: head_dim is {config.head_dim}; RoPE needs an even number")
    beyond = [i for i in config.eos_token_ids if i >= config.vocab_size]
    if beyond:
        raise ModelLoadError(
            f"{source}: eos_token_id {beyond} lies beyond vocab_size ({config.vocab_size})"
        )


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
