"""How much of the machine others used while an engine was being measured. Linux only."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuReading:
    """Processor time so far: of the whole machine, and of one session of processes."""

    wall_s: float
    busy_s: float
    """All processors, time stolen by the host included."""
    session_s: float


def read_cpu(session: int) -> CpuReading | None:
    """The counters of this instant; None where there is no /proc."""
    if not (PROC / "stat").exists():
        return None
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    # cpu user nice system idle iowait irq softirq steal ...
    fields = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return CpuReading(
        wall_s=time.monotonic(),
        busy_s=tick_s * (sum(fields) - idle),
        session_s=tick_s * sum(_ticks_in_session(stat, session) for stat in _processes()),
    )


def num_cores_of_others(before: CpuReading, after: CpuReading) -> float:
    """Mean number of cores that anything outside the session kept busy."""
    busy_s = after.busy_s - before.busy_s
    own_s = after.session_s - before.session_s
    return max(0.0, busy_s - own_s) / max(after.wall_s - before.wall_s, 1e-9)


def _processes() -> list[Path]:
    return [path / "stat" for path in PROC.iterdir() if path.name.isdigit()]


def _ticks_in_session(stat: Path, session: int) -> int:
    try:
        # The name may hold spaces and brackets; after its last bracket: state ppid pgrp session.
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15])) if int(fields[3]) == session else 0
