"""Causal attention of a window of queries over cached keys and values, and its backward.

Causality makes windows exact: the keys and values of a token get gradients from queries at or
behind it only, so with windows taken right to left theirs are complete once their own window is
done (FlexLLM, arXiv 2402.18789 §6.1). The probabilities are computed again, a block of queries at a
time; nothing of size window x context is held. On the CPU the kernels of `cpu_window` take what
they can; the rest, and other devices, run in torch.

Shape legend: s tokens of the window, n tokens of the sample, c cached tokens seen, D head_dim, Hq
query heads, Hkv key-value heads, G = Hq / Hkv, m queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft.model.finetune.primitives import wide_dtype
from weft.model.forward_step import KvLayer
from weft.model.kernels import cpu_window
from weft.model.kernels.held_tokens import HeldTokens, TokenGather

_BLOCK_ROWS = 64
"""G * m, about: rows of one block's product for each key-value head."""


def gather_kv(
    kv: KvLayer, pages: Tensor, *, page_tokens: int, begin: int, end: int, window: int | None
) -> TokenGather:
    """Copies from the arena what a window sees, of the layers of `kv`'s cache group in turn.

    `pages` [P] are the sample's from its first on.
    """
    keys = kv.keys
    multiple = cpu_window.token_multiple(keys.dtype, keys.device, keys.shape[3])
    return TokenGather(
        kv,
        pages,
        page_tokens=page_tokens,
        begin=begin,
        end=end,
        window=window,
        multiple=multiple or 1,
    )


def _widened(kv: HeldTokens) -> HeldTokens:
    """The same in the dtype that sums are taken in, without the zeros behind."""
    num, dtype = kv.end - kv.first, wide_dtype(kv.keys.dtype)
    keys, values = (x[:, :num].to(dtype) for x in (kv.keys, kv.values))
    return replace(kv, keys=keys, values=values)


@dataclass(frozen=True, slots=True)
class _Block:
    rows: slice
    """Within the window."""
    seen: slice
    """Within the cached tokens held."""
    mask: Tensor
    """[m, c] 0 where a query sees a cached token, else -inf; or its last columns, where the rest
    is seen by all."""


def attention_forward(query: Tensor, kv: HeldTokens) -> Tensor:
    """query [s, Hq, D], turned, to [s, Hq * D]."""
    if cpu_window.can_run(query, kv):
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        cpu_window.window_forward(query, kv, out)
        return out
    kv = _widened(kv)
    num_kv_heads = kv.keys.shape[0]
    out = torch.empty_like(query)
    for block in _blocks(kv, query.shape[1] // num_kv_heads):
        rows = _grouped(query[block.rows], num_kv_heads, kv.keys.dtype)
        probs = _probabilities(rows, kv, block)
        _ungroup(torch.bmm(probs, kv.values[:, block.seen]), out[block.rows])
    return out.flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KvGrads:
    """Accumulators [Hkv, n, D] of one layer of a sample, wide; None where no gradient is wanted."""

    keys: Tensor | None
    values: Tensor | None


def attention_backward(
    d_out: Tensor, query: Tensor, kv: HeldTokens, grads: KvGrads, *, wants_query: bool
) -> Tensor | None:
    """Add the window's share to `grads`; returns the gradient of `query` [s, Hq, D], wide.

    `d_out` [s, Hq * D].
    """
    held = slice(kv.first, kv.end)
    if (
        wants_query
        and grads.keys is not None
        and grads.values is not None
        and cpu_window.can_run(query, kv)
    ):
        sums = grads.keys[:, held], grads.values[:, held]
        return cpu_window.window_backward(d_out, query, kv, *sums)
    kv = _widened(kv)
    num_kv_heads, wide = kv.keys.shape[0], kv.keys.dtype
    d_out = d_out.view(query.shape)
    d_query = query.new_empty(query.shape, dtype=wide) if wants_query else None
    for block in _blocks(kv, query.shape[1] // num_kv_heads):
        rows = _grouped(query[block.rows], num_kv_heads, wide)
        d_rows = _grouped(d_out[block.rows], num_kv_heads, wide)
        probs = _probabilities(rows, kv, block)
        if grads.values is not None:
            grads.values[:, held][:, block.seen].baddbmm_(probs.transpose(1, 2), d_rows)
        if d_query is None and grads.keys is None:
            continue
        d_probs = torch.bmm(d_rows, kv.values[:, block.seen].transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, wide)
        scale = query.shape[2] ** -0.5
        if d_query is not None:
            rows_grad = torch.bmm(d_scores, kv.keys[:, block.seen]).mul_(scale)
            _ungroup(rows_grad, d_query[block.rows])
        if grads.keys is not None:
            held_keys = grads.keys[:, held][:, block.seen]
            held_keys.baddbmm_(d_scores.transpose(1, 2), rows, alpha=scale)
    return d_query


def _blocks(kv: HeldTokens, group: int) -> Iterator[_Block]:
    size = max(8, _BLOCK_ROWS // group)
    device = kv.keys.device
    for begin in range(kv.begin, kv.end, size):
        end = min(begin + size, kv.end)
        first = kv.first if kv.window is None else max(kv.first, begin + 1 - kv.window)
        # Without a sliding window the tokens before the block are seen by all of its queries.
        masked_from = begin if kv.window is None else first
        queries = torch.arange(begin, end, device=device)[:, None]
        cached = torch.arange(masked_from, end, device=device)
        is_hidden = cached > queries
        if kv.window is not None:
            is_hidden |= cached <= queries - kv.window
        mask = torch.zeros(is_hidden.shape, dtype=kv.keys.dtype, device=device)
        yield _Block(
            rows=slice(begin - kv.begin, end - kv.begin),
            seen=slice(first - kv.first, end - kv.first),
            mask=mask.masked_fill_(is_hidden, float("-inf")),
        )


def _probabilities(rows: Tensor, kv: HeldTokens, block: _Block) -> Tensor:
    """[Hkv, G * m, c]."""
    scores = torch.bmm(rows, kv.keys[:, block.seen].transpose(1, 2)).mul_(rows.shape[2] ** -0.5)
    num_queries, num_masked = block.mask.shape
    by_query = scores.unflatten(1, (-1, num_queries))
    by_query[..., -num_masked:] += block.mask
    return torch.softmax(scores, dim=-1)


def _grouped(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[m, Hq, D] to [Hkv, G * m, D]: heads that share keys become rows of one product."""
    grouped = x.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    return grouped.to(dtype).flatten(1, 2)


def _ungroup(x: Tensor, out: Tensor) -> None:
    """[Hkv, G * m, D] into out [m, Hq, D]."""
    grouped = x.unflatten(1, (-1, out.shape[0])).permute(2, 0, 1, 3)
    out.copy_(grouped.reshape(out.shape))
