"""The graphpipe planner for the step time: candidates over every shape, the fastest simulated."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weft.graph.series_parallel import Composition
from weft.plan import data_parallel, megatron, pipedream, piper
from weft.plan.bottleneck import Solution
from weft.plan.choose import evaluated, fits_memory
from weft.plan.estimate import least_step_s, pipeline_s
from weft.plan.graphpipe import new_search, notes, to_plan
from weft.plan.infeasible import explain_infeasible
from weft.plan.layers import layer_segments
from weft.plan.mixed_devices import heaviest_on_fastest, is_mixed, moved, on_faster_devices
from weft.plan.problem import InfeasiblePlanError, Problem
from weft.plan.search import BottleneckSearch
from weft.plan.spp import linear_search
from weft.plan.train_plan import TrainPlan

SLACK = (1.08, 1.2, 1.4, 1.7, 2.2, 3.0, 5.0)
"""How much slower than the best the bottleneck may be for a shallower pipeline."""

SIMULATED_PER_SIZE = 4
"""Candidates of one micro-batch size that are simulated: the best by the closed form."""

MAX_UNIFORM = 64
"""Uniform splits that are simulated at most; few are, since most are bounded away."""

OVERLAP = 1.25
"""How much longer than the best step the batch at a bottleneck's rate may take: it prices messages
that the simulation overlaps with work."""

LIKELY_SLACK = 1.1
"""How far PipeDream's bottleneck is expected above that of `spp`, for a quick first search."""

MAX_PIPER_STATES = 20_000_000
"""States of Piper's search, all micro-batch sizes together, up to which its plan is one too."""

SMALL_DOWNSETS = 1000
"""Downsets up to which those states are counted."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    estimate_s: float
    micro_batch: int
    solution: Solution
    sequential: bool


class _Fastest:
    """The fastest of the plans offered; one that cannot be faster is not simulated."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.plan: TrainPlan | None = None
        self.step_time_s = math.inf
        self._seen: set[Hashable] = set()

    def offer(self, plan: TrainPlan) -> bool:
        """Take the plan if it fits and is faster; whether it had to be simulated for that."""
        if not fits_memory(plan) or least_step_s(plan) * (1 - 1e-9) >= self.step_time_s:
            return False
        key = (plan.schedule, _shape(plan), frozenset(plan.edge_by_pair))
        if key in self._seen:
            return False
        self._seen.add(key)
        plan = evaluated(self.problem, plan)
        if plan.step_time_s < self.step_time_s:
            self.plan, self.step_time_s = plan, plan.step_time_s
        return True

    def may_stop(self) -> bool:
        """Whether there is a plan and no time left for another."""
        return self.plan is not None and self.problem.effort.is_over


def _shape(plan: TrainPlan) -> Hashable:
    """What a planner decides about the stages of a plan."""
    return tuple(
        (stage.ops, stage.devices, stage.tp, stage.micro_batch, stage.recompute)
        for stage in plan.stages
    )


def plan_step_time(problem: Problem) -> TrainPlan:
    """The plan with the least simulated step time among candidates of many shapes.

    For every micro-batch size whose work alone is not slower than the best plan so far: the stage
    graphs of the class and the contiguous partitions of the linearised graph, at the least
    bottleneck and at slower ones that save depth, the latter also run as a chain, as sequential
    planners do; besides, pure data parallelism, Megatron's uniform splits, and the plans of `spp`,
    PipeDream and (where its search is small) Piper: so that no sequential planner is faster. Raises
    InfeasiblePlanError when nothing fits.
    """
    search = new_search(problem)
    has_branches = problem.decomposition.root.composition is not Composition.OP and any(
        node.composition is Composition.PARALLEL for node in problem.decomposition.root.nodes()
    )
    linear = linear_search(problem) if has_branches else search
    searches = [(search, False), (linear, True)] if has_branches else [(search, False)]
    fastest = _Fastest(problem)
    if not problem.rules:
        for plan in data_parallel.candidates(problem):
            fastest.offer(plan)
    bounds = sorted(
        (search.lower_bound_s(b) * problem.table.batch_size, b) for b in problem.micro_batches
    )
    for bound_s, micro_batch in bounds:
        if bound_s >= fastest.step_time_s or fastest.may_stop():
            continue
        most_s = fastest.step_time_s * OVERLAP
        for candidate in _ranked(problem, searches, micro_batch, most_s):
            fastest.offer(
                to_plan(
                    problem,
                    candidate.micro_batch,
                    candidate.solution,
                    method="graphpipe",
                    sequential=candidate.sequential,
                )
            )
    if not problem.rules:
        _offer_uniform(problem, fastest)
    _offer_sequential(problem, fastest, linear, bounds)
    if is_mixed(problem) and not problem.rules:
        _offer_mixed(problem, fastest)
    if fastest.plan is None:
        raise explain_infeasible(
            problem, [one for one, _ in searches], None if problem.rules else _others
        )
    best = fastest.plan
    return best.replace(
        method="graphpipe",
        search=problem.statistics,
        notes=(*best.notes, *notes(problem, search)),
    )


def _offer_uniform(problem: Problem, fastest: _Fastest) -> None:
    """Megatron's uniform splits, those apart that cannot be faster."""
    segments = layer_segments(problem.table.graph, problem.linear_order)
    num_simulated = 0
    for configuration in megatron.ranked_configurations(problem, segments):
        if num_simulated == MAX_UNIFORM or fastest.may_stop():
            return
        if configuration.bound_s >= fastest.step_time_s:
            continue
        plan = megatron.to_plan(problem, segments, configuration)
        num_simulated += plan is not None and fastest.offer(plan)


