"""From a recorded run to a Graph: which steps become operators, who shares, who is saved.

Saved for backward: each distinct tensor is counted once, at the first operator (in topological
order) whose backward needs it; which operators need what is the rule at the head of
`weft.graph.aten`. A tensor that its producer counts and that another operator needs too is on that
edge's `saved_bytes`. Parameters and constants are not counted; inputs are.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.base.errors import GraphError
from weft.graph.graph import Edge, Graph, Kernel, Op, Parameter, merge_kernels
from weft.graph.recorder import Origin, Recorder, Step, Value

LOSS_PATH = "loss"
"""Module path under which the loss runs; its steps become one operator per task."""

# AccumulateGrad of a weight: write the new gradient, then read it and the old one, write the sum.
_GRADIENT_PASSES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Everything that `lower` needs besides the steps: what leaves the run, and what it owns.

    `losses` maps a task's name ("" where there is only one) to its loss value.
    """

    name: str
    recorder: Recorder
    outputs: tuple[Value, ...]
    losses: Mapping[str, Value]
    parameters: Mapping[str, Parameter]
    batch: int
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowered:
    """A graph, and the recorded steps that make up each of its operators."""

    graph: Graph
    steps_of_op: Mapping[str, tuple[int, ...]]


def lower(recording: Recording) -> Lowered:
    """Build the Graph of a recorded run; raises GraphError where parameters reach no loss."""
    tasks = _tasks_of_steps(recording)
    steps = [step for step in recording.recorder.steps if step.index in tasks]
    groups = _group(steps, tasks, recording)
    op_of_step = {step.index: op_id for op_id, members in groups.items() for step in members}
    saved = _saved_bytes(steps, op_of_step)
    loss_ops = {
        op_of_step[recording.recorder.writers[value.storage]]
        for value in recording.losses.values()
        if value.storage in recording.recorder.writers
    }
    ops = [
        _op(op_id, members, tasks, saved.by_op.get(op_id, 0), op_id in loss_ops, recording)
        for op_id, members in groups.items()
    ]
    used = {p for op in ops for p in op.param_ids}
    graph = Graph.ordered(
        recording.name,
        ops,
        _edges(steps, op_of_step, saved.by_edge, recording.batch),
        [p for p in recording.parameters.values() if p.id in used],
        recording.dtype,
    ).validate()
    steps_of_op = {op_id: tuple(s.index for s in members) for op_id, members in groups.items()}
    return Lowered(graph=graph, steps_of_op=steps_of_op)


def _reachable(recorder: Recorder, values: Iterable[Value]) -> set[int]:
    """Indices of the steps that these values depend on."""
    stack = [recorder.writers[v.storage] for v in values if v.storage in recorder.writers]
    found: set[int] = set()
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            stack.extend(p for p in recorder.steps[index].producers if p is not None)
    return found


def _tasks_of_steps(recording: Recording) -> dict[int, tuple[str, ...]]:
    """The tasks that each kept step serves; steps that serve nothing are left out."""
    recorder = recording.recorder
    tasks: dict[int, tuple[str, ...]] = {}
    for task, value in recording.losses.items():
        for index in _reachable(recorder, [value]):
            tasks[index] = (*tasks.get(index, ()), task)
    outputs = _reachable(recorder, recording.outputs)
    if not recording.losses:
        return dict.fromkeys(outputs, ("",))
    for index in sorted(outputs - tasks.keys()):
        step = recorder.steps[index]
        trained = [p for v in step.reads for p in v.param_ids if recording.parameters[p].trainable]
        if trained:
            raise GraphError(
                f"module {step.module_path!r} computes an output with parameter {trained[0]!r} "
                "that reaches no loss, so it would never be trained; add it to the loss, freeze "
                "it, or remove it from the model"
            )
    return tasks


def _group(
    steps: Sequence[Step], tasks: Mapping[int, tuple[str, ...]], recording: Recording
) -> dict[str, list[Step]]:
    """Steps by operator id: one each, but for the loss, whose steps form one operator a task."""
    groups: dict[str, list[Step]] = {}
    ordinals: Counter[str] = Counter()
    for step in steps:
        if step.module_path == LOSS_PATH and len(tasks[step.index]) == 1:
            task = tasks[step.index][0]
            op_id = f"{LOSS_PATH}.{task}" if task else LOSS_PATH
        else:
            op_id = f"{step.module_path or '.'}:{ordinals[step.module_path]}"
            ordinals[step.module_path] += 1
        groups.setdefault(op_id, []).append(step)
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    by_op: Mapping[str, int]
    by_edge: Mapping[tuple[str, str], int]


def _saved_bytes(steps: Sequence[Step], op_of_step: Mapping[int, str]) -> _Saved:
    owner: dict[int, str] = {}
    by_op: Counter[str] = Counter()
    by_edge: Counter[tuple[str, str]] = Counter()
    again: set[tuple[int, str]] = set()
    for step in steps:
        op_id = op_of_step[step.index]
        by_op[op_id] += step.cost.extra_saved_bytes
        kept = [(step.reads[i], step.producers[i]) for i in step.cost.saved_inputs]
        if step.cost.saves_output:
            kept.append((step.writes, step.index))
        for value, producer in kept:
            if value.origin in (Origin.WEIGHT, Origin.CONSTANT):
                continue
            first = owner.setdefault(value.storage, op_id)
            if first == op_id and (value.storage, op_id) not in again:
                by_op[op_id] += value.storage_bytes
            elif (
                first != op_id
                and producer is not None
                and op_of_step[producer] == first
                and (value.storage, op_id) not in again
            ):
                by_edge[first, op_id] += value.storage_bytes
            again.add((value.storage, op_id))
    return _Saved(by_op=by_op, by_edge=by_edge)


