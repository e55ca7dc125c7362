"""Models, methods and plans that several parts of the planning benchmark share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from time import perf_counter
from typing import Any

from rows import Row, compare, single

from weft.base.errors import WeftError
from weft.cluster.cluster import Cluster
from weft.cluster.presets import load_cluster
from weft.cost.roofline import RooflineCost
from weft.cost.training import SGD_FP32, TrainingSpec
from weft.graph.coarsen import coarsen
from weft.graph.graph import Graph
from weft.model.zoo.registry import resolve
from weft.plan.api import plan as make_plan
from weft.plan.constraints import Constraint
from weft.plan.train_plan import TrainPlan
from weft.sim.repair import repair_in_flight
from weft.sim.stage_executor import simulate

MAX_BLOCKS = 75
"""Blocks of every graph here, for all methods alike: layers and their halves, joins with losses."""


@dataclass(kw_only=True)
class Findings:
    """What one part of the benchmark reports: compared figures, tables, and remarks."""

    rows: list[Row] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take over everything of another part."""
        self.rows += other.rows
        self.tables |= other.tables
        self.remarks += other.remarks


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One planned and simulated point; without a plan, `reason` says why."""

    method: str
    plan: TrainPlan | None = None
    step_time_s: float = float("inf")
    throughput_per_s: float = 0.0
    search_time_s: float = 0.0
    reason: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The outcome as a table row."""
        plan = self.plan
        return {
            "method": self.method,
            "samples_per_s": round(self.throughput_per_s, 3),
            "step_time_s": self.step_time_s if plan else None,
            "bottleneck_s": plan.bottleneck_s if plan else None,
            "micro_batch": plan.micro_batch if plan else None,
            "num_stages": plan.num_stages if plan else None,
            "depth": plan.depth if plan else None,
            "devices": len(plan.used_devices) if plan else None,
            "search_time_s": round(self.search_time_s, 4),
            "reason": self.reason,
        }


@cache
def graph_of(model: str, max_blocks: int = MAX_BLOCKS, **options: Any) -> Graph:
    """The block-level graph of a zoo model."""
    return coarsen(resolve(model, options), max_blocks)


@cache
def summit(num_devices: int) -> Cluster:
    """The paper's machine: V100s, four a node."""
    return load_cluster(f"summit-{num_devices}")


def planned(
    method: str,
    graph: Graph,
    cluster: Cluster,
    batch_size: int,
    *,
    objective: str = "bottleneck",
    training: TrainingSpec = SGD_FP32,
    micro_batches: Sequence[int] | None = None,
    contention: bool = True,
    constraints: Sequence[Constraint] = (),
    time_limit_s: float | None = 120.0,
) -> Outcome:
    """One method's plan, simulated with links that queue (unless told otherwise)."""
    started_s = perf_counter()
    try:
        found = make_plan(
            graph,
            cluster,
            batch_size=batch_size,
            method=method,
            objective=objective,
            training=training,
            micro_batches=micro_batches,
            cost=RooflineCost(dtype=training.dtype),
            constraints=constraints,
            time_limit_s=time_limit_s,
        )
    except WeftError as error:
        return Outcome(
            method=method, search_time_s=perf_counter() - started_s, reason=_short(str(error))
        )
    search_time_s = perf_counter() - started_s
    return measured(found, method, search_time_s, contention=contention)


def measured(
    plan: TrainPlan, method: str, search_time_s: float = 0.0, *, contention: bool = True
) -> Outcome:
    """The simulated outcome of a plan."""
    timeline = simulate(plan, contention=contention)
    return Outcome(
        method=method,
        plan=plan,
        step_time_s=timeline.step_time_s,
        throughput_per_s=timeline.throughput_per_s,
        search_time_s=search_time_s,
        reason="; ".join(plan.notes),
    )


def repaired(outcome: Outcome) -> Outcome:
    """The outcome with samples in flight raised where messages need it, if that is faster."""
    if outcome.plan is None:
        return outcome
    better = repair_in_flight(outcome.plan, max_simulations=40).plan
    again = measured(better, outcome.method, outcome.search_time_s)
    return max(outcome, again, key=lambda one: one.throughput_per_s)


def swept(
    method: str, graph: Graph, cluster: Cluster, batch_size: int, sizes: Iterable[int]
) -> Outcome:
    """The best simulated plan of a method over micro-batch sizes, as the paper takes its best."""
    outcomes = [
        planned(method, graph, cluster, batch_size, micro_batches=(size,)) for size in sizes
    ]
    outcomes.sort(key=lambda outcome: -outcome.throughput_per_s)
    best = max(map(repaired, outcomes[:2]), key=lambda outcome: outcome.throughput_per_s)
    return replace(best, search_time_s=sum(outcome.search_time_s for outcome in outcomes))


def powers(low: int, high: int) -> tuple[int, ...]:
    """Powers of two in [low, high]."""
    return tuple(1 << i for i in range(64) if low <= 1 << i <= high)


def ratio_row(
    claim: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    target: float | None = None,
    tolerance: float | None = None,
) -> Row:
    """Figures in which more is better; a simulated point has no spread of its own, several do."""
    row = compare(claim, unit, ours, peer, target=target)
    return replace(row, tolerance=tolerance, simulated=True)


def limit_row(
    claim: str, unit: str, values: Sequence[float], limit: float, *, simulated: bool = False
) -> Row:
    """A figure that may not exceed a limit; the ratio is limit / figure, 1 and more is met."""
    return Row(
        claim=claim,
        unit=unit,
        ours=statistics.median(values),
        peer=limit,
        ratio=limit / max(statistics.median(values), 1e-12),
        ratio_low=limit / max(*values, 1e-12, 1e-12),
        ratio_high=limit / max(min(values), 1e-12),
        target=1.0,
        simulated=simulated,
    )


def rate_row(claim: str, unit: str, values: Sequence[float], least: float) -> Row:
    """A rate that must reach a target."""
    return compare(claim, unit, values, [least] * len(values), target=1.0)


def count_row(claim: str, good: int, total: int) -> Row:
    """How many of all cases agree; all must."""
    return single(claim, "cases", good, total, target=1.0)


def point(model: str, num_devices: int, batch_size: int, **more: Any) -> Mapping[str, Any]:
    """The leading columns of a table row."""
    return {"model": model, "devices_available": num_devices, "batch": batch_size, **more}


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
