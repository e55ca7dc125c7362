"""From raw rounds to rows: ours against each peer, and against what the machine can do."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench_models import BenchModel
from peers.roster import OURS
from rich.table import Table
from rows import Row, compare, wide_console
from workloads import Kind, Workload

DECODE_SHARE_TARGET = {"float32": 0.80, "bfloat16": 0.70}
PREFILL_SHARE_TARGET = {"float32": 0.60, "bfloat16": 0.65}

Rounds = dict[int, float]


@dataclass(kw_only=True, slots=True)
class Measured:
    """Values by round: tokens/s, or seconds for the one-token workloads."""

    values: dict[tuple[str, str, str], Rounds] = field(default_factory=lambda: defaultdict(dict))
    """(engine, dtype, workload) -> round -> value."""
    read_bytes_per_s: Rounds = field(default_factory=dict)
    gemm_flop_per_s: dict[str, Rounds] = field(default_factory=lambda: defaultdict(dict))

    cores_of_others: list[float] = field(default_factory=list)
    """For each measurement, the mean number of cores that other programs kept busy."""

    def as_plain(self) -> dict[str, object]:
        """For the JSON file."""
        return {
            "values": {" | ".join(key): list(r.values()) for key, r in self.values.items()},
            "cores_of_others": self.cores_of_others,
            "read_bytes_per_s": list(self.read_bytes_per_s.values()),
            "gemm_flop_per_s": {k: list(r.values()) for k, r in self.gemm_flop_per_s.items()},
        }


def print_figures(measured: Measured, *, title: str) -> None:
    """Every engine's own median with its extremes, so that no ratio hides an absolute."""
    names = list(dict.fromkeys(name for _, _, name in measured.values))
    table = Table(title=title)
    table.add_column("engine")
    for name in names:
        table.add_column(name, justify="right")
    for engine, dtype in dict.fromkeys((engine, dtype) for engine, dtype, _ in measured.values):
        cells: list[str] = []
        for name in names:
            values = list(measured.values.get((engine, dtype, name), {}).values())
            is_rate = name.startswith((Kind.MIXED, "batch"))
            cells.append(_spread(values, 1.0 if is_rate else 1000.0))
        table.add_row(f"{engine} {dtype}", *cells)
    wide_console().print(table)
    print("tokens/s for batches, ms for ttft and prefill: median [lowest, highest round]")
    if measured.cores_of_others:
        others = statistics.median(measured.cores_of_others)
        most = max(measured.cores_of_others)
        print(f"other programs kept {others:.2f} cores busy in the median, {most:.2f} at most")


def _spread(values: Sequence[float], scale: float) -> str:
    if not values:
        return ""
    scaled = [scale * value for value in values]
    # The bracket is escaped: rich reads it as a style otherwise.
    return f"{statistics.median(scaled):.4g} \\[{min(scaled):.4g}, {max(scaled):.4g}]"


def model_rows(model: BenchModel, measured: Measured, workloads: Sequence[Workload]) -> list[Row]:
    """Every comparison that the rounds allow, the lost ones too."""
    rows: list[Row] = []
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in measured.values))
    for dtype in dtypes:
        for workload in workloads:
            rows += _peer_rows(model, measured, workload, dtype)
        rows += _machine_rows(model, measured, dtype)
    if "float32" in dtypes and "bfloat16" in dtypes:
        for workload in workloads:
            rows += _across_dtypes(model, measured, workload)
    return rows


def target_ratio(model: str, peer: str, workload: Workload) -> float | None:
    """The ratio that the project set itself; None where it promised nothing."""
    if peer.startswith(OURS):
        return None
    is_throughput = workload.kind in (Kind.UNIFORM, Kind.MIXED)
    if peer == "vllm":
        return 2.0 if model == "embedded" else 1.0
    if not is_throughput:
        return None
    if peer.startswith("transformers"):
        return 2.0 if workload.kind is Kind.MIXED else 1.5
    if model == "rand110":
        return 1.0
    if peer == "llama.cpp" and workload.batch >= 8:
        return 1.0
    return None


