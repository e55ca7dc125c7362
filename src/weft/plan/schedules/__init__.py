"""Schedules by name: each makes the ordered actions of every device from a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weft.base.errors import UnsupportedError
from weft.plan.program import Program
from weft.plan.schedule import Schedule, ScheduleError
from weft.plan.schedules import build, order
from weft.plan.train_plan import TrainPlan


def gpipe(plan: TrainPlan) -> Schedule:
    """Every forward, then every backward; holds the whole batch (GPipe, Megatron-LM sheet §1)."""
    orders = [
        order.forward_only(stage.index, plan.num_micro_batches(stage.index))
        if stage.frozen
        else order.all_forward_all_backward(stage.index, plan.num_micro_batches(stage.index))
        for stage in plan.stages
    ]
    return build.synchronous(plan, "gpipe", orders)


def one_forward_one_backward(plan: TrainPlan) -> Schedule:
    """1F1B on a stage graph: each stage holds the plan's samples in flight, one forward a backward.

    Source: GraphPipe (arXiv 2406.17145) §6; on a chain it is PipeDream-Flush.
    """
    return build.synchronous(plan, "1f1b", _orders(plan, [1] * plan.num_stages))


def k_forward_k_backward(plan: TrainPlan) -> Schedule:
    """kFkB: like 1F1B, in groups of each stage's own k (GraphPipe §6)."""
    return build.synchronous(plan, "kfkb", _orders(plan, [stage.k for stage in plan.stages]))


def zero_bubble(plan: TrainPlan) -> Schedule:
    """1F1B with split backwards whose weight halves fill the drain (arXiv 2401.10241, ZB-H1).

    Every stage may hold as many micro-batches as the deepest one does under 1F1B.
    """
    deepest = max(stage.num_in_flight for stage in plan.stages)
    orders = [
        whole if stage.frozen else order.split_backward(whole, deepest - stage.num_in_flight)
        for stage, whole in zip(plan.stages, _orders(plan, [1] * plan.num_stages), strict=True)
    ]
    return build.synchronous(plan, "zero-bubble", orders)


def interleaved(plan: TrainPlan) -> Schedule:
    """Interleaved 1F1B: stage s of a chain runs on device group s mod p, v stages on each.

    Equal to the order of torch's ScheduleInterleaved1F1B. Source: Megatron-LM §2.2.2.
    """
    groups = list(dict.fromkeys(stage.devices for stage in plan.stages))
    num_groups = len(groups)
    chunks, rest = divmod(plan.num_stages, num_groups)
    is_chain = all(
        plan.successors[s] == ((s + 1,) if s + 1 < plan.num_stages else ())
        for s in range(plan.num_stages)
    )
    loops = all(stage.devices == groups[stage.index % num_groups] for stage in plan.stages)
    counts = {plan.num_micro_batches(stage.index) for stage in plan.stages}
    if rest or not is_chain or not loops or len(counts) > 1:
        raise ScheduleError(
            "interleaved 1F1B needs a chain of p*v stages with one micro-batch size, stage s on "
            f"device group s mod p; this plan has {plan.num_stages} stages on {num_groups} groups, "
            f"{'a chain' if is_chain else 'not a chain'}, micro-batch counts {sorted(counts)}"
        )
    order_of: dict[int, Program] = {}
    for rank, group in enumerate(groups):
        program = order.interleaved(rank, num_groups, chunks, counts.copy().pop())
        order_of |= dict.fromkeys(group, program)
    return build.assemble(plan, "interleaved", order_of)


def pipedream_2bw(plan: TrainPlan) -> Schedule:
    """1F1B without flushes and with two weight versions (PipeDream-2BW, arXiv 2006.09503 §3.1)."""
    by_device = build.stages_by_device(plan)
    if any(len(stages) > 1 for stages in by_device.values()):
        raise ScheduleError("PipeDream-2BW runs one stage per device; this plan shares devices")
    if any(stage.frozen for stage in plan.stages):
        raise ScheduleError("PipeDream-2BW trains every stage; this plan has frozen ones")
    parts = {
        stage.index: order.without_flush(
            stage.index, plan.num_micro_batches(stage.index), stage.num_in_flight - 1
        )
        for stage in plan.stages
    }
    ends = {stage.index: build.flush(plan, (stage.index,)) for stage in plan.stages}
    stages = [by_device[device][0] for device in plan.used_devices]
    return build.schedule_of(
        plan,
        "2bw",
        prologue=tuple(parts[s][0] for s in stages),
        body=tuple(Program.concat([parts[s][1], ends[s]]) for s in stages),
        epilogue=tuple(Program.concat([parts[s][2], ends[s]]) for s in stages),
    )


SCHEDULES: Mapping[str, Callable[[TrainPlan], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "kfkb": k_forward_k_backward,
    "zero-bubble": zero_bubble,
    "interleaved": interleaved,
    "2bw": pipedream_2bw,
}
"""Name -> generator."""


def generate(plan: TrainPlan, name: str | None = None) -> Schedule:
    """The schedule called `name` (default: the plan's own) for `plan`, compute actions only.

    Raises UnsupportedError with the known names, and ScheduleError where the plan does not suit.
    """
    chosen = plan.schedule if name is None else name
    if chosen not in SCHEDULES:
        raise UnsupportedError(f"schedule {chosen!r} is unknown; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[chosen](plan)


def _orders(plan: TrainPlan, k: list[int]) -> list[Program]:
    return [
        order.forward_only(stage.index, plan.num_micro_batches(stage.index))
        if stage.frozen
        else order.k_forward_k_backward(
            stage.index,
            plan.num_micro_batches(stage.index),
            stage.num_in_flight,
            k[stage.index],
        )
        for stage in plan.stages
    ]
