"""A run of aten operators, recorded: which values they read and write, and on what storage.

A value has one of four origins. *Constant*: computed from nothing (tables, ranges). *Input*:
computed from the inputs and constants alone, without parameters (casts, masks, positions); whoever
loads data makes it on any device, so neither is an operator and neither has an edge. *Weight*:
computed from parameters and constants alone (a position table looked up, a scaled temperature);
its parameters and its arithmetic go to each operator that reads it. *Activation*: everything else,
made by exactly one operator per version of its storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from weft.graph.aten import AtenCost, Operand, aten_cost


class Origin(StrEnum):
    """Where a value comes from; see the head of this file."""

    CONSTANT = "constant"
    INPUT = "input"
    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A tensor in the recorded run; views of one tensor share its `storage` number."""

    origin: Origin
    operand: Operand
    storage: int
    storage_bytes: int
    param_ids: tuple[str, ...] = ()
    weight_flops: float = 0.0

    @property
    def bytes_read(self) -> int:
        """Bytes that reading all of it moves: an expanded view holds less than its shape says."""
        return min(self.operand.size_bytes, self.storage_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One recorded operator that makes an activation; `producers` are step indices, by read."""

    index: int
    name: str
    module_path: str
    reads: tuple[Value, ...]
    producers: tuple[int | None, ...]
    writes: Value
    output_bytes: int
    cost: AtenCost


@dataclass(kw_only=True, slots=True)
class Recorder:
    """Receives operators in execution order."""

    steps: list[Step] = field(default_factory=list[Step])
    writers: dict[int, int] = field(default_factory=dict[int, int])
    _num_storages: int = 0

    def new_value(
        self,
        origin: Origin,
        operand: Operand,
        *,
        param_ids: tuple[str, ...] = (),
        weight_flops: float = 0.0,
    ) -> Value:
        """A value on storage of its own."""
        self._num_storages += 1
        return Value(
            origin=origin,
            operand=operand,
            storage=self._num_storages,
            storage_bytes=operand.size_bytes,
            param_ids=param_ids,
            weight_flops=weight_flops,
        )

    def view(self, source: Value, operand: Operand, *, detached: bool = False) -> Value:
        """A value that looks at the storage of another, with or without its gradient."""
        needs = source.operand.needs_grad and operand.floating and not detached
        return replace(source, operand=replace(operand, needs_grad=needs))

    def current(self, value: Value) -> Value:
        """`value` as it is now: a write into its storage may have made it an activation."""
        step = self.writers.get(value.storage)
        if step is None or value.origin is Origin.ACTIVATION:
            return value
        written = self.steps[step].writes.operand
        operand = replace(value.operand, needs_grad=written.needs_grad and value.operand.floating)
        return replace(
            value, origin=Origin.ACTIVATION, operand=operand, param_ids=(), weight_flops=0.0
        )

    def call(
        self,
        name: str,
        module_path: str,
        reads: Sequence[Value],
        outputs: Sequence[Operand],
        *,
        grad_enabled: bool = True,
        in_place: bool = False,
        equation: str = "",
    ) -> tuple[Value, ...]:
        """Record one operator and return its outputs; an in-place one writes its first operand."""
        if not grad_enabled:
            reads = [replace(v, operand=replace(v.operand, needs_grad=False)) for v in reads]
        needs = any(v.operand.needs_grad for v in reads)
        outputs = [replace(o, needs_grad=needs and o.floating) for o in outputs]
        cost = aten_cost(name, [v.operand for v in reads], outputs[0], equation=equation)
        origin = _origin(reads)
        if origin is not Origin.ACTIVATION:
            flops = cost.flops_forward + sum(v.weight_flops for v in reads)
            params = tuple(dict.fromkeys(p for v in reads for p in v.param_ids))
            return tuple(
                self.new_value(
                    origin,
                    operand,
                    param_ids=params,
                    weight_flops=flops if origin is Origin.WEIGHT else 0.0,
                )
                for operand in outputs
            )
        values = [self.new_value(origin, operand) for operand in outputs]
        if in_place:
            target = reads[0]
            values[0] = replace(
                values[0], storage=target.storage, storage_bytes=target.storage_bytes
            )
        self._add_step(name, module_path, reads, values, cost)
        return tuple(values)

    def _add_step(
        self,
        name: str,
        module_path: str,
        reads: Sequence[Value],
        values: Sequence[Value],
        cost: AtenCost,
    ) -> None:
        index = len(self.steps)
        self.steps.append(
            Step(
                index=index,
                name=name,
                module_path=module_path,
                reads=tuple(reads),
                producers=tuple(self.writers.get(v.storage) for v in reads),
                writes=values[0],
                output_bytes=sum(v.operand.size_bytes for v in values),
                cost=cost,
            )
        )
        for value in values:
            self.writers[value.storage] = index


def _origin(reads: Sequence[Value]) -> Origin:
    origins = {value.origin for value in reads}
    if Origin.ACTIVATION in origins or {Origin.WEIGHT, Origin.INPUT} <= origins:
        return Origin.ACTIVATION
    for origin in (Origin.WEIGHT, Origin.INPUT):
        if origin in origins:
            return origin
    return Origin.CONSTANT
