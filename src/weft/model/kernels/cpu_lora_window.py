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

from weft.model.kernels import cpu_linear
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
    low_rank: Tensor | None
    """[s, r], what B was applied to; None where it is to be computed again, as x Aᵀ."""


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
    for part in parts:
        is_whole = _is_whole(part.a, part.b, like=x)
        is_whole &= _is_whole(part.grad_a, part.grad_b, like=part.grad_a)
        low = part.dy if part.low_rank is None else part.low_rank
        if not is_whole or not _is_laid_out(x, part.dy, low):
            return False
        if part.grad_a.dtype is not torch.float32:
            return False
    calls: list[Call] = []
    missing = [part.a for part in parts if part.low_rank is None]
    if x.shape[0] <= _most_forward_rows(native, storage):
        made = [x.new_empty(x.shape[0], a.shape[0]) for a in missing]
        if missing:
            calls += _inner_calls(native, storage, missing, made, x)
    else:
        made = [cpu_linear.linear(x, a) for a in missing]
    rest = iter(made)
    lows = [next(rest) if part.low_rank is None else part.low_rank for part in parts]
    head, firsts, scratch = _head(native, [part.a.shape[0] for part in parts], x.shape[0])
    words: list[int] = []
    for part, low, first in zip(parts, lows, firsts, strict=True):
        words += (
            part.a.shape[0],
            first,
            float_bits(part.scale),
            part.dy.data_ptr(),
            part.dy.stride(0),
            part.dy.shape[1],
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
    keep = (*scratch, *lows)
    calls += _calls(native, storage, (*head, *words), keep, is_backward=True)
    native.team.submit(*calls)
    return True


def _inner_calls(
    native: NativeKernels,
    storage: Storage,
    weights: Sequence[Tensor],
    lows: Sequence[Tensor],
    x: Tensor,
) -> tuple[Call, Call]:
    """The calls that fill `lows` with x Aᵀ, and add to nothing."""
    head, firsts, scratch = _head(native, [a.shape[0] for a in weights], x.shape[0])
    words: list[int] = []
    for a, low, first in zip(weights, lows, firsts, strict=True):
        words += _forward_words(a, 1.0, first, x, low)
        words += (0, 0, 0, 0, 0, 0, 0)
    return _calls(native, storage, (*head, *words), (*scratch, *lows), is_backward=False)


def _forward_words(
    a: Tensor, scale: float, first: int, x: Tensor, low: Tensor | None
) -> tuple[int, ...]:
    """`PART_ARGS` up to what is expanded."""
    return (
        a.shape[0],
        first,
        float_bits(scale),
        x.data_ptr(),
        x.stride(0),
        x.shape[1],
        a.data_ptr(),
        0,
        address(low),
        0 if low is None else low.stride(0),
    )


def forward(parts: Sequence[LoraOutput], x: Tensor) -> bool:
    """Fill every `low_rank`, and add to every `out`, rounded once; x [s, K].

    Long windows are left to the caller.
    """
    native, storage = native_kernels(), storage_of(x.dtype)
    if native is None or storage is None or not _is_laid_out(x):
        return False
    if x.shape[0] > _most_forward_rows(native, storage):
        return False
    head, firsts, scratch = _head(native, [part.a.shape[0] for part in parts], x.shape[0])
    words: list[int] = []
    for part, first in zip(parts, firsts, strict=True):
        low, out = part.low_rank, part.out
        is_whole = _is_whole(part.a, part.b, like=x)
        if not is_whole or not _is_laid_out(x, out, out if low is None else low):
            return False
        words += _forward_words(part.a, part.scale, first, x, low)
        words += (
            part.b.data_ptr(),
            0,
            0,
            0,
            out.data_ptr(),
            out.stride(0),
            out.shape[1],
        )
    native.team.submit(*_calls(native, storage, (*head, *words), scratch, is_backward=False))
    return True


def _most_forward_rows(native: NativeKernels, storage: Storage) -> int:
    return _MOST_DOT_FORWARD_ROWS if _has_dot(native, storage) else _MOST_FORWARD_ROWS


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


def _calls(
    native: NativeKernels,
    storage: Storage,
    words: tuple[int, ...],
    keep: tuple[Tensor, ...],
    *,
    is_backward: bool,
) -> tuple[Call, Call]:
    contract, expand = _kernels(native, storage, is_backward)
    return (
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
