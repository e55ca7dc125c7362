"""From chosen stages to a plan: edges, samples in flight, devices, memory and times."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weft.graph.graph import Graph, Parameter
from weft.plan.cost_table import CostTable, StageTable, Variant, distinct_bytes, divisors
from weft.plan.in_flight import in_flight_samples
from weft.plan.placement import place, stage_order
from weft.plan.train_plan import PlanError, SearchStatistics, Stage, StageEdge, TrainPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class StageChoice:
    """What a planner decides about one stage; operators are positions in the graph.

    `devices` overrides the placement; several stages may name the same devices.
    """

    ops: tuple[int, ...]
    micro_batch: int
    dp: int = 1
    tp: int = 1
    k: int = 1
    recompute: bool = False
    devices: tuple[int, ...] = ()

    @property
    def num_devices(self) -> int:
        """Devices of the stage."""
        return self.dp * self.tp


def assemble(
    table: CostTable,
    choices: Sequence[StageChoice],
    *,
    method: str,
    objective: str = "bottleneck",
    schedule: str = "1f1b",
    sequential: bool = False,
    allowed: Mapping[int, Collection[int]] | None = None,
    search: SearchStatistics | None = None,
    notes: Sequence[str] = (),
) -> TrainPlan:
    """The plan of these stages; with `sequential` they run as one chain in the order given.

    A sequential plan gets an edge of 0 bytes between consecutive stages that exchange nothing (the
    false dependencies that linearising adds; GraphPipe sheet §4). `allowed` restricts the devices
    of some choices. Groups of k > 1 turn 1F1B into kFkB. Raises PlanError when the stages do not
    partition the graph or form a cycle.
    """
    graph = table.graph
    stage_of = _stage_of(graph, choices)
    pairs = {
        (stage_of[graph.op_index[e.source]], stage_of[graph.op_index[e.target]])
        for e in graph.edges
    }
    pairs = {(a, b) for a, b in pairs if a != b}
    if sequential:
        order = list(range(len(choices)))
        for a, b in pairs:
            if a > b:
                raise PlanError(
                    f"a sequential plan lists stage {a} after stage {b}, which reads it"
                )
        pairs |= {(a, a + 1) for a in range(len(choices) - 1)}
    else:
        order = stage_order(len(choices), pairs, [min(choice.ops) for choice in choices])
    number = {old: new for new, old in enumerate(order)}
    choices = [choices[old] for old in order]
    restricted = {number[s]: devices for s, devices in (allowed or {}).items()}
    stage_of = [number[s] for s in stage_of]
    edges = _edges(graph, stage_of, {(number[a], number[b]) for a, b in pairs})
    successors: list[list[int]] = [[] for _ in choices]
    for edge in edges:
        successors[edge.source].append(edge.target)
    in_flight = in_flight_samples(
        successors, [c.micro_batch for c in choices], [c.k for c in choices], table.batch_size
    )
    devices = _devices(table, choices, restricted)
    stages = tuple(
        _stage(table, index, choice, held, where)
        for index, (choice, held, where) in enumerate(zip(choices, in_flight, devices, strict=True))
    )
    plan = TrainPlan(
        method=method,
        objective=objective,
        schedule="kfkb" if schedule == "1f1b" and any(c.k > 1 for c in choices) else schedule,
        graph_name=graph.name,
        graph_digest=graph.digest,
        cluster=table.cluster,
        batch_size=table.batch_size,
        stages=_with_shared_gradients(table, stages),
        edges=edges,
        training=table.training,
        search=search or SearchStatistics(),
        notes=tuple(notes),
    )
    # A device that runs several stages is as slow as all of them together.
    busy_s: dict[tuple[int, ...], float] = {}
    times = stage_times_per_sample_s(table, choices)
    for stage, seconds in zip(stages, times, strict=True):
        busy_s[stage.devices] = busy_s.get(stage.devices, 0.0) + seconds
    return plan.replace(bottleneck_s=max(busy_s.values()))


def stage_times_per_sample_s(table: CostTable, choices: Sequence[StageChoice]) -> list[float]:
    """The planner's time per sample of each stage, placement ignored."""
    member = np.zeros((len(choices), table.num_ops), dtype=np.bool_)
    for row, choice in enumerate(choices):
        member[row, list(choice.ops)] = True
    prices = StageTable(table, member)
    found: list[float] = []
    for row, choice in enumerate(choices):
        variant = Variant(dp=choice.dp, recompute=choice.recompute)
        if choice.tp == 1:
            one = prices.time_per_sample_s(choice.micro_batch, variant)[row]
        else:
            ((forward_s, backward_s),) = _seconds(table, choice, [choice.micro_batch])
            one = (forward_s + backward_s) / choice.micro_batch
        found.append(float(one))
    return found


