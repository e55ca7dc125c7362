"""Page tables of the running sequences, one for each (slot, cache group)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from weft.base.errors import ConfigError, IntegrityError
from weft.engine.batch import NULL_PAGE, CacheGroup, Int32
from weft.engine.pages import PagePool


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixMatch:
    """Cached pages that a sequence can start from."""

    num_tokens: int
    pages: tuple[tuple[int, ...], ...]
    """For each group, the pages of tokens [0, num_tokens); null where a window has passed."""


def pages_for_sequence(groups: Seq[CacheGroup], num_tokens: int, chunk: int) -> int:
    """Most pages that a sequence of `num_tokens` holds at once, computed `chunk` at a time."""
    total = 0
    for group in groups:
        held = num_tokens
        if group.window is not None:
            # The window behind a chunk and the chunk itself; both ends may lie inside a page.
            held = min(num_tokens, group.window + chunk + group.page_tokens)
        total += -(-held // group.page_tokens)
    return total


class KvCache:
    """Hands pages to slots and finds prefixes again.

    A slot's table covers tokens from 0; entries that a sliding window has left behind are null.
    """

    def __init__(self, *, groups: Seq[CacheGroup], num_pages: int, max_slots: int, max_len: int):
        self.groups = tuple(groups)
        if not self.groups:
            raise ConfigError("a KV cache needs at least one cache group")
        self.pool = PagePool(num_pages)
        self.block_tokens = min(group.page_tokens for group in self.groups)
        """Granularity of prefix hashes."""
        self.no_match = PrefixMatch(num_tokens=0, pages=tuple(() for _ in self.groups))
        """What a sequence that finds nothing starts from."""
        self._unit = max(group.page_tokens for group in self.groups)
        for group in self.groups:
            if self._unit % group.page_tokens:
                raise ConfigError(
                    f"a page of {group.page_tokens} tokens does not divide one of {self._unit}; "
                    "page sizes of cache groups must divide each other"
                )
        self.tables: tuple[Int32, ...] = tuple(
            np.full((max_slots, -(-max_len // group.page_tokens)), NULL_PAGE, np.int32)
            for group in self.groups
        )
        self._num_entries = [[0] * max_slots for _ in self.groups]
        self._num_passed = [[0] * max_slots for _ in self.groups]

    def pages_for(self, num_tokens: int, chunk: int) -> int:
        """`pages_for_sequence` of this cache's groups."""
        return pages_for_sequence(self.groups, num_tokens, chunk)

    def pages_whole(self, num_tokens: int) -> int:
        """Pages that a slot needs for `num_tokens` of which no window is ever passed."""
        return sum(-(-num_tokens // group.page_tokens) for group in self.groups)

    def match(self, hashes: Seq[bytes], num_tokens: int) -> PrefixMatch:
        """The longest cached prefix of at most `num_tokens - 1` tokens, as one token must run.

        `hashes` are the chained digests of the sequence's full blocks of `block_tokens`.
        """
        limit = (num_tokens - 1) // self._unit * self._unit
        found = [self._find_blocks(g, hashes, limit) for g in range(len(self.groups))]
        for group, pages in zip(self.groups, found, strict=True):
            limit = min(limit, len(pages) * group.page_tokens // self._unit * self._unit)
        for length in range(limit, 0, -self._unit):
            pages = self._prefix_pages(found, length)
            if pages is not None:
                return PrefixMatch(num_tokens=length, pages=pages)
        return self.no_match

    def num_idle(self, match: PrefixMatch) -> int:
        """How many available pages adopting this match would use up."""
        return sum(self.pool.is_idle(page) for pages in match.pages for page in set(pages))

    def adopt(self, slot: int, match: PrefixMatch) -> None:
        """Start an empty slot from a match."""
        for g, pages in enumerate(match.pages):
            for page in pages:
                if page != NULL_PAGE:
                    self.pool.hold(page)
            self.tables[g][slot, : len(pages)] = pages
            self._num_entries[g][slot] = len(pages)
            self._num_passed[g][slot] = next(
                (i for i, page in enumerate(pages) if page != NULL_PAGE), len(pages)
            )

    def share(self, slot: int, num_tokens: int) -> PrefixMatch:
        """Pages of a running slot that a sequence with the same first `num_tokens` can adopt."""
        length = (num_tokens - 1) // self._unit * self._unit
        pages: list[tuple[int, ...]] = []
        for g, group in enumerate(self.groups):
            count = length // group.page_tokens
            held = tuple(int(page) for page in self.tables[g][slot, :count])
            first = self._first_visible(group, length)
            if NULL_PAGE in held[first:]:
                return self.no_match
            pages.append((NULL_PAGE,) * first + held[first:])
        return PrefixMatch(num_tokens=length, pages=tuple(pages))

    def num_missing(self, slot: int, num_tokens: int) -> int:
        """Pages that `extend` to `num_tokens` would allocate."""
        return sum(
            max(0, -(-num_tokens // group.page_tokens) - self._num_entries[g][slot])
            for g, group in enumerate(self.groups)
        )

    def extend(self, slot: int, num_tokens: int) -> bool:
        """Give a slot pages for `num_tokens`; False, changing nothing, if too few are left."""
        if self.num_missing(slot, num_tokens) > self.pool.num_available:
            return False
        for g, group in enumerate(self.groups):
            have = self._num_entries[g][slot]
            need = -(-num_tokens // group.page_tokens)
            if need > have:
                self.tables[g][slot, have:need] = self.pool.allocate(need - have)
                self._num_entries[g][slot] = need
        return True

    def extend_as_far_as_possible(self, slot: int, num_tokens: int) -> int:
        """Give a slot as many of the pages for `num_tokens` as are left; returns its capacity."""
        end = self.capacity(slot)
        while end < num_tokens and self.extend(slot, min(end + self._unit, num_tokens)):
            end = self.capacity(slot)
        return end

    def capacity(self, slot: int) -> int:
        """Tokens that the slot's pages can hold in every group."""
        return min(
            self._num_entries[g][slot] * group.page_tokens for g, group in enumerate(self.groups)
        )

    def pass_window(self, slot: int, position: int) -> None:
        """Release pages that no token from `position` on can see."""
        for g, group in enumerate(self.groups):
            if group.window is None:
                continue
            first = min(self._first_visible(group, position), self._num_entries[g][slot])
            passed = self._num_passed[g][slot]
            if first > passed:
                row = self.tables[g][slot]
                self.pool.release(int(page) for page in row[passed:first])
                row[passed:first] = NULL_PAGE
                self._num_passed[g][slot] = first

    def register(self, slot: int, hashes: Seq[bytes], begin: int, end: int) -> None:
        """Make the slot's full pages within tokens [0, end) findable; those before `begin` are."""
        for g, group in enumerate(self.groups):
            blocks = group.page_tokens // self.block_tokens
            row = self.tables[g][slot]
            for index in range(begin // group.page_tokens, end // group.page_tokens):
                page = int(row[index])
                if page != NULL_PAGE:
                    self.pool.register(page, (g, hashes[(index + 1) * blocks - 1]))

    def release(self, slot: int) -> None:
        """Give up all pages of a slot, the last first, so that prefixes outlive their tails."""
        for g in range(len(self.groups)):
            count = self._num_entries[g][slot]
            row = self.tables[g][slot]
            self.pool.release(int(page) for page in row[:count][::-1])
            row[:count] = NULL_PAGE
            self._num_entries[g][slot] = 0
            self._num_passed[g][slot] = 0

    def check_integrity(self, slots: Seq[int]) -> None:
        """Verify that the tables of `slots` account for every reference to a page.

        Raises:
            IntegrityError: they do not.
        """
        used = set(slots)
        held: list[int] = []
        for g, table in enumerate(self.tables):
            for slot in range(len(table)):
                count = self._num_entries[g][slot]
                if (count or table[slot].any()) and slot not in used:
                    raise IntegrityError(f"slot {slot} is free but holds pages in group {g}")
                if table[slot, count:].any():
                    raise IntegrityError(f"slot {slot} has pages beyond its entries in group {g}")
                held.extend(int(page) for page in table[slot, :count])
        self.pool.check_integrity(held)

    def _first_visible(self, group: CacheGroup, position: int) -> int:
        """Index of the first page that the token at `position` or a later one can see."""
        if group.window is None:
            return 0
        return max(0, position - group.window + 1) // group.page_tokens

    def _find_blocks(self, g: int, hashes: Seq[bytes], limit: int) -> list[int | None]:
        group = self.groups[g]
        blocks = group.page_tokens // self.block_tokens
        found: list[int | None] = []
        for index in range(limit // group.page_tokens):
            page = self.pool.find((g, hashes[(index + 1) * blocks - 1]))
            if page is None and group.window is None:
                break  # Without a window nothing beyond the first gap can be used.
            found.append(page)
        return found

    def _prefix_pages(
        self, found: Seq[Seq[int | None]], length: int
    ) -> tuple[tuple[int, ...], ...] | None:
        """Pages of a prefix of `length` tokens, or None if one that must be seen is missing."""
        tables: list[tuple[int, ...]] = []
        for group, pages in zip(self.groups, found, strict=True):
            count = length // group.page_tokens
            if count > len(pages):
                return None
            first = self._first_visible(group, length)
            seen = [page for page in pages[first:count] if page is not None]
            if len(seen) < count - first:
                return None
            tables.append((NULL_PAGE,) * first + tuple(seen))
        return tuple(tables)
