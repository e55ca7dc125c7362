"""Triton programs between the linear layers, and how they are launched.

Everything reads the arena in place through page tables. No launch depends on a length that only the
device knows, so that a decode iteration can be captured in a CUDA graph and replayed with other
lengths. Sums are taken in float32.

Shape legend: T tokens, R rows, n rows of one token, P pages of a table, D head_dim, Hq query heads,
Hkv key-value heads, G = Hq / Hkv, S splits of a context, N pages of the arena, B tokens of a page.
"""

# Triton turns plain ints into constexprs and scalars into tensors; its stubs do not say so.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.model.forward_step import GroupStep, KvLayer, RopeRows

_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_WINDOW = 2**31 - 1
_TILE_TOKENS = 64
"""Cached tokens that a decode program looks at in one turn."""


@triton.jit
def _rms_norm_kernel(x, weight, out, row_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    gains = tl.load(weight + columns, mask=inside, other=0.0)
    normed = (values * scale).to(gains.dtype) * gains
    tl.store(out + row * width + columns, normed, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K] over its root mean square, times weight [K]."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    width = rows.shape[1]
    _rms_norm_kernel[(rows.shape[0],)](
        rows, weight, out, rows.stride(0), width, eps, BLOCK=triton.next_power_of_2(width)
    )
    return out.view(x.shape)


@triton.jit
def _silu_mul_kernel(x, out, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * row_stride + width + columns, mask=inside, other=0.0)
    activated = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + row * width + columns, activated * up, mask=inside)


def silu_mul(x: Tensor) -> Tensor:
    """x [..., 2F], gate then up, to silu(gate) * up [..., F]."""
    rows = x.reshape(-1, x.shape[-1])
    width = rows.shape[1] // 2
    out = torch.empty((rows.shape[0], width), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows.shape[0], triton.cdiv(width, block))
    _silu_mul_kernel[grid](rows, out, rows.stride(0), width, BLOCK=block)
    return out.view(*x.shape[:-1], width)


