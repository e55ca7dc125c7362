"""Time as a dependency: the wall clock for real runs, a virtual one for simulated runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from weft.base.errors import IntegrityError


class Clock(Protocol):
    """Anything that tells the time."""

    def now_s(self) -> float:
        """Seconds since a fixed origin; never decreases."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()


@dataclass(kw_only=True, slots=True)
class VirtualClock:
    """A clock that moves only when told to."""

    time_s: float = 0.0

    def now_s(self) -> float:
        """The virtual time."""
        return self.time_s

    def advance_to(self, time_s: float) -> None:
        """Move forward to `time_s`.

        Raises:
            IntegrityError: `time_s` lies in the past.
        """
        if time_s < self.time_s:
            raise IntegrityError(f"virtual time cannot go back from {self.time_s} to {time_s}")
        self.time_s = time_s
