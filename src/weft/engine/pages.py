"""Pages of the arena: who holds which, how often, and which may be found again by content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from weft.base.errors import ConfigError, IntegrityError
from weft.engine.batch import NULL_PAGE


class PagePool:
    """Reference-counted pages `1 .. num_pages - 1`, with a content index over some of them.

    A page is *free* (no content), *held* (one or more references) or *idle*: no reference, but its
    content is known by a key, so that it can be found and held again. Idle pages are allocated only
    when no page is free, least recently released first. Page 0 is the null page, never allocated.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ConfigError(
                f"an arena of {num_pages} pages holds nothing; it needs the null page and one more"
            )
        self._num_pages = num_pages
        # A stack: pages released last are handed out first, while they are warm in the caches.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._references = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[Hashable, int] = {}
        self._key_of: dict[int, Hashable] = {}

    @property
    def num_total(self) -> int:
        """Pages that can ever be held."""
        return self._num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages with at least one reference."""
        return self.num_total - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Hold `count` pages without content, evicting idle ones if it must.

        Raises:
            IntegrityError: fewer than `count` are available; ask `num_available` first.
        """
        if count > self.num_available:
            raise IntegrityError(f"{count} pages asked, {self.num_available} available")
        pages: list[int] = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        return pages

    def is_idle(self, page: int) -> bool:
        """Whether holding this page would take it from the available ones."""
        return page in self._idle

    def hold(self, page: int) -> None:
        """Add a reference to a held or idle page."""
        if self._references[page] == 0:
            del self._idle[page]
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page; null pages are passed over."""
        for page in pages:
            if page == NULL_PAGE:
                continue
            if self._references[page] <= 0:
                raise IntegrityError(f"page {page} is released more often than held")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: Hashable) -> None:
        """Make a held page findable by its content; the first page of a key keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: Hashable) -> int | None:
        """The page that has this content, or None. Changes nothing."""
        return self._page_of.get(key)

    def forget_all(self) -> int:
        """Drop the content index (weights changed, say); returns how many idle pages it freed."""
        self._page_of.clear()
        self._key_of.clear()
        freed = len(self._idle)
        self._free.extend(self._idle)
        self._idle.clear()
        return freed

    def check_integrity(self, held: Sequence[int] | None = None) -> None:
        """Verify every invariant; `held` is all references that owners claim, one entry each.

        Raises:
            IntegrityError: an invariant is broken, with the page that breaks it.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("a page is free twice")
        for page in range(1, self._num_pages):
            states = (page in free) + (page in self._idle) + (self._references[page] > 0)
            if states != 1:
                raise IntegrityError(f"page {page} is in {states} states, not in exactly one")
            if page in free and page in self._key_of:
                raise IntegrityError(f"free page {page} still has content")
        if self._references[NULL_PAGE]:
            raise IntegrityError("the null page is held")
        if {page: key for key, page in self._page_of.items()} != self._key_of:
            raise IntegrityError("the content index is not one to one")
        if held is not None:
            counts = [0] * self._num_pages
            for page in held:
                counts[page] += page != NULL_PAGE
            if counts != self._references:
                wrong = next(p for p in range(self._num_pages) if counts[p] != self._references[p])
                raise IntegrityError(
                    f"page {wrong} has {self._references[wrong]} references, "
                    f"its owners claim {counts[wrong]}"
                )

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
