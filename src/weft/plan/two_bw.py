"""PipeDream-2BW's planner: equal stages, equally replicated (arXiv 2006.09503 §4.2, Alg. 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weft.plan.assemble import StageChoice, assemble
from weft.plan.cost_table import StageTable
from weft.plan.infeasible import tightest
from weft.plan.layers import even_split, layer_segments
from weft.plan.problem import InfeasiblePlanError, Objective, Problem
from weft.plan.train_plan import TrainPlan

SCHEDULE = "2bw"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    width: int
    depth: int
    micro_batch: int
    recompute: bool
    throughput_per_s: float


def plan_two_bw(problem: Problem) -> TrainPlan:
    """The equal split over depth d and width w with the highest modelled throughput.

    For each (w, d) the largest micro-batch that fits, with and without recomputation, the faster
    kept; two weight versions in memory; at least d micro-batches per update. A stage's batch time
    is `max(compute + messages, all-reduce / m)` (App. A.1.1), and w multiplies the rate of one
    pipeline. Raises InfeasiblePlanError when nothing fits.
    """
    segments = layer_segments(problem.table.graph, problem.linear_order)
    best = max(_points(problem, segments), key=lambda p: p.throughput_per_s, default=None)
    if best is None:
        constraint = tightest(problem.table, problem.micro_batches)
        raise InfeasiblePlanError(
            f"no equal split over {problem.num_devices} devices fits with two weight versions: "
            f"{constraint}; use method='graphpipe'",
            constraint,
        )
    plan = assemble(
        problem.table,
        _choices(segments, best),
        method="2bw",
        objective=str(problem.objective),
        schedule=SCHEDULE if best.depth > 1 else "1f1b",
        sequential=True,
        search=problem.statistics,
        notes=[f"w={best.width} d={best.depth}"],
    )
    if problem.objective is Objective.STEP_TIME:
        plan = plan.replace(step_time_s=problem.evaluate(plan))
    return plan


def _points(problem: Problem, segments: Sequence[tuple[int, ...]]) -> Iterator[_Point]:
    for depth in range(1, min(problem.num_devices, len(segments)) + 1):
        stages = _EqualStages(problem, _parts(segments, depth))
        for width in range(1, problem.num_devices // depth + 1):
            for recompute in (False, True):
                for micro_batch in sorted(problem.micro_batches, reverse=True):
                    if micro_batch % width or problem.table.batch_size // micro_batch < depth:
                        continue
                    problem.effort.num_candidates += 1
                    if stages.fits(width, micro_batch, recompute):
                        yield _Point(
                            width=width,
                            depth=depth,
                            micro_batch=micro_batch,
                            recompute=recompute,
                            throughput_per_s=micro_batch
                            / stages.micro_batch_s(width, micro_batch, recompute),
                        )
                        break


def _parts(segments: Sequence[tuple[int, ...]], depth: int) -> list[tuple[int, ...]]:
    """The operators of `depth` stages of equally many layers."""
    found: list[tuple[int, ...]] = []
    start = 0
    for count in even_split(len(segments), depth):
        found.append(tuple(op for part in segments[start : start + count] for op in part))
        start += count
    return found


class _EqualStages:
    """Prices of one equal split, for any width and micro-batch size."""

    def __init__(self, problem: Problem, parts: Sequence[tuple[int, ...]]) -> None:
        self.table = problem.table
        member = np.zeros((len(parts), self.table.num_ops), dtype=np.bool_)
        for row, ops in enumerate(parts):
            member[row, list(ops)] = True
        self.stages = StageTable(self.table, member)
        weights = np.zeros(self.table.num_ops)
        graph = self.table.graph
        for i, op in enumerate(graph.ops):
            weights[i] = sum(graph.parameter_by_id[name].size_bytes for name in op.param_ids)
        # Without a pipeline there is nothing in flight across an update, hence one version.
        self.second_version = member @ weights if len(parts) > 1 else np.zeros(1)

    def fits(self, width: int, micro_batch: int, recompute: bool) -> bool:
        """Whether every stage holds two weight versions and its activations in flight."""
        features = self.stages.features
        num_stages = len(self.stages)
        held = np.minimum(np.arange(num_stages, 0, -1) * micro_batch, self.table.batch_size)
        if recompute:
            activations = features.input_bytes * held + features.saved_bytes * micro_batch
        else:
            activations = features.saved_bytes * held
        total = features.state_bytes + self.second_version + activations / width
        total = total + self.stages.reserved_bytes(micro_batch // width)
        return bool((total <= self.table.memory_bytes).all())

    def micro_batch_s(self, width: int, micro_batch: int, recompute: bool) -> float:
        """Seconds between micro-batches in the steady state."""
        local = micro_batch // width
        forward_s, backward_s = self.stages.seconds(local)
        compute_s = forward_s + backward_s + (forward_s if recompute else 0.0)
        compute_s = compute_s + self.table.transfer_s(self.stages.features.boundary_bytes * local)
        reduce_s = self.table.all_reduce_s(self.stages.features.gradient_bytes, width)
        num_micro_batches = self.table.batch_size // micro_batch
        return float(np.maximum(compute_s, reduce_s / num_micro_batches).max())


def _choices(segments: Sequence[tuple[int, ...]], point: _Point) -> list[StageChoice]:
    width = point.width
    return [
        StageChoice(
            ops=ops,
            micro_batch=point.micro_batch,
            dp=width,
            recompute=point.recompute,
            devices=tuple(range(stage * width, (stage + 1) * width)),
        )
        for stage, ops in enumerate(_parts(segments, point.depth))
    ]
