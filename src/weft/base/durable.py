"""Files and directories that appear whole or not at all, and stay after a power cut.

What is written goes under a name beside the final one, is flushed to the disk, and only then takes
its name; a reader never sees half of it.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it appears under its name at once, and whole; replaces an older one.

    Raises:
        OSError: from writing, flushing or renaming; nothing is left behind then.
    """
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory with files so that it appears under its name at once, and whole.

    `write` gets an empty directory beside `path`. An older directory of the name is replaced.

    Raises:
        OSError: as `write`, or from flushing and renaming; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        publish_directory(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish_directory(partial: Path, path: Path) -> None:
    """Flush a filled directory without subdirectories, and give it its final name.

    Raises:
        OSError: from flushing or renaming.
    """
    for file in partial.iterdir():
        _flush(file)
    _flush(partial)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        # A directory cannot be renamed onto one that holds files.
        path.rename(old)
    partial.rename(path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
