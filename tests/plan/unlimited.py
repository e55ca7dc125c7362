"""Step times with unlimited buffers: what samples in flight should come close to."""

from __future__ import annotations

import heapq

from plan.longest_path import Key, inputs
from weft.plan.train_plan import TrainPlan


def unlimited_s(plan: TrainPlan) -> float:
    """Step time when devices hold any number of micro-batches and choose as they go.

    An independent simulator without schedules: a device that is free runs the backward that is
    ready with the lowest micro-batch, else the forward.
    """
    waits = inputs(plan)
    missing: dict[Key, int] = {}
    feeds: dict[Key, list[tuple[Key, float]]] = {}
    for stage in plan.stages:
        for device in stage.devices:
            for m in range(plan.num_micro_batches(stage.index)):
                for kind in "FB":
                    key = (device, kind, stage.index, m)
                    before = dict(waits.get(key, {}))
                    if kind == "B":
                        before[device, "F", stage.index, m] = 0.0
                    missing[key] = len(before)
                    for source, delay_s in before.items():
                        feeds.setdefault(source, []).append((key, delay_s))
    ready: dict[int, list[tuple[bool, int, Key]]] = {d: [] for d in plan.used_devices}
    busy = dict.fromkeys(plan.used_devices, False)
    events: list[tuple[float, int, Key]] = []
    now = 0.0

    def offer(key: Key) -> None:
        ready[key[0]].append((key[1] == "F", key[3], key))

    def dispatch() -> None:
        for device, options in ready.items():
            if options and not busy[device]:
                option = min(options)
                options.remove(option)
                key = option[2]
                stage = plan.stages[key[2]]
                times = stage.forward_s if key[1] == "F" else stage.backward_s
                busy[device] = True
                heapq.heappush(events, (now + times[stage.micro_batch], 0, key))

    for key, count in missing.items():
        if not count:
            offer(key)
    dispatch()
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, arrival, key = heapq.heappop(events)
            if arrival:
                missing[key] -= 1
                if not missing[key]:
                    offer(key)
                continue
            busy[key[0]] = False
            for target, delay_s in feeds.get(key, []):
                heapq.heappush(events, (now + delay_s, 1, target))
        dispatch()
    return now
