"""Replays a schedule without contention: longest paths in max-plus arithmetic, NumPy only.

A task ends at max(end of the task before it, arrivals of its inputs) + its duration. The event
kernel of `weft.sim` computes the same sums in the same order, so without contention the two agree
to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import ActionKind
from weft.plan.lower import EdgeDirection, TaskGraph, lower
from weft.plan.program import CODE
from weft.plan.replicas import MergedPlan, merge_replicas
from weft.plan.schedule import Schedule, ScheduleError
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan

_WIDE = 48
"""Devices from which replaying wave after wave in NumPy beats one Python loop (measured)."""

_WINDOW = 32
"""Micro-batches of the windows that are compared to see whether a pipeline has settled."""

_MAX_EXACT_ACTIONS = 1 << 16
"""Actions up to which replicas with unequal messages are replayed one by one."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Start and end of every task of a graph, seconds from the start of the run, shape (n,)."""

    tasks: TaskGraph
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]

    @property
    def makespan_s(self) -> float:
        """Seconds until everything is done."""
        return float(self.end_s.max(initial=0.0))


def step_time_s(plan: TrainPlan, schedule: Schedule | None = None) -> float:
    """Seconds of one optimizer step of `plan`, without contention between messages.

    `schedule` is generated from the plan when it is not given; equal replicas are then replayed
    once. Exact, except that above 65,536 actions replicas with unequal messages all wait for the
    slowest one, which may say too much, never too little, and that of very many micro-batches the
    settled middle is extrapolated (to rounding). For a schedule that does not flush it is
    the time between steps of a long run.
    """
    if schedule is not None:
        return _replayed_step_s(plan, schedule, None)
    merged = merge_replicas(plan)
    if merged is not None and (merged.is_exact or _num_actions(plan) > _MAX_EXACT_ACTIONS):
        extrapolated_s = _extrapolated_step_s(merged)
        if extrapolated_s is not None:
            return extrapolated_s
        return _replayed_step_s(merged.plan, generate(merged.plan), merged.delays_s)
    return _replayed_step_s(plan, generate(plan), None)


def _extrapolated_step_s(merged: MergedPlan) -> float | None:
    """Step time of many equal micro-batches from a shorter batch; None where it is not sure.

    What a pipeline does next follows from when its last few micro-batches passed every stage. Once
    each of those passes is later by the same time than one window of micro-batches before, every
    further window takes that time too (max-plus systems become periodic).
    """
    plan = merged.plan
    sizes = {stage.micro_batch for stage in plan.stages}
    if len(sizes) > 1 or plan.schedule != "1f1b":
        return None
    (size,) = sizes
    depth = max(stage.num_in_flight for stage in plan.stages)
    count = 4 * depth + 3 * _WINDOW
    total = plan.batch_size // size
    if total < 6 * (count - _WINDOW):
        return None
    # The window must end where the batch does.
    count += (total - count) % _WINDOW
    short = plan.replace(batch_size=count * size)
    result = replay(lower(short, generate(short), edge_delays_s=merged.delays_s))
    window_s = _window_s(result, count, depth)
    if window_s is None:
        return None
    return result.makespan_s + (total - count) // _WINDOW * window_s


def _window_s(result: Replay, count: int, depth: int) -> float | None:
    """How much later all passes are than a window of micro-batches before; None if they differ.

    Compared are the passes of 2 x `depth` of `count` micro-batches, `depth` before the end.
    """
    columns = result.tasks.columns
    (passes,) = np.nonzero(np.isin(columns.kind, [CODE[ActionKind.F], CODE[ActionKind.B]]))
    keys = (columns.micro_batch, columns.kind, columns.stage, result.tasks.device)
    order = passes[np.lexsort([key[passes] for key in keys])]
    if len(order) % count:
        return None
    if not (columns.micro_batch[order].reshape(-1, count) == np.arange(count)).all():
        return None
    end_s = result.end_s[order].reshape(-1, count)
    last = count - depth
    later_s = (
        end_s[:, last - 2 * depth : last] - end_s[:, last - 2 * depth - _WINDOW : last - _WINDOW]
    )
    window_s = float(later_s.mean())
    if np.abs(later_s - window_s).max() > 1e-10 * result.makespan_s:
        return None
    return window_s


def _replayed_step_s(
    plan: TrainPlan, schedule: Schedule, delays_s: Mapping[EdgeDirection, float] | None
) -> float:
    num_steps = 1 if schedule.is_synchronous else 4
    result = replay(lower(plan, schedule, num_steps=num_steps, edge_delays_s=delays_s))
    return time_per_step_s(result.tasks, result.end_s, num_steps, schedule.is_synchronous)


def _num_actions(plan: TrainPlan) -> int:
    return sum(2 * s.num_devices * plan.num_micro_batches(s.index) for s in plan.stages)


def time_per_step_s(
    tasks: TaskGraph, end_s: NDArray[np.float64], num_steps: int, is_synchronous: bool
) -> float:
    """Seconds per step: of the whole run where it flushes, else between the inner steps' ends."""
    if is_synchronous or num_steps < 3:
        return float(end_s.max(initial=0.0)) / num_steps
    steps = np.nonzero(tasks.columns.kind == CODE[ActionKind.STEP])[0]
    ends = np.sort(end_s[steps].reshape(-1, num_steps), axis=1).max(axis=0)
    return float(ends[-2] - ends[0]) / (num_steps - 2)


