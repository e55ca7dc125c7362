"""Option values that several verbs read alike."""

from __future__ import annotations

from weft.base.errors import ConfigError


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,2,4` as integers.

    Raises:
        ConfigError: a part is not a whole number; the message names the option.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; give whole numbers separated by commas, as in 1,2,4"
        ) from None
