"""Merges the data-parallel replicas of a plan into one device per stage, to replay it faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from weft.plan.lower import EdgeDirection, transfers_s
from weft.plan.messages import messages
from weft.plan.schedule import Placement, Schedule
from weft.plan.train_plan import TrainPlan


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
        if edge.is_order_only:
            continue
        ends = (plan.stages[edge.source], plan.stages[edge.target])
        is_exact &= ends[0].micro_batch == ends[1].micro_batch
        size = max(stage.micro_batch for stage in ends)
        one = Schedule(
            name="",
            batch_size=size,
            placements=tuple(
                Placement(stage=i, devices=stage.devices, tp=stage.tp)
                for i, stage in enumerate(ends)
            ),
            edges=(replace(edge, source=0, target=1),),
            num_micro_batches=tuple(size // stage.micro_batch for stage in ends),
            devices=(),
            body=(),
        )
        table = messages(one)
        seconds = transfers_s(plan.cluster, table)
        for backward, sender, receiver in (
            (False, edge.source, edge.target),
            (True, edge.target, edge.source),
        ):
            found = seconds[table.backward == backward]
            if len(found):
                is_exact &= bool(found.min() == found.max())
                direction = EdgeDirection(sender_stage=sender, receiver_stage=receiver)
                delays_s[direction] = float(np.max(found))
    stages = tuple(
        replace(stage, devices=stage.devices[:1], axes={"dp": 1}) for stage in plan.stages
    )
    return MergedPlan(plan=plan.replace(stages=stages), delays_s=delays_s, is_exact=is_exact)
