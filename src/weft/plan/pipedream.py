"""PipeDream's hierarchical partitioner on the linearised graph (GraphPipe sheet §6.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.assemble import StageChoice, assemble
from weft.plan.choose import choose, finished, fits_memory
from weft.plan.cost_table import UNLIMITED, Variant
from weft.plan.infeasible import explain_infeasible
from weft.plan.problem import Problem, out_of_time
from weft.plan.search import BottleneckSearch
from weft.plan.spp import linear_search
from weft.plan.train_plan import TrainPlan


def plan_pipedream(problem: Problem) -> TrainPlan:
    """The plan of PipeDream's dynamic programme, run as synchronous 1F1B over a chain of stages.

    `A[i][j][m]`, the least bottleneck of operators i..j on m devices of a server, is solved for all
    i, j, m; whole servers are then the machines of a second level, where a segment is replicated
    over m2 of them. Stages are priced by the shared tables, which amortise the all-reduce over the
    batch as synchronous training does. In-flight counts are not part of its state: stages are
    checked against an assumed count, which is raised until the finished plan fits (deviation: the
    published check assumes asynchronous warm-up). Raises InfeasiblePlanError when nothing fits,
    SearchLimitError when time runs out before any plan.
    """
    search = linear_search(problem)
    best = choose(problem, candidates(problem, search), len(problem.micro_batches))
    if best is None and problem.effort.timed_out:
        raise out_of_time(problem, "pipedream")
    if best is None:
        raise explain_infeasible(problem, search)
    return finished(problem, best)


def candidates(problem: Problem, search: BottleneckSearch | None = None) -> Iterator[TrainPlan]:
    """The plan of every micro-batch size that fits in memory."""
    search = search or linear_search(problem)
    for micro_batch in problem.micro_batches:
        if problem.effort.is_over:
            return
        assumed = 1
        while True:
            stages = _Hierarchy(problem, search, micro_batch, assumed).best()
            if stages is None:
                break
            plan = assemble(
                problem.table,
                stages,
                method="pipedream",
                objective=str(problem.objective),
                sequential=True,
            )
            if fits_memory(plan):
                yield plan
                break
            if assumed >= plan.num_stages:
                break
            assumed = min(2 * assumed, plan.num_stages)


@dataclass(frozen=True, slots=True)
class _Level:
    """Least bottleneck [m, i, j] of segment i..j on m devices, and the last stage that gives it.

    `cut` is where the last stage begins, `size` the devices of a server that it takes.
    """

    least: NDArray[np.float64]
    cut: NDArray[np.int32]
    size: NDArray[np.int32]


class _Hierarchy:
    """The two levels of one micro-batch size."""

    def __init__(
        self, problem: Problem, search: BottleneckSearch, micro_batch: int, assumed: int
    ) -> None:
        self.problem = problem
        self.search = search
        self.micro_batch = micro_batch
        self.assumed = assumed
        sizes = [node.num_devices for node in problem.table.cluster.nodes]
        self.per_server = math.gcd(*sizes)
        self.num_servers = problem.num_devices // self.per_server
        self.stage = search.space.root.stage
        self.size = search.space.root.num_elements
        self._prices: dict[tuple[int, bool], NDArray[np.float64]] = {}

    def _seconds(self, dp: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Time per sample of every segment [i, j] on `dp` devices, and whether it recomputes."""
        best = np.full((self.size, self.size + 1), np.inf)
        recomputed = np.zeros(best.shape, dtype=np.bool_)
        if self.micro_batch % dp:
            return best, recomputed
        for recompute in self.problem.recompute_choices:
            key = (dp, recompute)
            if key not in self._prices:
                self._prices[key] = self._new_prices(Variant(dp=dp, recompute=recompute))
            better = self._prices[key] < best
            best = np.where(better, self._prices[key], best)
            recomputed = np.where(better, recompute, recomputed)
        return best, recomputed

    def _new_prices(self, variant: Variant) -> NDArray[np.float64]:
        stages = self.search.stages
        found = stages.candidates(self.micro_batch, [variant], self.problem.k)
        self.problem.effort.num_candidates += len(stages)
        limit = np.minimum(found.max_in_flight[:, 0], UNLIMITED)
        seconds = np.where(limit >= self.assumed, found.time_per_sample_s[:, 0], np.inf)
        table = np.append(seconds, np.inf)
        return table[self.stage]

    def inner(self, replicas: int) -> _Level:
        """Segments inside a server that is replicated `replicas` times."""
        n, num = self.size, self.per_server
        least = np.full((num + 1, n, n + 1), np.inf)
        cut = np.zeros(least.shape, dtype=np.int32)
        size = np.zeros(least.shape, dtype=np.int32)
        seconds = {m: self._seconds(m * replicas)[0] for m in range(1, num + 1)}
        rows = np.arange(n)
        for m in range(1, num + 1):
            least[m], size[m] = seconds[m], m
            cut[m] = rows[:, None]
            for last in range(1, m):
                price = seconds[last]
                for j in range(2, n + 1):
                    worst = np.maximum(least[m - last][:, 1:j], price[1:j, j][None, :])
                    self.problem.effort.num_states += worst.size
                    at = np.argmin(worst, axis=1)
                    value = worst[rows, at]
                    better = value < least[m, :, j]
                    least[m, better, j] = value[better]
                    cut[m, better, j] = at[better] + 1
                    size[m, better, j] = last
        return _Level(least=least, cut=cut, size=size)

    def best(self) -> list[StageChoice] | None:
        """The stages of the least bottleneck over whole servers, or None."""
        n, servers = self.size, self.num_servers
        levels = {r: self.inner(r) for r in range(1, servers + 1) if self.micro_batch % r == 0}
        least = np.full((servers + 1, n + 1), np.inf)
        least[:, 0] = 0.0
        choice: dict[tuple[int, int], tuple[int, int, int]] = {}
        for s in range(1, servers + 1):
            for replicas, level in levels.items():
                if replicas > s:
                    continue
                # Any part of a server may stay idle: the segment takes its best device count.
                counts = np.argmin(level.least[1:], axis=0) + 1
                inside = level.least[1:].min(axis=0)
                worst = np.maximum(least[s - replicas][:n, None], inside)
                at = np.argmin(worst, axis=0)
                value = worst[at, np.arange(n + 1)]
                for j in np.flatnonzero(value < least[s]).tolist():
                    least[s, j] = value[j]
                    choice[s, j] = (int(at[j]), replicas, int(counts[at[j], j]))
            idle = least[s - 1] <= least[s]
            least[s, idle] = least[s - 1, idle]
            for j in np.flatnonzero(idle).tolist():
                choice.pop((s, j), None)
        if not np.isfinite(least[servers, n]):
            return None
        return self._read(levels, choice, servers)

    def _read(
        self,
        levels: dict[int, _Level],
        choice: dict[tuple[int, int], tuple[int, int, int]],
        servers: int,
    ) -> list[StageChoice]:
        found: list[StageChoice] = []
        s, j = servers, self.size
        while j > 0:
            if (s, j) not in choice:
                s -= 1
                continue
            start, replicas, devices = choice[s, j]
            level = levels[replicas]
            m, end = devices, j
            while end > start:
                begin, last = int(level.cut[m, start, end]), int(level.size[m, start, end])
                found.append(self._choice(begin, end, last * replicas))
                m, end = m - last, begin
            s, j = s - replicas, start
        return found[::-1]

    def _choice(self, start: int, end: int, dp: int) -> StageChoice:
        stage = int(self.stage[start, end])
        _, recomputed = self._seconds(dp)
        return StageChoice(
            ops=tuple(np.flatnonzero(self.search.space.member[stage]).tolist()),
            micro_batch=self.micro_batch,
            dp=dp,
            k=self.problem.k,
            recompute=bool(recomputed[start, end]),
        )
