"""A plan and a schedule as one graph of tasks with durations: what simulators run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from weft.cluster.cluster import Cluster
from weft.plan.action import ActionKind
from weft.plan.compute_index import ComputeIndex
from weft.plan.messages import MessageTable
from weft.plan.program import CODE, Program
from weft.plan.schedule import Schedule, ScheduleError
from weft.plan.train_plan import TrainPlan
from weft.plan.wiring import wire


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeDirection:
    """Messages from one stage to another: forward along an edge, or backward against it."""

    sender_stage: int
    receiver_stage: int


@dataclass(frozen=True, kw_only=True)
class TaskGraph:
    """Tasks in program order, device after device, then barriers; and what crosses devices.

    Arrays over tasks (n,): `duration_s`; `columns` and `device` cover the actions alone, the first
    `row_start[-1]` tasks. A task starts when the one before it on its device has ended and when
    all of its `target` edges have arrived. Arrays over edges (e,): an edge arrives `delay_s` after
    its `source` task ends; `message` is its row in `messages`, or -1 where nothing is sent.
    """

    schedule: Schedule
    columns: Program
    device: NDArray[np.int32]
    row_start: NDArray[np.int64]
    duration_s: NDArray[np.float64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    delay_s: NDArray[np.float64]
    message: NDArray[np.int64]
    messages: MessageTable

    @property
    def num_tasks(self) -> int:
        """Actions and barriers."""
        return len(self.duration_s)

    @property
    def num_actions(self) -> int:
        """Actions alone."""
        return int(self.row_start[-1])

    @cached_property
    def next_task(self) -> NDArray[np.int64]:
        """The following task on the same device, -1 after the last (and for barriers)."""
        following = np.full(self.num_tasks, -1, dtype=np.int64)
        if self.num_actions:
            following[: self.num_actions - 1] = np.arange(1, self.num_actions)
            last = self.row_start[1:][np.diff(self.row_start) > 0] - 1
            following[last] = -1
        return following


def lower(
    plan: TrainPlan,
    schedule: Schedule,
    *,
    num_steps: int = 1,
    input_gradient_share: float = 0.5,
    edge_delays_s: Mapping[EdgeDirection, float] | None = None,
) -> TaskGraph:
    """The task graph of `num_steps` optimizer steps.

    `input_gradient_share` is the part of a backward that its I half takes. SEND and RECV take no
    device time; where a schedule has none, messages leave with their producer and are awaited by
    their consumer, which is the same. `edge_delays_s` replaces the time of every message of an edge
    and direction. Raises ScheduleError where an action is missing or repeated.
    """
    _check_plan(plan, schedule)
    run = schedule.unrolled(num_steps)
    wiring = wire(run)
    index, table, crossing = wiring.index, wiring.table, wiring.crossing
    barriers = _barriers(run, index)
    message = np.full(len(table) + len(barriers.source), -1, dtype=np.int64)
    message[crossing] = np.arange(len(crossing))
    delay_s = np.zeros(len(message))
    delay_s[crossing] = (
        transfers_s(plan.cluster, table.take(crossing))
        if edge_delays_s is None
        else _given_delays_s(table.take(crossing), edge_delays_s, plan.num_stages)
    )
    durations_s = _durations_s(plan, index.columns, input_gradient_share)
    return TaskGraph(
        schedule=run,
        columns=index.columns,
        device=index.device,
        row_start=index.row_start,
        duration_s=np.concatenate([durations_s, np.zeros(barriers.count)]),
        source=np.concatenate([wiring.source, barriers.source]),
        target=np.concatenate([wiring.target, barriers.target]),
        delay_s=delay_s,
        message=message,
        messages=table.take(crossing),
    )


def transfers_s(cluster: Cluster, table: MessageTable) -> NDArray[np.float64]:
    """Seconds of each message on an idle link: latency + bytes / bandwidth."""
    if not len(table.sender):
        return np.zeros(0)
    # Links differ by node only, so one look-up a pair of nodes is enough.
    node = cluster.node_of_device
    pair = node[table.sender] * len(cluster.nodes) + node[table.receiver]
    pair[table.sender == table.receiver] = -1
    _, first, of_message = np.unique(pair, return_index=True, return_inverse=True)
    links = [cluster.link(int(table.sender[i]), int(table.receiver[i])) for i in first]
    latency_s = np.array([link.latency_s for link in links])
    bandwidth = np.array([link.bandwidth_bytes_per_s for link in links])
    return latency_s[of_message] + table.num_bytes / bandwidth[of_message]


def _given_delays_s(
    table: MessageTable, delays_s: Mapping[EdgeDirection, float], num_stages: int
) -> NDArray[np.float64]:
    by_pair = np.zeros((num_stages, num_stages))
    for direction, seconds in delays_s.items():
        by_pair[direction.sender_stage, direction.receiver_stage] = seconds
    return by_pair[table.sender_stage, table.receiver_stage]


def _check_plan(plan: TrainPlan, schedule: Schedule) -> None:
    if schedule.num_stages != plan.num_stages or schedule.batch_size != plan.batch_size:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {schedule.num_stages} stages and batches of "
            f"{schedule.batch_size}; the plan has {plan.num_stages} and {plan.batch_size}"
        )
    for stage, place in zip(plan.stages, schedule.placements, strict=True):
        count = schedule.num_micro_batches[stage.index]
        if place.devices != stage.devices or count != plan.num_micro_batches(stage.index):
            raise ScheduleError(
                f"stage {stage.index} runs {count} micro-batches on devices {place.devices} in "
                f"schedule {schedule.name!r}, but {plan.num_micro_batches(stage.index)} on "
                f"{stage.devices} in the plan; generate the schedule from this plan"
            )


def _durations_s(plan: TrainPlan, columns: Program, share: float) -> NDArray[np.float64]:
    """Seconds of each action on its device, by kind and stage."""
    by_kind = np.zeros((len(ActionKind), plan.num_stages))
    split_recompute = ActionKind.RECOMPUTE in columns.kinds
    for stage in plan.stages:
        forward_s = stage.forward_s[stage.micro_batch]
        backward_s = 0.0 if stage.frozen else stage.backward_s[stage.micro_batch]
        if split_recompute and stage.recompute:
            backward_s -= forward_s
        for kind, seconds in {
            ActionKind.F: forward_s,
            ActionKind.B: backward_s,
            ActionKind.I: backward_s * share,
            ActionKind.W: backward_s - backward_s * share,
            ActionKind.RECOMPUTE: forward_s,
            ActionKind.REDUCE_GRAD: stage.all_reduce_s,
            ActionKind.STEP: stage.step_s,
        }.items():
            by_kind[CODE[kind], stage.index] = seconds
    return by_kind[columns.kind, columns.stage]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Barriers:
    count: int
    source: NDArray[np.int64]
    target: NDArray[np.int64]


def _barriers(schedule: Schedule, index: ComputeIndex) -> _Barriers:
    """A REDUCE_GRAD starts on all devices of its stage at once: one barrier task for each.

    The n-th REDUCE_GRAD of a stage on one device meets the n-th on the others.
    """
    columns, first = index.columns, int(index.row_start[-1])
    (rows,) = np.nonzero(columns.kind == CODE[ActionKind.REDUCE_GRAD])
    sources: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    count = 0
    for place in schedule.placements:
        own = rows[columns.stage[rows] == place.stage]
        if place.dp < 2 or not len(own):
            continue
        times, rest = divmod(len(own), len(place.devices))
        if rest or (np.bincount(index.device[own])[np.unique(index.device[own])] != times).any():
            raise ScheduleError(
                f"REDUCE_GRAD of stage {place.stage} occurs {len(own)} times on its "
                f"{len(place.devices)} devices; every device needs it equally often"
            )
        meeting = own.reshape(len(place.devices), times)
        barrier = np.tile(first + count + np.arange(times), (len(place.devices), 1))
        has_before = meeting != index.row_start[index.device[meeting]]
        sources += [meeting[has_before] - 1, barrier.ravel()]
        targets += [barrier[has_before], meeting.ravel()]
        count += times
    empty = np.zeros(0, dtype=np.int64)
    return _Barriers(
        count=count,
        source=np.concatenate([empty, *sources]),
        target=np.concatenate([empty, *targets]),
    )
