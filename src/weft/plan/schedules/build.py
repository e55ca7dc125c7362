"""From the orders of single stages to the schedule of all devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weft.plan.action import Action, ActionKind
from weft.plan.program import EMPTY_PROGRAM, Program
from weft.plan.schedule import Placement, Schedule
from weft.plan.schedules.merge import merge_orders
from weft.plan.train_plan import TrainPlan


def placements(plan: TrainPlan) -> tuple[Placement, ...]:
    """Where each stage of the plan runs."""
    return tuple(
        Placement(stage=stage.index, devices=stage.devices, tp=stage.tp) for stage in plan.stages
    )


def flush(plan: TrainPlan, stages: Sequence[int]) -> Program:
    """What a device does at the end of a step: all-reduce and update each stage that trains."""
    actions: list[Action] = []
    for index in stages:
        stage = plan.stages[index]
        if stage.frozen:
            continue
        # Also without replicas where a parameter is shared with another stage.
        if stage.dp > 1 or stage.all_reduce_s > 0:
            actions.append(Action(kind=ActionKind.REDUCE_GRAD, stage=index))
        actions.append(Action(kind=ActionKind.STEP, stage=index))
    return Program.of(actions)


def stages_by_device(plan: TrainPlan) -> Mapping[int, tuple[int, ...]]:
    """Stages of each used device, ascending."""
    found: dict[int, list[int]] = {device: [] for device in plan.used_devices}
    for stage in plan.stages:
        for device in stage.devices:
            found[device].append(stage.index)
    return {device: tuple(sorted(row)) for device, row in found.items()}


def synchronous(plan: TrainPlan, name: str, orders: Sequence[Program]) -> Schedule:
    """The flushing schedule in which each stage runs its order.

    Devices that run several stages get one order by list scheduling (`merge_orders`).
    """
    by_device = stages_by_device(plan)
    merged = (
        merge_orders(plan, orders)
        if any(len(stages) > 1 for stages in by_device.values())
        else {stage.devices: orders[stage.index] for stage in plan.stages}
    )
    order_of = {device: program for devices, program in merged.items() for device in devices}
    return assemble(plan, name, order_of)


def assemble(plan: TrainPlan, name: str, order_of: Mapping[int, Program]) -> Schedule:
    """The flushing schedule of these compute orders by device, all-reduce and update at the end."""
    by_device = stages_by_device(plan)
    made: dict[tuple[int, tuple[int, ...]], Program] = {}
    body: list[Program] = []
    for device in plan.used_devices:
        key = (id(order_of[device]), by_device[device])
        if key not in made:
            made[key] = Program.concat([order_of[device], flush(plan, by_device[device])])
        body.append(made[key])
    return schedule_of(plan, name, tuple(body))


def schedule_of(
    plan: TrainPlan,
    name: str,
    body: tuple[Program, ...],
    prologue: tuple[Program, ...] = (),
    epilogue: tuple[Program, ...] = (),
) -> Schedule:
    """A schedule of the plan's stages from finished programs."""
    return Schedule(
        name=name,
        batch_size=plan.batch_size,
        placements=placements(plan),
        edges=plan.edges,
        num_micro_batches=tuple(plan.num_micro_batches(s.index) for s in plan.stages),
        devices=plan.used_devices,
        prologue=prologue or (EMPTY_PROGRAM,) * len(body),
        body=body,
        epilogue=epilogue or (EMPTY_PROGRAM,) * len(body),
    )


def has_backward(plan: TrainPlan) -> np.ndarray:
    """By stage: whether gradients flow into it."""
    return np.array([not stage.frozen for stage in plan.stages])
