"""The sequential baseline on equal terms: the graphpipe search on the linearised graph."""

from __future__ import annotations

from collections.abc import Iterator

from weft.plan.choose import choose, finished
from weft.plan.graphpipe import chain_tree, new_search, to_plan
from weft.plan.infeasible import explain_infeasible
from weft.plan.problem import Objective, Problem
from weft.plan.search import BottleneckSearch
from weft.plan.train_plan import TrainPlan


def plan_spp(problem: Problem) -> TrainPlan:
    """The best chain of stages over an order that finishes one branch before the next.

    Stages run as a pipeline one after the other, false dependencies included (GraphPipe sheet §6.2:
    "our DP with linearize=True"). Raises InfeasiblePlanError when nothing fits.
    """
    search = linear_search(problem)
    if problem.objective is Objective.BOTTLENECK:
        found = search.best(problem.micro_batches)
        if found is None:
            raise explain_infeasible(problem, [search])
        return to_plan(problem, found.micro_batch, found.solution, method="spp", sequential=True)
    best = choose(problem, candidates(problem, search), len(problem.micro_batches))
    if best is None:
        raise explain_infeasible(problem, [search])
    return finished(problem, best)


def linear_search(problem: Problem) -> BottleneckSearch:
    """A search over contiguous stages of the linearised graph."""
    return new_search(problem, chain_tree([*problem.decomposition.root.ops()]))


def candidates(problem: Problem, search: BottleneckSearch) -> Iterator[TrainPlan]:
    """The sequential plan of least bottleneck of every micro-batch size."""
    for micro_batch in problem.micro_batches:
        solution = search.least(micro_batch)
        if solution is not None:
            yield to_plan(problem, micro_batch, solution, method="spp", sequential=True)
