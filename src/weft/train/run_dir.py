"""One directory holds a run: plan, configuration, versions, metrics, checkpoints, timeline."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weft.base.durable import write_file
from weft.base.errors import ConfigError
from weft.plan.train_plan import TrainPlan

_PACKAGES = ("weft", "torch", "numpy", "safetensors")


class RunDirectory:
    """Paths and files of a run; rank 0 writes, except for logs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.metrics = path / "metrics.jsonl"
        self.plan = path / "plan.json"
        self.config = path / "config.json"
        self.versions = path / "versions.json"
        self.timeline = path / "timeline.npz"
        self.trace = path / "trace.json"

    def create(self) -> None:
        """Make the directory and those within.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            for directory in (self.path, self.checkpoints, self.logs):
                directory.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"run directory {str(self.path)!r} cannot be written: {error.strerror}; name "
                "another with --run-dir"
            ) from None

    def describe(self, plan: TrainPlan, config: Mapping[str, Any]) -> None:
        """Write what the run is made of."""
        self.plan.write_text(plan.to_json() + "\n")
        _write(self.config, config)
        _write(self.versions, versions())

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def drop_metrics_after(self, num_steps: int) -> None:
        """Forget lines of steps that a resumed run does again."""
        if not self.metrics.exists():
            return
        rows = read_metrics(self.metrics)
        kept = [row for row in rows if row.get("step", 0) <= num_steps]
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        # Also where a dying process left half a line: the next one would continue it.
        if lines != self.metrics.read_text():
            write_file(self.metrics, lines.encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line that a dying process left unfinished is dropped."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def versions() -> dict[str, str]:
    """What runs here."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from source"
    found["argv"] = " ".join(sys.argv[1:])
    return found


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")
