"""The stage executor under a virtual clock: runs a schedule's actions at a plan's prices."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import COMPUTE_KINDS, RECV_KINDS, SEND_KINDS, ActionKind
from weft.plan.executor import Bubble, BubbleHook, require_kinds
from weft.plan.lower import TaskGraph, lower
from weft.plan.program import CODE
from weft.plan.replay import critical_path, time_per_step_s
from weft.plan.schedule import Schedule
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan
from weft.sim.kernel import KernelResult, Routes, run
from weft.sim.memory import memory_curve
from weft.sim.network import routes
from weft.sim.timeline import MemoryCurve, Timeline

SUPPORTED_KINDS = (
    COMPUTE_KINDS
    | SEND_KINDS
    | RECV_KINDS
    | {ActionKind.REDUCE_GRAD, ActionKind.STEP, ActionKind.LOAD, ActionKind.BUBBLE}
)
"""What the simulator runs; UNSHARD, RESHARD and TRANSMIT have no price in a training plan."""


@dataclass(frozen=True, kw_only=True)
class SimulatedStageExecutor:
    """Runs schedules of one plan under a virtual clock (a `weft.plan.executor.StageExecutor`).

    `contention` queues messages at links and network cards; without it messages only take their
    own time. `overlap` lets devices compute while what they sent leaves. `on_bubble` is asked at
    every BUBBLE action what to run there, with the time at which the device is needed again.
    `input_gradient_share` is the part of a backward that its I half takes.
    """

    plan: TrainPlan
    contention: bool = True
    overlap: bool = True
    on_bubble: BubbleHook | None = None
    input_gradient_share: float = 0.5
    supported_kinds: frozenset[ActionKind] = field(default=SUPPORTED_KINDS, init=False)

    def execute(self, schedule: Schedule, *, num_steps: int = 1) -> Timeline:
        """Run `num_steps` optimizer steps; the timeline counts seconds from their start."""
        require_kinds(schedule, self.supported_kinds, "simulator")
        tasks = lower(
            self.plan,
            schedule,
            num_steps=num_steps,
            input_gradient_share=self.input_gradient_share,
        )
        paths = routes(self.plan.cluster, tasks.messages, contention=self.contention)
        (bubbles,) = np.nonzero(tasks.columns.kind == CODE[ActionKind.BUBBLE])
        fills = _Fills(jobs=["train"], job=np.zeros(tasks.num_actions, dtype=np.int32))
        result = run(tasks, paths, overlap=self.overlap)
        if self.on_bubble is not None and len(bubbles):
            result = self._run_with_fills(tasks, paths, result, fills, bubbles, self.on_bubble)
        return self._timeline(tasks, result, fills, schedule, num_steps)

    def _run_with_fills(
        self,
        tasks: TaskGraph,
        paths: Routes,
        dry: KernelResult,
        fills: _Fills,
        bubbles: NDArray[np.int64],
        hook: BubbleHook,
    ) -> KernelResult:
        """Run again, now asking the hook; deadlines and free memory are those of the dry run."""
        memory = self._memory(tasks, dry)
        needed = tasks.next_task
        devices = self.plan.cluster.devices

        def on_bubble(task: int, now: float) -> float:
            device = tasks.schedule.devices[int(tasks.device[task])]
            after = int(needed[task])
            deadline_s = float(dry.start_s[after]) if after >= 0 else float(dry.end_s.max())
            used = memory.used_at(device, float(dry.start_s[task]))
            fill = hook(
                Bubble(
                    device=device,
                    start_s=now,
                    deadline_s=max(deadline_s, now),
                    free_bytes=max(devices[device].type.memory_bytes - used, 0),
                )
            )
            if fill is None:
                return 0.0
            fills.record(task, fill.job)
            return fill.duration_s

        return run(
            tasks,
            paths,
            overlap=self.overlap,
            bubbles=frozenset(bubbles.tolist()),
            on_bubble=on_bubble,
        )

    def _timeline(
        self,
        tasks: TaskGraph,
        result: KernelResult,
        fills: _Fills,
        schedule: Schedule,
        num_steps: int,
    ) -> Timeline:
        n, names = tasks.num_actions, self.plan.cluster.devices
        devices = tasks.schedule.devices
        (sent,) = np.nonzero(tasks.message >= 0)
        ready_s = np.zeros(len(tasks.messages))
        ready_s[tasks.message[sent]] = result.end_s[tasks.source[sent]]
        arrival_s = result.end_s[tasks.source]
        arrival_s[sent] = result.message_arrival_s[tasks.message[sent]]
        critical = critical_path(tasks, result.end_s, arrival_s)
        return Timeline(
            name=schedule.name,
            batch_size=schedule.batch_size,
            num_steps=num_steps,
            step_time_s=time_per_step_s(tasks, result.end_s, num_steps, schedule.is_synchronous),
            devices=devices,
            device_names=tuple(names[device].name for device in devices),
            capacity_bytes=tuple(names[device].type.memory_bytes for device in devices),
            actions=tasks.columns,
            device=np.array(devices, dtype=np.int64)[tasks.device],
            job=fills.job,
            jobs=tuple(fills.jobs),
            start_s=result.start_s[:n],
            end_s=result.end_s[:n],
            messages=tasks.messages,
            message_ready_s=ready_s,
            message_start_s=result.message_start_s,
            message_arrival_s=result.message_arrival_s,
            memory=self._memory(tasks, result),
            critical_rows=critical[critical < n],
        )

    def _memory(self, tasks: TaskGraph, result: KernelResult) -> MemoryCurve:
        n = tasks.num_actions
        return memory_curve(
            self.plan,
            tasks.columns,
            np.array(tasks.schedule.devices, dtype=np.int64)[tasks.device],
            result.start_s[:n],
            result.end_s[:n],
        )


@dataclass(kw_only=True, slots=True)
class _Fills:
    """Which job ran in which action row."""

    jobs: list[str]
    job: NDArray[np.int32]

    def record(self, task: int, job: str) -> None:
        if job not in self.jobs:
            self.jobs.append(job)
        self.job[task] = self.jobs.index(job)


def simulate(
    plan: TrainPlan,
    schedule: Schedule | None = None,
    *,
    num_steps: int | None = None,
    contention: bool = True,
    overlap: bool = True,
    on_bubble: BubbleHook | None = None,
) -> Timeline:
    """Run `plan` under the virtual clock and say when everything happened.

    `schedule` is generated from the plan when it is not given. `num_steps` is 1, or 4 for a
    schedule that does not flush, whose step time is that between inner steps.
    """
    chosen = generate(plan) if schedule is None else schedule
    steps = num_steps if num_steps is not None else (1 if chosen.is_synchronous else 4)
    executor = SimulatedStageExecutor(
        plan=plan, contention=contention, overlap=overlap, on_bubble=on_bubble
    )
    return executor.execute(chosen, num_steps=steps)
