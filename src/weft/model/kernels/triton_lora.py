"""The adapter kernels on CUDA: rows of many adapters in one launch, found through a table.

The twin in torch is `weft.model.adapters.bypass`, which applies adapters group by group.

Shape legend: T tokens, K in_features, N out_features, r rank, M modules that share an input.
"""

# Triton turns plain ints into constexprs and scalars into tensors; its stubs do not say so.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.graph.adapter_spec import SUB_LAYERS, Module
from weft.model.adapters.table import (
    FIELDS,
    MODULES,
    AdapterTable,
    Field,
    GroupedRows,
    Linear,
    is_transposed,
)
from weft.model.adapters.weights import AdapterWeights, Bypass

_RANKS = 16
_INPUTS = 128
_OUTPUTS = 256
_FIELDS = tl.constexpr(FIELDS)
_RANK, _A, _B, _SCALE = (tl.constexpr(int(f)) for f in (Field.RANK, Field.A, Field.B, Field.SCALE))
_DOWN_BIAS, _UP_BIAS = tl.constexpr(int(Field.DOWN_BIAS)), tl.constexpr(int(Field.UP_BIAS))


@triton.jit
def _shrink_kernel(
    x,
    slots,
    words,
    inner,
    x_stride,
    k_size,
    slot_words,
    first_module,
    max_rank,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A few ranks of one row and module: inner = s · A x (+ bias)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        entry = words + slot * slot_words + (first_module + tl.program_id(1)) * _FIELDS
        rank = tl.load(entry + _RANK)
        ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        has_rank = ranks < rank
        a = tl.load(entry + _A).to(tl.pointer_type(x.dtype.element_ty))
        total = tl.zeros([RANKS], tl.float32)
        for begin in range(0, k_size, INPUTS):
            columns = begin + tl.arange(0, INPUTS)
            inside = columns < k_size
            source = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            at = a + ranks[:, None] * k_size + columns[None, :]
            tile = tl.load(at, mask=has_rank[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(tile * source[None, :], 1)
        scale = tl.load(entry + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
        total *= scale
        bias_at = tl.load(entry + _DOWN_BIAS)
        if bias_at != 0:
            bias = bias_at.to(tl.pointer_type(x.dtype.element_ty))
            total += tl.load(bias + ranks, mask=has_rank, other=0.0).to(tl.float32)
        index = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(inner + index * max_rank + ranks, total, mask=has_rank)


@triton.jit
def _expand_kernel(
    out,
    slots,
    words,
    inner,
    places,
    out_stride,
    slot_words,
    first_module,
    max_rank,
    OUTPUTS: tl.constexpr,
):
    """Some columns of one row and module: out += B inner (+ bias); B lies as [r, N]."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        module = tl.program_id(1)
        entry = words + slot * slot_words + (first_module + module) * _FIELDS
        rank = tl.load(entry + _RANK)
        if rank > 0:
            begin, width = tl.load(places + 2 * module), tl.load(places + 2 * module + 1)
            columns = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
            inside = columns < width
            target = out + row * out_stride + begin + columns
            total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(entry + _B).to(tl.pointer_type(out.dtype.element_ty))
            source = inner + (row * tl.num_programs(1) + module) * max_rank
            for index in range(rank):
                line = tl.load(b + index * width + columns, mask=inside, other=0.0)
                total += tl.load(source + index) * line.to(tl.float32)
            bias_at = tl.load(entry + _UP_BIAS)
            if bias_at != 0:
                bias = bias_at.to(tl.pointer_type(out.dtype.element_ty))
                total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(
    data,
    slots,
    words,
    places,
    data_stride,
    slot_words,
    first_module,
    field,
    OUTPUTS: tl.constexpr,
):
    """Some columns of one row and module: data *= l."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        module = tl.program_id(1)
        entry = words + slot * slot_words + (first_module + module) * _FIELDS
        vector_at = tl.load(entry + field)
        if vector_at != 0:
            begin, width = tl.load(places + 2 * module), tl.load(places + 2 * module + 1)
            columns = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
            inside = columns < width
            target = data + row * data_stride + begin + columns
            vector = vector_at.to(tl.pointer_type(data.dtype.element_ty))
            factors = tl.load(vector + columns, mask=inside, other=0.0)
            tl.store(target, tl.load(target, mask=inside, other=0.0) * factors, mask=inside)


class TritonGrouped:
    """`GroupedKernels` on CUDA, or in Triton's interpreter for tests."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._words: tuple[AdapterTable, int, Tensor] | None = None

    def takes(self, adapter: AdapterWeights) -> bool:
        return all(self._takes(bypass) for bypass in adapter)

    def _takes(self, bypass: Bypass) -> bool:
        for name, weight in bypass.weights.items():
            if weight.dtype is not self._dtype or weight.device.type != self._device.type:
                return False
            if not (is_transposed(weight) if name in ("B", "up") else weight.is_contiguous()):
                return False
        # Linears that share an input must not find it scaled for one of them.
        alone = (Module.O_PROJ, Module.DOWN_PROJ)
        return not bypass.target.scales_input or bypass.target.module in alone

    def add_low_rank(
        self, x: Tensor, out: Tensor, parts: tuple[Linear, ...], rows: GroupedRows, layer: int
    ) -> None:
        max_rank, num_rows = rows.max_rank(layer, parts), x.shape[0]
        words, places = self._words_of(rows.table), _places(parts, x.device)
        inner = x.new_zeros((num_rows, len(parts), max_rank), dtype=torch.float32)
        first = MODULES[parts[0].module]
        _shrink_kernel[(num_rows, len(parts), triton.cdiv(max_rank, _RANKS))](
            x,
            rows.slots,
            words[layer],
            inner,
            x.stride(0),
            x.shape[1],
            words.stride(1),
            first,
            max_rank,
            RANKS=_RANKS,
            INPUTS=_INPUTS,
        )
        if parts[0].module in SUB_LAYERS:
            rows.activate(inner)
        _expand_kernel[(num_rows, len(parts), _num_blocks(parts))](
            out,
            rows.slots,
            words[layer],
            inner,
            places,
            out.stride(0),
            words.stride(1),
            first,
            max_rank,
            OUTPUTS=_OUTPUTS,
        )

    def scale(
        self,
        data: Tensor,
        parts: tuple[Linear, ...],
        rows: GroupedRows,
        layer: int,
        field: Field,
    ) -> None:
        words = self._words_of(rows.table)
        _scale_kernel[(data.shape[0], len(parts), _num_blocks(parts))](
            data,
            rows.slots,
            words[layer],
            _places(parts, data.device),
            data.stride(0),
            words.stride(1),
            MODULES[parts[0].module],
            int(field),
            OUTPUTS=_OUTPUTS,
        )

    def _words_of(self, table: AdapterTable) -> Tensor:
        """The table on the device; a copy of its own for each version, in stream order."""
        known = self._words
        if known is None or known[0] is not table or known[1] != table.version:
            words = torch.from_numpy(table.words.copy()).to(self._device)
            self._words = known = (table, table.version, words)
        return known[2]


def _num_blocks(parts: tuple[Linear, ...]) -> int:
    return triton.cdiv(max(part.width for part in parts), _OUTPUTS)


@functools.lru_cache(maxsize=256)
def _places(parts: tuple[Linear, ...], device: torch.device) -> Tensor:
    """[M, 2] int64: first column and width of each module."""
    return torch.tensor([(part.begin, part.width) for part in parts], device=device)
