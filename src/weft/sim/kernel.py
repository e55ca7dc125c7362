"""The event kernel: tasks on devices, messages on links, one virtual clock.

Tie order. Events of one instant are all handled before any message that became ready at that
instant is given a link: first task ends by row, then arrivals by message, then second hops by
message, then (without overlap) departures by message. The messages are then served by (ready time,
sender stage, sender micro-batch, row); one that gets its first resource at once reaches its second
in that order too. Tasks and messages of no duration make further rounds at the
same instant. No other order exists, so equal inputs give bit-identical results.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.lower import TaskGraph
from weft.plan.schedule import ScheduleError

NO_HOP = -1
"""A message that queues nowhere."""

OnBubble = Callable[[int, float], float]
"""(task, now) -> seconds that a fill job holds the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """Which FIFO resources each message passes, shape (number of messages,).

    A message holds `first_hop` for `occupancy_s`, then `second_hop` likewise, the second from the
    moment the first begins (cut-through); it arrives `delay_s` after its last hop begins.
    """

    first_hop: NDArray[np.int64]
    second_hop: NDArray[np.int64]
    occupancy_s: NDArray[np.float64]
    delay_s: NDArray[np.float64]
    num_resources: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelResult:
    """When tasks started and ended, and when messages got their link and arrived, seconds."""

    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    message_start_s: NDArray[np.float64]
    message_arrival_s: NDArray[np.float64]


def run(
    tasks: TaskGraph,
    routes: Routes,
    *,
    overlap: bool = True,
    bubbles: frozenset[int] = frozenset(),
    on_bubble: OnBubble | None = None,
) -> KernelResult:
    """Execute all tasks; ScheduleError when some wait for each other.

    Without `overlap` a device starts its next task only when what it sent has left it. At the start
    of each task in `bubbles`, `on_bubble` says how long it takes.
    """
    return _Kernel(tasks, routes, overlap, bubbles, on_bubble).run()


