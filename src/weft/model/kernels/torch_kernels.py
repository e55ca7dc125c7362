"""The kernels in plain torch: any device, any floating dtype; the reference of the others.

Shape legend: T tokens, D head_dim, Hq query heads, Hkv key-value heads, G = Hq / Hkv, n rows of one
token, S cached tokens, P pages, B tokens of a page.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.model.forward_step import ChunkRow, ForwardStep, GroupStep, KvLayer, RopeRows
from weft.model.kernels.interface import AttentionShape, HeadNorms
from weft.model.linear import DenseLinear, LinearWeight


class TorchKernels:
    """`Kernels` from torch operations alone."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._scale = shape.head_dim**-0.5

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> LinearWeight:
        return DenseLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype is torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rope: RopeRows,
        kv: KvLayer,
        step: ForwardStep,
        group: GroupStep,
    ) -> Tensor:
        query = self.turn_and_store(qkv, norms, rope, kv, group)
        out = torch.empty_like(query)
        if step.num_decodes:
            out[: step.num_decodes] = self._attend_decodes(query, kv, step, group)
        for chunk in step.chunks:
            span = slice(chunk.begin, chunk.end)
            out[span] = self._attend_chunk(query[span], kv, step, group, chunk)
        return out.flatten(1)

    def turn_and_store(
        self, qkv: Tensor, norms: HeadNorms | None, rope: RopeRows, kv: KvLayer, group: GroupStep
    ) -> Tensor:
        """Norm and turn queries and keys, write keys and values; returns queries [T, Hq, D]."""
        shape = self._shape
        parts = qkv.split([shape.query_size, shape.kv_size, shape.kv_size], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, shape.head_dim)) for part in parts)
        if norms is not None:
            query = self.rms_norm(query, norms.query, shape.norm_eps)
            key = self.rms_norm(key, norms.key, shape.norm_eps)
        if "pages" not in group.scratch:
            group.scratch["pages"] = group.write_slots // group.page_tokens
            group.scratch["offsets"] = group.write_slots % group.page_tokens
        pages, offsets = group.scratch["pages"], group.scratch["offsets"]
        kv.keys[pages, :, offsets] = _turn(key, rope)
        kv.values[pages, :, offsets] = value
        return _turn(query, rope)

    def _attend_decodes(
        self, query: Tensor, kv: KvLayer, step: ForwardStep, group: GroupStep
    ) -> Tensor:
        shape, num = self._shape, step.num_decodes
        if "decode_pages" not in group.scratch:
            _gather_plan(step, group)
        pages, hidden = group.scratch["decode_pages"], group.scratch["decode_hidden"]
        # What lies beyond a prefix may be anything; zeros keep NaNs out of the sums.
        keys, values = (
            cache[pages].transpose(1, 2).flatten(2, 3).masked_fill(hidden[:, None, :, None], 0)
            for cache in (kv.keys, kv.values)
        )
        grouped = query[:num].view(num, shape.num_kv_heads, -1, shape.head_dim)
        out = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=~hidden[:, None, None, :], scale=self._scale
        )
        return out.reshape(num, shape.num_heads, shape.head_dim)

    def _attend_chunk(
        self, query: Tensor, kv: KvLayer, step: ForwardStep, group: GroupStep, chunk: ChunkRow
    ) -> Tensor:
        num_kv_heads = self._shape.num_kv_heads
        first_page = 0
        if group.window is not None:
            first_page = max(0, chunk.first_prefix - group.window) // group.page_tokens
        begin = first_page * group.page_tokens
        last_page = -(-chunk.context // group.page_tokens)
        pages = group.page_tables[chunk.row, first_page:last_page]
        keys, values = (
            cache[pages].transpose(0, 1).flatten(1, 2)[:, : chunk.context - begin]
            for cache in (kv.keys, kv.values)
        )
        # [Hkv, G * tokens, D]: heads that share keys become rows of one product.
        grouped = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            grouped.flatten(1, 2)[None],
            keys[None],
            values[None],
            attn_mask=self._chunk_mask(step, group, chunk, begin),
            scale=self._scale,
        )[0]
        return out.view(grouped.shape).permute(2, 0, 1, 3).flatten(1, 2)

    def _chunk_mask(
        self, step: ForwardStep, group: GroupStep, chunk: ChunkRow, begin: int
    ) -> Tensor:
        """[G * tokens, S] True where a token sees a cached one; S starts at token `begin`."""
        key = f"chunk_mask_{chunk.row}"
        mask = group.scratch.get(key)
        if mask is None:
            ends = step.prefix_lens[chunk.begin : chunk.end, None]
            cached = torch.arange(begin, chunk.context, device=ends.device)
            mask = cached < ends
            if group.window is not None:
                mask &= cached >= ends - group.window
            mask = mask.repeat(self._shape.num_heads // self._shape.num_kv_heads, 1)
            group.scratch[key] = mask
        return mask


def _turn(x: Tensor, rope: RopeRows) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head of x [T, H, D]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = rope.cos[:, None, :], rope.sin[:, None, :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _gather_plan(step: ForwardStep, group: GroupStep) -> None:
    """Derive the pages [n, P] that decodes gather, and which gathered tokens are hidden [n, S]."""
    num, size = step.num_decodes, group.page_tokens
    ends = step.prefix_lens[:num].long()
    table = group.page_tables[:num, : -(-step.max_decode_context // size)]
    first_pages = torch.zeros_like(ends)
    if group.window is not None:
        first_pages = (ends - group.window).clamp(min=0) // size
        # A window of w tokens touches at most this many pages, wherever it begins.
        num_pages = min(table.shape[1], (group.window + size - 2) // size + 1)
        columns = first_pages[:, None] + torch.arange(num_pages, device=ends.device)
        table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
    cached = torch.arange(table.shape[1] * size, device=ends.device)
    cached = first_pages[:, None] * size + cached
    hidden = cached >= ends[:, None]
    if group.window is not None:
        hidden |= cached < (ends - group.window)[:, None]
    group.scratch["decode_pages"] = table
    group.scratch["decode_hidden"] = hidden
