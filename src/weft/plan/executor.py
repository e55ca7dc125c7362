"""Whoever runs a schedule: the protocol that real devices and the virtual clock implement."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

from weft.base.errors import UnsupportedError
from weft.plan.action import ActionKind
from weft.plan.schedule import Schedule

ResultT_co = TypeVar("ResultT_co", covariant=True)


class UnsupportedActionError(UnsupportedError):
    """A schedule holds an action kind that the executor lacks; the message names both."""


class StageExecutor(Protocol[ResultT_co]):
    """Runs schedules: ordered actions per device.

    SEND does not hold the device; RECV waits for the message, whose receive the executor posted
    earlier. Actions of one device run in order. Messages are those of `weft.plan.messages`.
    """

    @property
    def supported_kinds(self) -> frozenset[ActionKind]:
        """The action kinds that this executor runs; it refuses others by name."""
        ...

    def execute(self, schedule: Schedule, *, num_steps: int = 1) -> ResultT_co:
        """Run prologue, bodies and epilogue for `num_steps` optimizer steps."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Bubble:
    """Idle time offered to a fill job: the device is needed again at `deadline_s`."""

    device: int
    start_s: float
    deadline_s: float
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """What a fill job did in a bubble: it held the device for `duration_s`."""

    job: str
    duration_s: float


class BubbleHook(Protocol):
    """Called at each BUBBLE action; returns what ran, or None for nothing."""

    def __call__(self, bubble: Bubble) -> Fill | None: ...


def require_kinds(schedule: Schedule, supported: Set[ActionKind], executor: str) -> None:
    """Raise UnsupportedActionError naming the kinds of `schedule` that `executor` lacks."""
    missing = sorted(schedule.kinds - supported)
    if missing:
        raise UnsupportedActionError(
            f"schedule {schedule.name!r} holds action kinds {', '.join(missing)}, which the "
            f"{executor} lacks; it runs {', '.join(sorted(supported))}"
        )
