"""What every benchmark prints: where it ran, and rows of claim, ours, peer, ratio and spread."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One compared figure. A ratio above 1 is always in our favour, whatever the unit."""

    claim: str
    unit: str
    ours: float
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
    """Smallest and largest ratio over the rounds, each pairing the two sides of one round."""
    target: float | None = None
    """The least ratio that was promised."""
    tolerance: float | None = None
    """The promise instead is a ratio within 1 - tolerance and 1 + tolerance."""
    simulated: bool = False

    @property
    def is_met(self) -> bool | None:
        """None where nothing was promised."""
        if self.tolerance is not None:
            return abs(self.ratio - 1.0) <= self.tolerance
        return None if self.target is None else self.ratio >= self.target

    @property
    def promise(self) -> str:
        """Target or tolerance as printed."""
        if self.tolerance is not None:
            return f"1 ± {self.tolerance:.2f}"
        return "" if self.target is None else f"{self.target:.2f}"


def compare(
    claim: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    lower_is_better: bool = False,
    target: float | None = None,
) -> Row:
    """A row from paired rounds: medians of both sides, median and extremes of the paired ratios."""
    pairs = list(zip(ours, peer, strict=True))
    ratios = [theirs / mine if lower_is_better else mine / theirs for mine, theirs in pairs]
    return Row(
        claim=claim,
        unit=unit,
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        target=target,
    )


def single(
    claim: str,
    unit: str,
    ours: float,
    peer: float,
    *,
    lower_is_better: bool = False,
    target: float | None = None,
    tolerance: float | None = None,
    simulated: bool = False,
) -> Row:
    """A row of one round, without a spread."""
    above, below = (peer, ours) if lower_is_better else (ours, peer)
    ratio = above / max(below, 1e-9)
    return Row(
        claim=claim,
        unit=unit,
        ours=ours,
        peer=peer,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
        target=target,
        tolerance=tolerance,
        simulated=simulated,
    )


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, system, Python and commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()),
        "memory": f"{memory:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "commit": _commit(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def print_rows(rows: Sequence[Row], *, title: str) -> None:
    """A table on stdout, losing rows marked rather than left out."""
    table = Table(title=title)
    for column in ("claim", "unit", "ours", "peer", "ratio", "low", "high", "target", ""):
        table.add_column(column, justify="left" if column in ("claim", "unit") else "right")
    for row in rows:
        met = {None: "", True: "met", False: "NOT MET"}[row.is_met]
        if row.is_met is None and row.ratio < 1:
            met = "behind"
        table.add_row(
            ("simulated: " if row.simulated else "") + row.claim,
            row.unit,
            f"{row.ours:.4g}",
            f"{row.peer:.4g}",
            f"{row.ratio:.2f}",
            f"{row.ratio_low:.2f}",
            f"{row.ratio_high:.2f}",
            row.promise,
            met,
        )
    wide_console().print(table)


def wide_console() -> Console:
    """A table in a log file must not be cut to a terminal's width."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def write_json(path: Path, rows: Sequence[Row], machine: Mapping[str, str], **more: object) -> None:
    """Everything printed, and whatever raw figures the caller adds."""
    document = {"machine": dict(machine), "rows": [asdict(row) for row in rows], **more}
    text = json.dumps(document, indent=1, default=str)
    if str(path) == "-":
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    known = fields.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known]
    return f"{fields.get('model name', platform.processor())} ({' '.join(wide)})"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "../src", ".")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
