"""The native adapter kernels as calls on tensors.

Shape legend: T tokens, K in_features, N out_features, r rank, M modules.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from weft.graph.adapter_spec import SUB_LAYERS
from weft.model.adapters.table import MODULES, Field, GroupedRows, Linear, is_transposed
from weft.model.adapters.weights import AdapterWeights, Bypass
from weft.model.kernels.cpu_ir import Storage
from weft.model.kernels.cpu_linear import storage_of
from weft.model.kernels.cpu_lora_ir import (
    EXPAND_ARGS,
    SCALE_ARGS,
    SHRINK_ARGS,
    ExpandSpec,
    ScaleSpec,
    ShrinkSpec,
)
from weft.model.kernels.cpu_team import Call, NativeKernels


class CpuGrouped:
    """`GroupedKernels` in native code."""

    def __init__(self, native: NativeKernels, dtype: torch.dtype) -> None:
        """`dtype` is the model's, one that `storage_of` knows."""
        storage = storage_of(dtype)
        assert storage is not None
        self._native = native
        self._dtype = dtype
        self._storage: Storage = storage

    def takes(self, adapter: AdapterWeights) -> bool:
        return all(self._takes(bypass) for bypass in adapter)

    def _takes(self, bypass: Bypass) -> bool:
        target, lanes = bypass.target, self._native.isa.lanes
        if target.in_features % lanes or target.out_features % lanes:
            return False
        if any(weight.dtype is not self._dtype for weight in bypass.weights.values()):
            return False
        for name, weight in bypass.weights.items():
            if not (is_transposed(weight) if name in ("B", "up") else weight.is_contiguous()):
                return False
        # Linears that share an input must not find it scaled for one of them.
        return not target.scales_input or target.module in ("o_proj", "down_proj")

    def add_low_rank(
        self,
        x: Tensor,
        out: Tensor,
        parts: tuple[Linear, ...],
        rows: GroupedRows,
        layer: int,
    ) -> None:
        max_rank = rows.max_rank(layer, parts)
        num_rows = x.shape[0]
        inner = torch.empty(num_rows, len(parts), max_rank, dtype=torch.float32)
        table = self._table_words(rows, layer, parts)
        isa = self._native.isa
        is_bfloat = self._storage is Storage.BFLOAT16
        use_dot = is_bfloat and isa.has_bf16_dot and x.shape[1] % (2 * isa.lanes) == 0
        shrink = Call(
            kernel=self._native.address(ShrinkSpec(storage=self._storage, use_dot=use_dot)),
            words=(x.data_ptr(), x.stride(0), x.shape[1], *table, inner.data_ptr(), max_rank),
            rows_word=SHRINK_ARGS.index("num_rows"),
            keep=(x, rows.slots, inner),
        )
        places = _places(parts)
        expand = Call(
            kernel=self._native.address(ExpandSpec(storage=self._storage)),
            words=(
                out.data_ptr(),
                out.stride(0),
                *table,
                inner.data_ptr(),
                max_rank,
                places.data_ptr(),
            ),
            rows_word=EXPAND_ARGS.index("num_rows"),
            keep=(out, rows.slots, inner, places),
        )
        if parts[0].module not in SUB_LAYERS:
            self._native.team.submit(shrink, expand)
            return
        self._native.team.submit(shrink)
        rows.activate(inner)
        self._native.team.submit(expand)

    def scale(
        self,
        data: Tensor,
        parts: tuple[Linear, ...],
        rows: GroupedRows,
        layer: int,
        field: Field,
    ) -> None:
        places = _places(parts)
        table = self._table_words(rows, layer, parts)
        words = (data.data_ptr(), data.stride(0), *table, int(field), places.data_ptr())
        self._native.team.submit(
            Call(
                kernel=self._native.address(ScaleSpec(storage=self._storage)),
                words=words,
                rows_word=SCALE_ARGS.index("num_rows"),
                keep=(data, rows.slots, places),
            )
        )

    def _table_words(
        self, rows: GroupedRows, layer: int, parts: tuple[Linear, ...]
    ) -> tuple[int, ...]:
        """The words from `slots` to `num_modules`, which all three kernels share."""
        table = rows.table.words
        itemsize = table.itemsize
        return (
            rows.slots.data_ptr(),
            rows.slots.shape[0],
            table.ctypes.data + layer * table.strides[0],
            table.strides[1] // itemsize,
            MODULES[parts[0].module],
            len(parts),
        )


@functools.lru_cache(maxsize=256)
def _places(parts: tuple[Linear, ...]) -> Tensor:
    """[M, 2] int64: first column and width of each module."""
    # Not torch.tensor: it dispatches an operation, which would spoil a recording under way.
    return torch.from_numpy(np.array([(part.begin, part.width) for part in parts], np.int64))
