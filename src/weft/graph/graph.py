"""What is computed: operators, the tensors between them, and the parameters they refer to."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from weft.base.errors import GraphError

DTYPE_BYTES: dict[str, int] = {
    "float64": 8,
    "int64": 8,
    "complex64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Element size of every dtype that a graph may name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A weight that operators refer to by id; two operators that name one id share the weight.

    Tying, freezing and sharing between tasks are this one mechanism.
    """

    id: str
    num_elements: int
    dtype: str = "float32"
    trainable: bool = True

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight itself, without gradient or optimizer state."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """`count` equal kernels inside an operator; figures of one, as in Op.

    `is_product` tells matrix products, convolutions and attention, whose arithmetic may bind, from
    everything else, which memory binds.
    """

    flops_forward: float = 0.0
    flops_backward: float = 0.0
    bytes_accessed: float = 0.0
    bytes_accessed_backward: float = 0.0
    fixed_flops: float = 0.0
    fixed_bytes: float = 0.0
    fixed_bytes_backward: float = 0.0
    is_product: bool = True
    count: int = 1


def merge_kernels(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """The same kernels with equal ones counted together, in order of first appearance."""
    counts: dict[Kernel, int] = {}
    for kernel in kernels:
        one = replace(kernel, count=1)
        counts[one] = counts.get(one, 0) + kernel.count
    return tuple(replace(kernel, count=count) for kernel, count in counts.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operator, or one block of them; every cost is per sample unless its name says `fixed`.

    `flops_backward` is 0 where nothing upstream or inside needs a gradient. `bytes_accessed` is
    what forward moves through device memory; `fixed_*` is paid once per invocation whatever the
    number of samples (weights read, gradients of weights written, weight-only arithmetic).
    `saved_bytes` is kept from forward to backward. `signature` is equal for operators that are
    structurally equal (kind, shapes, parameter shapes), so that their costs are looked up once.
    `members` lists the operators inside a block, in order; it is empty for a plain operator.
    `kernels` breaks the figures down, so that a block costs what its operators cost one by one; an
    operator without them is a single product.
    """

    id: str
    kind: str
    module_path: str = ""
    flops_forward: float = 0.0
    flops_backward: float = 0.0
    bytes_accessed: float = 0.0
    bytes_accessed_backward: float = 0.0
    fixed_flops: float = 0.0
    fixed_bytes: float = 0.0
    fixed_bytes_backward: float = 0.0
    param_ids: tuple[str, ...] = ()
    saved_bytes: int = 0
    output_bytes: int = 0
    task: str = ""
    is_loss: bool = False
    signature: str = ""
    members: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()

    @property
    def parts(self) -> tuple[Kernel, ...]:
        """The kernels, also of an operator that does not list them."""
        if self.kernels:
            return self.kernels
        return (
            Kernel(
                flops_forward=self.flops_forward,
                flops_backward=self.flops_backward,
                bytes_accessed=self.bytes_accessed,
                bytes_accessed_backward=self.bytes_accessed_backward,
                fixed_flops=self.fixed_flops,
                fixed_bytes=self.fixed_bytes,
                fixed_bytes_backward=self.fixed_bytes_backward,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """All distinct tensors that `target` reads from `source`, summed; at most one per pair.

    A tensor that several operators read appears on the edge to each. `needs_grad` is False where
    no gradient flows back (frozen parts, integer tensors). `saved_bytes` is the part that the
    target needs for its backward but that the source already counts in its own `saved_bytes`: a
    plan that puts the two on different devices keeps it twice.
    """

    source: str
    target: str
    bytes_per_sample: int
    needs_grad: bool = True
    saved_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A training step of one model: operators in topological order, edges, parameters.

    Source: computation graph G_C of GraphPipe (arXiv 2406.17145) §2.
    """

    name: str
    ops: tuple[Op, ...]
    edges: tuple[Edge, ...]
    parameters: tuple[Parameter, ...] = ()
    dtype: str = "float32"

    @classmethod
    def ordered(
        cls,
        name: str,
        ops: Iterable[Op],
        edges: Iterable[Edge],
        parameters: Iterable[Parameter] = (),
        dtype: str = "float32",
    ) -> Graph:
        """Build a graph from operators in any order, sorted topologically and stably.

        Raises GraphError, naming one cycle, when there is no such order.
        """
        ops, edges = tuple(ops), tuple(edges)
        _check_ids(ops, edges)
        order = _topological_order(ops, edges)
        return cls(name=name, ops=order, edges=edges, parameters=tuple(parameters), dtype=dtype)

    @cached_property
    def op_index(self) -> Mapping[str, int]:
        """Position of each operator in `ops`, by id."""
        return {op.id: i for i, op in enumerate(self.ops)}

    @cached_property
    def op_by_id(self) -> Mapping[str, Op]:
        """Each operator by its id."""
        return {op.id: op for op in self.ops}

    @cached_property
    def parameter_by_id(self) -> Mapping[str, Parameter]:
        """Each parameter by its id."""
        return {parameter.id: parameter for parameter in self.parameters}

    @cached_property
    def predecessors(self) -> Mapping[str, tuple[str, ...]]:
        """Direct predecessors of each operator, in edge order."""
        found: dict[str, list[str]] = {op.id: [] for op in self.ops}
        for edge in self.edges:
            found[edge.target].append(edge.source)
        return {op: tuple(sources) for op, sources in found.items()}

    @cached_property
    def successors(self) -> Mapping[str, tuple[str, ...]]:
        """Direct successors of each operator, in edge order."""
        found: dict[str, list[str]] = {op.id: [] for op in self.ops}
        for edge in self.edges:
            found[edge.source].append(edge.target)
        return {op: tuple(targets) for op, targets in found.items()}

    @cached_property
    def digest(self) -> str:
        """Hash of everything but the name: equal on every machine for equal graphs."""
        body = self._as_dict()
        del body["name"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def flops_forward(self) -> float:
        """Forward FLOP of one sample over all operators."""
        return sum(op.flops_forward for op in self.ops)

    @property
    def flops_backward(self) -> float:
        """Backward FLOP of one sample over all operators."""
        return sum(op.flops_backward for op in self.ops)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, shared ones once."""
        return sum(parameter.num_elements for parameter in self.parameters)

    def parameter_bytes(self, op_ids: Iterable[str]) -> int:
        """Bytes of the distinct parameters that these operators name."""
        ids = {p for op_id in op_ids for p in self.op_by_id[op_id].param_ids}
        return sum(self.parameter_by_id[p].size_bytes for p in ids)

    def distinct_bytes(self, edges: Iterable[Edge]) -> int:
        """Bytes per sample that these edges carry, a tensor with several readers counted once.

        Edges of one source never carry more than its output; so summed over any cut this is what a
        stage sends, exactly unless one source's readers take overlapping parts of its output.
        """
        carried: dict[str, int] = {}
        for edge in edges:
            carried[edge.source] = carried.get(edge.source, 0) + edge.bytes_per_sample
        return sum(min(n, self.op_by_id[op].output_bytes or n) for op, n in carried.items())

    def to_json(self) -> str:
        """The graph as JSON text; fields at their default are left out."""
        return json.dumps(self._as_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """Read what `to_json` wrote; raises GraphError for anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(
                name=data["name"],
                dtype=data.get("dtype", "float32"),
                ops=tuple(_read_op(op) for op in data["ops"]),
                edges=tuple(Edge(**edge) for edge in data["edges"]),
                parameters=tuple(Parameter(**p) for p in data["parameters"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GraphError(
                f"this is not a graph written by Weft ({type(error).__name__}: {error}); "
                "write it with Graph.to_json or capture the model again"
            ) from None

    def validate(self) -> Graph:
        """Return self, or raise GraphError for the first thing that no planner could use.

        Checked: duplicate and unknown ids, order and cycles, negative, NaN or infinite costs, a
        total cost of 0, and, where the graph has a loss, operators that reach none.
        """
        if not self.ops:
            raise GraphError(
                f"graph {self.name!r} has no operators; capture a module that computes"
            )
        _check_ids(self.ops, self.edges)
        for earlier, later in ((e.source, e.target) for e in self.edges):
            if self.op_index[earlier] >= self.op_index[later]:
                _topological_order(self.ops, self.edges)
                raise GraphError(
                    f"operator {earlier!r} feeds {later!r} but is listed after it; "
                    "build the graph with Graph.ordered, which sorts"
                )
        self._validate_numbers()
        self._validate_parameters()
        self._validate_losses()
        return self

    def _validate_numbers(self) -> None:
        for op in self.ops:
            for field in _OP_NUMBERS:
                _check_number(getattr(op, field), f"{field} of operator {op.id!r}")
        for edge in self.edges:
            _check_number(
                edge.bytes_per_sample,
                f"bytes_per_sample of edge {edge.source!r} -> {edge.target!r}",
            )
        work = sum(op.flops_forward + op.bytes_accessed + op.fixed_flops for op in self.ops)
        if work <= 0:
            raise GraphError(
                f"graph {self.name!r} has a total cost of 0: no operator has FLOP or bytes; "
                "capture a module that computes, or give the operators their costs"
            )

    def _validate_parameters(self) -> None:
        known: set[str] = set()
        for parameter in self.parameters:
            if parameter.id in known:
                raise GraphError(f"parameter {parameter.id!r} is listed twice; list it once")
            if parameter.dtype not in DTYPE_BYTES:
                raise GraphError(
                    f"parameter {parameter.id!r} has unknown dtype {parameter.dtype!r}; "
                    f"known: {', '.join(DTYPE_BYTES)}"
                )
            _check_number(parameter.num_elements, f"num_elements of parameter {parameter.id!r}")
            known.add(parameter.id)
        for op in self.ops:
            for param_id in op.param_ids:
                if param_id not in known:
                    raise GraphError(
                        f"operator {op.id!r} refers to parameter {param_id!r}, "
                        "which the graph does not list; add it to `parameters`"
                    )

    def _validate_losses(self) -> None:
        reached = {op.id for op in self.ops if op.is_loss}
        if not reached:
            return
        for op in reversed(self.ops):
            if op.id not in reached and any(s in reached for s in self.successors[op.id]):
                reached.add(op.id)
        for op in self.ops:
            if op.id not in reached:
                raise GraphError(
                    f"operator {op.id!r} (and what it feeds) reaches no loss, so it would never "
                    "be trained; add its output to the loss or remove it from the model"
                )

    def _as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "ops": [_without_defaults(op, _OP_DEFAULTS) for op in self.ops],
            "edges": [_without_defaults(edge, _EDGE_DEFAULTS) for edge in self.edges],
            "parameters": [asdict(parameter) for parameter in self.parameters],
        }


_OP_DEFAULTS = asdict(Op(id="", kind=""))
_EDGE_DEFAULTS = asdict(Edge(source="", target="", bytes_per_sample=-1))
_KERNEL_DEFAULTS = asdict(Kernel())
_OP_NUMBERS = tuple(name for name, value in _OP_DEFAULTS.items() if type(value) in (int, float))


def _without_defaults(item: Op | Edge, defaults: Mapping[str, Any]) -> dict[str, Any]:
    fields = asdict(item)
    keep = {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}
    if isinstance(item, Op):
        keep |= {"id": item.id, "kind": item.kind}
        if item.kernels:
            keep["kernels"] = [
                {k: v for k, v in asdict(kernel).items() if v != _KERNEL_DEFAULTS[k]}
                for kernel in item.kernels
            ]
    return keep | {k: fields[k] for k in ("source", "target") if k in fields}


def _read_op(fields: Mapping[str, Any]) -> Op:
    kernels = tuple(Kernel(**kernel) for kernel in fields.get("kernels", ()))
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    plain["kernels"] = kernels
    return Op(**plain)


def _check_ids(ops: tuple[Op, ...], edges: tuple[Edge, ...]) -> None:
    ids: set[str] = set()
    for op in ops:
        if op.id in ids:
            raise GraphError(f"operator id {op.id!r} is used twice; ids must be unique")
        ids.add(op.id)
    pairs: set[tuple[str, str]] = set()
    for edge in edges:
        for end in (edge.source, edge.target):
            if end not in ids:
                raise GraphError(
                    f"edge {edge.source!r} -> {edge.target!r} names operator {end!r}, "
                    "which the graph does not list"
                )
        if (edge.source, edge.target) in pairs:
            raise GraphError(
                f"edge {edge.source!r} -> {edge.target!r} is listed twice; sum its bytes into one"
            )
        pairs.add((edge.source, edge.target))


def _check_number(value: float, what: str) -> None:
    if not math.isfinite(value) or value < 0:
        raise GraphError(f"{what} is {value}; it must be finite and at least 0")


def _topological_order(ops: tuple[Op, ...], edges: tuple[Edge, ...]) -> tuple[Op, ...]:
    """Stable order: always the earliest listed operator whose inputs are done."""
    position = {op.id: i for i, op in enumerate(ops)}
    waiting = {op.id: 0 for op in ops}
    targets: dict[str, list[str]] = {op.id: [] for op in ops}
    for edge in edges:
        waiting[edge.target] += 1
        targets[edge.source].append(edge.target)
    ready = [i for i, op in enumerate(ops) if waiting[op.id] == 0]
    order: list[Op] = []
    while ready:
        op = ops[heapq.heappop(ready)]
        order.append(op)
        for target in targets[op.id]:
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(ready, position[target])
    if len(order) < len(ops):
        cycle = " -> ".join(repr(op) for op in _find_cycle(waiting, targets))
        raise GraphError(f"the graph has a cycle: {cycle}; remove one of these edges")
    return tuple(order)


def _find_cycle(waiting: Mapping[str, int], targets: Mapping[str, list[str]]) -> list[str]:
    stuck = {op for op, count in waiting.items() if count > 0}
    # Every stuck operator has a stuck predecessor, so walking backwards must repeat one.
    sources: dict[str, str] = {}
    for source in stuck:
        for target in targets[source]:
            if target in stuck:
                sources[target] = source
    path: list[str] = []
    here = next(iter(sorted(stuck & sources.keys())))
    while here not in path:
        path.append(here)
        here = sources[here]
    cycle = path[path.index(here) :]
    return [here, *reversed(cycle)]
