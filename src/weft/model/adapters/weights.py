"""The weights of one adapter on one model, by layer and module.

Shape legend: K in_features, N out_features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weft.graph.adapter_spec import (
    SUB_LAYERS,
    AdapterKind,
    AdapterSpec,
    BypassTarget,
    LayerWidths,
    Module,
    resolve_targets,
)
from weft.model.config import ModelConfig
from weft.model.linear import tensor_bytes


class Bypass(Protocol):
    """One bypass: where it attaches, and its weights, frozen or being trained."""

    @property
    def target(self) -> BypassTarget:
        """Place, widths, rank and scale."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """LoRA has `A` [r, K] and `B` [N, r]; (IA)³ `l` [K or N]; a bottleneck `down` [r, N],
        `down_bias` [r], `up` [N, r] and `up_bias` [N]. Any strides."""
        ...

    @property
    def activation(self) -> str:
        """A bottleneck's: relu, gelu or silu."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenBypass:
    """A bypass that is served."""

    target: BypassTarget
    weights: Mapping[str, Tensor]
    activation: str = "relu"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """All bypasses of one adapter, in the model's dtype and on its device."""

    kind: AdapterKind
    layers: tuple[Mapping[Module, Bypass], ...]
    """For each layer of the model, the bypasses by module; empty where there are none."""

    def __iter__(self) -> Iterator[Bypass]:
        """All bypasses, by layer."""
        for layer in self.layers:
            yield from layer.values()

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor_bytes(w) for bypass in self for w in bypass.weights.values())


def layer_widths(config: ModelConfig) -> LayerWidths:
    """In and out features of a model's linears."""
    return LayerWidths(
        hidden=config.hidden_size,
        query=config.query_size,
        kv=config.kv_size,
        ffn=config.intermediate_size,
    )


def model_targets(spec: AdapterSpec, config: ModelConfig) -> tuple[BypassTarget, ...]:
    """The bypasses of an adapter on a model.

    Raises:
        ConfigError: as `weft.graph.adapter_spec.resolve_targets`.
    """
    return resolve_targets(spec, num_layers=config.num_layers, widths=layer_widths(config))


def weight_shapes(target: BypassTarget) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one bypass's weights, in the order in which files hold them."""
    num_in, num_out, rank = target.in_features, target.out_features, target.rank
    if rank == 0:
        return {"l": (num_in if target.scales_input else num_out,)}
    if target.module not in SUB_LAYERS:
        return {"A": (rank, num_in), "B": (num_out, rank)}
    return {
        "down": (rank, num_out),
        "down_bias": (rank,),
        "up": (num_out, rank),
        "up_bias": (num_out,),
    }


def collect_layers(
    bypasses: Iterable[Bypass], num_layers: int
) -> tuple[Mapping[Module, Bypass], ...]:
    """`AdapterWeights.layers` from its bypasses in any order."""
    layers: list[dict[Module, Bypass]] = [{} for _ in range(num_layers)]
    for bypass in bypasses:
        layers[bypass.target.layer][bypass.target.module] = bypass
    return tuple(layers)


_ALIGN = 64  # bytes: weights begin on a cache line


def pack(adapter: AdapterWeights, device: torch.device | str) -> AdapterWeights:
    """A copy of an adapter in one piece of memory, in the order in which an iteration reads it.

    Of linears that share an input, what is applied to it comes before what makes the outputs; `B`
    and `up` lie transposed. So a kernel reads a row's weights as a few long streams.
    """
    places: list[tuple[Bypass, str, int]] = []
    num = 0
    for layer in adapter.layers:
        for stack in _STACKS:
            found = [layer[module] for module in stack if module in layer]
            for is_output in (False, True):
                for bypass in found:
                    for name, weight in bypass.weights.items():
                        if (name in _OUTPUT_SIDE) == is_output:
                            places.append((bypass, name, num))
                            num += -(-weight.numel() * weight.element_size() // _ALIGN) * _ALIGN
    if not places:
        return adapter
    dtype = places[0][0].weights[places[0][1]].dtype
    flat = torch.empty(num // dtype.itemsize, dtype=dtype)
    packed: dict[int, dict[str, Tensor]] = {}
    flat_there = flat.to(device)
    for bypass, name, begin in places:
        weight = bypass.weights[name]
        first = begin // dtype.itemsize
        span = slice(first, first + weight.numel())
        is_turned = name in ("B", "up")
        shape = weight.shape[::-1] if is_turned else weight.shape
        flat[span].view(shape).copy_(weight.t() if is_turned else weight)
        view = flat_there[span].view(shape)
        packed.setdefault(id(bypass), {})[name] = view.t() if is_turned else view
    flat_there.copy_(flat)
    bypasses = [
        FrozenBypass(target=bypass.target, weights=packed[id(bypass)], activation=bypass.activation)
        for bypass in adapter
    ]
    return AdapterWeights(kind=adapter.kind, layers=collect_layers(bypasses, len(adapter.layers)))


_OUTPUT_SIDE = ("B", "up", "up_bias")
_STACKS = (
    (Module.Q_PROJ, Module.K_PROJ, Module.V_PROJ),
    (Module.O_PROJ,),
    (Module.SELF_ATTN,),
    (Module.GATE_PROJ, Module.UP_PROJ),
    (Module.DOWN_PROJ,),
    (Module.MLP,),
)
