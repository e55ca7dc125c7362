"""Merges the data-parallel replicas of a plan into one device per stage, to replay it faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from weft.plan.lower import EdgeDirection, transfers_s
from weft.plan.messages import messages
from weft.plan.schedule import Placement, Schedule
from weft.plan.train_plan import StageEdge, TrainPlan


@dataclass(frozen=True, kw_only=True)
class MergedPlan:
    """A plan with one device per stage, and the time of a message along each of its edges.

    `is_exact` says that it takes exactly the time of the plan that it stands for; otherwise every
    replica waits for the slowest message of its edge, which is never faster.
    """

    plan: TrainPlan
    delays_s: Mapping[EdgeDirection, float]
    is_exact: bool


def merge_replicas(plan: TrainPlan) -> MergedPlan | None:
    """`plan` with each stage on the first of its devices; None where stages share devices.

    Exact when all messages of an edge and direction take equal time and both ends have equal
    micro-batches: then all replicas of a stage do the same at the same times.
    """
    if sum(stage.num_devices for stage in plan.stages) != len(plan.used_devices):
        return None
    delays_s: dict[EdgeDirection, float] = {}
    is_exact = True
    for edge in plan.edges:
        # Edges of no bytes too: a replica with part of a micro-batch waits for that part alone.
        is_exact &= plan.stages[edge.source].micro_batch == plan.stages[edge.target].micro_batch
        if edge.is_order_only:
            continue
        for direction, seconds in _message_times_s(plan, edge).items():
            is_exact &= bool(seconds.min() == seconds.max())
            delays_s[direction] = float(seconds.max())
    stages = tuple(
        replace(stage, devices=stage.devices[:1], axes={"dp": 1}) for stage in plan.stages
    )
    return MergedPlan(plan=plan.replace(stages=stages), delays_s=delays_s, is_exact=is_exact)


def _message_times_s(
    plan: TrainPlan, edge: StageEdge
) -> Mapping[EdgeDirection, NDArray[np.float64]]:
    """Seconds of the messages of one micro-batch of an edge, for each direction that has any."""
    ends = (plan.stages[edge.source], plan.stages[edge.target])
    forward = EdgeDirection(sender_stage=edge.source, receiver_stage=edge.target)
    backward = EdgeDirection(sender_stage=edge.target, receiver_stage=edge.source)
    size = max(stage.micro_batch for stage in ends)
    if all(stage.num_devices == 1 and stage.micro_batch == size for stage in ends):
        links = (
            (forward, edge.forward_bytes_per_sample, ends[0].devices[0], ends[1].devices[0]),
            (backward, edge.backward_bytes_per_sample, ends[1].devices[0], ends[0].devices[0]),
        )
        return {
            direction: np.array([plan.cluster.link(a, b).transfer_s(size * per_sample)])
            for direction, per_sample, a, b in links
            if per_sample > 0
        }
    one_micro_batch = Schedule(
        name="",
        batch_size=size,
        placements=tuple(
            Placement(stage=i, devices=stage.devices, tp=stage.tp) for i, stage in enumerate(ends)
        ),
        edges=(replace(edge, source=0, target=1),),
        num_micro_batches=tuple(size // stage.micro_batch for stage in ends),
        devices=(),
        body=(),
    )
    table = messages(one_micro_batch)
    seconds = transfers_s(plan.cluster, table)
    found = {forward: seconds[~table.backward], backward: seconds[table.backward]}
    return {direction: times for direction, times in found.items() if len(times)}
