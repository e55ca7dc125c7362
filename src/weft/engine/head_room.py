"""What became of the time that latency objectives left to finetuning, by cause."""

from __future__ import annotations

from enum import StrEnum


class Unused(StrEnum):
    """Why an iteration ended before its budget."""

    BEHIND_STEP = "behind-step"
    """An optimizer step was its last piece: what follows needs the new weights."""
    NO_PIECE = "no-piece"
    """Not even the least piece fitted, none was worth its price yet, or no job had one."""
    REST = "rest"
    """What a whole number of granules leaves, and what rows that lack a place would have taken."""


class HeadRoom:
    """Sums over the iterations that carried inference."""

    def __init__(self) -> None:
        self.granted_s = 0.0
        """Of all budgets, less what inference was expected to take; what is saved up counts in each
        iteration that might have spent it."""
        self.unused_s = dict.fromkeys(Unused, 0.0)

    def count(
        self, *, budget_s: float, inference_s: float, upper_s: float, has_part: bool, ends: bool
    ) -> None:
        """One iteration: `upper_s` is its foreseen end, `ends` whether a step ended its part."""
        self.granted_s += max(0.0, budget_s - inference_s)
        cause = Unused.NO_PIECE
        if has_part:
            cause = Unused.BEHIND_STEP if ends else Unused.REST
        self.unused_s[cause] += max(0.0, budget_s - max(upper_s, inference_s))