def _edges(
    steps: Sequence[Step],
    op_of_step: Mapping[int, str],
    saved: Mapping[tuple[str, str], int],
    batch: int,
) -> list[Edge]:
    read: dict[tuple[str, str], Counter[int]] = {}
    limit: dict[int, int] = {}
    needs_grad: dict[tuple[str, str], bool] = {}
    for step in steps:
        target = op_of_step[step.index]
        for value, producer in zip(step.reads, step.producers, strict=True):
            if producer is None or op_of_step[producer] == target:
                continue
            pair = (op_of_step[producer], target)
            read.setdefault(pair, Counter())[value.storage] += value.bytes_read
            limit[value.storage] = value.storage_bytes
            needs_grad[pair] = needs_grad.get(pair, False) or value.operand.needs_grad
    return [
        Edge(
            source=source,
            target=target,
            bytes_per_sample=_per_sample(
                # Several views of one tensor never add up to more than the tensor.
                sum(min(count, limit[storage]) for storage, count in storages.items()),
                batch,
            ),
            needs_grad=needs_grad[source, target],
            saved_bytes=_per_sample(saved.get((source, target), 0), batch),
        )
        for (source, target), storages in read.items()
    ]


def _op(
    op_id: str,
    steps: Sequence[Step],
    tasks: Mapping[int, tuple[str, ...]],
    saved_bytes: int,
    is_loss: bool,
    recording: Recording,
) -> Op:
    batch = recording.batch
    inside = {step.index for step in steps}
    weights = {v.storage: v for s in steps for v in s.reads if v.origin is Origin.WEIGHT}
    served = tasks[steps[0].index]
    kernels = merge_kernels(_kernel(step, batch) for step in steps)
    fields: dict[str, Any] = {
        name: sum(getattr(k, name) * k.count for k in kernels)
        for name in Kernel.__dataclass_fields__
        if name not in ("is_product", "count")
    }
    last = [s for s in steps if not (inside & _readers(s, steps))]
    kind = steps[0].name if len(steps) == 1 else "loss"
    output_bytes = _per_sample(sum(s.output_bytes for s in last), batch)
    shapes = [tuple(v.operand.shape for v in s.reads) for s in steps]
    identity = repr((kind, shapes, list(fields.values()), saved_bytes, output_bytes))
    return Op(
        id=op_id,
        kind=kind,
        module_path=steps[0].module_path,
        **fields,
        param_ids=tuple(dict.fromkeys(p for v in weights.values() for p in v.param_ids)),
        saved_bytes=_per_sample(saved_bytes, batch),
        output_bytes=output_bytes,
        task=served[0] if len(served) == 1 else "",
        is_loss=is_loss,
        signature=hashlib.sha256(identity.encode()).hexdigest()[:16],
        kernels=kernels,
    )


def _readers(step: Step, steps: Sequence[Step]) -> set[int]:
    return {s.index for s in steps if step.index in s.producers}


def _kernel(step: Step, batch: int) -> Kernel:
    traffic = _traffic(step)
    weights = {v.storage: v for v in step.reads if v.origin is Origin.WEIGHT}
    return Kernel(
        flops_forward=step.cost.flops_forward / batch,
        flops_backward=step.cost.flops_backward / batch,
        bytes_accessed=traffic.forward / batch,
        bytes_accessed_backward=traffic.backward / batch,
        fixed_flops=sum(v.weight_flops for v in weights.values()),
        fixed_bytes=traffic.fixed,
        fixed_bytes_backward=traffic.fixed_backward,
        is_product=step.cost.is_product,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Traffic:
    forward: int
    backward: int
    fixed: int
    fixed_backward: int


def _traffic(step: Step) -> _Traffic:
    """Bytes through device memory, at the example batch and once per invocation."""
    gathers = step.cost.gathers
    moving = [v for v in step.reads if v.origin in (Origin.ACTIVATION, Origin.INPUT)]
    standing = [v for v in step.reads if v.origin in (Origin.WEIGHT, Origin.CONSTANT)]
    forward = sum(v.bytes_read for v in moving) + step.output_bytes * (2 if gathers else 1)
    fixed = 0 if gathers else sum(v.bytes_read for v in standing)
    if not step.writes.operand.needs_grad:
        return _Traffic(forward=forward, backward=0, fixed=fixed, fixed_backward=0)
    kept = [step.reads[i] for i in step.cost.saved_inputs]
    backward = step.output_bytes * (2 if step.cost.saves_output else 1)
    backward += sum(v.bytes_read for v in moving if v.operand.needs_grad)
    backward += sum(v.bytes_read for v in kept if v.origin is not Origin.WEIGHT)
    gradients = sum(v.bytes_read for v in standing if v.operand.needs_grad)
    return _Traffic(
        forward=forward,
        backward=backward,
        fixed=fixed,
        fixed_backward=fixed + _GRADIENT_PASSES * gradients,
    )


def _per_sample(total: int, batch: int) -> int:
    return math.ceil(total / batch)
