"""Where tables go."""

from __future__ import annotations

import sys

from rich.console import Console

_FILE_WIDTH = 160
"""Columns of a table that is piped or logged: nobody's window cuts it."""


def stdout_console() -> Console:
    """The terminal at its own width; a pipe or a file wide enough for every table."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