class _Kernel:
    """State of one run, in plain lists: element access is what the loop spends its time on."""

    def __init__(
        self,
        tasks: TaskGraph,
        routes: Routes,
        overlap: bool,
        bubbles: frozenset[int],
        on_bubble: OnBubble | None,
    ) -> None:
        self.tasks, self.overlap = tasks, overlap
        self.bubbles, self.on_bubble = bubbles, on_bubble
        order = np.argsort(tasks.source, kind="stable")
        self.first: list[int] = np.searchsorted(
            tasks.source[order], np.arange(tasks.num_tasks + 1)
        ).tolist()
        self.edge_target: list[int] = tasks.target[order].tolist()
        self.edge_message: list[int] = tasks.message[order].tolist()
        self.following: list[int] = tasks.next_task.tolist()
        missing = np.bincount(tasks.target, minlength=tasks.num_tasks)
        missing[tasks.next_task[tasks.next_task >= 0]] += 1
        self.missing: list[int] = missing.tolist()
        self.duration_s: list[float] = tasks.duration_s.tolist()
        self.start_s: list[float] = [0.0] * tasks.num_tasks
        self.end_s: list[float] = [0.0] * tasks.num_tasks
        num_messages = len(tasks.messages)
        rows = np.nonzero(tasks.message >= 0)[0]
        sent, target = tasks.message[rows], tasks.target[rows]
        ends = np.empty((2, num_messages), dtype=np.int64)
        ends[0, sent], ends[1, sent] = tasks.source[rows], target
        self.sender: list[int] = ends[0].tolist()
        self.target: list[int] = ends[1].tolist()
        rank = np.empty(num_messages, dtype=np.int64)
        table = tasks.messages
        rank[np.lexsort((table.sender_micro_batch, table.sender_stage))] = np.arange(num_messages)
        self.rank: list[int] = rank.tolist()
        self.first_hop: list[int] = routes.first_hop.tolist()
        self.second_hop: list[int] = routes.second_hop.tolist()
        self.occupancy_s: list[float] = routes.occupancy_s.tolist()
        self.delay_s: list[float] = routes.delay_s.tolist()
        self.free_s: list[float] = [0.0] * routes.num_resources
        self.message_start_s: list[float] = [0.0] * num_messages
        self.message_arrival_s: list[float] = [0.0] * num_messages
        self.events: list[tuple[float, int]] = []
        self.ready: list[int] = []
        self.held: dict[int, int] = {}

    def run(self) -> KernelResult:
        """Handle events until none is left."""
        # Millions of live tuples make the cyclic collector scan in vain; nothing here is a cycle.
        collects = gc.isenabled()
        gc.disable()
        try:
            num_ended = self._loop()
        finally:
            if collects:
                gc.enable()
        if num_ended < len(self.start_s):
            raise ScheduleError(
                f"schedule {self.tasks.schedule.name!r} cannot finish: "
                f"{len(self.start_s) - num_ended} of {len(self.start_s)} actions wait for each "
                "other (`check_deadlock` names them)"
            )
        return KernelResult(
            start_s=np.array(self.start_s),
            end_s=np.array(self.end_s),
            message_start_s=np.array(self.message_start_s),
            message_arrival_s=np.array(self.message_arrival_s),
        )

    def _loop(self) -> int:
        """Handle events in order; the number of tasks that ended.

        Event codes: a task ends, a message arrives, it reaches its second resource, it has left.
        """
        num_tasks, num_messages = len(self.start_s), len(self.target)
        arrived, hopped = num_tasks + num_messages, num_tasks + 2 * num_messages
        events, ready, missing, unblocked = self.events, self.ready, self.missing, list[int]()
        first, edge_target, edge_message = self.first, self.edge_target, self.edge_message
        following, target, end_s = self.following, self.target, self.end_s
        start_s, duration_s, bubbles = self.start_s, self.duration_s, self.bubbles
        pop, push = heapq.heappop, heapq.heappush
        num_ended = 0
        for task, count in enumerate(missing):
            if not count:
                push(events, (self._duration(task, 0.0), task))
        while events:
            now, event = pop(events)
            if event < num_tasks:
                num_ended += 1
                end_s[event] = now
                num_sent = 0
                for edge in range(first[event], first[event + 1]):
                    message = edge_message[edge]
                    if message < 0:
                        unblocked.append(edge_target[edge])
                    else:
                        ready.append(message)
                        num_sent += 1
                after = following[event]
                if after >= 0:
                    if self.overlap or not num_sent:
                        unblocked.append(after)
                    else:
                        self.held[event] = num_sent
            elif event < arrived:
                unblocked.append(target[event - num_tasks])
            elif event < hopped:
                self._hop(event - arrived, now)
            else:
                unblocked += self._left(event - hopped)
            for task in unblocked:
                missing[task] -= 1
                if not missing[task]:
                    start_s[task] = now
                    seconds = duration_s[task] if not bubbles else self._duration(task, now)
                    push(events, (now + seconds, task))
            unblocked.clear()
            if ready and (not events or events[0][0] > now):
                self._serve(now)
        return num_ended

    def _duration(self, task: int, now: float) -> float:
        """Seconds of a task that starts now; a BUBBLE asks what runs in it."""
        if task in self.bubbles and self.on_bubble is not None:
            self.duration_s[task] = self.on_bubble(task, now)
        return self.duration_s[task]

    def _serve(self, now: float) -> None:
        """Give links to the messages that became ready now, in the documented order."""
        batch = self.ready
        if len(batch) > 1:
            batch.sort(key=self.rank.__getitem__)
        num_tasks, num_messages = len(self.start_s), len(self.target)
        for message in batch:
            hop, start_s = self.first_hop[message], now
            if hop >= 0:
                free_s = self.free_s[hop]
                if free_s > now:
                    start_s = free_s
                self.free_s[hop] = start_s + self.occupancy_s[message]
            self.message_start_s[message] = start_s
            if self.second_hop[message] < 0:
                self._arrive(message, start_s)
            elif start_s > now:
                heapq.heappush(self.events, (start_s, num_tasks + num_messages + message))
            else:
                self._hop(message, now)
            if not self.overlap:
                left_s = start_s + self.occupancy_s[message]
                heapq.heappush(self.events, (left_s, num_tasks + 2 * num_messages + message))
        batch.clear()

    def _hop(self, message: int, now: float) -> None:
        """The message reaches its second resource, queued by when it got the first."""
        hop, start_s = self.second_hop[message], now
        if self.free_s[hop] > now:
            start_s = self.free_s[hop]
        self.free_s[hop] = start_s + self.occupancy_s[message]
        self._arrive(message, start_s)

    def _arrive(self, message: int, start_s: float) -> None:
        arrival_s = start_s + self.delay_s[message]
        self.message_arrival_s[message] = arrival_s
        heapq.heappush(self.events, (arrival_s, len(self.start_s) + message))

    def _left(self, message: int) -> list[int]:
        """Without overlap: the sender goes on when the last of its messages has left."""
        task = self.sender[message]
        self.held[task] -= 1
        return [] if self.held[task] else [self.following[task]]
