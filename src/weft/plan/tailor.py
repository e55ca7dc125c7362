"""Micro-batch sizes and groups of their own for single stages, kept where they are faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from weft.plan.assemble import StageChoice, assemble
from weft.plan.choose import evaluated, fits_memory
from weft.plan.problem import Problem
from weft.plan.train_plan import TrainPlan

MAX_ROUNDS = 4
"""Passes over the stages."""


def tailored(problem: Problem, plan: TrainPlan) -> TrainPlan:
    """The plan with per-stage micro-batch sizes and k changed one stage at a time.

    A local search on the simulated step time that starts from the uniform plan and never returns a
    slower one (GraphPipe, arXiv 2406.17145 §6, names both options and turns them off for search
    time). In-flight samples follow the general rule of `weft.plan.in_flight`.
    """
    best = plan if plan.step_time_s else evaluated(problem, plan)
    index = problem.table.graph.op_index
    choices = [
        StageChoice(
            ops=tuple(index[op] for op in stage.ops),
            micro_batch=stage.micro_batch,
            dp=stage.dp,
            tp=stage.tp,
            k=stage.k,
            recompute=stage.recompute,
            devices=stage.devices,
        )
        for stage in plan.stages
    ]
    if plan.schedule != "1f1b":
        return plan
    sequential = any(edge.is_order_only for edge in plan.edges)
    for _ in range(MAX_ROUNDS):
        before = best.step_time_s
        for number in range(len(choices)):
            for choice in _neighbours(problem, choices[number]):
                if problem.effort.is_over:
                    return best
                trial = [*choices[:number], choice, *choices[number + 1 :]]
                found = _assembled(problem, best, trial, sequential)
                if fits_memory(found):
                    found = evaluated(problem, found)
                    if found.step_time_s < best.step_time_s:
                        best, choices = found, trial
        if best.step_time_s >= before:
            break
    return best


def _neighbours(problem: Problem, choice: StageChoice) -> Iterator[StageChoice]:
    """The stage with half or twice its micro-batch, or its k."""
    for size in (choice.micro_batch // 2, choice.micro_batch * 2):
        if size and size % choice.dp == 0 and problem.table.batch_size % (size * choice.k) == 0:
            yield replace(choice, micro_batch=size)
    for k in (choice.k // 2, choice.k * 2):
        if k and problem.table.batch_size % (choice.micro_batch * k) == 0:
            yield replace(choice, k=k)


def _assembled(
    problem: Problem, plan: TrainPlan, choices: Sequence[StageChoice], sequential: bool
) -> TrainPlan:
    return assemble(
        problem.table,
        choices,
        method=plan.method,
        objective=plan.objective,
        schedule="kfkb" if any(choice.k > 1 for choice in choices) else plan.schedule,
        sequential=sequential,
        notes=plan.notes,
    )
