"""The directory that a server keeps its files in: one server at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Generator
from pathlib import Path

from weft.base.errors import ConfigError

_STATE = "server.json"


class DataDir:
    """A directory that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def announce(self, *, url: str, model: str) -> None:
        """Write `server.json`, by which scripts find the running server; replaced in one piece."""
        partial = self.path / f"{_STATE}.partial"
        partial.write_text(json.dumps({"url": url, "model": model, "pid": os.getpid()}) + "\n")
        partial.replace(self.path / _STATE)


@contextlib.contextmanager
def hold_data_dir(path: Path) -> Generator[DataDir]:
    """Create the directory and hold it until the end; `server.json` is gone then.

    Raises:
        ConfigError: it cannot be made or written, or another server holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "w")  # noqa: SIM115 - held for the life of the server
    except OSError as error:
        raise ConfigError(f"the data directory {path} cannot be used: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another server holds the data directory {path}; stop it or choose another "
                "with --data-dir"
            ) from error
        try:
            yield DataDir(path)
        finally:
            (path / _STATE).unlink(missing_ok=True)
