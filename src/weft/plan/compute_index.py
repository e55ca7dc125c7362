"""Finds the row of a compute action in the programs of a schedule, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import ActionKind
from weft.plan.program import CODE, KINDS, Program
from weft.plan.schedule import Schedule, ScheduleError

_NO_ROW = -1
_F = CODE[ActionKind.F]
_BACKWARD = (CODE[ActionKind.B], CODE[ActionKind.I])


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeIndex:
    """Rows of F and of B (or I) by device position, stage and micro-batch.

    Rows count over all programs, one after the other: `row_start[p]` is the first of device
    position p, `row_start[-1]` their number.
    """

    columns: Program
    device: NDArray[np.int32]
    row_start: NDArray[np.int64]
    pair: NDArray[np.int32]
    num_micro_batches: int
    rows: NDArray[np.int32]
    has_backward: NDArray[np.bool_]
    """By stage: whether any backward of it occurs."""

    @classmethod
    def of(cls, schedule: Schedule) -> ComputeIndex:
        """The index of a schedule's body; ScheduleError names an action that occurs twice."""
        programs: Sequence[Program] = schedule.body
        columns = Program.concat(programs)
        lengths = [len(program) for program in programs]
        device = np.repeat(np.arange(len(programs), dtype=np.int32), lengths)
        is_backward = np.isin(columns.kind, _BACKWARD)
        (found,) = np.nonzero((columns.kind == _F) | is_backward)
        _check_stages(schedule, columns)
        pair = np.full(len(programs) * schedule.num_stages, _NO_ROW, dtype=np.int32)
        pair_key = device[found] * schedule.num_stages + columns.stage[found]
        present = np.unique(pair_key)
        pair[present] = np.arange(len(present))
        count = max(schedule.num_micro_batches)
        rows = np.full(len(present) * count * 2, _NO_ROW, dtype=np.int32)
        slot = (pair[pair_key].astype(np.int64) * count + columns.micro_batch[found]) * 2
        slot += is_backward[found]
        rows[slot] = found
        if len(twice := found[rows[slot] != found]):
            row = int(twice[0])
            raise ScheduleError(
                f"action {columns[row]} occurs twice in the program of device "
                f"{schedule.devices[device[row]]}; remove one"
            )
        has_backward = np.zeros(schedule.num_stages, dtype=bool)
        has_backward[np.unique(columns.stage[is_backward])] = True
        return cls(
            columns=columns,
            device=device,
            row_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pair=pair,
            num_micro_batches=count,
            rows=rows,
            has_backward=has_backward,
        )

    @property
    def num_stages(self) -> int:
        """Stages of the schedule."""
        return len(self.has_backward)

    def find(self, device: Any, stage: Any, micro_batch: Any, backward: Any) -> NDArray[np.int64]:
        """Rows of these actions by device position; -1 where the programs lack one."""
        pair = self.pair[np.asarray(device, dtype=np.int64) * self.num_stages + stage]
        slot = (pair.astype(np.int64) * self.num_micro_batches + micro_batch) * 2 + backward
        return np.where(pair == _NO_ROW, _NO_ROW, self.rows[np.where(pair == _NO_ROW, 0, slot)])


def _check_stages(schedule: Schedule, columns: Program) -> None:
    if len(columns) and int(columns.stage.max()) >= schedule.num_stages:
        raise ScheduleError(
            f"schedule {schedule.name!r} has an action of stage {int(columns.stage.max())}; its "
            f"stages are 0 to {schedule.num_stages - 1}"
        )
    limit = np.array(schedule.num_micro_batches)[columns.stage] if len(columns) else np.zeros(0)
    (beyond,) = np.nonzero(columns.micro_batch >= limit)
    if len(beyond):
        action = columns[int(beyond[0])]
        raise ScheduleError(
            f"action {action} names micro-batch {action.micro_batch}; stage {action.stage} has "
            f"{schedule.num_micro_batches[action.stage]} per step"
        )


def check_complete(schedule: Schedule, index: ComputeIndex | None = None) -> None:
    """Raise ScheduleError unless every device runs each of its micro-batches once, F before B.

    A stage has either no backward at all, or for each forward one B, or one I and later one W.
    """
    index = ComputeIndex.of(schedule) if index is None else index
    position = {device: p for p, device in enumerate(schedule.devices)}
    for place, count in zip(schedule.placements, schedule.num_micro_batches, strict=True):
        micro_batches = np.arange(count)
        for device in place.devices:
            if device not in position:
                raise ScheduleError(
                    f"stage {place.stage} is placed on device {device}, which has no program"
                )
            forward = index.find(position[device], place.stage, micro_batches, 0)
            _require(forward >= 0, place.stage, ActionKind.F, device, "is missing")
            if not index.has_backward[place.stage]:
                continue
            backward = index.find(position[device], place.stage, micro_batches, 1)
            _require(backward >= 0, place.stage, ActionKind.B, device, "is missing")
            _require(backward > forward, place.stage, ActionKind.B, device, "precedes its forward")
    _check_weight_halves(schedule, index)


def _check_weight_halves(schedule: Schedule, index: ComputeIndex) -> None:
    columns, codes = index.columns, {k: CODE[k] for k in (ActionKind.I, ActionKind.W)}
    keys = {}
    for kind, code in codes.items():
        (rows,) = np.nonzero(columns.kind == code)
        key = (index.device[rows].astype(np.int64) * schedule.num_stages + columns.stage[rows]) * (
            index.num_micro_batches
        ) + columns.micro_batch[rows]
        order = np.argsort(key, kind="stable")
        keys[kind] = (key[order], rows[order])
    inputs, weights = keys[ActionKind.I], keys[ActionKind.W]
    if len(inputs[0]) != len(weights[0]) or (inputs[0] != weights[0]).any():
        odd = np.setxor1d(inputs[0], weights[0])
        row = (
            next(
                int(rows[np.searchsorted(key, odd[0])])
                for key, rows in (inputs, weights)
                if len(odd) and odd[0] in key
            )
            if len(odd)
            else int(weights[1][0])
        )
        raise ScheduleError(
            f"action {columns[row]} on device {schedule.devices[index.device[row]]} has no other "
            f"half; every I needs exactly one W of its micro-batch"
        )
    if (early := weights[1] < inputs[1]).any():
        row = int(weights[1][early][0])
        raise ScheduleError(
            f"action {columns[row]} on device {schedule.devices[index.device[row]]} precedes its "
            f"{KINDS[CODE[ActionKind.I]]}"
        )


def _require(
    holds: NDArray[np.bool_], stage: int, kind: ActionKind, device: int, problem: str
) -> None:
    if not holds.all():
        micro_batch = int(np.argmin(holds))
        raise ScheduleError(f"action {stage}{kind}{micro_batch} {problem} on device {device}")
