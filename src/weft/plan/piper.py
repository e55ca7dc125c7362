"""Piper's dynamic programme over downsets (NeurIPS 2021; GraphPipe sheet §6.1), t = 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Graph
from weft.plan.assemble import StageChoice, assemble
from weft.plan.choose import choose, finished
from weft.plan.cost_table import StageTable, Variant, divisors
from weft.plan.graphpipe import to_plan
from weft.plan.infeasible import explain_infeasible
from weft.plan.problem import Problem, SearchLimitError, out_of_time
from weft.plan.search import BottleneckSearch
from weft.plan.spp import linear_search
from weft.plan.stage_space import membership
from weft.plan.train_plan import TrainPlan

MAX_DOWNSETS = 40_000
"""Downsets that the published program keeps; beyond them it gives up."""


def plan_piper(problem: Problem) -> TrainPlan:
    """The plan of Piper's search, run as synchronous 1F1B over a chain of stages.

    `dp[I][q][k]` is the least bottleneck of a set I closed under successors, cut into q stages on
    at most k devices; the stage I minus I' has q micro-batches in flight, as the runtime that
    executes it here (deviation: the published state counts data-parallel degrees instead, for
    micro-batches that are not split over replicas). The best chain of contiguous stages bounds the
    values kept, and is the plan where none is better.
    Raises SearchLimitError above 40,000 downsets or when time runs out before any plan,
    InfeasiblePlanError when nothing fits.
    """
    downsets = enumerate_downsets(problem.table.graph, MAX_DOWNSETS)
    if downsets is None:
        raise SearchLimitError(
            f"piper gives up: graph {problem.table.graph.name!r} has more than {MAX_DOWNSETS:,} "
            "downsets, the limit of the published program (n operators in each of p branches make "
            "(n+1)^p); use method='graphpipe'"
        )
    best = choose(problem, candidates(problem, downsets), len(problem.micro_batches))
    if best is None and problem.effort.timed_out:
        raise out_of_time(problem, "piper")
    if best is None:
        raise explain_infeasible(problem, [linear_search(problem)])
    return finished(problem, best)


def enumerate_downsets(graph: Graph, limit: int) -> list[int] | None:
    """All sets closed under successors as bit masks, small ones first; None above the limit."""
    follows = [0] * len(graph.ops)
    for edge in graph.edges:
        follows[graph.op_index[edge.source]] |= 1 << graph.op_index[edge.target]
    found = {0}
    frontier = [0]
    while frontier:
        larger: set[int] = set()
        for downset in frontier:
            for op, needed in enumerate(follows):
                if not downset >> op & 1 and needed & ~downset == 0:
                    larger.add(downset | 1 << op)
            if len(found) + len(larger) > limit:
                return None
        found |= larger
        frontier = sorted(larger)
    return sorted(found, key=lambda downset: (downset.bit_count(), downset))


def candidates(
    problem: Problem, downsets: Sequence[int], linear: BottleneckSearch | None = None
) -> Iterator[TrainPlan]:
    """The plan of least bottleneck of every micro-batch size; memory is not yet checked.

    Contiguous stages of the linearised graph are downsets too: their best plan is taken where no
    other is better.
    """
    linear = linear or linear_search(problem)
    for micro_batch in problem.micro_batches:
        if problem.effort.is_over:
            return
        bound = linear.least(micro_batch)
        # Sums in another order differ in the last bits, which are no improvement.
        limit_s = np.inf if bound is None else bound.bottleneck_s * (1 - 1e-9)
        choices = _DownsetSearch(problem, downsets, micro_batch, limit_s).best()
        if choices is None and bound is not None:
            yield to_plan(problem, micro_batch, bound, method="piper", sequential=True)
        elif choices is not None:
            yield assemble(
                problem.table,
                choices,
                method="piper",
                objective=str(problem.objective),
                sequential=True,
            )


def num_states(problem: Problem, downsets: Sequence[int], sizes: Sequence[int]) -> int:
    """States that `candidates` looks at over these micro-batch sizes, at most."""
    inside = membership(downsets, problem.table.num_ops).astype(np.float32)
    # Pairs (smaller, larger) with nothing of the smaller outside the larger.
    num_pairs = int(np.count_nonzero(inside @ (1.0 - inside).T == 0))
    max_stages = min(problem.num_devices, problem.table.num_ops)
    num_variants = len(problem.recompute_choices) * sum(
        len(divisors(size, problem.num_devices)) for size in sizes
    )
    return num_pairs * num_variants * max_stages * problem.num_devices


@dataclass(frozen=True, slots=True)
class _Step:
    """Arrays [q, k] of one downset: least bottleneck, and the stage added last."""

    least: NDArray[np.float64]
    before: NDArray[np.int32]
    variant: NDArray[np.int32]


class _DownsetSearch:
    def __init__(
        self, problem: Problem, downsets: Sequence[int], micro_batch: int, limit_s: float
    ) -> None:
        self.problem = problem
        self.downsets = downsets
        self.micro_batch = micro_batch
        self.limit_s = limit_s
        self.num_devices = problem.num_devices
        self.max_stages = min(problem.num_devices, problem.table.num_ops)
        self.variants = [
            Variant(dp=dp, recompute=recompute)
            for dp in divisors(micro_batch, problem.num_devices)
            for recompute in problem.recompute_choices
        ]
        self.member = membership(downsets, problem.table.num_ops)

    def best(self) -> list[StageChoice] | None:
        """The stages of the least bottleneck, first stage first, or None."""
        shape = (self.max_stages + 1, self.num_devices + 1)
        empty = np.full(shape, np.inf)
        empty[0] = 0.0
        none = np.zeros(shape, dtype=np.int32)
        steps = [_Step(least=empty, before=none, variant=none)]
        stacked = np.full((len(self.downsets), *shape), np.inf)
        stacked[0] = empty
        for number in range(1, len(self.downsets)):
            if self.problem.effort.is_over:
                return None
            step = self._step(number, stacked)
            steps.append(step)
            stacked[number] = step.least
        final = steps[-1].least[:, self.num_devices]
        if not np.isfinite(final).any():
            return None
        return self._read(steps, int(np.argmin(final)))

    def _step(self, number: int, stacked: NDArray[np.float64]) -> _Step:
        """Best ways to add one last stage (first in execution) and reach this downset."""
        whole = self.member[number]
        smaller = np.flatnonzero(~(self.member[:number] & ~whole).any(axis=1))
        smaller = smaller[np.isfinite(stacked[smaller, :, -1]).any(axis=1)]
        shape = stacked.shape[1:]
        least = np.full(shape, np.inf)
        before = np.zeros(shape, dtype=np.int32)
        chosen = np.zeros(shape, dtype=np.int32)
        prices = StageTable(self.problem.table, whole & ~self.member[smaller]).candidates(
            self.micro_batch, self.variants, self.problem.k
        )
        self.problem.effort.num_candidates += prices.time_per_sample_s.size
        depth = np.arange(1, shape[0])
        for column, variant in enumerate(self.variants):
            seconds = prices.time_per_sample_s[:, column]
            rows = np.flatnonzero(seconds <= self.limit_s)
            if not len(rows):
                continue
            rest = stacked[smaller[rows], :-1, : shape[1] - variant.dp]
            total = np.maximum(rest, seconds[rows, None, None])
            held = prices.max_in_flight[rows, column]
            total[held[:, None] < depth[None, :]] = np.inf
            self.problem.effort.num_states += total.size
            at = np.argmin(total, axis=0)
            value = np.take_along_axis(total, at[None], axis=0)[0]
            target = least[1:, variant.dp :]
            better = value < target
            target[better] = value[better]
            before[1:, variant.dp :][better] = smaller[rows][at][better]
            chosen[1:, variant.dp :][better] = column
        return _Step(least=least, before=before, variant=chosen)

    def _read(self, steps: Sequence[_Step], num_stages: int) -> list[StageChoice]:
        found: list[StageChoice] = []
        number, devices = len(steps) - 1, self.num_devices
        for q in range(num_stages, 0, -1):
            step = steps[number]
            variant = self.variants[int(step.variant[q, devices])]
            smaller = int(step.before[q, devices])
            inside = self.member[number] & ~self.member[smaller]
            found.append(
                StageChoice(
                    ops=tuple(np.flatnonzero(inside).tolist()),
                    micro_batch=self.micro_batch,
                    dp=variant.dp,
                    k=self.problem.k,
                    recompute=variant.recompute,
                )
            )
            number, devices = smaller, devices - variant.dp
        return found
