"""Step times without contention, from first principles: an oracle that shares nothing with `weft`.

It reads the plan's figures and the programs, assigns every single sample to its owner, and relaxes
the longest-path equations until nothing changes.
"""

from __future__ import annotations

from collections import defaultdict

from weft.plan.schedule import Schedule
from weft.plan.train_plan import Stage, TrainPlan

Key = tuple[int, str, int, int]
"""(device, "F" or "B", stage, micro-batch)"""


def owner(stage: Stage, sample: int) -> tuple[int, int]:
    """(device, micro-batch) that computes one sample of the batch."""
    micro_batch, offset = divmod(sample, stage.micro_batch)
    return stage.devices[offset // (stage.micro_batch // stage.dp)], micro_batch


def inputs(plan: TrainPlan) -> dict[Key, dict[Key, float]]:
    """What each action waits for on other devices, with the seconds that its message takes."""
    waits: dict[Key, dict[Key, float]] = defaultdict(dict)
    for edge in plan.edges:
        source, target = plan.stages[edge.source], plan.stages[edge.target]
        count: dict[tuple[Key, Key], int] = defaultdict(int)
        size: dict[tuple[Key, Key], int] = {}
        for sample in range(plan.batch_size):
            (a, m), (b, n) = owner(source, sample), owner(target, sample)
            pairs = [((a, "F", edge.source, m), (b, "F", edge.target, n))]
            order_only = not edge.forward_bytes_per_sample and not edge.backward_bytes_per_sample
            trained = not source.frozen and not target.frozen
            if (edge.backward_bytes_per_sample or order_only) and trained:
                pairs.append(((b, "B", edge.target, n), (a, "B", edge.source, m)))
            for pair in pairs:
                count[pair] += 1
                size[pair] = (
                    edge.forward_bytes_per_sample
                    if pair[0][1] == "F"
                    else edge.backward_bytes_per_sample
                )
        for (before, after), samples in count.items():
            num_bytes = samples * size[before, after]
            link = plan.cluster.link(before[0], after[0])
            waits[after][before] = (
                link.latency_s + num_bytes / link.bandwidth_bytes_per_s if num_bytes else 0.0
            )
    return waits


def makespan_s(plan: TrainPlan, schedule: Schedule) -> float:
    """Seconds until every device has run its program once."""
    waits = inputs(plan)
    end_s: dict[Key, float] = {}
    done = dict.fromkeys(schedule.devices, 0)
    clock = dict.fromkeys(schedule.devices, 0.0)
    programs = {device: list(schedule.program(device)) for device in schedule.devices}
    moved = True
    while moved:
        moved = False
        for device, program in programs.items():
            while done[device] < len(program):
                action = program[done[device]]
                stage = plan.stages[action.stage]
                if action.kind == "REDUCE_GRAD":
                    group = stage.devices
                    at = [
                        programs[d][done[d]] if done[d] < len(programs[d]) else None for d in group
                    ]
                    if any(a != action for a in at):
                        break
                    start = max(clock[d] for d in group)
                    for d in group:
                        clock[d] = start + stage.all_reduce_s
                        done[d] += 1
                    moved = True
                    continue
                if action.kind in ("F", "B"):
                    key = (device, str(action.kind), action.stage, action.micro_batch)
                    if any(before not in end_s for before in waits[key]):
                        break
                    start = max([clock[device], *(end_s[b] + s for b, s in waits[key].items())])
                    times = stage.forward_s if action.kind == "F" else stage.backward_s
                    clock[device] = end_s[key] = start + times[stage.micro_batch]
                done[device] += 1
                moved = True
    assert all(done[d] == len(programs[d]) for d in programs), "the oracle is stuck"
    return max(clock.values())
