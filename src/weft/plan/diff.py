"""What changed between two plans, in words."""

from __future__ import annotations

from collections.abc import Iterator

from weft.plan.train_plan import Stage, TrainPlan

_FIELDS = ("method", "objective", "schedule", "graph_digest", "batch_size")


def diff(old: TrainPlan, new: TrainPlan) -> str:
    """A line for every difference that a person would act on; empty for equal plans.

    Stages are matched by their operators, not by their numbers.
    """
    return "\n".join(_lines(old, new))


def _lines(old: TrainPlan, new: TrainPlan) -> Iterator[str]:
    for name in _FIELDS:
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            yield f"{name}: {a} -> {b}"
    if old.cluster != new.cluster:
        yield f"cluster: {old.cluster.name} -> {new.cluster.name}"
    if old.training != new.training:
        yield f"training: {old.training} -> {new.training}"
    for name in ("num_stages", "depth"):
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            yield f"{name}: {a} -> {b}"
    for name in ("bottleneck_s", "step_time_s"):
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            change = f" ({100 * (b / a - 1):+.1f} %)" if a else ""
            yield f"{name}: {a:.6g} -> {b:.6g}{change}"
    yield from _stage_lines(old, new)


def _stage_lines(old: TrainPlan, new: TrainPlan) -> Iterator[str]:
    before = {frozenset(stage.ops): stage for stage in old.stages}
    after = {frozenset(stage.ops): stage for stage in new.stages}
    for ops, stage in before.items():
        if ops not in after:
            yield f"- {_name(stage)}"
    for ops, stage in after.items():
        if ops not in before:
            yield f"+ {_name(stage)}"
            continue
        other = before[ops]
        for field in ("devices", "micro_batch", "k", "in_flight", "recompute"):
            a, b = getattr(other, field), getattr(stage, field)
            if a != b:
                yield f"  {_name(stage)}: {field} {a} -> {b}"


def _name(stage: Stage) -> str:
    first, *rest = stage.ops
    more = f" ... {rest[-1]} ({len(stage.ops)} operators)" if rest else ""
    return f"stage {stage.index} on {len(stage.devices)} device(s): {first}{more}"
