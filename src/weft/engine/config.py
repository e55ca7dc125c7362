"""Settings of an online policy: plain numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from weft.base.errors import ConfigError


def check_whole(name: str, value: object, lowest: int | None = None) -> None:
    """Refuse a setting that is no whole number, or too low a one.

    Raises:
        ConfigError: names the setting and its value.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if lowest is not None and value < lowest:
        raise ConfigError(f"{name} is {value}; it must be at least {lowest}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Limits that a policy keeps.

    Raises:
        ConfigError: a limit is below its least useful value.
    """

    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    max_num_batched_tokens: int = 2048
    """Tokens of one iteration; decodes count one each and come first."""
    eos_token_ids: tuple[int, ...] = ()
    enable_prefix_caching: bool = True
    max_waiting: int | None = None
    """Requests that may wait before `add` raises QueueFullError; None means no bound."""
    admission_reserve: float = 0.01
    """Share of the pages that stay free when a request joins running ones, so that their next
    tokens do not preempt it at once."""
    seed: int = 0
    """Requests without a seed draw theirs from this and their number."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens"):
            check_whole(name, getattr(self, name), 1)
        if self.max_waiting is not None and self.max_waiting < 0:
            raise ConfigError(f"max_waiting is {self.max_waiting}; it must be 0 or more, or None")
        if not 0 <= self.admission_reserve < 1:
            raise ConfigError(
                f"admission_reserve is {self.admission_reserve}; it must be in [0, 1)"
            )
