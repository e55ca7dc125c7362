"""The weights of one adapter on one model, by layer and module.

Shape legend: K in_features, N out_features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from weft.graph.adapter_spec import AdapterKind, BypassTarget, Module
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
