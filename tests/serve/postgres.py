"""A PostgreSQL server of the tests' own, on a Unix socket in a directory that goes with it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

START_TIMEOUT_S = 60.0
_USERS = ("postgres", "nobody")
"""PostgreSQL refuses to run as root; then it runs as the first of these that there is."""


def find_binaries() -> Path | None:
    """The directory of initdb and postgres, or None."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextlib.contextmanager
def running_postgres(binaries: Path) -> Generator[str]:
    """Start a server; yields its SQLAlchemy URL."""
    directory = Path(tempfile.mkdtemp(prefix="weft-pg-"))
    user: str | None = None
    if os.geteuid() == 0:
        user = next(name for name in _USERS if _exists(name))
        entry = pwd.getpwnam(user)
        os.chown(directory, entry.pw_uid, entry.pw_gid)
    data = directory / "data"
    process: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run(
            [binaries / "initdb", "-D", data, "-A", "trust", "-U", "weft", "--no-sync"],
            check=True,
            capture_output=True,
            user=user,
            cwd=directory,
        )
        command = [binaries / "postgres", "-D", data, "-k", directory, "-h", "", "-F"]
        process = subprocess.Popen(
            command, user=user, cwd=directory, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        _wait(directory / ".s.PGSQL.5432", process)
        yield f"postgresql://weft@/postgres?host={directory}"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for clients to leave.
            process.wait(START_TIMEOUT_S)
        shutil.rmtree(directory, ignore_errors=True)


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _wait(socket: Path, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, "postgres ended"
        assert time.monotonic() < deadline_s, "postgres does not start"
        if socket.exists():
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(f"host={socket.parent} user=weft dbname=postgres").close()
                return
        time.sleep(0.05)
