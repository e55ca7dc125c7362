"""What binds a plan, in words and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from weft.cluster.device import Link
from weft.plan.cost_table import divisors
from weft.plan.train_plan import Stage, TrainPlan

_LARGE_SHARE = 0.05
"""Part of a stage's time below which messages and reductions go unmentioned."""


class Bound(StrEnum):
    """What keeps a plan from being faster."""

    COMPUTE = "compute"
    """Every device is used, and the slowest stage computes."""
    COMMUNICATION = "communication"
    """The slowest stage sends, receives and reduces for longer than it computes."""
    MEMORY = "memory"
    """The fullest device cannot hold one more micro-batch."""
    BATCH = "batch"
    """Idle devices cannot join the slowest stage: no degree divides its micro-batches."""
    OPERATOR = "operator"
    """The slowest stage is one operator, which no cut makes shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """One stage's share of a step and of its devices' memory; seconds are of one step.

    `message_s` is the time of its messages in and out where none waits for another.
    """

    stage: int
    first_op: str
    num_ops: int
    num_devices: int
    micro_batch: int
    num_in_flight: int
    compute_s: float
    compute_s_per_sample: float
    all_reduce_s: float
    message_s: float
    memory_bytes: int
    memory_fraction: float
    is_bottleneck: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceReport:
    """Planned peak memory of one device, all its stages together."""

    device: int
    name: str
    stages: tuple[int, ...]
    memory_bytes: int
    capacity_bytes: int
    headroom_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The reports of all stages and devices, what binds, and sentences about it."""

    stages: tuple[StageReport, ...]
    devices: tuple[DeviceReport, ...]
    binds: tuple[Bound, ...]
    sentences: tuple[str, ...]


def explain(plan: TrainPlan) -> Explanation:
    """Say which stage sets the rate and why, what the depth costs, and where memory is tight.

    Nothing is simulated: times are the plan's own, and messages take theirs on an idle link.
    """
    message_s = _message_s(plan)
    busy_s = [_busy_s(plan, stage) + message_s[stage.index] for stage in plan.stages]
    slowest = max(range(plan.num_stages), key=busy_s.__getitem__)
    reports = tuple(
        StageReport(
            stage=stage.index,
            first_op=stage.ops[0],
            num_ops=len(stage.ops),
            num_devices=stage.num_devices,
            micro_batch=stage.micro_batch,
            num_in_flight=stage.num_in_flight,
            compute_s=_compute_s(plan, stage),
            compute_s_per_sample=stage.micro_batch_s / stage.micro_batch,
            all_reduce_s=stage.all_reduce_s,
            message_s=message_s[stage.index],
            memory_bytes=stage.memory_bytes,
            memory_fraction=stage.memory_bytes / _capacity(plan, stage),
            is_bottleneck=stage.index == slowest,
        )
        for stage in plan.stages
    )
    devices = tuple(_devices(plan))
    binds = tuple(_binds(plan, reports[slowest], devices))
    sentences = [
        _rate(plan, reports, busy_s, slowest),
        *(_why(plan, plan.stages[slowest], bound) for bound in binds),
        _depth(plan),
        _in_flight(plan),
        _memory(plan, devices),
        *_communication(plan, reports),
        *plan.notes,
    ]
    return Explanation(stages=reports, devices=devices, binds=binds, sentences=tuple(sentences))


def _compute_s(plan: TrainPlan, stage: Stage) -> float:
    return stage.micro_batch_s * plan.num_micro_batches(stage.index)


def _busy_s(plan: TrainPlan, stage: Stage) -> float:
    """Seconds of one step that a stage's devices compute and reduce."""
    return _compute_s(plan, stage) + stage.all_reduce_s


def _capacity(plan: TrainPlan, stage: Stage) -> int:
    return min(plan.cluster.devices[device].type.memory_bytes for device in stage.devices)


def _message_s(plan: TrainPlan) -> list[float]:
    """Seconds per step of every stage's messages, over the worst link that its groups share."""
    found = [0.0] * plan.num_stages
    for edge in plan.edges:
        source, target = plan.stages[edge.source], plan.stages[edge.target]
        link = _worst_link(plan, source, target)
        pairs = max(source.dp, target.dp)
        for num_bytes in (edge.forward_bytes_per_sample, edge.backward_bytes_per_sample):
            if num_bytes == 0 or source.devices == target.devices:
                continue
            size = min(source.micro_batch, target.micro_batch)
            one_s = link.latency_s + num_bytes * size / pairs / link.bandwidth_bytes_per_s
            seconds = one_s * plan.batch_size / size
            found[source.index] += seconds
            found[target.index] += seconds
    return found


def _worst_link(plan: TrainPlan, source: Stage, target: Stage) -> Link:
    # Replicas talk to the replicas of their samples: the first and last pair see every node.
    ends = {(source.devices[i], target.devices[i]) for i in (0, -1)}
    links = [plan.cluster.link(a, b) for a, b in sorted(ends)]
    return min(links, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s))


def _devices(plan: TrainPlan) -> Iterator[DeviceReport]:
    for device, num_bytes in plan.memory_bytes.items():
        known = plan.cluster.devices[device]
        yield DeviceReport(
            device=device,
            name=known.name,
            stages=tuple(stage.index for stage in plan.stages if device in stage.devices),
            memory_bytes=num_bytes,
            capacity_bytes=known.type.memory_bytes,
            headroom_bytes=known.type.memory_bytes - num_bytes,
        )


