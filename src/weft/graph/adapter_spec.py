"""What an adapter is, as plain data: its kind, its ranks, and the modules that it bypasses.

A bypass network reads one tensor of the frozen backbone and adds its output to another
(FlexLLM, arXiv 2402.18789 §4): LoRA reads a linear's input and adds to its output; (IA)³ scales a
tensor, which is adding (l - 1) ⊙ x to x; a bottleneck reads a sub-layer's output and adds to it.
Module names are those of Hugging Face checkpoints, so that PEFT's target_modules mean the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar, cast

from weft.base.errors import ConfigError

T = TypeVar("T")

MAX_RANK = 256
MAX_ALPHA = 1e6
"""Beyond sense already; far beyond it, products overflow."""
KEY_PATTERN = r"(.*\.)?({})"
"""How PEFT matches a key of `rank_pattern` or `alpha_pattern`."""


class AdapterKind(StrEnum):
    """The bypass networks that an executor can run and train."""

    LORA = "lora"
    IA3 = "ia3"
    BOTTLENECK = "bottleneck"


class Module(StrEnum):
    """The modules of a decoder layer that a bypass may attach to, in the order of the forward."""

    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    O_PROJ = "o_proj"
    SELF_ATTN = "self_attn"
    """The attention sub-layer's output, for bottlenecks."""
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"
    MLP = "mlp"
    """The feed-forward sub-layer's output, for bottlenecks."""


_PARENT = {
    Module.Q_PROJ: "self_attn.",
    Module.K_PROJ: "self_attn.",
    Module.V_PROJ: "self_attn.",
    Module.O_PROJ: "self_attn.",
    Module.SELF_ATTN: "",
    Module.GATE_PROJ: "mlp.",
    Module.UP_PROJ: "mlp.",
    Module.DOWN_PROJ: "mlp.",
    Module.MLP: "",
}
SUB_LAYERS = (Module.SELF_ATTN, Module.MLP)
LINEARS = tuple(module for module in Module if module not in SUB_LAYERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """How an adapter is made; the names and the meanings of the settings are PEFT's.

    Raises:
        ConfigError: a number is out of its range; the message names it and the limit.
    """

    kind: AdapterKind = AdapterKind.LORA
    rank: int = 8
    """LoRA's r, or a bottleneck's width; no meaning for (IA)³."""
    alpha: float = 16.0
    use_rslora: bool = False
    dropout: float = 0.0
    """On a LoRA's input, in training only."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Names or name endings; or one regular expression; or `all-linear`."""
    exclude_modules: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    """Name endings or regular expressions -> another rank; the first that matches holds."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    layers_to_transform: tuple[int, ...] | None = None
    feedforward_modules: tuple[str, ...] | str = ("down_proj",)
    """(IA)³ targets whose input is scaled, not their output."""
    activation: str = "relu"
    """A bottleneck's: relu, gelu or silu."""

    def __post_init__(self) -> None:
        # Plain values that callers write by hand: the name of a kind, a list of modules.
        if self.kind not in list(AdapterKind):
            raise ConfigError(f"kind is {self.kind!r}; it must be one of {', '.join(AdapterKind)}")
        object.__setattr__(self, "kind", AdapterKind(self.kind))
        for field_name in ("target_modules", "exclude_modules", "feedforward_modules"):
            object.__setattr__(self, field_name, _names(field_name, getattr(self, field_name)))
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        for key in (*self.rank_pattern, *self.alpha_pattern):
            _compile(key, within=KEY_PATTERN)
        for name, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                raise ConfigError(
                    f"{name}: the rank is {rank!r}; it must be in [1, {MAX_RANK}], and whole"
                )
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not (_is_number(alpha) and 0 < alpha <= MAX_ALPHA):
                raise ConfigError(
                    f"{name}: alpha is {alpha!r}; it must be a positive number, {MAX_ALPHA:g} at "
                    "most"
                )
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout is {self.dropout!r}; it must be in [0, 1)")
        if self.dropout and self.kind is not AdapterKind.LORA:
            raise ConfigError(f"dropout is {self.dropout}; only LoRA has dropout, set it to 0")
        if self.activation not in ("relu", "gelu", "silu"):
            raise ConfigError(f"activation is {self.activation!r}; it must be relu, gelu or silu")
        if self.target_modules in ((), ""):
            raise ConfigError("target_modules is empty; name at least one module, or all-linear")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWidths:
    """In and out features of a decoder layer's linears."""

    hidden: int
    query: int
    kv: int
    ffn: int

    def of(self, module: Module) -> tuple[int, int]:
        """(in_features, out_features); a sub-layer's output counts as hidden to hidden."""
        match module:
            case Module.Q_PROJ:
                return self.hidden, self.query
            case Module.K_PROJ | Module.V_PROJ:
                return self.hidden, self.kv
            case Module.O_PROJ:
                return self.query, self.hidden
            case Module.GATE_PROJ | Module.UP_PROJ:
                return self.hidden, self.ffn
            case Module.DOWN_PROJ:
                return self.ffn, self.hidden
            case Module.SELF_ATTN | Module.MLP:
                return self.hidden, self.hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class BypassTarget:
    """One bypass: where it attaches, and its own numbers."""

    layer: int
    module: Module
    in_features: int
    out_features: int
    rank: int
    """0 for (IA)³."""
    scale: float
    """Of a LoRA's product: alpha / r, or alpha / sqrt(r) with rsLoRA; else 1."""
    scales_input: bool = False
    """(IA)³ on the input of the linear instead of its output."""

    @property
    def num_params(self) -> int:
        """Trainable numbers (biases of a bottleneck included)."""
        if self.rank == 0:
            return self.in_features if self.scales_input else self.out_features
        weights = self.rank * (self.in_features + self.out_features)
        return weights + (self.rank + self.out_features if self.module in SUB_LAYERS else 0)


def module_name(layer: int, module: Module) -> str:
    """The name in a Hugging Face checkpoint, such as `model.layers.3.self_attn.q_proj`."""
    return f"model.layers.{layer}.{_PARENT[module]}{module}"


def resolve_targets(
    spec: AdapterSpec, *, num_layers: int, widths: LayerWidths
) -> tuple[BypassTarget, ...]:
    """The bypasses of an adapter on a model, by layer and then in the order of the forward.

    Raises:
        ConfigError: no module matches, or a name, pattern or layer matches nothing; the message
            lists the modules that there are.
    """
    modules = SUB_LAYERS if spec.kind is AdapterKind.BOTTLENECK else LINEARS
    layers = range(num_layers) if spec.layers_to_transform is None else spec.layers_to_transform
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"layers_to_transform names layer {layer}; the model has layers 0 to "
                f"{num_layers - 1}"
            )
    found = tuple(
        _target(spec, layer, module, widths)
        for layer in sorted(set(layers))
        for module in modules
        if _matches(spec.target_modules, layer, module)
        and not _matches(spec.exclude_modules, layer, module)
    )
    names = ", ".join(modules)
    if not found:
        raise ConfigError(
            f"target_modules {spec.target_modules!r} match no module; there are {names}"
        )
    if isinstance(spec.target_modules, tuple):
        for entry in spec.target_modules:
            if not any(
                _matches((entry,), layer, module)
                for layer in range(num_layers)
                for module in modules
            ):
                raise ConfigError(f"target module {entry!r} is unknown; there are {names}")
    return found