@triton.jit
def _turn_and_store_kernel(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    slots,
    queries,
    keys,
    values,
    eps,
    qkv_stride,
    page_stride,
    head_stride,
    token_stride,
    num_heads,
    num_kv_heads,
    page_tokens,
    HAS_NORMS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one token: norm, turn, and store where it belongs."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    inside = pair < HALF
    source = qkv + token * qkv_stride + head * (2 * HALF)
    low = tl.load(source + pair, mask=inside, other=0.0)
    high = tl.load(source + HALF + pair, mask=inside, other=0.0)
    dtype = low.dtype
    is_value = head >= num_heads + num_kv_heads
    if not is_value:
        wide_low = low.to(tl.float32)
        wide_high = high.to(tl.float32)
        if HAS_NORMS:
            total = tl.sum(wide_low * wide_low, 0) + tl.sum(wide_high * wide_high, 0)
            scale = tl.rsqrt(total / (2 * HALF) + eps)
            gains = query_norm if head < num_heads else key_norm
            low_gain = tl.load(gains + pair, mask=inside, other=0.0)
            high_gain = tl.load(gains + HALF + pair, mask=inside, other=0.0)
            wide_low = ((wide_low * scale).to(dtype) * low_gain).to(tl.float32)
            wide_high = ((wide_high * scale).to(dtype) * high_gain).to(tl.float32)
        c = tl.load(cos + token * HALF + pair, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * HALF + pair, mask=inside, other=0.0).to(tl.float32)
        low = (wide_low * c - wide_high * s).to(dtype)
        high = (wide_high * c + wide_low * s).to(dtype)
    if head < num_heads:
        target = queries + (token * num_heads + head) * (2 * HALF)
        tl.store(target + pair, low, mask=inside)
        tl.store(target + HALF + pair, high, mask=inside)
    else:
        slot = tl.load(slots + token)
        kv_head = (head - num_heads) % num_kv_heads
        place = (
            (slot // page_tokens) * page_stride
            + kv_head * head_stride
            + (slot % page_tokens) * token_stride
        )
        if is_value:
            tl.store(values + place + pair, low, mask=inside)
            tl.store(values + place + HALF + pair, high, mask=inside)
        else:
            tl.store(keys + place + pair, low, mask=inside)
            tl.store(keys + place + HALF + pair, high, mask=inside)


def turn_and_store(
    qkv: Tensor,
    *,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    rope: RopeRows,
    kv: KvLayer,
    group: GroupStep,
    num_heads: int,
) -> Tensor:
    """Norm and turn queries and keys of qkv [T, (Hq + 2 Hkv) D], write keys and values to their
    slots; returns queries [T, Hq, D]."""
    num_tokens = qkv.shape[0]
    _, num_kv_heads, _, head_dim = kv.keys.shape
    queries = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    half = head_dim // 2
    has_norms = query_norm is not None and key_norm is not None
    _turn_and_store_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        qkv,
        rope.cos,
        rope.sin,
        query_norm if has_norms else qkv,
        key_norm if has_norms else qkv,
        group.write_slots,
        queries,
        kv.keys,
        kv.values,
        eps,
        qkv.stride(0),
        kv.keys.stride(0),
        kv.keys.stride(1),
        kv.keys.stride(2),
        num_heads,
        num_kv_heads,
        group.page_tokens,
        HAS_NORMS=has_norms,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
    )
    return queries


@triton.jit
def _decode_kernel(
    queries,
    keys,
    values,
    page_tables,
    prefix_lens,
    partial,
    log_sums,
    scale,
    window,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    page_tokens,
    num_heads,
    num_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one row's visible tokens, for the G query heads that share a key head."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(prefix_lens + row)
    begin = tl.maximum(end - window, 0)
    per_split = tl.cdiv(tl.cdiv(end - begin, num_splits), TILE) * TILE
    first = begin + split * per_split
    last = tl.minimum(first + per_split, end)

    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    is_query = (group[:, None] < G) & (dim[None, :] < D)
    heads = row * num_heads + kv_head * G + group
    query = tl.load(queries + heads[:, None] * D + dim[None, :], mask=is_query, other=0.0)

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        seen = token < last
        page = tl.load(
            page_tables + row * table_stride + token // page_tokens, mask=seen, other=0
        ).to(tl.int64)
        place = page * page_stride + kv_head * head_stride + (token % page_tokens) * token_stride
        is_cached = seen[:, None] & (dim[None, :] < D)
        key = tl.load(keys + place[:, None] + dim[None, :], mask=is_cached, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * _LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * decay + tl.sum(weights, 1)
        value = tl.load(values + place[:, None] + dim[None, :], mask=is_cached, other=0.0)
        mixed = mixed * decay[:, None]
        mixed += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = new_top

    # A split without tokens reports log-sum -inf and is left out of the merge.
    has_tokens = total > 0
    mixed = mixed / tl.where(has_tokens, total, 1.0)[:, None]
    where = heads * num_splits + split
    tl.store(partial + where[:, None] * D + dim[None, :], mixed, mask=is_query)
    log_sum = tl.where(has_tokens, top + tl.log2(tl.where(has_tokens, total, 1.0)), float("-inf"))
    tl.store(log_sums + where, log_sum, mask=group < G)


@triton.jit
def _merge_kernel(
    partial,
    log_sums,
    out,
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Weigh the splits of one head of one row by their sums."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    is_split = split < num_splits
    sums = tl.load(log_sums + head * num_splits + split, mask=is_split, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    inside = is_split[:, None] & (dim[None, :] < D)
    rows = (head * num_splits + split)[:, None] * D + dim[None, :]
    parts = tl.load(partial + rows, mask=inside, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * D + dim, merged.to(out.dtype.element_ty), mask=dim < D)


def decode_attention(
    queries: Tensor,
    kv: KvLayer,
    *,
    page_tables: Tensor,
    prefix_lens: Tensor,
    page_tokens: int,
    window: int | None,
    scale: float,
    num_splits: int,
    out: Tensor,
) -> None:
    """Attend with one token a row: queries [n, Hq, D] to out [n, Hq, D].

    page_tables [>= n, P] int32, prefix_lens [>= n] int32. `num_splits` programs share a row's
    context (flash decoding), so that few rows with long contexts still fill the device.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = kv.keys.shape[1]
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    shape = (num_rows, num_heads, num_splits)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=queries.device)
    log_sums = torch.empty(shape, dtype=torch.float32, device=queries.device)
    _decode_kernel[(num_rows, num_kv_heads, num_splits)](
        queries,
        kv.keys,
        kv.values,
        page_tables,
        prefix_lens,
        partial,
        log_sums,
        scale,
        _NO_WINDOW if window is None else window,
        page_tables.stride(0),
        kv.keys.stride(0),
        kv.keys.stride(1),
        kv.keys.stride(2),
        page_tokens,
        num_heads,
        num_splits,
        G=group,
        D=head_dim,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        TILE=_TILE_TOKENS,
        PRECISION=_precision(queries.dtype),
    )
    _merge_kernel[(num_rows * num_heads,)](
        partial,
        log_sums,
        out,
        num_splits,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_S=triton.next_power_of_2(num_splits),
    )


@triton.jit
def _chunk_kernel(
    queries,
    keys,
    values,
    blocks,
    page_tables,
    prefix_lens,
    out,
    scale,
    window,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    page_tokens,
    num_heads,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M tokens of one row, one query head."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(blocks + block * 3).to(tl.int64)
    first_token = tl.load(blocks + block * 3 + 1)
    last_token = tl.load(blocks + block * 3 + 2)
    kv_head = head // group

    token = first_token + tl.arange(0, BLOCK_M)
    is_token = token < last_token
    dim = tl.arange(0, BLOCK_D)
    is_query = is_token[:, None] & (dim[None, :] < D)
    places = (token.to(tl.int64) * num_heads + head)[:, None] * D + dim[None, :]
    query = tl.load(queries + places, mask=is_query, other=0.0)
    end = tl.load(prefix_lens + token, mask=is_token, other=0)
    begin = tl.maximum(end - window, 0)
    last = tl.max(end, 0)
    first = tl.min(tl.where(is_token, begin, last), 0) // TILE * TILE

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, last, TILE):
        cached = start + tl.arange(0, TILE)
        exists = cached < last
        page = tl.load(
            page_tables + row * table_stride + cached // page_tokens, mask=exists, other=0
        ).to(tl.int64)
        place = page * page_stride + kv_head * head_stride + (cached % page_tokens) * token_stride
        # Null pages (behind a window) are masked below; zeros keep whatever they hold out.
        is_cached = (exists & (page > 0))[:, None] & (dim[None, :] < D)
        key = tl.load(keys + place[:, None] + dim[None, :], mask=is_cached, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * _LOG2_E)
        sees = (cached[None, :] < end[:, None]) & (cached[None, :] >= begin[:, None])
        scores = tl.where(sees, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Rows that have seen nothing yet keep -inf; subtracting it from itself would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(weights, 1)
        value = tl.load(values + place[:, None] + dim[None, :], mask=is_cached, other=0.0)
        mixed = mixed * decay[:, None]
        mixed += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = new_top

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + places, mixed.to(out.dtype.element_ty), mask=is_query)


def chunk_attention(
    queries: Tensor,
    kv: KvLayer,
    *,
    blocks: Tensor,
    page_tables: Tensor,
    prefix_lens: Tensor,
    page_tokens: int,
    window: int | None,
    scale: float,
    block_tokens: int,
    out: Tensor,
) -> None:
    """Attend with rows of several tokens: queries [T, Hq, D] to out [T, Hq, D].

    blocks [.., 3] int32 holds (row, first token, end token) of at most `block_tokens` tokens each.
    """
    _, num_heads, head_dim = queries.shape
    _chunk_kernel[(blocks.shape[0], num_heads)](
        queries,
        kv.keys,
        kv.values,
        blocks,
        page_tables,
        prefix_lens,
        out,
        scale,
        _NO_WINDOW if window is None else window,
        page_tables.stride(0),
        kv.keys.stride(0),
        kv.keys.stride(1),
        kv.keys.stride(2),
        page_tokens,
        num_heads,
        num_heads // kv.keys.shape[1],
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=block_tokens,
        TILE=_TILE_TOKENS,
        PRECISION=_precision(queries.dtype),
    )


def _precision(dtype: torch.dtype) -> str:
    """float32 products stay float32: TF32 would lose ten bits without being asked."""
    return "ieee" if dtype is torch.float32 else "tf32"
