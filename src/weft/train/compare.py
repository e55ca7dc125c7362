"""What a run measured beside what the simulator said."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from weft.plan.train_plan import TrainPlan
from weft.sim.stage_executor import simulate
from weft.sim.timeline import Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class KindRow:
    """Device-seconds of one action kind, a step."""

    kind: str
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """Micro-batches that a stage held at once."""

    stage: int
    planned_in_flight: int
    measured_in_flight: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A measured timeline and its prediction."""

    predicted: Timeline
    measured: Timeline
    kinds: tuple[KindRow, ...]
    stages: tuple[StageRow, ...]

    @property
    def step_time_error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted.step_time_s - self.measured.step_time_s) / self.measured.step_time_s

    @property
    def is_in_flight_as_planned(self) -> bool:
        """Whether every stage held just as many micro-batches as the plan says."""
        return all(row.planned_in_flight == row.measured_in_flight for row in self.stages)


def compare(plan: TrainPlan, measured: Timeline, peaks: dict[str, int]) -> Comparison:
    """Simulate the plan and set it beside a recorded run; `peaks` are micro-batches by stage."""
    predicted = simulate(plan)
    seconds = [
        {kind: total / timeline.num_steps for kind, total in timeline.seconds_by_kind.items()}
        for timeline in (predicted, measured)
    ]
    kinds = dict.fromkeys([*seconds[0], *seconds[1]])
    return Comparison(
        predicted=predicted,
        measured=measured,
        kinds=tuple(
            KindRow(
                kind=kind.value,
                predicted_s=seconds[0].get(kind, 0.0),
                measured_s=seconds[1].get(kind, 0.0),
            )
            for kind in kinds
        ),
        stages=tuple(
            StageRow(
                stage=stage.index,
                planned_in_flight=min(stage.num_in_flight, plan.num_micro_batches(stage.index)),
                measured_in_flight=peaks.get(str(stage.index)),
            )
            for stage in plan.stages
        ),
    )


def last_step(timeline: Timeline) -> Timeline:
    """The last of a timeline's steps alone, from time 0: for pictures."""
    if timeline.num_steps <= 1:
        return timeline
    kept = np.zeros(len(timeline), bool)
    for device in timeline.devices:
        rows = np.flatnonzero((timeline.device == device) & (timeline.job == 0))
        rows = rows[np.argsort(timeline.start_s[rows], kind="stable")]
        kept[rows[len(rows) - len(rows) // timeline.num_steps :]] = True
    begin_s = float(timeline.start_s[kept].min(initial=np.inf))
    if not np.isfinite(begin_s):
        return timeline
    messages = timeline.message_ready_s >= begin_s
    actions = timeline.actions
    return replace(
        timeline,
        num_steps=1,
        actions=replace(
            actions,
            **{
                name: getattr(actions, name)[kept]
                for name in ("kind", "stage", "micro_batch", "peer", "version", "task")
            },
        ),
        device=timeline.device[kept],
        job=timeline.job[kept],
        start_s=timeline.start_s[kept] - begin_s,
        end_s=timeline.end_s[kept] - begin_s,
        messages=timeline.messages.take(messages),
        message_ready_s=timeline.message_ready_s[messages] - begin_s,
        message_start_s=timeline.message_start_s[messages] - begin_s,
        message_arrival_s=timeline.message_arrival_s[messages] - begin_s,
        critical_rows=np.empty(0, np.int64),
    )