def _peer_rows(model: BenchModel, measured: Measured, workload: Workload, dtype: str) -> list[Row]:
    ours = measured.values.get((OURS, dtype, workload.name), {})
    rows: list[Row] = []
    for (peer, peer_dtype, name), theirs in measured.values.items():
        if peer == OURS or peer_dtype != dtype or name != workload.name:
            continue
        rounds = sorted(set(ours) & set(theirs))
        if rounds:
            rows.append(
                _pair(
                    f"{dtype} {workload.name} vs {peer}",
                    workload,
                    [ours[r] for r in rounds],
                    [theirs[r] for r in rounds],
                    target_ratio(model.name, peer, workload),
                )
            )
    return rows


def _across_dtypes(model: BenchModel, measured: Measured, workload: Workload) -> list[Row]:
    """Our bfloat16 against the fastest float32 of any peer at this point."""
    ours = measured.values.get((OURS, "bfloat16", workload.name), {})
    if workload.kind not in (Kind.UNIFORM, Kind.MIXED) or not ours:
        return []
    best: tuple[float, str, Rounds] | None = None
    for (peer, dtype, name), theirs in measured.values.items():
        if peer.startswith(OURS) or dtype != "float32" or name != workload.name:
            continue
        median = statistics.median(theirs.values())
        if best is None or median > best[0]:
            best = (median, peer, theirs)
    if best is None:
        return []
    rounds = sorted(set(ours) & set(best[2]))
    return [
        _pair(
            f"our bfloat16 {workload.name} vs best float32 ({best[1]})",
            workload,
            [ours[r] for r in rounds],
            [best[2][r] for r in rounds],
            1.5 if model.name == "rand110" else None,
        )
    ]


def _pair(
    claim: str, workload: Workload, ours: list[float], theirs: list[float], target: float | None
) -> Row:
    if workload.kind in (Kind.UNIFORM, Kind.MIXED):
        return compare(claim, "tokens/s", ours, theirs, target=target)
    return compare(claim, "s", ours, theirs, lower_is_better=True, target=target)


def _machine_rows(model: BenchModel, measured: Measured, dtype: str) -> list[Row]:
    """Shares of the machine: only for a model that no cache holds."""
    if model.name != "rand110":
        return []
    rows: list[Row] = []
    single = measured.values.get((OURS, dtype, "batch 1"), {})
    first = measured.values.get((OURS, dtype, "ttft"), {})
    rounds = sorted(set(single) & set(first) & set(measured.read_bytes_per_s))
    if rounds:
        # A run of 128 tokens is one prefill (the TTFT) and 127 decode steps, at a mean context
        # of 256 + 64 tokens.
        step_s = [(128 / single[r] - first[r]) / 127 for r in rounds]
        num_bytes = model.decode_bytes(256 + 64, dtype)
        rows.append(
            compare(
                f"{dtype} decode batch 1: bytes read / read bandwidth",
                "B/s",
                [num_bytes / step for step in step_s],
                [measured.read_bytes_per_s[r] for r in rounds],
                target=DECODE_SHARE_TARGET[dtype],
            )
        )
    prefill = measured.values.get((OURS, dtype, "prefill 2048"), {})
    rates = measured.gemm_flop_per_s.get(dtype, {})
    rounds = sorted(set(prefill) & set(rates))
    if rounds:
        # In bfloat16 the promise is about the linears alone; their FLOP over the whole time,
        # attention included, is a lower bound of their rate.
        is_float32 = dtype == "float32"
        flop = model.prefill_flop(2048) if is_float32 else model.linear_flop(2048)
        what = "linears and attention" if is_float32 else "linears over all time"
        rows.append(
            compare(
                f"{dtype} prefill 2048: {what} / GEMM rate",
                "FLOP/s",
                [flop / prefill[r] for r in rounds],
                [rates[r] for r in rounds],
                target=PREFILL_SHARE_TARGET[dtype],
            )
        )
    return rows
