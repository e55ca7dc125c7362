"""What happened in a run, as columns: actions, messages, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import RECV_KINDS, SEND_KINDS, ActionKind
from weft.plan.messages import MessageTable
from weft.plan.program import CODE, KINDS, Program

_TRAFFIC = [CODE[kind] for kind in SEND_KINDS | RECV_KINDS]


@dataclass(frozen=True, kw_only=True)
class MemoryCurve:
    """Bytes in use on each device over time; row i holds from `time_s[i]` on.

    Rows are sorted by device, then time; each device begins with what it always holds.
    """

    device: NDArray[np.int64]
    time_s: NDArray[np.float64]
    used_bytes: NDArray[np.int64]

    def peak_bytes(self, device: int) -> int:
        """The most that a device ever held."""
        return int(self.used_bytes[self.device == device].max(initial=0))

    def used_at(self, device: int, time_s: float) -> int:
        """Bytes in use on a device at a time; at a change, the value after it."""
        first, last = np.searchsorted(self.device, [device, device + 1])
        row = int(np.searchsorted(self.time_s[first:last], time_s, side="right")) - 1
        return int(self.used_bytes[first + max(row, 0)]) if last > first else 0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Rows of actions with start and end, seconds from the start of the run.

    Action columns have shape (number of actions,): `actions` (kind, stage, micro-batch and so on),
    `device` (global index), `job` (index into `jobs`; 0 is the training itself, others are fill
    jobs), `start_s`, `end_s`. Message columns have shape (number of messages,): `messages`,
    `message_ready_s` (produced), `message_start_s` (first link obtained), `message_arrival_s`.
    """

    name: str
    batch_size: int
    num_steps: int
    step_time_s: float
    devices: tuple[int, ...]
    device_names: tuple[str, ...]
    capacity_bytes: tuple[int, ...]
    actions: Program
    device: NDArray[np.int64]
    job: NDArray[np.int32]
    jobs: tuple[str, ...]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    messages: MessageTable
    message_ready_s: NDArray[np.float64]
    message_start_s: NDArray[np.float64]
    message_arrival_s: NDArray[np.float64]
    memory: MemoryCurve
    critical_rows: NDArray[np.int64]
    """Action rows of one longest chain of waiting, first to last."""

    @property
    def num_devices(self) -> int:
        """Devices used."""
        return len(self.devices)

    @property
    def makespan_s(self) -> float:
        """Seconds of the whole run."""
        return float(self.end_s.max(initial=0.0))

    @property
    def throughput_per_s(self) -> float:
        """Samples per second."""
        return self.batch_size / self.step_time_s if self.step_time_s > 0 else 0.0

    @cached_property
    def busy_s(self) -> NDArray[np.float64]:
        """Seconds of work of the training job by device, in the order of `devices`."""
        counts = (self.job == 0) & ~np.isin(self.actions.kind, [*_TRAFFIC, CODE[ActionKind.BUBBLE]])
        position = np.searchsorted(self.devices, self.device[counts])
        seconds = self.end_s[counts] - self.start_s[counts]
        busy_s = np.bincount(position, weights=seconds, minlength=self.num_devices)
        return busy_s.astype(np.float64)

    @property
    def bubble_fraction(self) -> float:
        """Idle device-seconds / (devices used * step time); all-reduce and update are not idle."""
        total_s = self.num_devices * self.step_time_s
        if total_s <= 0:
            return 0.0
        return max(0.0, 1.0 - float(self.busy_s.sum()) / self.num_steps / total_s)

    @cached_property
    def peak_memory_by_device(self) -> Mapping[int, int]:
        """The most bytes that each device ever held."""
        return {device: self.memory.peak_bytes(device) for device in self.devices}

    @property
    def peak_memory_bytes(self) -> int:
        """Peak of the worst device."""
        return max(self.peak_memory_by_device.values(), default=0)

    @property
    def devices_over_capacity(self) -> tuple[int, ...]:
        """Devices whose peak exceeds their memory."""
        peaks = self.peak_memory_by_device
        return tuple(
            device
            for device, capacity in zip(self.devices, self.capacity_bytes, strict=True)
            if peaks[device] > capacity
        )

    @cached_property
    def seconds_by_kind(self) -> Mapping[ActionKind, float]:
        """Device-seconds of each action kind over the run."""
        seconds = np.bincount(
            self.actions.kind, weights=self.end_s - self.start_s, minlength=len(KINDS)
        )
        return {KINDS[code]: float(s) for code, s in enumerate(seconds) if s > 0}

    def __len__(self) -> int:
        return len(self.start_s)