def _stage_of(graph: Graph, choices: Sequence[StageChoice]) -> list[int]:
    stage_of = [-1] * len(graph.ops)
    for number, choice in enumerate(choices):
        for op in choice.ops:
            if stage_of[op] >= 0:
                raise PlanError(
                    f"operator {graph.ops[op].id!r} is in stages {stage_of[op]} and {number}; "
                    "every operator belongs to one stage"
                )
            stage_of[op] = number
    for op, stage in enumerate(stage_of):
        if stage < 0:
            raise PlanError(f"operator {graph.ops[op].id!r} is in no stage; add it to one")
    return stage_of


def _edges(
    graph: Graph, stage_of: Sequence[int], pairs: Collection[tuple[int, int]]
) -> tuple[StageEdge, ...]:
    crossing: dict[tuple[int, int], dict[str, list[tuple[int, bool]]]] = {p: {} for p in pairs}
    for edge in graph.edges:
        a, b = stage_of[graph.op_index[edge.source]], stage_of[graph.op_index[edge.target]]
        if a != b:
            sources = crossing[a, b].setdefault(edge.source, [])
            sources.append((edge.bytes_per_sample, edge.needs_grad))
    return tuple(
        StageEdge(
            source=a,
            target=b,
            forward_bytes_per_sample=sum(
                distinct_bytes(graph, op, [n for n, _ in rows])
                for op, rows in crossing[a, b].items()
            ),
            backward_bytes_per_sample=sum(
                distinct_bytes(graph, op, [n for n, needs_grad in rows if needs_grad])
                for op, rows in crossing[a, b].items()
            ),
        )
        for a, b in sorted(pairs)
    )


def _devices(
    table: CostTable, choices: Sequence[StageChoice], allowed: Mapping[int, Collection[int]]
) -> list[tuple[int, ...]]:
    given = {s: choice.devices for s, choice in enumerate(choices) if choice.devices}
    if len(given) == len(choices):
        return [choice.devices for choice in choices]
    if given:
        taken = {device for devices in given.values() for device in devices}
        rest = [d.index for d in table.cluster.devices if d.index not in taken]
        allowed = {s: set(allowed.get(s, rest)) & set(rest) for s in range(len(choices))} | given
    return place(table.cluster, [choice.num_devices for choice in choices], allowed)


