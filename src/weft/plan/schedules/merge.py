"""One order for a device that runs several stages: list scheduling of the stages' own orders."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from weft.plan.action import ActionKind
from weft.plan.program import CODE, Program
from weft.plan.schedule import ScheduleError
from weft.plan.train_plan import TrainPlan

_F = CODE[ActionKind.F]
_W = CODE[ActionKind.W]


def merge_orders(plan: TrainPlan, orders: Sequence[Program]) -> Mapping[tuple[int, ...], Program]:
    """Compute programs by device group, from an execution of the stages' orders in virtual time.

    Groups that share a device must be equal: stages share all of their devices or none. Each
    group runs one action at a time; of those whose inputs are there it takes the backward with the
    lowest micro-batch, else the forward of the deepest stage. Because the result is an execution,
    it cannot deadlock. Messages take no time here: they shift the order, never its validity.
    """
    return _Merge(plan, orders).run()


class _Merge:
    def __init__(self, plan: TrainPlan, orders: Sequence[Program]) -> None:
        self.plan, self.orders = plan, orders
        self.next = [0] * plan.num_stages
        self.done_forward = [0] * plan.num_stages
        self.done_backward = [0] * plan.num_stages
        groups: dict[frozenset[int], list[int]] = {}
        for stage in plan.stages:
            groups.setdefault(frozenset(stage.devices), []).append(stage.index)
        self.groups = list(groups.values())
        _check_disjoint(plan, list(groups))
        self.group_of = {s: g for g, stages in enumerate(self.groups) for s in stages}
        self.picked: list[list[tuple[int, int]]] = [[] for _ in self.groups]

    def run(self) -> Mapping[tuple[int, ...], Program]:
        """Execute until every order is used up."""
        idle = set(range(len(self.groups)))
        running: list[tuple[float, int, int]] = []
        now = 0.0
        while True:
            for group in sorted(idle):
                stage = self._choose(group)
                if stage is None:
                    continue
                row = self.next[stage]
                self.next[stage] += 1
                self.picked[group].append((stage, row))
                heapq.heappush(running, (now + self._duration_s(stage, row), group, stage))
                idle.discard(group)
            if not running:
                break
            now = running[0][0]
            while running and running[0][0] == now:
                _, group, stage = heapq.heappop(running)
                self._finish(stage)
                idle.add(group)
        self._require_all()
        return {
            self.plan.stages[stages[0]].devices: self._program(group)
            for group, stages in enumerate(self.groups)
        }

    def _finish(self, stage: int) -> None:
        row = self.next[stage] - 1
        samples = (int(self.orders[stage].micro_batch[row]) + 1) * self._size(stage)
        if self.orders[stage].kind[row] == _F:
            self.done_forward[stage] = samples
        elif self.orders[stage].kind[row] != _W:
            self.done_backward[stage] = samples

    def _choose(self, group: int) -> int | None:
        best: tuple[int, int, int] | None = None
        for stage in self.groups[group]:
            order, row = self.orders[stage], self.next[stage]
            if row < len(order) and self._is_ready(stage, row):
                is_forward = int(order.kind[row] == _F)
                key = (is_forward, int(order.micro_batch[row]) if not is_forward else 0, -stage)
                best = key if best is None else min(best, key)
        return None if best is None else -best[2]

    def _is_ready(self, stage: int, row: int) -> bool:
        order = self.orders[stage]
        needed = (int(order.micro_batch[row]) + 1) * self._size(stage)
        if order.kind[row] == _F:
            return all(self.done_forward[p] >= needed for p in self.plan.predecessors[stage])
        if order.kind[row] == _W:
            return True
        return all(
            self.done_backward[s] >= needed
            for s in self.plan.successors[stage]
            if not self.plan.stages[s].frozen
            and (
                self.plan.edge_by_pair[stage, s].is_order_only
                or self.plan.edge_by_pair[stage, s].backward_bytes_per_sample > 0
            )
        )

    def _duration_s(self, stage: int, row: int) -> float:
        size, entry = self._size(stage), self.plan.stages[stage]
        if self.orders[stage].kind[row] == _F:
            return entry.forward_s[size]
        return entry.backward_s[size]

    def _size(self, stage: int) -> int:
        return self.plan.stages[stage].micro_batch

    def _program(self, group: int) -> Program:
        return Program.concat([self.orders[s][row : row + 1] for s, row in self.picked[group]])

    def _require_all(self) -> None:
        for stage, order in enumerate(self.orders):
            if self.next[stage] < len(order):
                raise ScheduleError(
                    f"the orders of stages that share devices wait for each other: stage {stage} "
                    f"cannot run {order[self.next[stage]]}; raise its samples in flight"
                )


def _check_disjoint(plan: TrainPlan, groups: Sequence[frozenset[int]]) -> None:
    owner: dict[int, frozenset[int]] = {}
    for group in groups:
        for device in group:
            if owner.setdefault(device, group) != group:
                raise ScheduleError(
                    f"device {device} of plan {plan.graph_name!r} runs stages on different groups "
                    f"{sorted(owner[device])} and {sorted(group)}; stages must share all of their "
                    f"devices or none"
                )
