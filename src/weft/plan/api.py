"""`weft.plan(...)`: one function over every planning method."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path

from weft.base.errors import ConfigError, UnsupportedError
from weft.cluster.cluster import Cluster
from weft.cost.model import CostModel
from weft.cost.profiled import BlockProfile, ProfiledCost
from weft.cost.roofline import RooflineCost
from weft.cost.training import SGD_FP32, TrainingSpec
from weft.graph.coarsen import coarsen
from weft.graph.graph import Graph
from weft.plan.assemble import StageChoice, assemble
from weft.plan.brute_force import best_bottleneck
from weft.plan.constraints import Constraint, Rules, resolve
from weft.plan.cost_table import CostTable
from weft.plan.data_parallel import plan_data_parallel
from weft.plan.graphpipe import plan_bottleneck
from weft.plan.infeasible import tightest
from weft.plan.megatron import plan_megatron
from weft.plan.pipedream import plan_pipedream
from weft.plan.piper import plan_piper
from weft.plan.problem import InfeasiblePlanError, Objective, Problem, micro_batch_sizes
from weft.plan.replay import step_time_s
from weft.plan.search import Effort
from weft.plan.spp import plan_spp
from weft.plan.step_time import plan_step_time
from weft.plan.tailor import tailored
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.two_bw import plan_two_bw

MAX_BLOCKS = 150
"""Operators above which a graph is coarsened before it is planned."""

CONSTRAINED_METHODS = ("graphpipe", "spp")
"""Methods that take constraints."""


def plan(
    graph: Graph,
    cluster: Cluster,
    *,
    batch_size: int,
    method: str = "graphpipe",
    objective: Objective | str = Objective.STEP_TIME,
    training: TrainingSpec = SGD_FP32,
    micro_batches: Sequence[int] | None = None,
    profile: BlockProfile | str | Path | None = None,
    cost: CostModel | None = None,
    constraints: Sequence[Constraint] = (),
    time_limit_s: float | None = None,
    evaluate: Callable[[TrainPlan], float] = step_time_s,
    k: int = 1,
    per_stage_recompute: bool = False,
    per_stage_micro_batch: bool = False,
    max_blocks: int = MAX_BLOCKS,
) -> TrainPlan:
    """Partition a training graph into stages on the devices of a cluster.

    `objective` is "bottleneck" (the largest time per sample of a stage, GraphPipe's) or "step_time"
    (simulated by `evaluate`, by default without contention between messages). Operators are priced
    by `cost`, or by `profile` (or its file), or by the roofline of each device type.
    `micro_batches` defaults to divisors of the batch. With `per_stage_recompute` each stage decides
    whether to recompute; with `per_stage_micro_batch` stages get micro-batches and groups (kFkB) of
    their own where that is faster; `k` is the group size of all stages. A graph of more than
    `max_blocks` operators is coarsened for the search; the plan's stages list the graph's own
    operators.

    Raises InfeasiblePlanError when nothing fits, PlanError, GraphError or ConfigError for wrong
    input. With `time_limit_s` the best plan so far is returned and says so in its notes.
    """
    graph.validate()
    run, goal = _method(method), _objective(objective)
    if constraints and method not in CONSTRAINED_METHODS:
        raise UnsupportedError(
            f"method {method!r} takes no constraints; methods that do: "
            f"{', '.join(CONSTRAINED_METHODS)}"
        )
    blocks = graph if len(graph.ops) <= max_blocks else coarsen(graph, max_blocks)
    if cost is None:
        cost = _price(profile, training)
    started_s = time.perf_counter()
    sizes = _sizes(batch_size, micro_batches, k)
    _check_time_limit(time_limit_s)
    rules = resolve(_on_blocks(constraints, graph, blocks), blocks, cluster)
    _check_degrees(rules, sizes, batch_size)
    problem = Problem(
        table=CostTable(blocks, cluster, cost, training=training, batch_size=batch_size),
        micro_batches=sizes,
        evaluate=evaluate,
        objective=goal,
        recompute_choices=(False, True) if per_stage_recompute else (training.recompute,),
        k=k,
        rules=rules,
        effort=Effort(
            deadline_s=None if time_limit_s is None else started_s + time_limit_s,
            started_s=started_s,
        ),
    )
    found = run(problem)
    if per_stage_micro_batch:
        found = tailored(problem, found)
    if goal is Objective.STEP_TIME and found.step_time_s == 0.0:
        found = found.replace(step_time_s=evaluate(found))
    return _with_remarks(_on_operators(found, graph, blocks), problem)


def _plan_graphpipe(problem: Problem) -> TrainPlan:
    """The graphpipe method under either objective."""
    if problem.objective is Objective.BOTTLENECK:
        return plan_bottleneck(problem)
    return plan_step_time(problem)


def _plan_brute_force(problem: Problem) -> TrainPlan:
    """The oracle's plan, for graphs of a few operators."""
    table = problem.table
    found = best_bottleneck(
        table.graph,
        table.cluster,
        table.cost,
        training=table.training,
        batch_size=table.batch_size,
        micro_batches=problem.micro_batches,
        recompute_choices=problem.recompute_choices,
    )
    if not found.stages:
        constraint = tightest(table, problem.micro_batches)
        raise InfeasiblePlanError(f"no partition of the graph fits: {constraint}", constraint)
    choices = [
        StageChoice(
            ops=stage.ops, micro_batch=found.micro_batch, dp=stage.dp, recompute=stage.recompute
        )
        for stage in found.stages
    ]
    problem.effort.num_candidates += found.num_partitions
    return assemble(
        table,
        choices,
        method="brute-force",
        objective=str(problem.objective),
        search=problem.statistics,
    )


METHODS: Mapping[str, Callable[[Problem], TrainPlan]] = {
    "graphpipe": _plan_graphpipe,
    "spp": plan_spp,
    "pipedream": plan_pipedream,
    "piper": plan_piper,
    "megatron": plan_megatron,
    "2bw": plan_two_bw,
    "data-parallel": plan_data_parallel,
    "brute-force": _plan_brute_force,
}
"""Planning method by name."""


def _method(name: str) -> Callable[[Problem], TrainPlan]:
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"planning method {name!r} is unknown; the nearest is {nearest!r} "
            f"(all: {', '.join(METHODS)})"
        )
    return METHODS[name]


