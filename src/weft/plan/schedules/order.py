"""Orders of one stage's compute actions, as columns: who comes first, forward or backward.

Every function returns the program of one optimizer step of one stage; nothing here knows devices.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import ActionKind
from weft.plan.program import CODE, EMPTY_PROGRAM, Program
from weft.plan.schedule import ScheduleError

F, B, I, W = (CODE[kind] for kind in (ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W))  # noqa: E741


def forward_only(stage: int, num_micro_batches: int) -> Program:
    """All forwards: the order of a stage through which no gradient flows."""
    return Program.from_columns(kind=F, stage=stage, micro_batch=np.arange(num_micro_batches))


def all_forward_all_backward(stage: int, num_micro_batches: int) -> Program:
    """GPipe: every forward, then every backward (Megatron-LM sheet §1)."""
    index = np.arange(num_micro_batches)
    return Program.from_columns(
        kind=np.repeat([F, B], num_micro_batches),
        stage=stage,
        micro_batch=np.concatenate([index, index]),
    )


def k_forward_k_backward(stage: int, num_micro_batches: int, in_flight: int, k: int = 1) -> Program:
    """Backward as early as possible: `in_flight` forwards, then k backwards, k forwards, and so on.

    Holds at most `in_flight` micro-batches. With k = 1 it is 1F1B: on a chain of p stages stage s
    has in_flight p - s. Source: GraphPipe (arXiv 2406.17145) §6, ScheduleTask.
    """
    if not 1 <= k <= in_flight:
        raise ScheduleError(
            f"stage {stage} keeps {in_flight} micro-batches in flight but runs k = {k} backwards "
            f"in a row; it needs at least k in flight"
        )
    order = _alternating(num_micro_batches, min(in_flight, num_micro_batches), k)
    return Program.from_columns(kind=order[0], stage=stage, micro_batch=order[1])


# Stages and candidate plans share few shapes of order.
@lru_cache(maxsize=256)
def _alternating(
    num_micro_batches: int, warm_up: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kinds and micro-batches: `warm_up` forwards, then groups of k backwards and k forwards."""
    index = np.arange(num_micro_batches)
    forward_group = np.where(index < warm_up, -1, 2 * ((index - warm_up) // k) + 1)
    backward_group = 2 * (index // k)
    # Groups alternate; within one, micro-batches ascend, which a stable sort keeps.
    order = np.argsort(np.concatenate([forward_group, backward_group]), kind="stable")
    return np.repeat([F, B], num_micro_batches)[order], np.concatenate([index, index])[order]


def split_backward(program: Program, delay: int) -> Program:
    """Replace each backward by I, its W following `delay` backwards later (zero bubble).

    With delay = (stashes allowed) - (in flight of 1F1B) the weight halves fill the bubbles of the
    drain at no more memory than the first stage of 1F1B has. Source: Zero Bubble Pipeline
    Parallelism (arXiv 2401.10241) §2.2, schedule ZB-H1.
    """
    is_backward = program.kind == B
    (rows,) = np.nonzero(is_backward)
    kind = np.where(is_backward, I, program.kind)
    # W(j) goes right after I(j + delay); those that are left go to the end.
    after = np.full(len(rows), len(program), dtype=np.int64)
    if delay < len(rows):
        after[: len(rows) - delay] = rows[delay:] + 1
    return Program.from_columns(
        kind=np.insert(kind, after, W),
        stage=np.insert(program.stage, after, program.stage[rows]),
        micro_batch=np.insert(program.micro_batch, after, program.micro_batch[rows]),
    )


def interleaved(
    rank: int, num_devices: int, num_chunks: int, num_micro_batches: int, group: int | None = None
) -> Program:
    """Interleaved 1F1B of device `rank`, which holds stages rank, rank + num_devices, and so on.

    `group` micro-batches pass a chunk before the next chunk takes over; by default it is what
    torch's ScheduleInterleaved1F1B uses, the number of devices where that divides the count.
    Source: Megatron-LM (arXiv 2104.04473) §2.2.2.
    """
    rounds = max(1, num_micro_batches // num_devices)
    if group is None:
        if num_micro_batches % rounds:
            raise ScheduleError(
                f"interleaved 1F1B on {num_devices} devices runs {rounds} rounds, which do not "
                f"divide {num_micro_batches} micro-batches; "
                f"{num_micro_batches // rounds * rounds} would do"
            )
        group = num_micro_batches // rounds
    table = _chunk_table(num_micro_batches, num_chunks, group)
    total = num_micro_batches * num_chunks
    warm_up = min(2 * (num_devices - rank - 1) + (num_chunks - 1) * group, total)
    forward_key = np.where(np.arange(total) < warm_up, -1, 2 * (np.arange(total) - warm_up))
    backward_key = 2 * np.arange(total) + 1
    order = np.argsort(np.concatenate([forward_key, backward_key]), kind="stable")
    chunk = np.concatenate([table[:, 1], num_chunks - 1 - table[:, 1]])
    return Program.from_columns(
        kind=np.repeat([F, B], total)[order],
        stage=(chunk * num_devices + rank)[order],
        micro_batch=np.concatenate([table[:, 0], table[:, 0]])[order],
    )


def _chunk_table(num_micro_batches: int, num_chunks: int, group: int) -> NDArray[np.int64]:
    """(micro-batch, chunk) in forward order: a group of micro-batches through every chunk."""
    index = np.arange(num_micro_batches)
    micro_batch = np.tile(index, num_chunks)
    chunk = np.repeat(np.arange(num_chunks), num_micro_batches)
    order = np.lexsort((micro_batch, chunk, micro_batch // group))
    return np.stack([micro_batch[order], chunk[order]], axis=1)


def without_flush(stage: int, num_micro_batches: int, warm_up: int) -> tuple[Program, ...]:
    """Prologue, body and epilogue of PipeDream-2BW: 1F1B that never drains between steps.

    The prologue runs `warm_up` forwards. A body runs each step's backwards, and the forwards
    `warm_up` micro-batches ahead of them; the epilogue is the last step, whose forwards are those
    that remain. Micro-batch k of the run uses weights max(k // m - 1, 0); `version` says so
    relative to the step. Source: PipeDream-2BW (arXiv 2006.09503) §3.1.
    """
    m = num_micro_batches
    if m < warm_up + 1:
        raise ScheduleError(
            f"PipeDream-2BW needs at least as many micro-batches per step as stage {stage} keeps "
            f"in flight: {m} < {warm_up + 1}"
        )
    index = np.arange(m)
    forward = np.stack([np.full(m, F), index + warm_up], axis=1)
    backward = np.stack([np.full(m, B), index], axis=1)
    pairs = np.stack([forward, backward], axis=1).reshape(-1, 2)
    last = np.delete(pairs, 2 * np.arange(m - warm_up, m), axis=0)
    prologue = np.stack([np.full(warm_up, F), np.arange(warm_up)], axis=1)

    def program(rows: NDArray[np.int64]) -> Program:
        if not len(rows):
            return EMPTY_PROGRAM
        return Program.from_columns(
            kind=rows[:, 0], stage=stage, micro_batch=rows[:, 1], version=rows[:, 1] // m - 1
        )

    return program(prologue), program(pairs), program(last)
