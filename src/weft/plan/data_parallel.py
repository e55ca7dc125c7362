"""The baseline without a pipeline: the whole model on every device."""

from __future__ import annotations

from collections.abc import Iterator

from weft.plan.assemble import StageChoice, assemble
from weft.plan.choose import choose, finished
from weft.plan.cost_table import divisors
from weft.plan.infeasible import memory_change, tightest
from weft.plan.problem import InfeasiblePlanError, Problem
from weft.plan.train_plan import TrainPlan


def plan_data_parallel(problem: Problem) -> TrainPlan:
    """One stage replicated over as many devices as divide the micro-batch.

    Raises InfeasiblePlanError when one device does not hold the model.
    """
    best = choose(problem, candidates(problem))
    if best is None:
        constraint = tightest(problem.table, problem.micro_batches)
        changes = memory_change(candidates(problem))
        raise InfeasiblePlanError(
            f"pure data parallelism needs the whole model on each device of "
            f"{problem.table.memory_bytes:,} bytes: {constraint}; it would fit with "
            f"{' or '.join(map(str, changes))}; or use method='graphpipe'",
            constraint,
            changes,
        )
    return finished(problem, best)


def candidates(problem: Problem) -> Iterator[TrainPlan]:
    """One plan for every micro-batch size, on the largest degree that divides it."""
    ops = tuple(range(problem.table.num_ops))
    for micro_batch in problem.micro_batches:
        for recompute in problem.recompute_choices:
            problem.effort.num_candidates += 1
            choice = StageChoice(
                ops=ops,
                micro_batch=micro_batch,
                dp=divisors(micro_batch, problem.num_devices)[-1],
                recompute=recompute,
            )
            yield assemble(
                problem.table, [choice], method="data-parallel", objective=str(problem.objective)
            )