def _objective(name: Objective | str) -> Objective:
    try:
        return Objective(name)
    except ValueError:
        raise ConfigError(
            f"objective {str(name)!r} is unknown; known: {', '.join(Objective)}"
        ) from None


def _price(profile: BlockProfile | str | Path | None, training: TrainingSpec) -> CostModel:
    if profile is None:
        return RooflineCost(dtype=training.dtype)
    if not isinstance(profile, BlockProfile):
        profile = BlockProfile.load(Path(profile))
    return ProfiledCost(profile=profile)


def _sizes(batch_size: int, wanted: Sequence[int] | None, k: int) -> tuple[int, ...]:
    """Micro-batch sizes to try; PlanError for counts that are no counts."""
    _check_count("batch_size", batch_size)
    _check_count("k", k)
    for size in wanted or ():
        _check_count("a micro-batch size", size)
    sizes = micro_batch_sizes(batch_size, wanted)
    most = batch_size // sizes[0]
    if k > most:
        raise PlanError(
            f"k is {k}, but a batch of {batch_size} has at most {most} micro-batches to group; "
            f"lower k to at most {most}"
        )
    return sizes


def _check_count(name: str, value: object) -> None:
    # True is an int to Python, and 2.5 samples would only fail deep in the search.
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:  # pyright: ignore
        raise PlanError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _check_time_limit(time_limit_s: float | None) -> None:
    if time_limit_s is not None and not time_limit_s >= 0:
        raise PlanError(
            f"time_limit_s is {time_limit_s}; it must be at least 0, or None for no limit"
        )


def _check_degrees(rules: Rules, sizes: Sequence[int], batch_size: int) -> None:
    """Raise PlanError where no micro-batch can be split over the devices of a fixed stage."""
    for degree in rules.sizes.values():
        if any(size % degree == 0 for size in sizes):
            continue
        nearest = max(degree, round(batch_size / degree) * degree)
        advice = (
            f"the nearest batch that works is {nearest}"
            if batch_size % degree
            else f"add {degree} or a multiple of it to micro_batches"
        )
        raise PlanError(
            f"a fixed stage has {degree} devices, but none of the micro-batch sizes "
            f"{', '.join(map(str, sizes))} of a batch of {batch_size} is divided by {degree}; "
            f"{advice}"
        )


def _on_blocks(
    constraints: Sequence[Constraint], graph: Graph, blocks: Graph
) -> tuple[Constraint, ...]:
    """Constraints on operators as constraints on the blocks that hold them."""
    if blocks is graph or not constraints:
        return tuple(constraints)
    block_of = {member: op.id for op in blocks.ops for member in op.members or (op.id,)}

    def rename(names: Sequence[str]) -> tuple[str, ...]:
        for name in names:
            if name not in block_of:
                raise PlanError(
                    f"a constraint names operator {name!r}, which graph {graph.name!r} does not "
                    "have"
                )
        return tuple(dict.fromkeys(block_of[name] for name in names))

    found: list[Constraint] = []
    for constraint in constraints:
        if hasattr(constraint, "ops"):
            found.append(replace(constraint, ops=rename(getattr(constraint, "ops"))))  # noqa: B009
            continue
        ends = rename([getattr(constraint, "source"), getattr(constraint, "target")])  # noqa: B009
        found.append(replace(constraint, source=ends[0], target=ends[-1]))
    return tuple(found)


def _on_operators(found: TrainPlan, graph: Graph, blocks: Graph) -> TrainPlan:
    """The plan in terms of the graph that was given, not of the blocks that were planned."""
    if blocks is graph:
        return found
    position = graph.op_index
    stages = tuple(
        replace(
            stage,
            ops=tuple(
                sorted(
                    (m for name in stage.ops for m in blocks.op_by_id[name].members or (name,)),
                    key=position.__getitem__,
                )
            ),
        )
        for stage in found.stages
    )
    return found.replace(stages=stages, graph_name=graph.name, graph_digest=graph.digest)


def _with_remarks(found: TrainPlan, problem: Problem) -> TrainPlan:
    """The plan with its statistics, and a note where devices stay idle."""
    remarks: list[str] = []
    idle = problem.num_devices - len(found.used_devices)
    if idle:
        remarks.append(
            f"{idle} of {problem.num_devices} devices stay idle: {found.method} has no better plan "
            "that uses them"
        )
    marked = any("time limit" in note for note in found.notes)
    if problem.effort.timed_out and not marked:
        remarks.append("the time limit was reached: this is the best plan found until then")
    return found.replace(search=problem.statistics, notes=(*found.notes, *remarks))
