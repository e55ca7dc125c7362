"""The graphpipe planner for the step time: candidates over every shape, the fastest simulated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weft.graph.series_parallel import Composition
from weft.plan import data_parallel, megatron, pipedream, piper
from weft.plan.bottleneck import Solution
from weft.plan.choose import evaluated, fits_memory
from weft.plan.estimate import pipeline_s
from weft.plan.graphpipe import new_search, notes, to_plan
from weft.plan.infeasible import explain_infeasible
from weft.plan.layers import layer_segments
from weft.plan.problem import Problem
from weft.plan.search import BottleneckSearch
from weft.plan.spp import linear_search
from weft.plan.train_plan import TrainPlan

SLACK = (1.08, 1.2, 1.4, 1.7, 2.2, 3.0, 5.0)
"""How much slower than the best the bottleneck may be for a shallower pipeline."""

SIMULATED_PER_SIZE = 4
"""Candidates of one micro-batch size that are simulated: the best by the closed form."""

MAX_UNIFORM = 64
"""Uniform splits that are simulated at most; few are, since most are bounded away."""

SMALL_PROBLEM = 400
"""Operators times devices up to which the sequential planners' own plans are candidates too."""

SMALL_DOWNSETS = 600
"""Downsets up to which Piper's plan is one of them."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    estimate_s: float
    micro_batch: int
    solution: Solution
    sequential: bool


def plan_step_time(problem: Problem) -> TrainPlan:
    """The plan with the least simulated step time among candidates of many shapes.

    For every micro-batch size whose work alone is not slower than the best plan so far: the stage
    graphs of the class and the contiguous partitions of the linearised graph, at the least
    bottleneck and at slower ones that save depth, the latter also run as a chain, as sequential
    planners do; besides, pure data parallelism, Megatron's uniform splits, and for small problems
    the plans of PipeDream and Piper. Raises InfeasiblePlanError when nothing fits.
    """
    search = new_search(problem)
    searches = [(search, False)]
    if problem.decomposition.root.composition is not Composition.OP and any(
        node.composition is Composition.PARALLEL for node in problem.decomposition.root.nodes()
    ):
        searches.append((linear_search(problem), True))
    best: TrainPlan | None = None
    if not problem.rules:
        for plan in data_parallel.candidates(problem):
            if fits_memory(plan):
                best = _faster(problem, best, plan)
    for bound_s, micro_batch in sorted(
        (search.lower_bound_s(b) * problem.table.batch_size, b) for b in problem.micro_batches
    ):
        if best is not None and (bound_s >= best.step_time_s or problem.effort.is_over):
            continue
        for candidate in _ranked(problem, searches, micro_batch):
            plan = to_plan(
                problem,
                candidate.micro_batch,
                candidate.solution,
                method="graphpipe",
                sequential=candidate.sequential,
            )
            if not fits_memory(plan):
                continue
            best = _faster(problem, best, plan)
    if not problem.rules:
        best = _best_uniform(problem, best)
        for plan in _sequential(problem):
            best = _faster(problem, best, plan)
    if best is None:
        raise explain_infeasible(problem, search, None if problem.rules else _others)
    return best.replace(
        method="graphpipe",
        search=problem.statistics,
        notes=(*best.notes, *notes(problem, search)),
    )


def _best_uniform(problem: Problem, best: TrainPlan | None) -> TrainPlan | None:
    """The best plan and Megatron's uniform splits, those apart that cannot be faster."""
    segments = layer_segments(problem.table.graph, problem.linear_order)
    num_simulated = 0
    for configuration in megatron.ranked_configurations(problem, segments):
        if num_simulated == MAX_UNIFORM or (best is not None and problem.effort.is_over):
            break
        if best is not None and configuration.bound_s >= best.step_time_s:
            continue
        plan = megatron.to_plan(problem, segments, configuration)
        if plan is not None and fits_memory(plan):
            num_simulated += 1
            best = _faster(problem, best, plan)
    return best


def _sequential(problem: Problem) -> Iterator[TrainPlan]:
    """The fitting plans, on graphs small enough, of the planners with other stages.

    Piper's stages may lie across branches; PipeDream's split whole servers first.
    """
    graph = problem.table.graph
    if problem.num_devices * len(graph.ops) > SMALL_PROBLEM:
        return
    plans = [pipedream.candidates(problem)]
    downsets = piper.enumerate_downsets(graph, SMALL_DOWNSETS)
    if downsets is not None:
        plans.append(piper.candidates(problem, downsets))
    yield from filter(fits_memory, itertools.chain(*plans))


def _others(problem: Problem) -> Iterator[TrainPlan]:
    """Plans beside the search, for saying what would fit."""
    yield from megatron.every_plan(problem)
    yield from _sequential(problem)


def _faster(problem: Problem, best: TrainPlan | None, plan: TrainPlan) -> TrainPlan:
    """The faster of two plans, the second one simulated here."""
    plan = evaluated(problem, plan)
    return plan if best is None or plan.step_time_s < best.step_time_s else best


def _ranked(
    problem: Problem, searches: Sequence[tuple[BottleneckSearch, bool]], micro_batch: int
) -> list[_Candidate]:
    """The candidates of one micro-batch size worth a simulation, best estimate first."""
    found: dict[tuple[object, ...], _Candidate] = {}
    for search, is_linear in searches:
        for solution in _shapes(search, micro_batch):
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
    return ranked[:SIMULATED_PER_SIZE]


def _shapes(search: BottleneckSearch, micro_batch: int) -> Iterator[Solution]:
    """Solutions from the least bottleneck to ever shallower pipelines."""
    best = search.least(micro_batch)
    if best is None:
        return
    yield best
    solver = search.solver(micro_batch)
    fewest = len(best.stages)
    for factor in SLACK:
        if search.effort.is_over or fewest == 1:
            return
        solution = solver.solve(best.bottleneck_s * factor, search.num_devices)
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