def replay(tasks: TaskGraph) -> Replay:
    """Start and end times of all tasks; DeadlockError-free graphs only, else ScheduleError."""
    out = _Outgoing.of(tasks)
    num_chains = max(tasks.schedule.num_devices, 1)
    run = _run_waves if num_chains >= _WIDE else _run_loop
    ready_s, num_done = run(tasks, out)
    if num_done < tasks.num_tasks:
        raise ScheduleError(
            f"schedule {tasks.schedule.name!r} cannot finish: {tasks.num_tasks - num_done} of "
            f"{tasks.num_tasks} actions wait for each other (`check_deadlock` names them)"
        )
    return Replay(tasks=tasks, start_s=ready_s, end_s=ready_s + tasks.duration_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outgoing:
    """Edges grouped by source (CSR); program order is kept apart, as `TaskGraph.next_task`."""

    first: NDArray[np.int64]
    target: NDArray[np.int64]
    delay_s: NDArray[np.float64]
    num_inputs: NDArray[np.int64]

    @classmethod
    def of(cls, tasks: TaskGraph) -> _Outgoing:
        order = np.argsort(tasks.source, kind="stable")
        first = np.searchsorted(tasks.source[order], np.arange(tasks.num_tasks + 1))
        num_inputs = np.bincount(tasks.target, minlength=tasks.num_tasks)
        following = tasks.next_task
        num_inputs[following[following >= 0]] += 1
        return cls(
            first=first,
            target=tasks.target[order],
            delay_s=tasks.delay_s[order],
            num_inputs=num_inputs,
        )


def _run_waves(tasks: TaskGraph, out: _Outgoing) -> tuple[NDArray[np.float64], int]:
    """Ready times, all tasks whose inputs are complete at once, wave after wave."""
    ready_s = np.zeros(tasks.num_tasks)
    missing = out.num_inputs.copy()
    slot = np.empty(tasks.num_tasks, dtype=np.int64)
    following, duration_s = tasks.next_task, tasks.duration_s
    (wave,) = np.nonzero(missing == 0)
    num_done = 0
    while len(wave):
        num_done += len(wave)
        end_s = ready_s[wave] + duration_s[wave]
        after = following[wave]
        has_after = after >= 0
        first = out.first[wave]
        count = out.first[wave + 1] - first
        skipped = np.cumsum(count) - count
        edges = np.repeat(first - skipped, count) + np.arange(int(count.sum()))
        target = np.concatenate([after[has_after], out.target[edges]])
        arrival_s = np.concatenate([end_s[has_after], np.repeat(end_s, count) + out.delay_s[edges]])
        np.maximum.at(ready_s, target, arrival_s)
        np.subtract.at(missing, target, 1)
        done = target[missing[target] == 0]
        slot[done] = np.arange(len(done))
        wave = done[slot[done] == np.arange(len(done))]
    return ready_s, num_done


def _run_loop(tasks: TaskGraph, out: _Outgoing) -> tuple[NDArray[np.float64], int]:
    """Ready times by one pass over a few long chains, each followed as far as it goes."""
    ready_s: list[float] = [0.0] * tasks.num_tasks
    missing: list[int] = out.num_inputs.tolist()
    first: list[int] = out.first.tolist()
    target: list[int] = out.target.tolist()
    delay_s: list[float] = out.delay_s.tolist()
    duration_s: list[float] = tasks.duration_s.tolist()
    following: list[int] = tasks.next_task.tolist()
    stack = [task for task, count in enumerate(missing) if count == 0]
    num_done = 0
    while stack:
        task = stack.pop()
        while True:
            num_done += 1
            end_s = ready_s[task] + duration_s[task]
            for edge in range(first[task], first[task + 1]):
                other = target[edge]
                arrival_s = end_s + delay_s[edge]
                if arrival_s > ready_s[other]:
                    ready_s[other] = arrival_s
                missing[other] -= 1
                if not missing[other]:
                    stack.append(other)
            task = following[task]
            if task < 0:
                break
            if end_s > ready_s[task]:
                ready_s[task] = end_s
            missing[task] -= 1
            if missing[task]:
                break
    return np.array(ready_s), num_done


def critical_path(
    tasks: TaskGraph, end_s: NDArray[np.float64], arrival_s: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Tasks of one longest chain of waiting, first to last.

    `arrival_s` says when each edge of the graph arrived, shape (number of edges,).
    """
    order = np.argsort(tasks.target, kind="stable")
    first = np.searchsorted(tasks.target[order], np.arange(tasks.num_tasks + 1))
    before = np.full(tasks.num_tasks, -1, dtype=np.int64)
    following = tasks.next_task
    (has_after,) = np.nonzero(following >= 0)
    before[following[has_after]] = has_after
    path = [int(np.argmax(end_s))] if tasks.num_tasks else []
    while path:
        task = path[-1]
        edges = order[first[task] : first[task + 1]]
        last, last_s = int(before[task]), -1.0
        if last >= 0:
            last_s = float(end_s[last])
        if len(edges) and float(arrival_s[edges].max()) > last_s:
            last = int(tasks.source[edges[int(np.argmax(arrival_s[edges]))]])
        if last < 0:
            break
        path.append(last)
    return np.array(path[::-1], dtype=np.int64)
