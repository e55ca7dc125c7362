"""Option values that several verbs read alike."""

from __future__ import annotations

import os
from pathlib import Path

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


def check_outputs(**files: Path | None) -> None:
    """Refuse files that could not be written, before the work that would fill them.

    Raises:
        ConfigError: naming the option (`schedule_out` is --schedule-out), the file, and why.
    """
    for name, path in files.items():
        if path is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if path.is_dir():
            raise ConfigError(f"{option} is {path}, a directory; name a file in it")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"{option} is {path}, but there is no directory {folder}; create it")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise ConfigError(f"{option} is {path}, which may not be written; name another file")