def _matches(wanted: tuple[str, ...] | str, layer: int, module: Module) -> bool:
    name = module_name(layer, module)
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted)


def _target(spec: AdapterSpec, layer: int, module: Module, widths: LayerWidths) -> BypassTarget:
    num_in, num_out = widths.of(module)
    if spec.kind is AdapterKind.IA3:
        scales_input = _matches(spec.feedforward_modules, layer, module)
        return BypassTarget(
            layer=layer,
            module=module,
            in_features=num_in,
            out_features=num_out,
            rank=0,
            scale=1.0,
            scales_input=scales_input,
        )
    rank = _from_pattern(spec.rank_pattern, layer, module, spec.rank)
    alpha = _from_pattern(spec.alpha_pattern, layer, module, spec.alpha)
    scale = 1.0
    if spec.kind is AdapterKind.LORA:
        scale = alpha / (math.sqrt(rank) if spec.use_rslora else rank)
    return BypassTarget(
        layer=layer,
        module=module,
        in_features=num_in,
        out_features=num_out,
        rank=rank,
        scale=scale,
    )


def _from_pattern(pattern: Mapping[str, T], layer: int, module: Module, default: T) -> T:
    name = module_name(layer, module)
    for key, value in pattern.items():
        if re.fullmatch(KEY_PATTERN.format(key), name):
            return value
    return default


def _names(field_name: str, given: object) -> tuple[str, ...] | str:
    """Names, or one regular expression that can be compiled."""
    if isinstance(given, str):
        if given != "all-linear":
            _compile(given)
        return given
    if isinstance(given, Iterable):
        names = tuple(cast(Iterable[object], given))
        if all(isinstance(name, str) for name in names):
            return cast(tuple[str, ...], names)
    raise ConfigError(
        f"{field_name} is {given!r}; it must be a list of names, a regular expression or all-linear"
    )


def _compile(pattern: str, *, within: str = "{}") -> None:
    try:
        re.compile(within.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
        raise ConfigError(f"{shown!r} is no regular expression: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
