"""The LoRAs beside linears that share an input, for a window of tokens, as one launch each way.

Where a function returns False it has done nothing, and plain torch does the work.

Shape legend: s tokens of the window, K in_features, N out_features, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.model.kernels.cpu_ir import Storage
from weft.model.kernels.cpu_linear import storage_of
from weft.model.kernels.cpu_lora_window_ir import (
    HEAD_ARGS,
    ROW_TILE,
    ContractSpec,
    ExpandSpec,
)
from weft.model.kernels.cpu_panel import sum_spec
from weft.model.kernels.cpu_team import Call, NativeKernels, address, float_bits, native_kernels

_MOST_DOT_ROWS = 384
"""Of a backward window in bfloat16, where the processor has dot products of it: beyond, the panels
of `cpu_panel`, which use them, are faster. Measured at rank 16 and widths of 384 to 2,048."""
_MOST_FORWARD_ROWS = 128
_MOST_DOT_FORWARD_ROWS = 64
"""Of a forward window, likewise: torch's own product of few ranks is the faster beyond."""
_ROWS_WORD = HEAD_ARGS.index("num_rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraGrads:
    """One LoRA of a backward window: weights and gradients whole, of the others each row."""

    a: Tensor
    """[r, K], as `grad_a`, which is float32."""
    b: Tensor
    """[N, r], as `grad_b`, which is float32."""
    grad_a: Tensor
    grad_b: Tensor
    scale: float
    dy: Tensor
    """[s, N], the gradient of the output."""
    low_rank: Tensor
    """[s, r], what B was applied to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOutput:
    """One LoRA of a forward window: weights whole, of the others each row."""

    a: Tensor
    """[r, K]."""
    b: Tensor
    """[N, r]."""
    scale: float
    low_rank: Tensor | None
    """[s, r], filled with x Aᵀ; None where nothing reads it."""
    out: Tensor
    """[s, N], to which scale · x Aᵀ Bᵀ is added."""


def backward(parts: Sequence[LoraGrads], x: Tensor, dx: Tensor | None) -> bool:
    """Sum the gradients of every A and B, and add the LoRAs' share to dx [s, K], rounded once.

    x [s, K] is the input that the linears share. The same tensors give the same bits in every run
    with as many threads. Long windows of bfloat16 are left to the caller.
    """
    native, storage = native_kernels(), storage_of(x.dtype)
    if native is None or storage is None or not _is_laid_out(x, x if dx is None else dx):
        return False
    if _has_dot(native, storage) and x.shape[0] > _MOST_DOT_ROWS:
        return False
    head, num_chunks, keep = _head(native, [part.a.shape[0] for part in parts], x.shape[0])
    words: list[int] = []
    for part, chunk in zip(parts, num_chunks, strict=True):
        dy, low = part.dy, part.low_rank
        is_whole = _is_whole(part.a, part.b, like=x)
        is_whole &= _is_whole(part.grad_a, part.grad_b, like=part.grad_a)
        if not is_whole or not _is_laid_out(x, dy, low) or part.grad_a.dtype is not torch.float32:
            return False
        words += (
            part.a.shape[0],
            chunk,
            float_bits(part.scale),
            dy.data_ptr(),
            dy.stride(0),
            dy.shape[1],
            part.b.data_ptr(),
            part.grad_b.data_ptr(),
            low.data_ptr(),
            low.stride(0),
            part.a.data_ptr(),
            part.grad_a.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            address(dx),
            0 if dx is None else dx.stride(0),
            x.shape[1],
        )
    _submit(native, storage, (*head, *words), keep, is_backward=True)
    return True


def forward(parts: Sequence[LoraOutput], x: Tensor) -> bool:
    """Fill every `low_rank`, and add to every `out`, rounded once; x [s, K].

    Long windows are left to the caller.
    """
    native, storage = native_kernels(), storage_of(x.dtype)
    if native is None or storage is None or not _is_laid_out(x):
        return False
    most = _MOST_DOT_FORWARD_ROWS if _has_dot(native, storage) else _MOST_FORWARD_ROWS
    if x.shape[0] > most:
        return False
    head, num_chunks, keep = _head(native, [part.a.shape[0] for part in parts], x.shape[0])
    words: list[int] = []
    for part, chunk in zip(parts, num_chunks, strict=True):
        low, out = part.low_rank, part.out
        is_whole = _is_whole(part.a, part.b, like=x)
        if not is_whole or not _is_laid_out(x, out, out if low is None else low):
            return False
        words += (
            part.a.shape[0],
            chunk,
            float_bits(part.scale),
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            part.a.data_ptr(),
            0,
            address(low),
            0 if low is None else low.stride(0),
            part.b.data_ptr(),
            0,
            0,
            0,
            out.data_ptr(),
            out.stride(0),
            out.shape[1],
        )
    _submit(native, storage, (*head, *words), keep, is_backward=False)
    return True


def _has_dot(native: NativeKernels, storage: Storage) -> bool:
    """Whether the other path multiplies twice as fast."""
    return storage is Storage.BFLOAT16 and native.isa.has_bf16_dot


def _is_laid_out(like: Tensor, *tensors: Tensor) -> bool:
    """Whether rows are contiguous, on the CPU, and all of one dtype."""
    return all(
        x.stride(1) == 1 and x.dtype is like.dtype and x.device.type == "cpu" and x.shape[0] > 0
        for x in (like, *tensors)
    )


def _is_whole(*tensors: Tensor, like: Tensor) -> bool:
    """Whether tensors have no gaps, and all one dtype."""
    return all(x.is_contiguous() and x.dtype is like.dtype for x in tensors)


def _head(
    native: NativeKernels, ranks: Sequence[int], num_rows: int
) -> tuple[tuple[int, ...], list[int], tuple[Tensor, ...]]:
    """`HEAD_ARGS`, the first chunk of every part, and the scratch."""
    team, lanes = native.team, native.isa.lanes
    firsts: list[int] = []
    num_chunks = 0
    for rank in ranks:
        firsts.append(num_chunks)
        num_chunks += -(-rank // lanes)
    num_slots = team.num_threads
    size = num_slots * num_chunks * -(-num_rows // ROW_TILE) * ROW_TILE * lanes
    sums, totals = team.scratch("low-rank sums", size), team.scratch("low-rank totals", size)
    words = (len(ranks), num_rows, num_chunks, num_slots, sums.data_ptr(), totals.data_ptr())
    return words, firsts, (sums, totals)


def _submit(
    native: NativeKernels,
    storage: Storage,
    words: tuple[int, ...],
    keep: tuple[Tensor, ...],
    *,
    is_backward: bool,
) -> None:
    contract, expand = _kernels(native, storage, is_backward)
    native.team.submit(
        Call(kernel=contract, words=words, rows_word=_ROWS_WORD, keep=keep),
        Call(kernel=expand, words=words, rows_word=_ROWS_WORD, keep=keep),
    )


@functools.cache
def _kernels(native: NativeKernels, storage: Storage, is_backward: bool) -> tuple[int, int]:
    """Addresses of what runs before the barrier and behind it."""
    if is_backward and _has_dot(native, storage):
        # What long windows need instead is compiled when a short one first comes, at start-up.
        native.address(sum_spec(native, storage))
    return (
        native.address(ContractSpec(storage=storage, is_backward=is_backward)),
        native.address(ExpandSpec(storage=storage, is_backward=is_backward)),
    )
