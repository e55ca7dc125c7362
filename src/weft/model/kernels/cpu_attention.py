"""The native attention, RoPE and norm kernels as calls on tensors.

Shape legend: T tokens, R rows, P pages of a table, D head_dim, Hq query heads, Hkv key-value heads,
N pages of the arena, B tokens of a page, W work items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from weft.model.forward_step import ChunkRow, ForwardStep, GroupStep, KvLayer, RopeRows
from weft.model.kernels.cpu_attention_ir import (
    ATTENTION_ARGS,
    WORK_FIELDS,
    AttentionSpec,
)
from weft.model.kernels.cpu_ir import Storage
from weft.model.kernels.cpu_rows_ir import (
    NORM_ARGS,
    ROPE_ARGS,
    NormSpec,
    RopeSpec,
)
from weft.model.kernels.cpu_team import Call, NativeKernels, address, float_bits
from weft.model.kernels.interface import AttentionShape, HeadNorms

_NO_WINDOW = 1 << 40


def norm_call(
    native: NativeKernels, storage: Storage, x: Tensor, weight: Tensor, out: Tensor, eps: float
) -> Call:
    """out = x / rms(x) · weight over rows: x [T, K] with K neighbouring, out [T, K] contiguous."""
    spec = NormSpec(storage=storage)
    words = (
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        float_bits(eps),
    )
    kernel = native.address(spec)
    rows_word = NORM_ARGS.index("num_rows")
    return Call(kernel=kernel, words=words, rows_word=rows_word, keep=(x, weight, out))


def rope_call(
    native: NativeKernels,
    storage: Storage,
    shape: AttentionShape,
    qkv: Tensor,
    norms: HeadNorms | None,
    rope: RopeRows,
    kv: KvLayer,
    group: GroupStep,
) -> Call:
    """Norm and turn the queries of qkv [T, (Hq + 2 Hkv) D] in place, write keys and values."""
    spec = RopeSpec(storage=storage, head_dim=shape.head_dim, has_norms=norms is not None)
    words = (
        qkv.data_ptr(),
        qkv.stride(0),
        rope.cos.data_ptr(),
        rope.sin.data_ptr(),
        rope.cos.stride(0),
        kv.keys.data_ptr(),
        kv.values.data_ptr(),
        kv.keys.stride(0),
        group.write_slots.data_ptr(),
        qkv.shape[0],
        shape.num_heads,
        shape.num_kv_heads,
        group.page_tokens,
        0 if norms is None else norms.query.data_ptr(),
        0 if norms is None else norms.key.data_ptr(),
        float_bits(shape.norm_eps),
    )
    keep = (qkv, rope.cos, rope.sin, kv.keys, kv.values, group.write_slots)
    kernel = native.address(spec)
    rows_word = ROPE_ARGS.index("num_tokens")
    return Call(kernel=kernel, words=words, rows_word=rows_word, keep=keep)


def attention_call(
    native: NativeKernels,
    spec: AttentionSpec,
    query: Tensor,
    out: Tensor,
    kv: KvLayer,
    group: GroupStep,
    num_kv_heads: int,
    *,
    context_lens: Tensor | None = None,
    work: Tensor | None = None,
) -> Call:
    """Attend with rows of `query` [T, >= Hq D] to the cached tokens, into out [T, Hq D].

    Either `context_lens` int32 [R], one query row for each row of the page tables, or `work` int32
    [W, 4] of `WORK_FIELDS`.
    """
    items = context_lens if work is None else work
    if work is None:
        spec = replace(spec, fetch=True)
    num_blocks = 0 if items is None else items.shape[0]
    words = (
        query.data_ptr(),
        query.stride(0),
        out.data_ptr(),
        out.stride(0),
        kv.keys.data_ptr(),
        kv.values.data_ptr(),
        kv.keys.stride(0),
        group.page_tables.data_ptr(),
        group.page_tables.stride(0),
        address(context_lens),
        address(work),
        num_blocks,
        num_kv_heads,
        group.page_tokens,
        _NO_WINDOW if group.window is None else group.window,
        float_bits(spec.head_dim**-0.5),
    )
    keep = (query, out, kv.keys, kv.values, group.page_tables, context_lens, work)
    kernel = native.address(spec)
    rows_word = ATTENTION_ARGS.index("num_blocks")
    return Call(kernel=kernel, words=words, rows_word=rows_word, keep=keep)


def chunk_work(chunks: Sequence[ChunkRow], max_block_rows: int) -> Tensor:
    """Cut chunks into blocks of at most `max_block_rows` query rows: int32 [W, 4].

    The longest blocks come last in each chunk; the kernel deals items out in turn, so neighbours,
    which cost alike, go to different threads.
    """
    parts: list[np.ndarray] = []
    for chunk in chunks:
        begins = np.arange(chunk.begin, chunk.end, max_block_rows, dtype=np.int32)
        part = np.empty((len(begins), len(WORK_FIELDS)), dtype=np.int32)
        part[:, 0] = chunk.row
        part[:, 1] = begins
        part[:, 2] = np.minimum(max_block_rows, chunk.end - begins)
        part[:, 3] = chunk.first_prefix + begins - chunk.begin
        parts.append(part)
    return torch.from_numpy(np.concatenate(parts))


def attention_calls(
    native: NativeKernels,
    spec: AttentionSpec,
    shape: AttentionShape,
    query: Tensor,
    out: Tensor,
    kv: KvLayer,
    step: ForwardStep,
    group: GroupStep,
    chunks: Sequence[ChunkRow],
) -> list[Call]:
    """The calls that attend with the decodes of an iteration, and with chunks of it.

    `chunks` are the same in all layers of the group.
    """
    calls: list[Call] = []
    heads = shape.num_kv_heads
    if step.num_decodes:
        lens = step.prefix_lens[: step.num_decodes]
        calls.append(attention_call(native, spec, query, out, kv, group, heads, context_lens=lens))
    if chunks:
        work = group.scratch.get("cpu_work")
        if work is None:
            work = group.scratch["cpu_work"] = chunk_work(chunks, spec.max_block_rows)
        calls.append(attention_call(native, spec, query, out, kv, group, heads, work=work))
    return calls
