"""Keys and values of one sample's tokens, copied out of the arena's pages to lie together.

Shape legend: c tokens held, D head_dim, Hkv key-value heads, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weft.model.forward_step import KvLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldTokens:
    """What a window of queries sees."""

    keys: Tensor
    """[Hkv, c, D]; rows behind the last token are zero."""
    values: Tensor
    first: int
    """Position of the first token held."""
    begin: int
    """The queries' positions are [begin, end)."""
    end: int
    window: int | None
    """A token sees itself and the `window - 1` before it."""


def gather_tokens(
    kv: KvLayer,
    pages: Tensor,
    *,
    page_tokens: int,
    begin: int,
    end: int,
    window: int | None,
    multiple: int,
) -> HeldTokens:
    """Copy what a window sees; `pages` [P] are the sample's from its first on.

    The tokens held are filled up with zeros to a multiple of `multiple`.
    """
    first_page = 0 if window is None else max(0, begin + 1 - window) // page_tokens
    first = first_page * page_tokens
    used = pages[first_page : -(-end // page_tokens)]
    num_paged = len(used) * page_tokens
    num_heads, head_dim = kv.keys.shape[1], kv.keys.shape[3]
    held: list[Tensor] = []
    for cache in (kv.keys, kv.values):
        target = cache.new_empty(num_heads, -(-num_paged // multiple) * multiple, head_dim)
        by_page = target[:, :num_paged].unflatten(1, (len(used), page_tokens))
        by_page.copy_(_pages_of(cache, used).transpose(0, 1))
        # What pages hold behind the last token may be anything.
        target[:, end - first :].zero_()
        held.append(target)
    keys, values = held
    return HeldTokens(keys=keys, values=values, first=first, begin=begin, end=end, window=window)


def _pages_of(cache: Tensor, pages: Tensor) -> Tensor:
    """cache[pages]; a view where they follow each other, as they mostly do on an idle device."""
    if cache.device.type == "cpu":
        first, num = int(pages[0]), len(pages)
        if pages.tolist() == list(range(first, first + num)):
            return cache[first : first + num]
    return cache[pages]
