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


class TokenGather:
    """Copies what a window sees, of one layer after the other.

    The layers of a cache group take turns in the same memory, which need not be faulted in again.
    """

    def __init__(
        self,
        kv: KvLayer,
        pages: Tensor,
        *,
        page_tokens: int,
        begin: int,
        end: int,
        window: int | None,
        multiple: int,
    ) -> None:
        """`kv` is any layer of the group; `pages` [P] are the sample's from its first on.

        The tokens held are filled up with zeros to a multiple of `multiple`.
        """
        first_page = 0 if window is None else max(0, begin + 1 - window) // page_tokens
        first = first_page * page_tokens
        used = pages[first_page : -(-end // page_tokens)]
        num_paged = len(used) * page_tokens
        num_heads, head_dim = kv.keys.shape[1], kv.keys.shape[3]
        num_held = -(-num_paged // multiple) * multiple
        both = kv.keys.new_empty(2, num_heads, num_held, head_dim)
        by_page = both[:, :, :num_paged].unflatten(2, (len(used), page_tokens)).transpose(1, 2)
        self._pages = _run_of(used)
        self._keys_by_page, self._values_by_page = by_page.unbind()
        # What pages hold behind the last token may be anything.
        self._behind = both[:, :, end - first :]
        keys, values = both.unbind()
        self._held = HeldTokens(
            keys=keys, values=values, first=first, begin=begin, end=end, window=window
        )

    def of(self, kv: KvLayer) -> HeldTokens:
        """What the window sees of a layer, until the next call."""
        self._keys_by_page.copy_(kv.keys[self._pages])
        self._values_by_page.copy_(kv.values[self._pages])
        self._behind.zero_()
        return self._held


def _run_of(pages: Tensor) -> slice | Tensor:
    """What to index pages with; on the CPU a slice where they follow each other, as they mostly do
    on an idle device."""
    if pages.device.type == "cpu":
        first, num = int(pages[0]), len(pages)
        if pages.tolist() == list(range(first, first + num)):
            return slice(first, first + num)
    return pages
