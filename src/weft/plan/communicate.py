"""Puts SEND and RECV into a schedule of compute actions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import RECV_KINDS, SEND_KINDS, ActionKind
from weft.plan.compute_index import ComputeIndex
from weft.plan.messages import MessageTable, dependencies
from weft.plan.program import CODE, Program
from weft.plan.schedule import Schedule, ScheduleError


def has_communication(schedule: Schedule) -> bool:
    """Whether the schedule already holds SEND or RECV actions."""
    return bool(schedule.kinds & (SEND_KINDS | RECV_KINDS))


def insert_communication(schedule: Schedule, *, with_order: bool = False) -> Schedule:
    """The schedule with a SEND after each producer and a RECV before each consumer.

    `with_order` sends along edges that only order two stages on different devices, too: a runtime
    has no other way to wait for them. What has such SENDs cannot be lowered again.

    RECVs of messages from one device to another stand in the order of their SENDs, so that one
    in-order queue per (sender, receiver) can carry them; where a later message is needed first, the
    RECV of an earlier one moves up to it, which costs no time because it has arrived before.
    A schedule that does not flush is unrolled first.
    """
    if has_communication(schedule):
        return schedule
    if not schedule.is_synchronous:
        raise ScheduleError(
            f"schedule {schedule.name!r} does not flush between steps; unroll it "
            f"(`schedule.unrolled(num_steps)`) before inserting communication"
        )
    index = ComputeIndex.of(schedule)
    table = dependencies(schedule)
    table = table.take(table.sender != table.receiver if with_order else table.crosses)
    table = table.take(
        ~table.backward
        | (index.has_backward[table.sender_stage] & index.has_backward[table.receiver_stage])
    )
    send = _actions(schedule, index, table, sending=True)
    recv = _actions(schedule, index, table, sending=False)
    _in_send_order(table, send, recv)
    # A SEND follows its producer, a RECV precedes its consumer: half a row after, half before.
    place = np.concatenate([np.arange(len(index.columns)) * 4, send.row * 4 + 1, recv.row * 4 - 1])
    order = np.lexsort(
        (
            np.concatenate([np.zeros(len(index.columns), np.int64), send.tie, recv.tie]),
            place,
        )
    )
    device = np.concatenate([index.device, index.device[send.row], index.device[recv.row]])[order]
    merged = Program.concat([index.columns, send.program, recv.program]).take(order)
    starts = np.searchsorted(device, np.arange(schedule.num_devices + 1))
    seen: dict[Program, Program] = {}
    body = [merged[int(a) : int(b)] for a, b in pairwise(starts)]
    return replace(schedule, body=tuple(seen.setdefault(program, program) for program in body))


@dataclass(kw_only=True, slots=True)
class _Actions:
    """All SENDs or all RECVs."""

    of_message: NDArray[np.int64]
    """For each message the action that it belongs to."""
    row: NDArray[np.int64]
    """For each action the row of the compute action that it follows or precedes."""
    tie: NDArray[np.int64]
    """Order among actions at one row."""
    program: Program


def _actions(
    schedule: Schedule, index: ComputeIndex, table: MessageTable, *, sending: bool
) -> _Actions:
    """One action per (device, stage, micro-batch, peer, direction) that has a message."""
    if sending:
        device, stage, micro_batch, peer = (
            table.sender,
            table.sender_stage,
            table.sender_micro_batch,
            table.receiver_stage,
        )
    else:
        device, stage, micro_batch, peer = (
            table.receiver,
            table.receiver_stage,
            table.receiver_micro_batch,
            table.sender_stage,
        )
    row = index.find(
        schedule.device_positions[device], stage, micro_batch, table.backward.astype(np.int64)
    )
    if (row < 0).any():
        missing = int(np.argmax(row < 0))
        kind = ActionKind.B if table.backward[missing] else ActionKind.F
        raise ScheduleError(
            f"action {stage[missing]}{kind}{micro_batch[missing]} is missing on device "
            f"{device[missing]}, although a message depends on it"
        )
    _, first, of_message = np.unique(
        row * schedule.num_stages + peer, return_index=True, return_inverse=True
    )
    kinds = (
        (ActionKind.SEND_F, ActionKind.SEND_B)
        if sending
        else (ActionKind.RECV_F, ActionKind.RECV_B)
    )
    return _Actions(
        of_message=of_message,
        row=row[first],
        tie=peer[first].astype(np.int64),
        program=Program.from_columns(
            kind=np.where(table.backward[first], CODE[kinds[1]], CODE[kinds[0]]),
            stage=stage[first],
            micro_batch=micro_batch[first],
            peer=peer[first],
        )
        if len(first)
        else Program.of(()),
    )


def _in_send_order(table: MessageTable, send: _Actions, recv: _Actions) -> None:
    """Move RECVs up until each (sender, receiver) queue is received in the order of its SENDs."""
    if not len(table):
        return
    queue = table.sender.astype(np.int64) * (int(table.receiver.max()) + 1) + table.receiver
    sent = send.row[send.of_message] * (int(send.tie.max()) + 1) + send.tie[send.of_message]
    order = np.lexsort((table.receiver_micro_batch, sent, queue))
    new_queue = np.diff(queue[order], prepend=-1) != 0
    group = np.cumsum(new_queue) - 1
    last = int(recv.row.max()) + 1
    while True:
        # Suffix minimum within each queue: nothing sent earlier is received later.
        row = recv.row[recv.of_message[order]] + (last * group)
        earliest = np.minimum.accumulate(row[::-1])[::-1] - last * group
        moved = recv.row.copy()
        np.minimum.at(moved, recv.of_message[order], earliest)
        if (moved == recv.row).all():
            break
        recv.row = moved
    # Among RECVs at one row, the order of their SENDs decides.
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    tie = np.full(len(recv.row), np.iinfo(np.int64).max)
    np.minimum.at(tie, recv.of_message, rank)
    recv.tie = tie
