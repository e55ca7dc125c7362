"""Megatron-LM's configuration rules: uniform layers, p x t x d (arXiv 2104.04473 §3; sheet §4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from weft.plan.assemble import StageChoice, assemble
from weft.plan.choose import choose, finished, fits_memory
from weft.plan.cost_table import divisors
from weft.plan.infeasible import memory_change, tightest
from weft.plan.layers import layer_segments
from weft.plan.problem import InfeasiblePlanError, Objective, Problem
from weft.plan.train_plan import TrainPlan

MAX_ASSEMBLED = 24
"""Configurations that are assembled in full: the best by Megatron's own formula."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """Pipeline, tensor and data degree, chunks per device, micro-batch (over all replicas)."""

    p: int
    t: int
    d: int
    v: int
    micro_batch: int
    recompute: bool
    estimate_s: float = 0.0
    bound_s: float = 0.0
    """Seconds that no step of this configuration undercuts."""


def plan_megatron(problem: Problem) -> TrainPlan:
    """The best uniform p x t x d configuration of the linearised model.

    Layers are split evenly over p*v stages; t is at most a node's devices; all devices are used.
    Chosen by `(m + (p-1)/v) * (tf + tb)` plus the gradient all-reduce, then by the objective.
    Raises InfeasiblePlanError when none fits.
    """
    best = choose(problem, candidates(problem))
    if best is None:
        constraint = tightest(problem.table, problem.micro_batches)
        changes = memory_change(every_plan(problem))
        would = f"it would fit with {changes[0]}; or " if changes else ""
        raise InfeasiblePlanError(
            f"no uniform split of layers over {problem.num_devices} devices fits: {constraint}; "
            f"{would}use method='graphpipe'",
            constraint,
            changes,
        )
    return finished(problem, best)


def every_plan(problem: Problem) -> Iterator[TrainPlan]:
    """The plan of every configuration, whether or not it fits in memory."""
    segments = layer_segments(problem.table.graph, problem.linear_order)
    for configuration in _configurations(problem, segments):
        plan = to_plan(problem, segments, configuration)
        if plan is not None:
            yield plan


def candidates(problem: Problem) -> Iterator[TrainPlan]:
    """Plans of the most promising configurations that fit in memory."""
    segments = layer_segments(problem.table.graph, problem.linear_order)
    num_fitting = 0
    for configuration in ranked_configurations(problem, segments):
        plan = to_plan(problem, segments, configuration)
        if plan is not None and fits_memory(plan):
            num_fitting += 1
            yield plan
        if num_fitting == MAX_ASSEMBLED:
            return


def ranked_configurations(
    problem: Problem, segments: Sequence[tuple[int, ...]]
) -> list[Configuration]:
    """Every configuration that the rules allow, best by Megatron's formula first."""
    formula = _Formula(problem, segments)
    found = [formula.applied(c) for c in _configurations(problem, segments)]
    problem.effort.num_candidates += len(found)
    return sorted(found, key=lambda c: c.estimate_s)


