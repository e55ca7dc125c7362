"""How many samples each stage of a stage graph must hold so that none of them waits."""

from __future__ import annotations

from collections.abc import Sequence

from weft.plan.train_plan import PlanError, TrainPlan


def source_in_flight(
    micro_batch: int, k: int, next_micro_batch: int, next_k: int, next_in_flight: int
) -> int:
    """Samples in flight that one successor asks of a stage.

    With equal micro-batches and k = 1 this is `next_in_flight + micro_batch` (GraphPipe, arXiv
    2406.17145 §6, verified on the artifact's strategies); the general form is a reconstruction of
    its Table 2, minimal up to one micro-batch, which the simulator's local repair adds.
    """
    more = max(next_micro_batch, k * micro_batch, 2 * micro_batch - next_k * next_micro_batch)
    return -(-(next_in_flight + more) // micro_batch) * micro_batch


def in_flight_samples(
    successors: Sequence[Sequence[int]],
    micro_batch: Sequence[int],
    k: Sequence[int],
    batch_size: int,
) -> tuple[int, ...]:
    """Samples in flight at every stage, from the sinks backwards; never more than the batch.

    f_sink = k*b; f_i = the largest of what its successors ask, at least k*b. Raises PlanError when
    the stage graph has a cycle.
    """
    num_stages = len(successors)
    found: list[int] = [0] * num_stages
    waiting = [len(row) for row in successors]
    sources: list[list[int]] = [[] for _ in range(num_stages)]
    for stage, row in enumerate(successors):
        for target in row:
            sources[target].append(stage)
    ready = [stage for stage in range(num_stages) if waiting[stage] == 0]
    num_done = 0
    while ready:
        stage = ready.pop()
        num_done += 1
        b, group = micro_batch[stage], k[stage]
        asked = [
            source_in_flight(b, group, micro_batch[j], k[j], found[j]) for j in successors[stage]
        ]
        found[stage] = max(group * b, *asked) if asked else group * b
        for source in sources[stage]:
            waiting[source] -= 1
            if waiting[source] == 0:
                ready.append(source)
    if num_done < num_stages:
        raise PlanError("the stage graph has a cycle; every stage must be convex")
    return tuple(min(samples, batch_size) for samples in found)


def plan_in_flight(plan: TrainPlan) -> tuple[int, ...]:
    """What `in_flight_samples` gives for a plan's stage graph."""
    return in_flight_samples(
        plan.successors,
        [stage.micro_batch for stage in plan.stages],
        [stage.k for stage in plan.stages],
        plan.batch_size,
    )
