"""A timeline as one .npz file of plain columns: what a run measured, for later comparison."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weft.base.errors import ConfigError
from weft.plan.messages import MessageTable
from weft.plan.program import Program
from weft.sim.timeline import MemoryCurve, Timeline

_PARTS: dict[str, type[Any]] = {
    "actions": Program,
    "messages": MessageTable,
    "memory": MemoryCurve,
}
_PLAIN = ("name", "batch_size", "num_steps", "step_time_s")
_TUPLES = ("devices", "device_names", "capacity_bytes", "jobs")


def write_timeline(timeline: Timeline, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write it; `extra` is further plain data, such as the peak numbers in flight."""
    columns: dict[str, npt.NDArray[Any]] = {}
    header: dict[str, Any] = {name: getattr(timeline, name) for name in _PLAIN}
    header |= {name: list(getattr(timeline, name)) for name in _TUPLES}
    header["extra"] = extra or {}
    for field in fields(Timeline):
        value = getattr(timeline, field.name)
        if field.name in _PARTS:
            for part in fields(_PARTS[field.name]):
                column = getattr(value, part.name)
                if isinstance(column, np.ndarray):
                    columns[f"{field.name}.{part.name}"] = column
                else:
                    header[f"{field.name}.{part.name}"] = list(column)
        elif isinstance(value, np.ndarray):
            columns[field.name] = value
    columns["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]


def read_timeline(path: Path) -> tuple[Timeline, dict[str, Any]]:
    """The timeline and the extra data.

    Raises:
        ConfigError: there is no such file, or it is not a timeline.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            columns = {name: held[name] for name in held.files}
        header = json.loads(columns.pop("header").tobytes())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{str(path)!r} is not a recorded timeline: {error}") from None
    values: dict[str, Any] = {name: header[name] for name in _PLAIN}
    values |= {name: tuple(header[name]) for name in _TUPLES}
    for name, kind in _PARTS.items():
        values[name] = kind(
            **{
                part.name: columns[key] if key in columns else tuple(header[key])
                for part in fields(kind)
                for key in (f"{name}.{part.name}",)
            }
        )
    values |= {name: column for name, column in columns.items() if "." not in name}
    return Timeline(**values), header["extra"]
