"""Chrome / Perfetto trace files: one writer for simulated and for real runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.base.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TraceWriter:
    """Collects slices and counters, then writes one JSON file that ui.perfetto.dev opens.

    Tracks are named `(process, thread)`; times are seconds from any fixed origin.
    """

    _events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _processes: dict[str, int] = field(default_factory=dict[str, int])
    _threads: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def slice(
        self,
        process: str,
        thread: str,
        name: str,
        *,
        start_s: float,
        duration_s: float,
        category: str = "",
        args: dict[str, Any] | None = None,
    ) -> None:
        """Add one complete event on a track."""
        pid, tid = self._track(process, thread)
        event: dict[str, Any] = {
            "ph": "X",
            "name": name,
            "cat": category,
            "pid": pid,
            "tid": tid,
            "ts": start_s * 1e6,
            "dur": duration_s * 1e6,
        }
        if args:
            event["args"] = args
        self._events.append(event)

    def counter(self, process: str, name: str, *, time_s: float, values: dict[str, float]) -> None:
        """Add one sample of a counter track; `values` maps series to value."""
        pid, _ = self._track(process, "")
        self._events.append(
            {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": time_s * 1e6, "args": values}
        )

    def write(self, path: str | Path) -> None:
        """Write all events; the file is complete or absent."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:  # One string of all might not fit.
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            separator = ""
            for event in self._events:
                file.write(separator + json.dumps(event))
                separator = ",\n"
            file.write("]}")
        partial.replace(target)

    @staticmethod
    def check_path(path: str | Path) -> None:
        """Find out before a long run whether `write` will be able to.

        Raises:
            ConfigError: the path is a directory, or its directory is missing or not writable.
        """
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            if target.is_dir():
                raise IsADirectoryError("it is a directory")
            partial.touch()
            partial.unlink()
        except OSError as error:
            raise ConfigError(
                f"the trace file {str(path)!r} cannot be written: {error.strerror or error}; name "
                "a file in a directory that exists and can be written to"
            ) from error

    def __len__(self) -> int:
        return len(self._events)

    def _track(self, process: str, thread: str) -> tuple[int, int]:
        pid = self._processes.get(process)
        if pid is None:
            pid = self._processes[process] = len(self._processes) + 1
            self._name("process_name", pid, 0, process)
        if not thread:
            return pid, 0
        tid = self._threads.get((process, thread))
        if tid is None:
            tid = self._threads[process, thread] = len(self._threads) + 1
            self._name("thread_name", pid, tid, thread)
        return pid, tid

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self._events.append(
            {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
        )
