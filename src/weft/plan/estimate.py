"""The planner's closed form for the time of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

from weft.plan.train_plan import TrainPlan


def estimate_step_time_s(
    *,
    batch_size: int,
    bottleneck_s: float,
    micro_batch: int,
    time_per_sample_s: Sequence[float],
    successors: Sequence[Sequence[int]],
) -> float:
    """Seconds of one step: the batch at the bottleneck's rate, plus one micro-batch's way through.

    `T_iter = B * bottleneck + max over source-to-sink paths of the sum of b * tps_s`, with times in
    seconds per sample; the form is recovered from three logs of the authors' planner and fits them
    to the printed digits (GraphPipe sheet §2.5). `successors` are those of each stage.
    """
    longest: dict[int, float] = {}

    def path_s(stage: int) -> float:
        if stage not in longest:
            rest = max((path_s(j) for j in successors[stage]), default=0.0)
            longest[stage] = micro_batch * time_per_sample_s[stage] + rest
        return longest[stage]

    return batch_size * bottleneck_s + max(path_s(stage) for stage in range(len(successors)))


def estimate_plan_s(plan: TrainPlan) -> float:
    """`estimate_step_time_s` of a plan, from its own stage times and messages excluded."""
    times = [stage.micro_batch_s / stage.micro_batch for stage in plan.stages]
    return estimate_step_time_s(
        batch_size=plan.batch_size,
        bottleneck_s=max(
            time + stage.all_reduce_s / plan.batch_size
            for time, stage in zip(times, plan.stages, strict=True)
        ),
        micro_batch=plan.micro_batch,
        time_per_sample_s=times,
        successors=plan.successors,
    )
