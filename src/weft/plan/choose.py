"""Picks one of several candidate plans by the objective of a problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from weft.plan.estimate import estimate_plan_s
from weft.plan.problem import Objective, Problem
from weft.plan.train_plan import TrainPlan

MAX_EVALUATED = 12
"""Candidates that are simulated: the best by the closed-form estimate."""


def fits_memory(plan: TrainPlan) -> bool:
    """Whether every device holds all its stages at their peaks."""
    devices = plan.cluster.devices
    return all(
        num_bytes <= devices[device].type.memory_bytes
        for device, num_bytes in plan.memory_bytes.items()
    )


def choose(
    problem: Problem,
    plans: Iterable[TrainPlan],
    max_evaluated: int = MAX_EVALUATED,
    below_s: float = math.inf,
) -> TrainPlan | None:
    """The best of the plans that fit in memory, or None.

    For the bottleneck: the least one, then the least depth. For the step time: the best candidates
    by estimate are simulated, and the fastest is returned with `step_time_s` set, if it is faster
    than `below_s`.
    """
    fitting = [plan for plan in plans if fits_memory(plan)]
    if problem.objective is Objective.BOTTLENECK:
        return min(fitting, key=lambda plan: (plan.bottleneck_s, plan.depth), default=None)
    best: TrainPlan | None = None
    estimates = sorted((estimate_plan_s(plan), i) for i, plan in enumerate(fitting))
    for _, i in estimates[:max_evaluated]:
        if best is not None and problem.effort.is_over:
            break
        plan = evaluated(problem, fitting[i])
        if plan.step_time_s < below_s:
            best, below_s = plan, plan.step_time_s
    return best


def evaluated(problem: Problem, plan: TrainPlan) -> TrainPlan:
    """The plan with its simulated step time."""
    return plan.replace(step_time_s=problem.evaluate(plan))


def finished(problem: Problem, plan: TrainPlan, notes: Sequence[str] = ()) -> TrainPlan:
    """The plan with the search's statistics and notes."""
    return plan.replace(search=problem.statistics, notes=(*plan.notes, *notes))
