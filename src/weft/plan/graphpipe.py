"""The graph pipeline planner (GraphPipe, arXiv 2406.17145 §5; sheet §2)."""

from __future__ import annotations

from collections.abc import Sequence

from weft.graph.series_parallel import Composition, SeriesParallel
from weft.plan.assemble import StageChoice, assemble
from weft.plan.bottleneck import Solution
from weft.plan.infeasible import explain_infeasible
from weft.plan.problem import Problem
from weft.plan.search import BottleneckSearch
from weft.plan.stage_space import build_stage_space
from weft.plan.train_plan import TrainPlan


def new_search(problem: Problem, tree: SeriesParallel | None = None) -> BottleneckSearch:
    """A search over the stages of a tree, by default the graph's own."""
    graph = problem.table.graph
    rules = problem.rules
    space = build_stage_space(
        problem.table,
        tree or problem.decomposition.root,
        members=rules.members(graph) if rules else None,
        allowed=rules.allows if rules else None,
        labels=rules.labels(len(graph.ops)),
    )
    return BottleneckSearch(
        problem.table,
        space,
        num_devices=problem.num_devices,
        recompute_choices=problem.recompute_choices,
        k=problem.k,
        rules=rules,
        effort=problem.effort,
    )


def chain_tree(leaves: Sequence[str]) -> SeriesParallel:
    """The tree of a model whose operators all follow one another."""
    children = tuple(SeriesParallel(composition=Composition.OP, op=leaf) for leaf in leaves)
    if len(children) == 1:
        return children[0]
    return SeriesParallel(composition=Composition.SERIES, children=children)


def plan_bottleneck(problem: Problem) -> TrainPlan:
    """The plan of the class with the least largest time per sample; ties by depth.

    Raises InfeasiblePlanError when nothing fits.
    """
    search = new_search(problem)
    found = search.best(problem.micro_batches)
    if found is None:
        raise explain_infeasible(problem, [search])
    return to_plan(
        problem, found.micro_batch, found.solution, method="graphpipe", notes=notes(problem, search)
    )


def to_plan(
    problem: Problem,
    micro_batch: int,
    solution: Solution,
    *,
    method: str,
    sequential: bool = False,
    notes: Sequence[str] = (),
) -> TrainPlan:
    """The plan of a solution; pins decide where its stages may run."""
    choices = [
        StageChoice(
            ops=stage.ops,
            micro_batch=micro_batch,
            dp=stage.variant.dp,
            k=problem.k,
            recompute=stage.variant.recompute,
        )
        for stage in solution.stages
    ]
    allowed: dict[int, frozenset[int]] = {}
    for number, choice in enumerate(choices):
        devices = problem.rules.devices_for(sum(1 << op for op in choice.ops))
        if devices is not None:
            allowed[number] = devices
    return assemble(
        problem.table,
        choices,
        method=method,
        objective=str(problem.objective),
        sequential=sequential,
        allowed=allowed,
        search=problem.statistics,
        notes=notes,
    )


def notes(problem: Problem, search: BottleneckSearch) -> list[str]:
    """What a reader of the plan must know about the search."""
    found: list[str] = []
    layered = problem.decomposition.layered_ops
    if layered:
        found.append(
            f"{len(layered)} operators lie in blocks that are not series-parallel; inside these "
            "blocks only cuts between layers were considered"
        )
    if search.space.num_contiguous:
        found.append(
            f"{search.space.num_contiguous} parallel node(s) have more than 10 distinct children; "
            "only groups contiguous in order of work were considered"
        )
    if problem.effort.timed_out:
        found.append("the time limit was reached: this is the best plan found until then")
    return found
