"""A run's measured timeline, in the simulator's own type, so that the two can be laid side by side.

Clocks: `time.perf_counter`, which processes of one machine share; between machines its origin
differs, so a timeline across machines is exact per machine only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from weft.base.errors import ConfigError
from weft.plan.action import RECV_KINDS, SEND_KINDS
from weft.plan.compute_index import ComputeIndex
from weft.plan.messages import MessageTable, messages
from weft.plan.program import CODE, Program
from weft.plan.schedule import Schedule
from weft.plan.train_plan import TrainPlan
from weft.runtime.rank_program import BoundAction
from weft.sim.timeline import MemoryCurve, Timeline

MAX_STEPS = 20
"""Steps that a record keeps: the last ones."""

_COLUMNS = 8  # step, kind, stage, micro-batch, peer, version, start, end


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """When each action of one step ran on one rank; seconds of `perf_counter`."""

    step: int
    actions: list[BoundAction] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)

    def rows(self, schedule: Schedule, shift: int) -> NDArray[np.float64]:
        """One row an action; micro-batches and versions count from `shift` steps before."""
        found = np.zeros((len(self.actions), _COLUMNS))
        for row, (bound, start, end) in enumerate(
            zip(self.actions, self.start_s, self.end_s, strict=True)
        ):
            action = bound.action
            micro_batch = action.micro_batch
            if micro_batch >= 0:
                micro_batch += shift * schedule.num_micro_batches[action.stage]
            found[row] = (
                *(self.step, CODE[action.kind], action.stage, micro_batch),
                *(action.peer, max(action.version + shift, 0), start, end),
            )
        return found


@dataclass(kw_only=True, slots=True)
class LoopRecord:
    """The last steps of one rank."""

    steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=MAX_STEPS))

    def begin(self, step: int) -> StepRecord:
        """The record of a step; another flush of the same step goes on with it."""
        if not self.steps or self.steps[-1].step != step:
            self.steps.append(StepRecord(step=step))
        return self.steps[-1]

    def end_step(self, time_s: float) -> None:
        """The step's last action, its STEP, has ended only now."""
        if self.steps and self.steps[-1].end_s:
            self.steps[-1].end_s[-1] = time_s

    def to_bytes(self, schedule: Schedule) -> bytes:
        """All steps' rows."""
        if not self.steps:
            return b""
        first = self.steps[0].step
        parts = [record.rows(schedule, record.step - first) for record in self.steps]
        return np.concatenate(parts).tobytes()


def timeline_of(
    plan: TrainPlan, schedule: Schedule, parts: Sequence[bytes], *, shifts: bool
) -> Timeline:
    """The timeline of all ranks' recorded steps; `parts` are their rows in rank order.

    Message times are those of the SEND's start and the RECV's end, so an arrival is as late as the
    receiver looked. With `shifts` False (accumulation) messages are left out. Raises ConfigError
    where nothing was recorded.
    """
    rows = [np.frombuffer(part).reshape(-1, _COLUMNS) for part in parts]
    table = np.concatenate(rows)
    if not len(table):
        raise ConfigError("no step was recorded; set ExecutorConfig(record=True) and run a step")
    device = np.repeat(np.array(plan.used_devices), [len(part) for part in rows])
    origin_s = float(table[:, 6].min())
    start_s, end_s = table[:, 6] - origin_s, table[:, 7] - origin_s
    actions = Program.from_columns(
        kind=table[:, 1].astype(np.uint8),
        stage=table[:, 2].astype(np.int32),
        micro_batch=table[:, 3].astype(np.int32),
        peer=table[:, 4].astype(np.int32),
        version=table[:, 5].astype(np.int32),
    )
    steps = np.unique(table[:, 0])
    spans_s = [
        float(end_s[table[:, 0] == step].max() - start_s[table[:, 0] == step].min())
        for step in steps
    ]
    moved = _messages(schedule, len(steps)) if shifts and schedule.is_synchronous else None
    if moved is None:
        moved = messages(schedule).take(slice(0, 0))
    ready_s, arrival_s = _message_times(moved, actions, device, start_s, end_s)
    names = plan.cluster.devices
    return Timeline(
        name=schedule.name,
        batch_size=schedule.batch_size,
        num_steps=len(steps),
        step_time_s=float(np.median(spans_s)),
        devices=plan.used_devices,
        device_names=tuple(names[d].name for d in plan.used_devices),
        capacity_bytes=tuple(names[d].type.memory_bytes for d in plan.used_devices),
        actions=actions,
        device=device.astype(np.int64),
        job=np.zeros(len(table), dtype=np.int32),
        jobs=("train",),
        start_s=start_s,
        end_s=end_s,
        messages=moved,
        message_ready_s=ready_s,
        message_start_s=ready_s,
        message_arrival_s=arrival_s,
        memory=MemoryCurve(
            device=np.array(plan.used_devices, dtype=np.int64),
            time_s=np.zeros(len(plan.used_devices)),
            used_bytes=np.zeros(len(plan.used_devices), dtype=np.int64),
        ),
        critical_rows=np.zeros(0, dtype=np.int64),
    )


def _messages(schedule: Schedule, num_steps: int) -> MessageTable:
    """The messages of these steps that the runtime sends."""
    has_backward = ComputeIndex.of(schedule).has_backward
    table = messages(schedule.unrolled(num_steps))
    trained = has_backward[table.sender_stage] & has_backward[table.receiver_stage]
    return table.take(~table.backward | trained)


def _message_times(
    table: MessageTable,
    actions: Program,
    device: NDArray[np.integer],
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """When each message was handed over, and when its receiver had it."""
    is_send = np.isin(actions.kind, [CODE[kind] for kind in SEND_KINDS])
    is_receive = np.isin(actions.kind, [CODE[kind] for kind in RECV_KINDS])

    def key(d: int, stage: int, micro_batch: int, peer: int) -> tuple[int, int, int, int]:
        return (d, stage, micro_batch, peer)

    times: dict[bool, dict[tuple[int, int, int, int], float]] = {True: {}, False: {}}
    for rows, sends, clock in ((is_send, True, start_s), (is_receive, False, end_s)):
        for row in np.nonzero(rows)[0].tolist():
            where = key(
                int(device[row]),
                int(actions.stage[row]),
                int(actions.micro_batch[row]),
                int(actions.peer[row]),
            )
            times[sends][where] = float(clock[row])
    ready_s, arrival_s = np.zeros(len(table)), np.zeros(len(table))
    for row, message in enumerate(table):
        sent = key(
            message.sender,
            message.sender_stage,
            message.sender_micro_batch,
            message.receiver_stage,
        )
        got = key(
            message.receiver,
            message.receiver_stage,
            message.receiver_micro_batch,
            message.sender_stage,
        )
        ready_s[row] = times[True].get(sent, 0.0)
        arrival_s[row] = times[False].get(got, 0.0)
    return ready_s, arrival_s
