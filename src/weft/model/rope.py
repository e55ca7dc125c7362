"""Rotary position embeddings: how fast each pair of a head turns, and the tables of it.

Shape legend: D head_dim, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from weft.base.errors import ModelLoadError, UnsupportedError


class RopeKind(StrEnum):
    """How a context longer than the pre-trained one is reached; the value is `rope_type`."""

    DEFAULT = "default"
    LINEAR = "linear"
    """Positions divided by a factor (Chen et al., 2023)."""
    LLAMA3 = "llama3"
    """Slow pairs divided by a factor, fast ones kept, a smooth step between (Llama 3.1)."""
    YARN = "yarn"
    """A ramp between divided and kept pairs, and a temperature (Peng et al., 2023)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """The numbers behind one RoPE; those of other kinds keep their defaults."""

    kind: RopeKind = RopeKind.DEFAULT
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cos and sin, for YaRN; resolved from mscale and factor where not given."""

    def max_context(self, max_position_embeddings: int) -> int:
        """Tokens for which the positions are meant (vLLM's rule)."""
        if self.kind is RopeKind.YARN:
            scaled = int(self.original_max_position_embeddings * self.factor)
            return max(scaled, max_position_embeddings)
        if self.kind is RopeKind.LINEAR:
            return int(max_position_embeddings * self.factor)
        return max_position_embeddings


_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    RopeKind.DEFAULT: set[str](),
    RopeKind.LINEAR: {"factor"},
    RopeKind.LLAMA3: {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    RopeKind.YARN: {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


_REQUIRED: dict[RopeKind, set[str]] = {
    RopeKind.LINEAR: {"factor"},
    RopeKind.LLAMA3: {"factor", "low_freq_factor", "high_freq_factor"},
    RopeKind.YARN: {"factor"},
}
"""What transformers asks for; it takes the pre-trained length from the configuration itself."""


def parse_rope(raw: Mapping[str, Any], max_position_embeddings: int, source: str) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).

    Raises:
        UnsupportedError: the type is none of `RopeKind`, or only part of a head turns.
        ModelLoadError: a number is missing or out of range.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
        raise ModelLoadError(
            f"{source}: {key} is {given!r}; an object such as "
            '{"rope_type": "linear", "factor": 2.0} is needed'
        )
    if any(isinstance(v, Mapping) for v in given.values()):
        raise UnsupportedError(
            f"{source}: RoPE parameters that differ by layer are not supported; got {given}"
        )
    values: dict[str, Any] = dict(given)
    kind = _kind(values.get("rope_type", values.get("type", "default")), source)
    values.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if values["partial_rotary_factor"] not in (None, 1, 1.0):
        raise UnsupportedError(
            f"{source}: partial_rotary_factor is {values['partial_rotary_factor']}, which is not "
            "supported; supported is 1 (the whole head turns)"
        )
    numbers = _Numbers(values, source, kind)
    theta = values.get("rope_theta") or raw.get("rope_theta") or 10000.0
    values["rope_theta"] = theta
    if kind is RopeKind.DEFAULT:
        return RopeConfig(theta=numbers.positive("rope_theta"))
    _refuse_unknown(values, kind, source)
    original = raw.get("original_max_position_embeddings") or values.get(
        "original_max_position_embeddings", max_position_embeddings
    )
    values["original_max_position_embeddings"] = original
    missing = sorted(key for key in _REQUIRED[kind] if values.get(key) is None)
    if missing:
        raise ModelLoadError(
            f"{source}: {kind} RoPE lacks {', '.join(missing)}; transformers refuses it as well"
        )
    theta = numbers.positive("rope_theta")
    if kind is RopeKind.YARN and theta <= 1:
        raise ModelLoadError(
            f"{source}: rope_theta of yarn RoPE is {theta}; a number above 1 is needed"
        )
    factor = numbers.positive("factor")
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=numbers.whole("original_max_position_embeddings"),
        low_freq_factor=numbers.positive("low_freq_factor", 1.0),
        high_freq_factor=numbers.positive("high_freq_factor", 4.0),
        beta_fast=numbers.positive("beta_fast", 32.0),
        beta_slow=numbers.positive("beta_slow", 1.0),
        truncate=numbers.flag("truncate", True),
        attention_factor=_attention_factor(numbers, factor) if kind is RopeKind.YARN else 1.0,
    )


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position for each pair of a head: [D/2] in float32, as the models were trained."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.kind is RopeKind.LINEAR:
        return plain / config.factor
    if config.kind is RopeKind.LLAMA3:
        return _llama3(plain, config)
    if config.kind is RopeKind.YARN:
        return _yarn(config, head_dim)
    return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTable:
    """cos and sin of every position: [L, D/2] each, in the model's dtype."""

    cos: Tensor
    sin: Tensor


def rope_table(
    config: RopeConfig,
    head_dim: int,
    num_positions: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> RopeTable:
    """Tabulate the turns; computed in float32 whatever the dtype, as the models were trained."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(config, head_dim)[None, :]
    scale = config.attention_factor
    return RopeTable(
        cos=(angles.cos() * scale).to(device=device, dtype=dtype),
        sin=(angles.sin() * scale).to(device=device, dtype=dtype),
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Typed look-ups whose errors name the file, the key and the value."""

    values: Mapping[str, Any]
    source: str
    kind: RopeKind

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise ModelLoadError(
                f"{self.source}: {key} of {self.kind} RoPE is {value!r}; a number above 0 is needed"
            )
        return float(value)

    def whole(self, key: str) -> int:
        value = self.positive(key)
        if value < 1 or value != int(value):
            raise ModelLoadError(
                f"{self.source}: {key} of {self.kind} RoPE is {value}; a whole number is needed"
            )
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ModelLoadError(
                f"{self.source}: {key} of {self.kind} RoPE is {value!r}; true or false is needed"
            )
        return value


def _kind(name: Any, source: str) -> RopeKind:
    try:
        return RopeKind(str(name))
    except ValueError:
        kinds = ", ".join(RopeKind)
        raise UnsupportedError(
            f"{source}: RoPE type {name!r} is not supported; supported are {kinds}"
        ) from None


def _refuse_unknown(values: Mapping[str, Any], kind: RopeKind, source: str) -> None:
    unknown = sorted(
        key
        for key, value in values.items()
        if value is not None and key not in _COMMON | _KEYS[kind]
    )
    if unknown:
        raise UnsupportedError(
            f"{source}: {', '.join(unknown)} of {kind} RoPE is not supported; supported are "
            f"{', '.join(sorted(_KEYS[kind]))}"
        )


def _attention_factor(numbers: _Numbers, factor: float) -> float:
    """YaRN's temperature, folded into cos and sin (§3.4 of the paper; mscale from DeepSeek)."""
    if numbers.values.get("attention_factor") is not None:
        return numbers.positive("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if numbers.values.get("mscale") and numbers.values.get("mscale_all_dim"):
        over, under = numbers.positive("mscale"), numbers.positive("mscale_all_dim")
        return mscale(over) / mscale(under)
    return mscale(1.0)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_position_embeddings / (2 * math.pi / plain)
    smooth = (turns - low) / (high - low)
    divided = plain / config.factor
    blended = (1 - smooth) * divided + smooth * plain
    return torch.where(turns < low, divided, torch.where(turns > high, plain, blended))


def _yarn(config: RopeConfig, head_dim: int) -> Tensor:
    def pair_with(num_turns: float) -> float:
        """The (fractional) pair that makes so many turns over the pre-trained context."""
        length = config.original_max_position_embeddings
        return (
            head_dim * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(config.theta))
        )

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no step is infinitely steep
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - torch.clamp((pairs - low) / (high - low), 0, 1)
    speeds = config.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (1.0 / (config.factor * speeds)) * (1 - kept) + (1.0 / speeds) * kept