def _offer_sequential(
    problem: Problem,
    fastest: _Fastest,
    linear: BottleneckSearch,
    bounds: Sequence[tuple[float, int]],
) -> None:
    """The very plans of the sequential planners, at micro-batch sizes that may be faster."""
    sizes: list[int] = []
    for bound_s, micro_batch in bounds:
        if bound_s >= fastest.step_time_s or fastest.may_stop():
            continue
        sizes.append(micro_batch)
        solution = linear.least(micro_batch)
        if solution is None:
            # PipeDream's partitions are of the same class.
            continue
        fastest.offer(to_plan(problem, micro_batch, solution, method="spp", sequential=True))
        if not problem.rules:
            likely_s = solution.bottleneck_s * LIKELY_SLACK
            plan = pipedream.plan_of_size(problem, linear, micro_batch, likely_s)
            if plan is not None:
                fastest.offer(plan)
    if not problem.rules and not fastest.may_stop():
        for plan in _piper_plans(problem, sizes, linear):
            fastest.offer(plan)


def _offer_mixed(problem: Problem, fastest: _Fastest) -> None:
    """Plans that tell the device types of the cluster apart."""
    for smaller, indices in on_faster_devices(problem):
        if fastest.may_stop():
            return
        try:
            plan = plan_step_time(smaller)
        except InfeasiblePlanError:
            continue
        fastest.offer(moved(problem, plan.replace(notes=()), indices))
    if fastest.plan is not None:
        better = heaviest_on_fastest(problem, fastest.plan)
        if better is not None:
            fastest.offer(better)


def _piper_plans(
    problem: Problem, sizes: Sequence[int], linear: BottleneckSearch | None = None
) -> Iterator[TrainPlan]:
    """Piper's plans of these micro-batch sizes, where its search is small; stages may cross.

    Where nothing crosses, on a chain, they are those of `spp`.
    """
    downsets = piper.enumerate_downsets(problem.table.graph, SMALL_DOWNSETS)
    if downsets is None or piper.num_states(problem, downsets, sizes) > MAX_PIPER_STATES:
        return
    yield from piper.candidates(replace(problem, micro_batches=tuple(sizes)), downsets, linear)


def _others(problem: Problem) -> Iterator[TrainPlan]:
    """Plans beside the search, for saying what would fit."""
    yield from megatron.every_plan(problem)
    yield from filter(fits_memory, _piper_plans(problem, problem.micro_batches))


def _ranked(
    problem: Problem,
    searches: Sequence[tuple[BottleneckSearch, bool]],
    micro_batch: int,
    most_s: float,
) -> list[_Candidate]:
    """The candidates of one micro-batch size worth a simulation, best estimate first.

    The stage graph of least bottleneck is always one of them.
    """
    found: dict[tuple[object, ...], _Candidate] = {}
    for search, is_linear in searches:
        for solution in _shapes(search, micro_batch, most_s / problem.table.batch_size):
            for sequential in (False, True) if is_linear else (False,):
                shape = tuple((stage.ops, stage.variant) for stage in solution.stages)
                key = (frozenset(shape), sequential)
                if key not in found:
                    found[key] = _Candidate(
                        estimate_s=_estimate_s(problem, micro_batch, solution, sequential),
                        micro_batch=micro_batch,
                        solution=solution,
                        sequential=sequential,
                    )
    ranked = sorted(found.values(), key=lambda candidate: candidate.estimate_s)
    least = next(iter(found.values()), None)
    late = [one for one in ranked[SIMULATED_PER_SIZE:] if one is least]
    return ranked[:SIMULATED_PER_SIZE] + late


def _shapes(search: BottleneckSearch, micro_batch: int, most_s: float) -> Iterator[Solution]:
    """Solutions from the least bottleneck to ever shallower pipelines, up to `most_s` a sample."""
    best = search.least(micro_batch)
    if best is None:
        return
    yield best
    solver = search.solver(micro_batch)
    fewest = len(best.stages)
    bound_s = best.bottleneck_s
    for factor in SLACK:
        if search.effort.is_over or fewest == 1 or bound_s >= most_s:
            return
        bound_s = min(best.bottleneck_s * factor, most_s)
        solution = solver.solve(bound_s, search.num_devices)
        search.effort.num_iterations += 1
        if solution is not None:
            fewest = len(solution.stages)
            yield solution


def _estimate_s(problem: Problem, micro_batch: int, solution: Solution, sequential: bool) -> float:
    """The closed form of a solution's step time."""
    graph = problem.table.graph
    stage_of = np.empty(problem.table.num_ops, dtype=np.int64)
    for number, stage in enumerate(solution.stages):
        stage_of[list(stage.ops)] = number
    sources = stage_of[[graph.op_index[edge.source] for edge in graph.edges]]
    targets = stage_of[[graph.op_index[edge.target] for edge in graph.edges]]
    successors: list[set[int]] = [set() for _ in solution.stages]
    for a, b in zip(sources.tolist(), targets.tolist(), strict=True):
        if a != b:
            successors[a].add(b)
    if sequential:
        for number in range(len(successors) - 1):
            successors[number].add(number + 1)
    return pipeline_s(
        batch_size=problem.table.batch_size,
        micro_batch=micro_batch,
        time_per_sample_s=[stage.time_per_sample_s for stage in solution.stages],
        successors=[sorted(row) for row in successors],
    )
