"""PipeDream's hierarchical partitioner on the linearised graph (GraphPipe sheet §6.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weft.plan.assemble import StageChoice, assemble
from weft.plan.choose import choose, finished, fits_memory
from weft.plan.cost_table import Variant
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
        raise explain_infeasible(problem, [search])
    return finished(problem, best)


def candidates(problem: Problem, search: BottleneckSearch | None = None) -> Iterator[TrainPlan]:
    """The plan of every micro-batch size that fits in memory."""
    search = search or linear_search(problem)
    for micro_batch in problem.micro_batches:
        if problem.effort.is_over:
            return
        found = plan_of_size(problem, search, micro_batch)
        if found is not None:
            yield found


def plan_of_size(
    problem: Problem, search: BottleneckSearch, micro_batch: int, likely_s: float = math.inf
) -> TrainPlan | None:
    """The plan of one micro-batch size, if it fits in memory.

    `likely_s` is a time per sample that its bottleneck probably does not exceed: the plan does not
    depend on it, but is found sooner when it is right.
    """
    assumed = 1
    while True:
        hierarchy = _Hierarchy(problem, search, micro_batch, assumed)
        stages = hierarchy.best(likely_s) if math.isfinite(likely_s) else None
        stages = stages or hierarchy.best()
        if stages is None:
            return None
        plan = assemble(
            problem.table,
            stages,
            method="pipedream",
            objective=str(problem.objective),
            sequential=True,
        )
        if fits_memory(plan):
            return plan
        if assumed >= plan.num_stages:
            return None
        assumed = min(2 * assumed, plan.num_stages)


class _Hierarchy:
    """The two levels of one micro-batch size.

    `least[m][i, j]` of a level is the least bottleneck of segment i..j on m devices of a server.
    Only these are kept: where a segment was cut is found again when the plan is read.
    """

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

    def _seconds(self, dp: int, limit_s: float) -> NDArray[np.float64]:
        """Time per sample of every segment [i, j] on `dp` devices, infinite above the limit."""
        best = np.full((self.size, self.size + 1), np.inf)
        if self.micro_batch % dp:
            return best
        for recompute in self.problem.recompute_choices:
            np.minimum(best, self._price(dp, recompute), out=best)
        best[best > limit_s] = np.inf
        return best

    def _price(self, dp: int, recompute: bool) -> NDArray[np.float64]:
        key = (dp, recompute)
        if key not in self._prices:
            found = self.search.solver(self.micro_batch).candidates
            column = found.variants.index(Variant(dp=dp, recompute=recompute))
            fits = found.max_in_flight[:, column] >= self.assumed
            seconds = np.where(fits, found.time_per_sample_s[:, column], np.inf)
            table = np.append(seconds, np.inf)
            self._prices[key] = table[self.stage]
        return self._prices[key]

    def _inner(self, replicas: int, limit_s: float) -> list[NDArray[np.float64]]:
        """`least` by devices of a server whose segments are replicated `replicas` times."""
        sizes = range(self.per_server + 1)
        price = [self._seconds(m * replicas, limit_s) if m else _EMPTY for m in sizes]
        least = [_EMPTY]
        for m in sizes[1:]:
            here = price[m].copy()
            for last in range(1, m):
                self._join(least[m - last], price[last], here)
            least.append(here)
        return least

    def _join(
        self, first: NDArray[np.float64], last: NDArray[np.float64], out: NDArray[np.float64]
    ) -> None:
        """Lower `out[i, j]` to the least over k of max(first[i, k], last[k, j])."""
        reach, span = _width(first), _width(last)
        if not reach or not span:
            return
        n = self.size
        # Rows by length instead of end: then one step is all segments whose first part is equally
        # long, and only the lengths that occur are looked at.
        tails = _by_length(last, span)
        found = np.full((n, reach + span + 1), np.inf)
        for length in range(1, min(reach, n - 1) + 1):
            heads = np.diagonal(first, length)[: n - length, None]
            worst = np.maximum(heads, tails[length:, 1:])
            self.problem.effort.num_states += worst.size
            here = found[: n - length, length + 1 : length + span + 1]
            np.minimum(here, worst, out=here)
        starts, ends = _segments(n, reach + span)
        out[starts, ends] = np.minimum(out[starts, ends], found[starts, ends - starts])

    def best(self, limit_s: float = math.inf) -> list[StageChoice] | None:
        """The stages of the least bottleneck over whole servers, or None if it is over the limit.

        A limit that is not exceeded changes nothing: it only removes segments that no plan of that
        bottleneck holds.
        """
        n, servers = self.size, self.num_servers
        levels: dict[int, list[NDArray[np.float64]]] = {}
        inside: dict[int, NDArray[np.float64]] = {}
        for r in range(1, servers + 1):
            if self.micro_batch % r == 0:
                # Any part of a server may stay idle: the segment takes its best device count.
                levels[r] = self._inner(r, limit_s)
                inside[r] = np.min(levels[r][1:], axis=0)
        least = np.full((servers + 1, n + 1), np.inf)
        least[:, 0] = 0.0
        useful = [r for r, seconds in inside.items() if np.isfinite(seconds).any()]
        for s in range(1, servers + 1):
            least[s] = least[s - 1]
            for r in useful:
                if r > s:
                    break
                worst = np.maximum(least[s - r][:n, None], inside[r])
                np.minimum(least[s], worst.min(axis=0), out=least[s])
        if not np.isfinite(least[servers, n]):
            return None
        return self._read(levels, inside, least, limit_s)

    def _read(
        self,
        levels: Mapping[int, Sequence[NDArray[np.float64]]],
        inside: Mapping[int, NDArray[np.float64]],
        least: NDArray[np.float64],
        limit_s: float,
    ) -> list[StageChoice]:
        """The stages, last to first; of equal choices the first one in the order of the search."""
        found: list[StageChoice] = []
        s, j = self.num_servers, self.size
        while j > 0:
            if least[s - 1, j] <= least[s, j]:
                s -= 1
                continue
            for replicas, seconds in inside.items():
                if replicas > s:
                    continue
                worst = np.maximum(least[s - replicas][: self.size], seconds[:, j])
                start = int(np.argmin(worst))
                if worst[start] == least[s, j]:
                    break
            else:
                raise AssertionError("no choice attains the value that was found")
            level = levels[replicas]
            devices = int(np.argmin([part[start, j] for part in level[1:]])) + 1
            found.extend(self._read_server(level, replicas, start, j, devices, limit_s))
            s, j = s - replicas, start
        return found[::-1]

    def _read_server(
        self,
        level: Sequence[NDArray[np.float64]],
        replicas: int,
        start: int,
        end: int,
        devices: int,
        limit_s: float,
    ) -> Iterator[StageChoice]:
        """The stages of a segment on that many devices of a server, last to first."""
        while end > start:
            value = level[devices][start, end]
            begin, last = start, devices
            if self._seconds(devices * replicas, limit_s)[start, end] > value:
                for last in range(1, devices):
                    price = self._seconds(last * replicas, limit_s)[start + 1 : end, end]
                    worst = np.maximum(level[devices - last][start, start + 1 : end], price)
                    if worst.min(initial=np.inf) == value:
                        begin = start + 1 + int(np.argmin(worst))
                        break
            yield self._choice(begin, end, last * replicas)
            devices, end = devices - last, begin

    def _choice(self, start: int, end: int, dp: int) -> StageChoice:
        stage = int(self.stage[start, end])
        prices = [
            self._price(dp, recompute)[start, end] for recompute in self.problem.recompute_choices
        ]
        return StageChoice(
            ops=tuple(np.flatnonzero(self.search.space.member[stage]).tolist()),
            micro_batch=self.micro_batch,
            dp=dp,
            k=self.problem.k,
            recompute=self.problem.recompute_choices[int(np.argmin(prices))],
        )


@lru_cache(maxsize=256)
def _segments(size: int, longest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of all segments of `size` operators up to a length."""
    starts, ends = np.triu_indices(size, 1, size + 1)
    short = ends - starts <= longest
    return starts[short], ends[short]


def _by_length(seconds: NDArray[np.float64], longest: int) -> NDArray[np.float64]:
    """Times [i, j] of segments as [i, j - i], infinite where there is none."""
    size = len(seconds)
    found = np.full((size, longest + 1), np.inf)
    starts, ends = _segments(size, longest)
    found[starts, ends - starts] = seconds[starts, ends]
    return found


def _width(seconds: NDArray[np.float64]) -> int:
    """Operators of the longest segment with a finite time."""
    starts, ends = np.nonzero(np.isfinite(seconds))
    return int((ends - starts).max(initial=0))


_EMPTY: NDArray[np.float64] = np.empty((0, 0))
