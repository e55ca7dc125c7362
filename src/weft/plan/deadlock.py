"""Proves that a schedule cannot hang, for executors that buffer nothing.

The model: devices run their actions in order. SEND is a rendezvous: it ends together with the
transfer. One in-order queue per (sender, receiver) carries the messages: a transfer starts when the
sender has reached its SEND, and when every transfer before it in the queue has ended, before it in
the order of the sender's SENDs and in the order of the receiver's RECVs. The receives of a queue
are posted ahead, in RECV order; RECV ends with its transfers. A schedule is safe exactly when this
happens-before graph has no cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.communicate import insert_communication
from weft.plan.schedule import Schedule, ScheduleError
from weft.plan.wiring import Wiring, wire


class DeadlockError(ScheduleError):
    """A schedule whose actions wait for each other; the message lists one cycle."""


def check_deadlock(schedule: Schedule, *, num_steps: int = 2) -> None:
    """Raise DeadlockError with a cycle, or ScheduleError for what is missing, else return.

    Communication is inserted where the schedule has none. `num_steps` repetitions of the body are
    checked; two suffice, because later ones repeat what happens between the first two.
    """
    run = insert_communication(schedule.unrolled(num_steps))
    wiring = wire(run)
    graph = _happens_before(run, wiring)
    stuck = graph.stuck()
    if stuck.any():
        names = [_name(node, run, wiring) for node in graph.cycle(stuck)]
        raise DeadlockError(
            f"schedule {schedule.name!r} deadlocks; each of these waits for the next: "
            + " -> ".join([*names, names[0]])
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Graph:
    """Happens-before edges; nodes are the actions in row order, then one per message."""

    num_nodes: int
    source: NDArray[np.int64]
    target: NDArray[np.int64]

    def stuck(self) -> NDArray[np.bool_]:
        """Which nodes can never happen: those on cycles and those behind them."""
        order = np.argsort(self.source, kind="stable")
        target = self.target[order]
        first = np.searchsorted(self.source[order], np.arange(self.num_nodes + 1))
        missing = np.bincount(self.target, minlength=self.num_nodes)
        stack: list[int] = np.nonzero(missing == 0)[0].tolist()
        waiting: list[int] = missing.tolist()
        starts: list[int] = first.tolist()
        targets: list[int] = target.tolist()
        while stack:
            node = stack.pop()
            for edge in range(starts[node], starts[node + 1]):
                waiting[targets[edge]] -= 1
                if not waiting[targets[edge]]:
                    stack.append(targets[edge])
        return np.array(waiting) > 0

    def cycle(self, stuck: NDArray[np.bool_]) -> list[int]:
        """One cycle among the stuck nodes, each waiting for the next."""
        inside = stuck[self.source] & stuck[self.target]
        waits_for = np.full(self.num_nodes, -1, dtype=np.int64)
        waits_for[self.target[inside]] = self.source[inside]
        node, seen = int(np.argmax(stuck)), dict[int, int]()
        path: list[int] = []
        while node not in seen:
            seen[node] = len(path)
            path.append(node)
            node = int(waits_for[node])
        return path[seen[node] :]


def _happens_before(schedule: Schedule, wiring: Wiring) -> _Graph:
    """Program order, dependencies inside devices, rendezvous, and the order of the queues."""
    index, crossing = wiring.index, wiring.crossing
    num_actions = int(index.row_start[-1])
    messages = wiring.table.take(crossing)
    transfer = num_actions + np.arange(len(crossing))
    sends, recvs = wiring.source[crossing], wiring.target[crossing]
    rows = np.arange(num_actions - 1) if num_actions else np.zeros(0, dtype=np.int64)
    rows = rows[index.device[:-1] == index.device[1:]]
    local = np.ones(len(wiring.table), dtype=bool)
    local[crossing] = False
    (held,) = np.nonzero(np.isin(sends + 1, index.row_start[1:], invert=True))
    queue = messages.sender.astype(np.int64) * (int(messages.receiver.max(initial=0)) + 1)
    queue += messages.receiver
    pairs = [
        (rows, rows + 1),
        (wiring.source[local], wiring.target[local]),
        (sends, transfer),
        (transfer, recvs),
        # The rendezvous: what follows a SEND on its device waits for the transfer.
        (transfer[held], sends[held] + 1),
    ]
    # Messages of one SEND or RECV go in the order of their samples, at both ends.
    for ends in (sends, recvs):
        order = np.lexsort((messages.first_sample, ends, queue))
        same = queue[order][1:] == queue[order][:-1]
        pairs.append((transfer[order][:-1][same], transfer[order][1:][same]))
    return _Graph(
        num_nodes=num_actions + len(crossing),
        source=np.concatenate([source for source, _ in pairs]).astype(np.int64),
        target=np.concatenate([target for _, target in pairs]).astype(np.int64),
    )


def _name(node: int, schedule: Schedule, wiring: Wiring) -> str:
    num_actions = int(wiring.index.row_start[-1])
    if node < num_actions:
        device = schedule.devices[int(wiring.index.device[node])]
        return f"{wiring.index.columns[node]} on device {device}"
    row = int(wiring.crossing[node - num_actions])
    message = wiring.table[row]
    send = wiring.index.columns[int(wiring.source[row])]
    return f"transfer of {send} from device {message.sender} to {message.receiver}"
