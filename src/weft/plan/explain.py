"""What binds a plan, in words."""

from __future__ import annotations

from dataclasses import dataclass

from weft.plan.train_plan import Stage, TrainPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """One stage's share of the batch's time and of its devices' memory."""

    stage: int
    first_op: str
    num_ops: int
    num_devices: int
    micro_batch: int
    num_in_flight: int
    compute_s_per_sample: float
    all_reduce_s: float
    memory_bytes: int
    memory_fraction: float
    is_bottleneck: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The reports of all stages, and sentences about what limits the plan."""

    stages: tuple[StageReport, ...]
    sentences: tuple[str, ...]


def explain(plan: TrainPlan) -> Explanation:
    """Say which stage sets the rate, what the pipeline's depth costs, and where memory is tight."""
    seconds = [_busy_s(plan, stage) for stage in plan.stages]
    slowest = max(range(plan.num_stages), key=seconds.__getitem__)
    reports = tuple(
        StageReport(
            stage=stage.index,
            first_op=stage.ops[0],
            num_ops=len(stage.ops),
            num_devices=stage.num_devices,
            micro_batch=stage.micro_batch,
            num_in_flight=stage.num_in_flight,
            compute_s_per_sample=stage.micro_batch_s / stage.micro_batch,
            all_reduce_s=stage.all_reduce_s,
            memory_bytes=stage.memory_bytes,
            memory_fraction=stage.memory_bytes / _limit(plan, stage),
            is_bottleneck=stage.index == slowest,
        )
        for stage in plan.stages
    )
    sentences = [
        _rate(plan, seconds, slowest),
        _depth(plan),
        _memory(plan, reports),
        *_all_reduce(plan),
        *plan.notes,
    ]
    return Explanation(stages=reports, sentences=tuple(sentences))


def _busy_s(plan: TrainPlan, stage: Stage) -> float:
    """Seconds of one step that a stage's devices compute and reduce."""
    return stage.micro_batch_s * plan.num_micro_batches(stage.index) + stage.all_reduce_s


def _limit(plan: TrainPlan, stage: Stage) -> int:
    return min(plan.cluster.devices[device].type.memory_bytes for device in stage.devices)


def _rate(plan: TrainPlan, seconds: list[float], slowest: int) -> str:
    stage = plan.stages[slowest]
    mean = sum(seconds) / len(seconds)
    balance = (
        "the stages are balanced"
        if mean >= 0.95 * seconds[slowest]
        else f"the mean stage is busy for {100 * mean / seconds[slowest]:.0f} % of that"
    )
    return (
        f"stage {slowest} ({stage.ops[0]} ... {stage.ops[-1]}) sets the rate: it is busy for "
        f"{seconds[slowest]:.4g} s of each step on {stage.num_devices} device(s); {balance}"
    )


def _depth(plan: TrainPlan) -> str:
    count = min(plan.num_micro_batches(s) for s in range(plan.num_stages))
    if plan.num_stages == 1:
        return "there is one stage, so nothing waits for a pipeline to fill"
    share = (plan.depth - 1) / (count + plan.depth - 1)
    return (
        f"{plan.num_stages} stages, {plan.depth} on the longest path: with {count} micro-batches a "
        f"step, filling and draining take about {100 * share:.0f} % of it"
    )


def _memory(plan: TrainPlan, reports: tuple[StageReport, ...]) -> str:
    full = max(plan.memory_bytes.items(), key=lambda item: item[1])
    device, num_bytes = full
    limit = plan.cluster.devices[device].type.memory_bytes
    held = [r for r in reports if device in plan.stages[r.stage].devices]
    stage = plan.stages[held[0].stage]
    tight = "memory binds there" if num_bytes > 0.9 * limit else "memory does not bind"
    return (
        f"device {device} is the fullest: {num_bytes:,} of {limit:,} bytes, of which "
        f"{stage.state_bytes:,} are weights with their state and {stage.activation_bytes:,} are "
        f"activations of {stage.num_in_flight} micro-batches in flight (stage {stage.index}); "
        f"{tight}"
    )


def _all_reduce(plan: TrainPlan) -> list[str]:
    worst = max(plan.stages, key=lambda stage: stage.all_reduce_s)
    busy_s = _busy_s(plan, worst)
    if busy_s == 0 or worst.all_reduce_s < 0.05 * busy_s:
        return []
    return [
        f"stage {worst.index} spends {100 * worst.all_reduce_s / busy_s:.0f} % of its time "
        f"reducing {worst.gradient_bytes:,} bytes of gradients over {worst.num_devices} devices"
    ]
