"""Memory over time, from when actions ran."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import ActionKind
from weft.plan.program import CODE, Program
from weft.plan.train_plan import TrainPlan
from weft.sim.timeline import MemoryCurve


def memory_curve(
    plan: TrainPlan,
    actions: Program,
    device: NDArray[np.int64],
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
) -> MemoryCurve:
    """Bytes in use on each device: state and scratch always, activations while a stage holds them.

    A forward takes a micro-batch's activations when it starts; its backward (of a split one, the W
    half) gives them back when it ends. A stage that recomputes holds its inputs instead, and the
    activations of one micro-batch from the start of RECOMPUTE, or of the backward that includes
    it. Messages under way are not counted. Source: GraphPipe sheet §3.3.
    """
    per_stage = np.array(
        [
            [
                s.saved_bytes_per_sample * s.micro_batch / s.dp,
                s.input_bytes_per_sample * s.micro_batch / s.dp,
                s.recompute,
                s.frozen,
            ]
            for s in plan.stages
        ]
    ).reshape(-1, 4)
    whole, inputs = per_stage[:, 0], per_stage[:, 1]
    recompute, frozen = per_stage[:, 2] > 0, per_stage[:, 3] > 0
    kept = np.where(recompute, inputs, whole)
    explicit = ActionKind.RECOMPUTE in actions.kinds
    rows: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []

    def add(kinds: tuple[ActionKind, ...], at_s: NDArray[np.float64], size: NDArray) -> None:
        (found,) = np.nonzero(np.isin(actions.kind, [CODE[kind] for kind in kinds]))
        change = size[actions.stage[found]]
        moves = change != 0
        rows.append((device[found][moves], at_s[found][moves], change[moves]))

    redone = np.where(recompute, whole, 0.0)
    restore = (ActionKind.RECOMPUTE,) if explicit else (ActionKind.B, ActionKind.I)
    held = np.where(frozen, 0.0, kept)
    # Frees come first in the list: at one instant a stable sort then frees before it takes.
    add((ActionKind.B, ActionKind.W), end_s, -held - redone)
    add((ActionKind.F,), end_s, np.where(frozen, -whole, 0.0))
    add((ActionKind.F,), start_s, np.where(frozen, whole, held))
    add(restore, start_s, redone)
    return _accumulate(plan, rows)


def _accumulate(
    plan: TrainPlan,
    rows: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]],
) -> MemoryCurve:
    static = dict.fromkeys(plan.used_devices, 0)
    for stage in plan.stages:
        for index in stage.devices:
            static[index] += stage.state_bytes + stage.reserved_bytes
    devices = np.array(list(static), dtype=np.int64)
    device = np.concatenate([devices, *(row[0] for row in rows)])
    time_s = np.concatenate([np.full(len(devices), -1.0), *(row[1] for row in rows)])
    change = np.concatenate([list(static.values()), *(row[2] for row in rows)])
    order = np.lexsort((time_s, device))
    device, time_s, change = device[order], time_s[order], change[order]
    total = np.cumsum(change)
    first = np.searchsorted(device, device)
    before = np.where(first > 0, total[first - 1], 0.0)
    return MemoryCurve(
        device=device,
        time_s=np.maximum(time_s, 0.0),
        used_bytes=np.ceil(np.round(total - before, 3)).astype(np.int64),
    )