def _stage(
    table: CostTable,
    index: int,
    choice: StageChoice,
    in_flight: int,
    devices: tuple[int, ...],
) -> Stage:
    graph = table.graph
    ops = [graph.ops[i] for i in sorted(choice.ops)]
    inside = {op.id for op in ops}
    names = tuple(dict.fromkeys(name for op in ops for name in op.param_ids))
    parameters = [graph.parameter_by_id[name] for name in names]
    arriving = [e for e in graph.edges if e.target in inside and e.source not in inside]
    leaving = [e for e in graph.edges if e.source in inside and e.target not in inside]
    by_source: dict[str, list[int]] = {}
    for edge in arriving:
        by_source.setdefault(edge.source, []).append(edge.bytes_per_sample)
    gradient_bytes = sum(table.training.gradient_bytes(p) for p in parameters)
    actual = table.on(slowest_of(table, devices))
    sizes = [
        b
        for b in divisors(table.batch_size, table.batch_size)
        if b % choice.dp == 0 and (b & (b - 1) == 0 or b == choice.micro_batch)
    ]
    sizes = sorted({*sizes, choice.micro_batch})
    seconds = dict(zip(sizes, _seconds(actual, choice, sizes), strict=True))
    frozen = (
        gradient_bytes == 0
        and not any(op.flops_backward for op in ops)
        and not any(edge.needs_grad for edge in (*arriving, *leaving))
    )
    tp = choice.tp
    return Stage(
        index=index,
        ops=tuple(op.id for op in ops),
        devices=devices,
        axes={"dp": choice.dp} | ({"tp": tp} if tp > 1 else {}),
        micro_batch=choice.micro_batch,
        k=choice.k,
        in_flight=in_flight,
        recompute=choice.recompute,
        frozen=frozen,
        task=ops[0].task if len({op.task for op in ops}) == 1 else "",
        param_ids=names,
        param_bytes=-(-sum(p.size_bytes for p in parameters) // tp),
        gradient_bytes=-(-gradient_bytes // tp),
        state_bytes=-(-sum(table.training.state_bytes(p) for p in parameters) // tp),
        saved_bytes_per_sample=-(
            -(sum(op.saved_bytes for op in ops) + sum(e.saved_bytes for e in arriving)) // tp
        ),
        input_bytes_per_sample=sum(
            distinct_bytes(graph, op, rows) for op, rows in by_source.items()
        ),
        reserved_bytes=sum(
            table.cost.reserved_bytes(op, choice.micro_batch // choice.dp) for op in ops
        ),
        forward_s={b: forward_s for b, (forward_s, _) in seconds.items()},
        backward_s={b: backward_s for b, (_, backward_s) in seconds.items()},
        all_reduce_s=_all_reduce_s(table, choice, devices, gradient_bytes),
        step_s=_step_s(table, parameters, tp, devices),
    )


def _step_s(
    table: CostTable, parameters: Sequence[Parameter], tp: int, devices: tuple[int, ...]
) -> float:
    num_params = sum(p.num_elements for p in parameters if p.trainable)
    device_type = table.cluster.devices[devices[0]].type
    return table.cost.step_s(num_params, table.training, device_type) / tp


def _seconds(
    table: CostTable, choice: StageChoice, micro_batches: Sequence[int]
) -> list[tuple[float, float]]:
    """Forward and backward seconds of one micro-batch, tensor-parallel collectives included."""
    rows = sorted(choice.ops)
    times = table.pass_times(tuple(b // choice.dp for b in micro_batches), choice.tp)
    forward_s = times.forward_s[rows].sum(axis=0)
    backward_s = times.backward_s[rows].sum(axis=0)
    if choice.recompute:
        backward_s = backward_s + forward_s
    return list(zip(forward_s.tolist(), backward_s.tolist(), strict=True))


def _all_reduce_s(
    table: CostTable, choice: StageChoice, devices: tuple[int, ...], gradient_bytes: int
) -> float:
    # Rank 0 of the tp axis stands for all: each reduces its own shard with its dp peers.
    ring = devices[:: choice.tp]
    if len(ring) < 2:
        return 0.0
    return table.cost.all_reduce_s(gradient_bytes / choice.tp, ring, table.cluster)


def _with_shared_gradients(table: CostTable, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages that also reduce the gradients of parameters living on several groups."""
    holders: dict[str, list[Stage]] = {}
    for stage in stages:
        for name in stage.param_ids:
            if name not in table.shared_parameters:
                continue
            holders.setdefault(name, []).append(stage)
    extra = dict.fromkeys(range(len(stages)), 0.0)
    for name, held in holders.items():
        if len(held) < 2:
            continue
        gradient_bytes = table.training.gradient_bytes(table.graph.parameter_by_id[name])
        ring = sorted({device for stage in held for device in stage.devices})
        if gradient_bytes == 0 or len(ring) < 2:
            continue
        seconds = table.cost.all_reduce_s(gradient_bytes, ring, table.cluster)
        for stage in held:
            extra[stage.index] += seconds
    return tuple(
        replace(stage, all_reduce_s=stage.all_reduce_s + extra[stage.index]) for stage in stages
    )


def slowest_of(table: CostTable, devices: Sequence[int]) -> str:
    """Name of the device type that a stage on these devices waits for."""
    names = {table.cluster.devices[device].type.name for device in devices}
    if len(names) == 1:
        return next(iter(names))
    totals = {name: _total_s(table, name) for name in sorted(names)}
    return max(totals, key=totals.__getitem__)


def _total_s(table: CostTable, name: str) -> float:
    times = table.on(name).op_times(1)
    return float(times.forward_s.sum() + times.backward_s.sum())
