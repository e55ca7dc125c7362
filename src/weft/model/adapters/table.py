"""Where the weights of resident adapters lie, as a table that grouped kernels read.

A slot is a resident adapter's number. For each layer, slot and module the table holds a few words:
addresses, rank, scale. A kernel is handed the slots of the tokens and finds the rest itself, so the
work to prepare an iteration does not grow with adapters times layers times modules.

Shape legend: T tokens, L layers, S slots, r rank.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from weft.graph.adapter_spec import AdapterKind, Module
from weft.model.adapters.weights import AdapterWeights, Bypass
from weft.model.finetune.primitives import activation

MODULES = {module: number for number, module in enumerate(Module)}
"""Numbers of the modules; those that share an input follow each other."""


class Field(IntEnum):
    """Words of one (layer, slot, module); addresses are 0 where there is nothing."""

    RANK = 0
    """0 where the adapter has no low-rank product here."""
    A = 1
    """Address of [r, K]: LoRA's A, or a bottleneck's down."""
    B = 2
    """Address of [r, N]: LoRA's B or a bottleneck's up, transposed."""
    SCALE = 3
    """A float32 in the low half."""
    DOWN_BIAS = 4
    UP_BIAS = 5
    SCALE_INPUT = 6
    """Address of an (IA)³ vector for the input."""
    SCALE_OUTPUT = 7


FIELDS = len(Field)
_FIRST_SLOTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One of the linears that a stacked weight [N1 + N2 + .., K] holds, or a sub-layer's output."""

    module: Module
    name: str
    """Its output's name for taps, behind its bypass."""
    begin: int
    """First of its columns in the stacked output."""
    width: int
    """Its out_features."""


class GroupedKernels(Protocol):
    """Applies the adapters of many tokens at once, found through a table."""

    def takes(self, adapter: AdapterWeights) -> bool:
        """Whether it can run an adapter: dtype, widths, layout of its tensors."""
        ...

    def add_low_rank(
        self,
        x: Tensor,
        out: Tensor,
        parts: tuple[Linear, ...],
        rows: GroupedRows,
        layer: int,
    ) -> None:
        """out += s · B A x for LoRA; out += U f(D x + d) + u for bottlenecks.

        x [T, K]; out [T, ..] holds the modules' outputs side by side; all modules are linears of
        one input, or the one is a sub-layer (whose x is `out` itself).
        """
        ...

    def scale(
        self,
        data: Tensor,
        parts: tuple[Linear, ...],
        rows: GroupedRows,
        layer: int,
        field: Field,
    ) -> None:
        """data *= l, in place, where the token's adapter has the vector `field`."""
        ...


class AdapterTable:
    """The words of all resident adapters; grows as needed."""

    def __init__(self, num_layers: int, kernels: GroupedKernels) -> None:
        self.kernels = kernels
        self.words = np.zeros((num_layers, _FIRST_SLOTS, len(MODULES), FIELDS), np.int64)
        """[L, S, modules, FIELDS]."""
        self.version = 0
        """Counts changes, for copies of the words elsewhere."""
        self._adapters: dict[int, AdapterWeights] = {}
        self._free: list[int] = list(range(_FIRST_SLOTS))[::-1]

    def add(self, adapter: AdapterWeights) -> int | None:
        """The slot of an adapter, or None where the kernels do not take it."""
        if not self.kernels.takes(adapter):
            return None
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.words[:, slot] = 0
        for bypass in adapter:
            target = bypass.target
            self.words[target.layer, slot, MODULES[target.module]] = _words(bypass)
        self._adapters[slot] = adapter
        self.version += 1
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot; no iteration that names it may be on its way."""
        del self._adapters[slot]
        self.words[:, slot] = 0
        self._free.append(slot)
        self.version += 1

    def rows(self, slots_T: npt.NDArray[np.int64], slots: Tensor) -> GroupedRows:
        """The tokens' adapters; `slots` holds the same numbers on the device."""
        used = np.unique(slots_T[slots_T >= 0])
        adapters = [self._adapters[int(slot)] for slot in used]
        words = self.words[:, used].max(axis=1, initial=0)
        kinds = {
            slot: bypass.activation
            for slot, adapter in zip(used.tolist(), adapters, strict=True)
            if adapter.kind is AdapterKind.BOTTLENECK
            for bypass in adapter
        }
        return GroupedRows(
            slots=slots,
            table=self,
            present=words,
            activations=tuple(
                (name, np.isin(slots_T, [slot for slot, kind in kinds.items() if kind == name]))
                for name in sorted(set(kinds.values()))
            ),
        )

    def _grow(self) -> None:
        num = self.words.shape[1]
        self.words = np.concatenate([self.words, np.zeros_like(self.words)], axis=1)
        self._free = list(range(num, 2 * num))[::-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedRows:
    """Which resident adapter each token of an iteration has."""

    slots: Tensor
    """[T] int64; -1 where a token has none, or has it in a group of its own."""
    table: AdapterTable
    present: npt.NDArray[np.int64]
    """[L, modules, FIELDS] the largest word of any adapter of the iteration: 0 where none has it,
    and for RANK the largest rank."""
    activations: tuple[tuple[str, npt.NDArray[np.bool_]], ...] = ()
    """For each activation of its bottlenecks, which tokens have it."""

    def has(self, layer: int, module: Module, field: Field) -> bool:
        """Whether any token's adapter has it."""
        return bool(self.present[layer, MODULES[module], field])

    def has_any(self, layer: int, parts: tuple[Linear, ...], field: Field) -> bool:
        """Whether any token's adapter has it for any of the modules."""
        return any(self.present[layer, MODULES[part.module], field] for part in parts)

    def max_rank(self, layer: int, parts: tuple[Linear, ...]) -> int:
        """The largest rank among modules."""
        return max(int(self.present[layer, MODULES[part.module], Field.RANK]) for part in parts)

    def activate(self, inner: Tensor) -> None:
        """Apply each token's activation to inner [T, .., r], in place."""
        if len(self.activations) == 1:
            inner.copy_(activation(self.activations[0][0], inner))
            return
        for name, mask in self.activations:
            rows = np.flatnonzero(mask)
            inner[rows] = activation(name, inner[rows])


def _words(bypass: Bypass) -> list[int]:
    words = [0] * FIELDS
    weights, target = bypass.weights, bypass.target
    if "l" in weights:
        field = Field.SCALE_INPUT if target.scales_input else Field.SCALE_OUTPUT
        words[field] = weights["l"].data_ptr()
        return words
    is_lora = "A" in weights
    words[Field.RANK] = target.rank
    words[Field.A] = weights["A" if is_lora else "down"].data_ptr()
    words[Field.B] = weights["B" if is_lora else "up"].data_ptr()
    words[Field.SCALE] = struct.unpack("I", struct.pack("f", target.scale))[0]
    if not is_lora:
        words[Field.DOWN_BIAS] = weights["down_bias"].data_ptr()
        words[Field.UP_BIAS] = weights["up_bias"].data_ptr()
    return words


def is_transposed(weight: Tensor) -> bool:
    """Whether a tensor [N, r] lies in memory as [r, N] in one piece."""
    return weight.t().is_contiguous()
