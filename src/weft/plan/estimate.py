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
    path_s = _longest_path(successors, [micro_batch * seconds for seconds in time_per_sample_s])
    return batch_size * bottleneck_s + path_s


def pipeline_s(
    *,
    batch_size: int,
    micro_batch: int,
    time_per_sample_s: Sequence[float],
    successors: Sequence[Sequence[int]],
) -> float:
    """Seconds of one step without counting the first micro-batch twice: `(B - b) * max + path`.

    On a chain of equal stages this is (m + p - 1)(tf + tb) (Megatron-LM sheet §1).
    """
    path_s = _longest_path(successors, [micro_batch * seconds for seconds in time_per_sample_s])
    return (batch_size - micro_batch) * max(time_per_sample_s) + path_s


def _longest_path(successors: Sequence[Sequence[int]], weight: Sequence[float]) -> float:
    """The largest sum of weights along a path of an acyclic graph."""
    longest: dict[int, float] = {}
    for start in range(len(successors)):
        stack = [start]
        while stack:
            here = stack[-1]
            missing = [after for after in successors[here] if after not in longest]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            longest[here] = weight[here] + max((longest[j] for j in successors[here]), default=0.0)
    return max(longest.values())


def estimate_plan_s(plan: TrainPlan) -> float:
    """`pipeline_s` of a plan, from its own stage times; messages between stages are not counted."""
    times = [
        stage.micro_batch_s / stage.micro_batch + stage.all_reduce_s / plan.batch_size
        for stage in plan.stages
    ]
    return pipeline_s(
        batch_size=plan.batch_size,
        micro_batch=plan.micro_batch,
        time_per_sample_s=times,
        successors=plan.successors,
    )


def least_step_s(plan: TrainPlan) -> float:
    """Seconds that no flushing step of `plan` undercuts; 0 where stages share devices.

    A stage computes all its micro-batches, after one micro-batch has come forward through the
    stages before it, and reduces its gradients at the end. Messages are not counted.
    """
    if sum(stage.num_devices for stage in plan.stages) != len(plan.used_devices):
        return 0.0
    arrival_s = [0.0] * plan.num_stages
    least_s = 0.0
    for index in plan.topological_order:
        stage = plan.stages[index]
        forward_s = stage.forward_s[stage.micro_batch]
        backward_s = 0.0 if stage.frozen else stage.backward_s[stage.micro_batch]
        work_s = plan.num_micro_batches(index) * (forward_s + backward_s) + stage.all_reduce_s
        least_s = max(least_s, arrival_s[index] + work_s)
        for target in plan.successors[index]:
            if plan.edge_by_pair[index, target].forward_bytes_per_sample > 0:
                arrival_s[target] = max(arrival_s[target], arrival_s[index] + forward_s)
    return least_s