def _binds(
    plan: TrainPlan, slowest: StageReport, devices: tuple[DeviceReport, ...]
) -> Iterator[Bound]:
    stage = plan.stages[slowest.stage]
    if slowest.message_s + slowest.all_reduce_s > slowest.compute_s:
        yield Bound.COMMUNICATION
    fullest = min(devices, key=lambda report: report.headroom_bytes)
    if fullest.headroom_bytes < _micro_batch_bytes(plan, fullest):
        yield Bound.MEMORY
    idle = plan.cluster.num_devices - len(plan.used_devices)
    if idle and _next_degree(plan, stage) is None:
        yield Bound.BATCH
    if len(stage.ops) == 1 and plan.num_stages > 1:
        yield Bound.OPERATOR
    if not idle and slowest.message_s + slowest.all_reduce_s <= slowest.compute_s:
        yield Bound.COMPUTE


def _micro_batch_bytes(plan: TrainPlan, report: DeviceReport) -> int:
    """Bytes of one more micro-batch on a device, of the stage that asks for most."""
    return max(
        stage.activation_bytes_at(stage.in_flight + stage.micro_batch) - stage.activation_bytes
        for stage in (plan.stages[index] for index in report.stages)
    )


def _next_degree(plan: TrainPlan, stage: Stage) -> int | None:
    """The next larger number of replicas that divides the micro-batch and finds devices."""
    idle = plan.cluster.num_devices - len(plan.used_devices)
    most = stage.dp + idle // stage.tp
    return next((d for d in divisors(stage.micro_batch, most) if d > stage.dp), None)


def _name(stage: Stage) -> str:
    ends = dict.fromkeys((stage.ops[0], stage.ops[-1]))
    return f"stage {stage.index} ({' ... '.join(ends)})"


def _rate(
    plan: TrainPlan, reports: tuple[StageReport, ...], busy_s: list[float], slowest: int
) -> str:
    stage, report = plan.stages[slowest], reports[slowest]
    mean = sum(busy_s) / len(busy_s)
    balance = (
        "the stages are balanced"
        if mean >= 0.95 * busy_s[slowest]
        else f"the mean stage is busy for {100 * mean / busy_s[slowest]:.0f} % of that"
    )
    return (
        f"{_name(stage)} sets the rate: {busy_s[slowest]:.4g} s of each step on "
        f"{_count(stage.num_devices, 'device')}, of which {report.compute_s:.4g} s compute, "
        f"{report.message_s:.4g} s messages and {report.all_reduce_s:.4g} s gradient reduction; "
        f"{balance}"
    )


def _why(plan: TrainPlan, stage: Stage, bound: Bound) -> str:
    idle = plan.cluster.num_devices - len(plan.used_devices)
    match bound:
        case Bound.COMMUNICATION:
            return (
                "communication binds: the slowest stage moves data for longer than it computes; "
                "faster links, larger micro-batches or fewer cuts would help"
            )
        case Bound.MEMORY:
            return (
                "memory binds: the fullest device cannot hold one more micro-batch in flight; "
                "recomputation, smaller micro-batches or more memory would help"
            )
        case Bound.BATCH:
            return (
                f"the batch binds: {_count(idle, 'device')} idle, but no degree above {stage.dp} "
                f"that they allow divides the micro-batches of {stage.micro_batch}"
            )
        case Bound.OPERATOR:
            return (
                f"one operator binds: {stage.ops[0]} is a stage by itself, so that only more "
                "replicas of it can help"
            )
        case Bound.COMPUTE:
            return (
                f"compute binds: all {_count(plan.cluster.num_devices, 'device')} are used, and "
                "the slowest stage computes for most of its time"
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


def _in_flight(plan: TrainPlan) -> str:
    most = max(plan.stages, key=lambda stage: stage.num_in_flight)
    held = f"{_count(most.num_in_flight, 'micro-batch', 'es')} of {most.micro_batch}"
    if plan.num_stages == 1:
        return f"the stage holds {held} in flight"
    deeper = "as many as the stages below it need" if most.num_in_flight > 1 else "the least"
    return f"stage {most.index} holds the most in flight: {held}, {deeper}"


def _memory(plan: TrainPlan, devices: tuple[DeviceReport, ...]) -> str:
    fullest = min(devices, key=lambda report: report.headroom_bytes)
    stages = [plan.stages[index] for index in fullest.stages]
    return (
        f"device {fullest.name} is the fullest: {fullest.memory_bytes:,} of "
        f"{fullest.capacity_bytes:,} bytes, {fullest.headroom_bytes:,} free; "
        f"{sum(stage.state_bytes for stage in stages):,} are weights with their state, "
        f"{sum(stage.activation_bytes for stage in stages):,} activations in flight"
    )


def _communication(plan: TrainPlan, reports: tuple[StageReport, ...]) -> Iterator[str]:
    worst = max(reports, key=lambda report: report.all_reduce_s)
    busy_s = worst.compute_s + worst.all_reduce_s
    if busy_s > 0 and worst.all_reduce_s >= _LARGE_SHARE * busy_s:
        stage = plan.stages[worst.stage]
        yield (
            f"stage {worst.stage} spends {100 * worst.all_reduce_s / busy_s:.0f} % of its time "
            f"reducing {stage.gradient_bytes:,} bytes of gradients over "
            f"{_count(stage.num_devices, 'device')}"
        )
    chatty = max(reports, key=lambda report: report.message_s)
    if chatty.message_s >= _LARGE_SHARE * max(chatty.compute_s, chatty.message_s) > 0:
        yield (
            f"stage {chatty.stage} has the most to say: {chatty.message_s:.4g} s of messages a "
            f"step beside {chatty.compute_s:.4g} s of compute, which overlap where they can"
        )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
