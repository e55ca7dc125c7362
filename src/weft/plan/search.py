"""The least largest time per sample over all micro-batch sizes: the search around the solver."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.plan.bottleneck import NONE, BottleneckSolver, Solution
from weft.plan.constraints import NO_RULES, Rules
from weft.plan.cost_table import Candidates, CostTable, StageTable, Variant, divisors
from weft.plan.stage_space import StageSpace

LIKELY_FACTORS = (1.1, 1.35)
"""Multiples of the lower bound that a search tries first; most problems are solved within them."""


@dataclass(slots=True)
class Effort:
    """Work done by a search so far, and when it must stop."""

    deadline_s: float | None = None
    num_candidates: int = 0
    num_states: int = 0
    num_iterations: int = 0
    timed_out: bool = False
    started_s: float = field(default_factory=time.perf_counter)

    @property
    def is_over(self) -> bool:
        """Whether the time limit has passed; once it has, the search is marked."""
        if self.deadline_s is not None and time.perf_counter() >= self.deadline_s:
            self.timed_out = True
        return self.timed_out

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.started_s


@dataclass(frozen=True, slots=True)
class Found:
    """The best solution of one micro-batch size."""

    micro_batch: int
    solution: Solution


class BottleneckSearch:
    """Searches a stage space; candidate prices are kept between calls."""

    def __init__(
        self,
        table: CostTable,
        space: StageSpace,
        *,
        num_devices: int,
        recompute_choices: Sequence[bool] = (False,),
        k: int = 1,
        rules: Rules = NO_RULES,
        effort: Effort | None = None,
    ) -> None:
        self.table = table
        self.space = space
        self.num_devices = num_devices
        self.recompute_choices = tuple(recompute_choices)
        self.k = k
        self.rules = rules
        self.effort = effort or Effort()
        self.stages = StageTable(table, space.member)
        self._solvers: dict[int, BottleneckSolver] = {}
        self._least: dict[int, Solution | None] = {}

    def solver(self, micro_batch: int) -> BottleneckSolver:
        """The solver of one micro-batch size."""
        if micro_batch not in self._solvers:
            variants = self._variants(micro_batch, self.num_devices)
            depth = min(self.num_devices, self.space.depth)
            candidates = self.stages.candidates(micro_batch, variants, self.k)
            self.effort.num_candidates += candidates.time_per_sample_s.size
            self._solvers[micro_batch] = self._new_solver(candidates, depth)
        return self._solvers[micro_batch]

    def _variants(self, micro_batch: int, max_devices: int) -> list[Variant]:
        return [
            Variant(dp=dp, recompute=recompute)
            for dp in divisors(micro_batch, max_devices)
            for recompute in self.recompute_choices
        ]

    def _new_solver(self, candidates: Candidates, depth: int) -> BottleneckSolver:
        if self.rules.pinned or self.rules.sizes:
            for row, mask in enumerate(self.space.masks):
                for column, variant in enumerate(candidates.variants):
                    if not self.rules.allows_size(mask, variant.dp):
                        candidates.time_per_sample_s[row, column] = np.inf
        return BottleneckSolver(self.space, candidates, depth)

    def lower_bound_s(self, micro_batch: int) -> float:
        """A time per sample that no plan of this micro-batch size beats.

        The devices together do at least the cheapest work of every operator, and some stage holds
        the operator that is slowest however many devices it gets.
        """
        work, slowest = np.inf, np.inf
        # A frozen stage skips even the fixed cost of backward.
        has_backward = np.array([op.flops_backward > 0 for op in self.table.graph.ops])
        for dp in divisors(micro_batch, self.num_devices):
            times = self.table.least_op_times(micro_batch // dp)
            seconds = (times.forward_s + times.backward_s * has_backward) / micro_batch
            work = np.minimum(work, seconds * dp)
            slowest = np.minimum(slowest, seconds)
        # Sums in another order differ in the last bits; the bound stays safely below.
        return float(max(np.sum(work) / self.num_devices, np.max(slowest))) * (1 - 1e-9)

    def best(self, micro_batches: Sequence[int], below_s: float = np.inf) -> Found | None:
        """The best solution over these micro-batch sizes with a bottleneck under `below_s`."""
        bounds = sorted((self.lower_bound_s(b), b) for b in micro_batches)
        found: Found | None = None
        for bound_s, micro_batch in bounds:
            if bound_s >= below_s or (found is not None and self.effort.is_over):
                continue
            solution = self.least(micro_batch, below_s)
            if solution is not None:
                found = Found(micro_batch, solution)
                below_s = solution.bottleneck_s
        return found

    def least(self, micro_batch: int, below_s: float = np.inf) -> Solution | None:
        """The solution of least bottleneck of one micro-batch size, if any is under `below_s`.

        A bisection over the distinct prices of candidate stages: exact, since the bottleneck is one
        of them. After a success it goes on below what was achieved, which is often far below the
        bound that was tried. The solution is the solver's for the least bottleneck itself, whatever
        bounds were tried on the way.
        """
        if math.isfinite(below_s):
            return self._new_least(micro_batch, below_s)
        if micro_batch not in self._least:
            self._least[micro_batch] = self._new_least(micro_batch, below_s)
        return self._least[micro_batch]

    def _new_least(self, micro_batch: int, below_s: float) -> Solution | None:
        *_, (tried_s, best) = ((math.inf, None), *self._improvements(micro_batch, below_s))
        if best is None or best.bottleneck_s == tried_s:
            return best
        return self._try(micro_batch, best.bottleneck_s) or best

    def _improvements(self, micro_batch: int, below_s: float) -> Iterator[tuple[float, Solution]]:
        """Bounds that were met, each with a solution, ever lower."""
        highest = float(np.nextafter(below_s, 0.0)) if np.isfinite(below_s) else float(np.inf)
        lower = self.lower_bound_s(micro_batch)
        failed, tried, solution = lower * (1 - 1e-9), 0.0, None
        for factor in (*LIKELY_FACTORS, np.inf):
            tried = min(lower * factor, highest) if np.isfinite(factor) else highest
            solution = self._try(micro_batch, tried)
            if solution is not None or tried == highest:
                break
            failed = tried
        if solution is None:
            return
        yield tried, solution
        prices = self.solver(micro_batch).candidates.time_per_sample_s
        inside = prices[(prices > failed) & (prices < solution.bottleneck_s)]
        values = np.unique(inside)
        low, high = 0, len(values)
        while low < high and not self.effort.is_over:
            middle = (low + high) // 2
            solution = self._try(micro_batch, float(values[middle]))
            if solution is None:
                low = middle + 1
            else:
                yield float(values[middle]), solution
                high = int(np.searchsorted(values, solution.bottleneck_s))

    def _try(self, micro_batch: int, bound_s: float) -> Solution | None:
        solver = self.solver(micro_batch)
        before = solver.num_states
        solution = solver.solve(bound_s, self.num_devices)
        self.effort.num_states += solver.num_states - before
        self.effort.num_iterations += 1
        return solution

    def fewest_devices(self, micro_batch: int, limit: int) -> int | None:
        """Fewest devices, up to `limit` in a stage, on which this micro-batch size fits at all."""
        variants = self._variants(micro_batch, limit)
        fitting = self.stages.fitting(micro_batch, variants, self.k)
        solver = self._new_solver(fitting, self.space.depth)
        fewest = int(solver.fewest_devices(np.inf)[-1])
        return None if fewest >= NONE else fewest

    def fits(self, micro_batch: int, memory_bytes: int) -> bool:
        """Whether this micro-batch size fits, however slow, with another size of memory."""
        variants = self._variants(micro_batch, self.num_devices)
        depth = min(self.num_devices, self.space.depth)
        fitting = self.stages.fitting(micro_batch, variants, self.k, memory_bytes)
        solver = self._new_solver(fitting, depth)
        return int(solver.fewest_devices(np.inf)[-1]) <= self.num_devices