def _configurations(
    problem: Problem, segments: Sequence[tuple[int, ...]]
) -> Iterator[Configuration]:
    cluster = problem.table.cluster
    num_devices = problem.num_devices
    per_node = min(node.num_devices for node in cluster.nodes)
    for t in divisors(num_devices, per_node):
        for p in divisors(num_devices // t, min(num_devices // t, len(segments))):
            d = num_devices // (t * p)
            if len(segments) % p:
                continue
            for micro_batch in problem.micro_batches:
                if micro_batch % d:
                    continue
                m = problem.table.batch_size // micro_batch
                for v in divisors(len(segments) // p, len(segments) // p):
                    if v > 1 and (p == 1 or m % p or problem.objective is Objective.BOTTLENECK):
                        continue
                    for recompute in problem.recompute_choices:
                        yield Configuration(
                            p=p, t=t, d=d, v=v, micro_batch=micro_batch, recompute=recompute
                        )


class _Formula:
    """Megatron's formula (sheet §4) and a lower bound, on one problem's layers."""

    def __init__(self, problem: Problem, segments: Sequence[tuple[int, ...]]) -> None:
        table = problem.table
        self.table = table
        self.num_layers = len(segments)
        self.gradient_bytes = sum(table.training.gradient_bytes(p) for p in table.graph.parameters)
        # A stage that is frozen skips even the fixed cost of backward, so only backwards with work
        # surely count.
        self.has_backward = np.array([op.flops_backward > 0 for op in table.graph.ops])
        self.inside = np.zeros((len(segments), table.num_ops))
        for row, segment in enumerate(segments):
            self.inside[row, list(segment)] = 1.0
        self._layers: dict[tuple[int, int, bool], tuple[NDArray[np.float64], ...]] = {}

    def applied(self, c: Configuration) -> Configuration:
        """The configuration with its estimate, on the slowest stage, and its bound."""
        total_s, least_s, forward_s = self._layers_s(c)
        per_device = self.num_layers // c.p
        # Chunks of a device are not contiguous; on uniform layers every p-th share weighs the same.
        slowest_s = float(total_s.reshape(c.p, per_device).sum(axis=1).max())
        m = self.table.batch_size // c.micro_batch
        ring = range(0, c.d * c.t, c.t)
        all_reduce_s = 0.0
        if c.d > 1:
            all_reduce_s = self.table.cost.all_reduce_s(
                self.gradient_bytes / (c.p * c.t), ring, self.table.cluster
            )
        # A device computes every micro-batch, after the stages before it forward one.
        chunks_s = least_s.reshape(c.v, c.p, -1).sum(axis=2)
        fill_s = forward_s.reshape(c.v, c.p, -1).sum(axis=2)[0]
        bound_s = float((m * chunks_s.sum(axis=0) + np.cumsum(fill_s) - fill_s).max())
        return replace(
            c,
            estimate_s=(m + (c.p - 1) / c.v) * slowest_s + all_reduce_s,
            bound_s=bound_s * (1 - 1e-9),
        )

    def _layers_s(self, c: Configuration) -> tuple[NDArray[np.float64], ...]:
        """Seconds of each layer: of both passes, at least of both, and of forward."""
        key = (c.micro_batch // c.d, c.t, c.recompute)
        if key not in self._layers:
            times = self.table.op_times(c.micro_batch // c.d, c.t)
            least = self.table.least_op_times(c.micro_batch // c.d, c.t)
            again = 2 if c.recompute else 1
            self._layers[key] = (
                self.inside @ (times.forward_s * again + times.backward_s),
                self.inside @ (least.forward_s * again + least.backward_s * self.has_backward),
                self.inside @ least.forward_s,
            )
        return self._layers[key]


def _is_chain(problem: Problem, segments: Sequence[tuple[int, ...]], num_stages: int) -> bool:
    """Whether no tensor skips a stage of an even split."""
    per_stage = len(segments) // num_stages
    stage_of = {op: i // per_stage for i, segment in enumerate(segments) for op in segment}
    graph = problem.table.graph
    return all(
        stage_of[graph.op_index[e.target]] - stage_of[graph.op_index[e.source]] <= 1
        for e in graph.edges
    )


def to_plan(
    problem: Problem, segments: Sequence[tuple[int, ...]], configuration: Configuration
) -> TrainPlan | None:
    """The plan of a configuration, stage s on device group s mod p; None where it cannot run.

    Interleaving sends round the ring of devices, so it needs a model without skips.
    """
    c = configuration
    num_stages = c.p * c.v
    if c.v > 1 and not _is_chain(problem, segments, num_stages):
        return None
    per_stage = len(segments) // num_stages
    group = c.t * c.d
    choices = [
        StageChoice(
            ops=tuple(op for part in segments[s * per_stage : (s + 1) * per_stage] for op in part),
            micro_batch=c.micro_batch,
            dp=c.d,
            tp=c.t,
            recompute=c.recompute,
            devices=tuple(range((s % c.p) * group, (s % c.p + 1) * group)),
        )
        for s in range(num_stages)
    ]
    return assemble(
        problem.table,
        choices,
        method="megatron",
        objective=str(problem.objective),
        schedule="interleaved" if c.v > 1 else "1f1b",
        sequential=True,
        notes=[f"p={c.p} t={c.t} d={c.d} v={c.v}"],
    )
