"""Fair shares by virtual token counters: who has been served least, weighted, goes next.

Each member's counter grows by what it was served over its weight. One that comes back from idle is
lifted to the least of the active ones, so that idling saves up no claim. (VTC, OSDI'24, as in the
FlexLLM sheet §4.5.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from weft.base.errors import ConfigError


class FairShare:
    """Counters of members, by name."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._active: set[str] = set()

    def join(self, name: str, weight: float = 1.0) -> None:
        """Add a member, or change its weight.

        Raises:
            ConfigError: the weight is not a positive number.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"the weight of {name!r} is {weight}; it must be a positive number")
        self._counters.setdefault(name, 0.0)
        self._weights[name] = weight

    def leave(self, name: str) -> None:
        """Forget a member; one that joins again starts at the others' least."""
        for held in (self._counters, self._weights):
            held.pop(name, None)
        self._active.discard(name)

    def order(self, ready: Iterable[str]) -> list[str]:
        """The members with work now, those served least first; names break ties."""
        names = set(ready)
        # Where all who were active fell idle at once, a newcomer starts level with them.
        level = (names & self._active) or (self._active & set(self._counters))
        if level:
            floor = min(self._counters[name] for name in level)
            for name in names - self._active:
                self._counters[name] = max(self._counters[name], floor)
        self._active = names
        return sorted(names, key=lambda name: (self._counters[name], name))

    def charge(self, name: str, amount: float) -> None:
        """Count work done for a member."""
        self._counters[name] += amount / self._weights[name]

    def counter(self, name: str) -> float:
        """Weighted work so far."""
        return self._counters[name]
