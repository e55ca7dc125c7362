"""Which action each message leaves with and which action waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import ActionKind
from weft.plan.communicate import has_communication
from weft.plan.compute_index import ComputeIndex, check_complete
from weft.plan.messages import MessageTable, dependencies
from weft.plan.program import CODE
from weft.plan.schedule import Schedule, ScheduleError


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """Dependencies between the actions of a schedule's body, as rows of `index`.

    `table` holds every dependency between stages; row i of it leaves with action `source[i]` and
    is awaited by action `target[i]`: SEND and RECV where the schedule has them, else producer and
    consumer. `crossing` are the rows of `table` that are messages between devices.
    """

    index: ComputeIndex
    table: MessageTable
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    crossing: NDArray[np.int64]


def wire(schedule: Schedule) -> Wiring:
    """The dependencies of `schedule.body`; ScheduleError names an action that is missing.

    Checks that every device runs each of its micro-batches once, forward before backward, and that
    every message has one SEND after its producer and one RECV before its consumer, or neither.
    """
    index = ComputeIndex.of(schedule)
    check_complete(schedule, index)
    table = dependencies(schedule)
    trained = index.has_backward[table.sender_stage] & index.has_backward[table.receiver_stage]
    table = table.take(~table.backward | trained)
    position = schedule.device_positions
    source = index.find(
        position[table.sender], table.sender_stage, table.sender_micro_batch, table.backward
    )
    target = index.find(
        position[table.receiver], table.receiver_stage, table.receiver_micro_batch, table.backward
    )
    (crossing,) = np.nonzero(table.crosses)
    if has_communication(schedule):
        messages = table.take(crossing)
        sends = _rows(schedule, index, messages, sending=True)
        recvs = _rows(schedule, index, messages, sending=False)
        _check_side(index, sends < source[crossing], sends, "precedes what it sends")
        _check_side(index, recvs > target[crossing], recvs, "follows the action that needs it")
        source[crossing], target[crossing] = sends, recvs
    return Wiring(index=index, table=table, source=source, target=target, crossing=crossing)


def _rows(
    schedule: Schedule, index: ComputeIndex, table: MessageTable, *, sending: bool
) -> NDArray[np.int64]:
    """The SEND (or RECV) row of each message; ScheduleError names one missing or one too many."""
    if sending:
        kinds = (ActionKind.SEND_F, ActionKind.SEND_B)
        ends = (table.sender, table.sender_stage, table.sender_micro_batch, table.receiver_stage)
    else:
        kinds = (ActionKind.RECV_F, ActionKind.RECV_B)
        ends = (
            table.receiver,
            table.receiver_stage,
            table.receiver_micro_batch,
            table.sender_stage,
        )
    device, stage, micro_batch, peer = ends
    columns = index.columns
    (rows,) = np.nonzero(np.isin(columns.kind, [CODE[kind] for kind in kinds]))
    key = _key(
        schedule,
        index.device[rows],
        columns.stage[rows],
        columns.micro_batch[rows],
        columns.peer[rows],
        columns.kind[rows] == CODE[kinds[1]],
    )
    wanted = _key(
        schedule, schedule.device_positions[device], stage, micro_batch, peer, table.backward
    )
    order = np.argsort(key, kind="stable")
    key, rows = key[order], rows[order]
    slot = np.searchsorted(key, wanted)
    missing = slot == len(key)
    missing[~missing] = key[slot[~missing]] != wanted[~missing]
    if missing.any():
        row = int(np.argmax(missing))
        raise ScheduleError(
            f"action {stage[row]}{kinds[int(table.backward[row])]}{micro_batch[row]}>{peer[row]} "
            f"is missing on device {device[row]}"
        )
    used = np.zeros(len(rows), dtype=bool)
    used[slot] = True
    _check_side(index, ~used, rows, "has no message, or occurs twice")
    return rows[slot]


def _check_side(
    index: ComputeIndex, wrong: NDArray[np.bool_], rows: NDArray[np.int64], problem: str
) -> None:
    if wrong.any():
        row = int(rows[int(np.argmax(wrong))])
        raise ScheduleError(
            f"action {index.columns[row]} on device position {index.device[row]} {problem}"
        )


def _key(
    schedule: Schedule,
    device: NDArray[np.integer],
    stage: NDArray[np.integer],
    micro_batch: NDArray[np.integer],
    peer: NDArray[np.integer],
    backward: NDArray[np.bool_],
) -> NDArray[np.int64]:
    key = device.astype(np.int64) * schedule.num_stages + stage
    key = key * max(schedule.num_micro_batches) + micro_batch
    return (key * schedule.num_stages + peer) * 2 + backward
