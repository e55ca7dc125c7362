"""What candidate stages cost: one memoised table that every planning method reads.

A stage is priced from its operators alone, so that a search may compare stages without knowing
where they will run: messages use the slowest link of the cluster, the all-reduce of a d-fold
data-parallel stage uses the first d devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from weft.cluster.cluster import Cluster
from weft.cluster.device import DeviceType, Link
from weft.cost.model import CostModel, Parallel
from weft.cost.training import TrainingSpec
from weft.graph.graph import Graph, Op
from weft.plan.train_plan import PlanError

UNLIMITED = 1 << 30
"""Micro-batches in flight of a stage that memory does not limit."""

_CHUNK = 2048
"""Stages whose features are computed at once: bounds the working memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpTimes:
    """Seconds of every operator, in graph order, for one local batch size."""

    forward_s: NDArray[np.float64]
    backward_s: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFeatures:
    """What candidate stages need, one row a stage: bytes per device, and bytes per sample."""

    state_bytes: NDArray[np.float64]
    gradient_bytes: NDArray[np.float64]
    saved_bytes: NDArray[np.float64]
    input_bytes: NDArray[np.float64]
    """Arriving from other stages; what recomputation keeps."""
    boundary_bytes: NDArray[np.float64]
    """Forward and backward messages, in and out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run a stage: data-parallel degree, and whether it recomputes activations."""

    dp: int
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Prices of many stages (rows) run in every variant (columns), at one micro-batch size.

    `time_per_sample_s` is infinite where the stage does not fit at all; `max_in_flight` is the
    number of micro-batches that memory allows.
    """

    variants: tuple[Variant, ...]
    time_per_sample_s: NDArray[np.float64]
    max_in_flight: NDArray[np.int64]

    @cached_property
    def num_devices(self) -> NDArray[np.int64]:
        """Devices of each variant."""
        return np.array([variant.dp for variant in self.variants], dtype=np.int64)


class CostTable:
    """Prices of operators and of candidate stages, for one graph, cluster and training batch.

    Times per sample follow the GraphPipe sheet §2.5:
    `[t_op(b/d) + alpha + beta * boundary_bytes * (b/d)] / b + all_reduce(gradients, d) / B`,
    where boundary bytes are those sent and received, forward and backward. Memory follows §3.3:
    `state + ceil(saved * f / d) + reserved(b/d)` with f = min(in-flight samples, B).
    """

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        cost: CostModel,
        *,
        training: TrainingSpec,
        batch_size: int,
        device_type: DeviceType | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.cost = cost
        self.training = training
        self.batch_size = batch_size
        self.device_type = device_type or slowest_device_type(cluster, cost, graph)
        limit = min(device.type.memory_bytes for device in cluster.devices)
        self.memory_bytes = limit if memory_bytes is None else memory_bytes
        self.link = slowest_link(cluster)
        self.num_priced = 0
        self._on: dict[str, CostTable] = {}
        self._op_times: dict[tuple[int, int], OpTimes] = {}
        self._reserved: dict[int, NDArray[np.float64]] = {}
        self._pass_times: dict[tuple[tuple[int, ...], int], OpTimes] = {}
        self._collective_s: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._all_reduce: dict[int, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {}
        self._transfer = _vectorised(lambda num_bytes: cost.transfer_s(num_bytes, self.link))

    def on(self, device_type: str) -> CostTable:
        """The same table with operators priced on another device type of the cluster."""
        if device_type == self.device_type.name:
            return self
        if device_type not in self._on:
            kind = next(d.type for d in self.cluster.devices if d.type.name == device_type)
            self._on[device_type] = CostTable(
                self.graph,
                self.cluster,
                self.cost,
                training=self.training,
                batch_size=self.batch_size,
                device_type=kind,
                memory_bytes=self.memory_bytes,
            )
        return self._on[device_type]

    def op_times(self, local_samples: int, tp: int = 1) -> OpTimes:
        """Seconds of every operator for `local_samples` samples on each device."""
        key = (local_samples, tp)
        if key not in self._op_times:
            parallel = Parallel(dp=1, tp=tp)
            known: dict[str, tuple[float, float]] = {}
            forward_s, backward_s = np.empty(self.num_ops), np.empty(self.num_ops)
            for i, op in enumerate(self.graph.ops):
                name = op.signature or f"id:{op.id}"
                if name not in known:
                    price = self.cost.op_cost(op, local_samples, parallel, self.device_type)
                    _check_price(op, price.forward_s, price.backward_s)
                    known[name] = (price.forward_s, price.backward_s)
                forward_s[i], backward_s[i] = known[name]
            self._op_times[key] = OpTimes(forward_s=forward_s, backward_s=backward_s)
        return self._op_times[key]

    def least_op_times(self, local_samples: int, tp: int = 1) -> OpTimes:
        """Seconds of every operator on whichever device type of the cluster is fastest for it."""
        names = {node.device_type.name for node in self.cluster.nodes}
        if names == {self.device_type.name}:
            return self.op_times(local_samples, tp)
        times = [self.on(name).op_times(local_samples, tp) for name in sorted(names)]
        return OpTimes(
            forward_s=np.min([row.forward_s for row in times], axis=0),
            backward_s=np.min([row.backward_s for row in times], axis=0),
        )

    def pass_times(self, local_samples: tuple[int, ...], tp: int) -> OpTimes:
        """Seconds of every operator with its collectives, shape (operators, local batch sizes)."""
        key = (local_samples, tp)
        if key not in self._pass_times:
            times = [self.op_times(samples, tp) for samples in local_samples]
            extra = np.zeros((self.num_ops, len(local_samples)))
            if tp > 1:
                columns = [self.tensor_parallel_s(samples, tp) for samples in local_samples]
                extra = np.stack(columns, axis=1)
            self._pass_times[key] = OpTimes(
                forward_s=np.stack([row.forward_s for row in times], axis=1) + extra,
                backward_s=np.stack([row.backward_s for row in times], axis=1) + extra,
            )
        return self._pass_times[key]

    def tensor_parallel_s(self, local_samples: int, tp: int) -> NDArray[np.float64]:
        """Seconds of the all-reduces that tensor parallelism adds to one pass over each operator.

        Two all-reduces of the output per transformer layer and direction (Megatron-LM, arXiv
        2104.04473 §3.2): here two for a block of several weight matrices, one for a single one.
        """
        key = (local_samples, tp)
        if key not in self._collective_s:
            counts, sizes = np.zeros(self.num_ops), np.zeros(self.num_ops)
            for i, op in enumerate(self.graph.ops):
                num_weights = sum(
                    self.graph.parameter_by_id[name].num_elements * 64 > op.output_bytes
                    for name in op.param_ids
                )
                counts[i] = min(num_weights, 2)
                sizes[i] = op.output_bytes * local_samples
            self._collective_s[key] = counts * self.all_reduce_s(sizes, tp)
        return self._collective_s[key]

    def reserved_bytes(self, local_samples: int) -> NDArray[np.float64]:
        """Scratch bytes of every operator at one local batch size."""
        if local_samples not in self._reserved:
            self._reserved[local_samples] = np.array(
                [self.cost.reserved_bytes(op, local_samples) for op in self.graph.ops],
                dtype=np.float64,
            )
        return self._reserved[local_samples]

    @property
    def num_ops(self) -> int:
        """Operators of the graph."""
        return len(self.graph.ops)

    def all_reduce_s(
        self, gradient_bytes: NDArray[np.float64], num_devices: int
    ) -> NDArray[np.float64]:
        """Seconds of the gradient all-reduce of stages on the first `num_devices` devices."""
        if num_devices not in self._all_reduce:
            ring = range(num_devices)
            self._all_reduce[num_devices] = _vectorised(
                lambda num_bytes: self.cost.all_reduce_s(num_bytes, ring, self.cluster)
            )
        if num_devices < 2:
            return np.zeros_like(gradient_bytes)
        return self._all_reduce[num_devices](gradient_bytes)

    def transfer_s(self, num_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of messages over the slowest link; no message takes no time."""
        return self._transfer(num_bytes)

    @cached_property
    def _own_bytes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """State and gradient bytes of the parameters that a single operator uses."""
        state, gradient = np.zeros(self.num_ops), np.zeros(self.num_ops)
        for parameter_id, users in self._users.items():
            if len(users) == 1:
                parameter = self.graph.parameter_by_id[parameter_id]
                state[users[0]] += self.training.state_bytes(parameter)
                gradient[users[0]] += self.training.gradient_bytes(parameter)
        return state, gradient

    @cached_property
    def _users(self) -> dict[str, list[int]]:
        users: dict[str, list[int]] = {}
        for i, op in enumerate(self.graph.ops):
            for parameter_id in dict.fromkeys(op.param_ids):
                users.setdefault(parameter_id, []).append(i)
        return users

    @cached_property
    def shared_parameters(self) -> frozenset[str]:
        """Parameters that more than one operator uses."""
        return frozenset(name for name, users in self._users.items() if len(users) > 1)

    @cached_property
    def _edges(self) -> _Edges:
        return _Edges.of(self.graph)

    def features(self, member: NDArray[np.bool_]) -> StageFeatures:
        """Features of stages given as rows of operator membership, shape (stages, operators)."""
        parts = [
            self._features(member[i : i + _CHUNK]) for i in range(0, max(len(member), 1), _CHUNK)
        ]
        names = StageFeatures.__dataclass_fields__
        return StageFeatures(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        )

    def _features(self, member: NDArray[np.bool_]) -> StageFeatures:
        inside = member.astype(np.float64)
        own_state, own_gradient = self._own_bytes
        state, gradient = inside @ own_state, inside @ own_gradient
        for parameter_id in self.shared_parameters:
            users = self._users[parameter_id]
            parameter = self.graph.parameter_by_id[parameter_id]
            used = member[:, users].any(axis=1)
            state += used * self.training.state_bytes(parameter)
            gradient += used * self.training.gradient_bytes(parameter)
        saved = inside @ np.array([op.saved_bytes for op in self.graph.ops], dtype=np.float64)
        edges = self._edges
        read = np.ascontiguousarray(inside.T)[edges.target]
        here = inside.T[edges.source]
        away = 1.0 - here
        forward = edges.by_source(edges.forward, read)
        backward = edges.by_source(edges.backward, read)
        arriving = np.minimum(forward.read, edges.cap) * away
        boundary = arriving + np.minimum(forward.kept, edges.cap) * here
        boundary += np.minimum(backward.read, edges.cap) * away
        boundary += np.minimum(backward.kept, edges.cap) * here
        if edges.saved.any():
            saved += (edges.by_source(edges.saved, read).read * away).sum(axis=0)
        return StageFeatures(
            state_bytes=state,
            gradient_bytes=gradient,
            saved_bytes=saved,
            input_bytes=arriving.sum(axis=0),
            boundary_bytes=boundary.sum(axis=0),
        )


class StageTable:
    """Candidate stages with their features, priced on demand for each micro-batch size."""

    def __init__(self, table: CostTable, member: NDArray[np.bool_]) -> None:
        self.table = table
        self.member = member
        self.features = table.features(member)
        self._inside = member.astype(np.float64)
        self._seconds: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._reserved: dict[int, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return len(self.member)

    def seconds(self, local_samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Forward and backward seconds of every stage for one local batch size."""
        if local_samples not in self._seconds:
            times = self.table.op_times(local_samples)
            self._seconds[local_samples] = (
                self._inside @ times.forward_s,
                self._inside @ times.backward_s,
            )
        return self._seconds[local_samples]

    def reserved_bytes(self, local_samples: int) -> NDArray[np.float64]:
        """Scratch bytes of every stage at one local batch size."""
        if local_samples not in self._reserved:
            reserved = self.table.reserved_bytes(local_samples)
            self._reserved[local_samples] = self._inside @ reserved
        return self._reserved[local_samples]

    def candidates(
        self,
        micro_batch: int,
        variants: Sequence[Variant],
        k: int = 1,
        memory_bytes: int | None = None,
    ) -> Candidates:
        """Price every stage in every variant; a degree must divide the micro-batch.

        `memory_bytes` stands for another size of device memory.
        """
        memory = self.table.memory_bytes if memory_bytes is None else memory_bytes
        shape = (len(self), len(variants))
        seconds = np.empty(shape)
        limit = np.empty(shape, dtype=np.int64)
        for column, variant in enumerate(variants):
            seconds[:, column] = self.time_per_sample_s(micro_batch, variant)
            limit[:, column] = self._max_in_flight(micro_batch, variant, k, memory)
        seconds[limit < 1] = np.inf
        self.table.num_priced += len(self) * len(variants)
        return Candidates(variants=tuple(variants), time_per_sample_s=seconds, max_in_flight=limit)

    def fitting(
        self,
        micro_batch: int,
        variants: Sequence[Variant],
        k: int = 1,
        memory_bytes: int | None = None,
    ) -> Candidates:
        """`candidates` without prices: 0 seconds where a stage fits, infinity where it does not.

        Degrees may exceed the devices of the cluster, for which no all-reduce could be priced.
        """
        memory = self.table.memory_bytes if memory_bytes is None else memory_bytes
        limit = np.stack([self._max_in_flight(micro_batch, v, k, memory) for v in variants], axis=1)
        seconds = np.where(limit < 1, np.inf, 0.0)
        return Candidates(variants=tuple(variants), time_per_sample_s=seconds, max_in_flight=limit)

    def time_per_sample_s(self, micro_batch: int, variant: Variant) -> NDArray[np.float64]:
        """Seconds per sample of every stage in one variant, whether or not it fits."""
        local = micro_batch // variant.dp
        forward_s, backward_s = self.seconds(local)
        compute_s = forward_s + backward_s + (forward_s if variant.recompute else 0.0)
        message_s = self.table.transfer_s(self.features.boundary_bytes * local)
        all_reduce_s = self.table.all_reduce_s(self.features.gradient_bytes, variant.dp)
        return (compute_s + message_s) / micro_batch + all_reduce_s / self.table.batch_size

    def _max_in_flight(
        self, micro_batch: int, variant: Variant, k: int, memory_bytes: int
    ) -> NDArray[np.int64]:
        """Groups of k micro-batches that fit in memory beside the state and scratch."""
        features, batch_size = self.features, self.table.batch_size
        free = memory_bytes - features.state_bytes
        free = (free - self.reserved_bytes(micro_batch // variant.dp)) * variant.dp
        held = features.saved_bytes
        if variant.recompute:
            # One micro-batch is held whole while it is recomputed; the others as inputs only.
            free = free - features.saved_bytes * micro_batch
            held = features.input_bytes
        with np.errstate(divide="ignore", invalid="ignore"):
            samples = np.floor(free / held)
        samples = np.where(held == 0, np.inf, samples)
        samples = np.minimum(samples, batch_size)
        groups = np.where(samples == batch_size, UNLIMITED, samples // (micro_batch * k))
        return np.where(free < 0, 0, groups).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BySource:
    """Bytes per sample of each source that stages read, and that others read, (sources, stages)."""

    read: NDArray[np.float64]
    kept: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Edges:
    """Edges sorted by source: bytes per sample, shape (edges, 1).

    `source` lists each operator with readers once, with `first` its first edge and `cap` its
    distinct output bytes, what several readers get together at most, shape (sources, 1).
    """

    target: NDArray[np.int64]
    forward: NDArray[np.float64]
    backward: NDArray[np.float64]
    saved: NDArray[np.float64]
    source: NDArray[np.int64]
    first: NDArray[np.int64]
    cap: NDArray[np.float64]

    @classmethod
    def of(cls, graph: Graph) -> _Edges:
        edges = sorted(graph.edges, key=lambda edge: graph.op_index[edge.source])
        by_edge = np.array([graph.op_index[edge.source] for edge in edges], dtype=np.int64)
        source, first = np.unique(by_edge, return_index=True)
        forward = np.array([float(edge.bytes_per_sample) for edge in edges])
        outputs = np.array([float(op.output_bytes) for op in graph.ops])
        np.maximum.at(outputs, by_edge, forward)
        return cls(
            target=np.array([graph.op_index[edge.target] for edge in edges], dtype=np.int64),
            forward=forward[:, None],
            backward=np.array([float(e.bytes_per_sample) * e.needs_grad for e in edges])[:, None],
            saved=np.array([float(edge.saved_bytes) for edge in edges])[:, None],
            source=source,
            first=first,
            cap=outputs[source][:, None],
        )

    def by_source(self, num_bytes: NDArray[np.float64], read: NDArray[np.float64]) -> _BySource:
        """Bytes of each source's edges to where `read` is 1, and to where it is 0."""
        if not len(self.first):
            return _BySource(read=np.zeros((0, read.shape[1])), kept=np.zeros((0, read.shape[1])))
        here = np.add.reduceat(num_bytes * read, self.first, axis=0)
        # Whole numbers below 2^53: differences are exact.
        return _BySource(read=here, kept=np.add.reduceat(num_bytes, self.first, axis=0) - here)


def distinct_bytes(graph: Graph, source: str, edge_bytes: Sequence[int]) -> int:
    """Bytes of the distinct tensors behind several edges of one source.

    An edge lists its tensors' bytes, so edges that share tensors count them twice; together they
    are at most the source's output.
    """
    output = graph.op_by_id[source].output_bytes
    every = [e.bytes_per_sample for e in graph.edges if e.source == source]
    return min(sum(edge_bytes), max(output, *every))


def slowest_link(cluster: Cluster) -> Link:
    """The link of least bandwidth that joins two devices of the cluster."""
    links = [node.intra for node in cluster.nodes if node.num_devices > 1]
    if len(cluster.nodes) > 1:
        links.append(cluster.inter)
        links.extend(entry.link for entry in cluster.links)
    if not links:
        return cluster.link(0, 0)
    return min(links, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s))


def slowest_device_type(cluster: Cluster, cost: CostModel, graph: Graph) -> DeviceType:
    """The device type on which the whole graph takes longest for one sample."""
    types = {node.device_type.name: node.device_type for node in cluster.nodes}
    if len(types) == 1:
        return next(iter(types.values()))

    def total_s(kind: DeviceType) -> float:
        return sum(cost.op_cost(op, 1, Parallel(), kind).total_s for op in graph.ops)

    return max(types.values(), key=total_s)


@lru_cache(maxsize=4096)
def divisors(number: int, limit: int) -> tuple[int, ...]:
    """Divisors of `number` that are at most `limit`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    both = sorted({*small, *(number // d for d in small)})
    return tuple(d for d in both if d <= limit)


def _check_price(op: Op, *seconds: float) -> None:
    for value in seconds:
        if not (value >= 0 and np.isfinite(value)):
            raise PlanError(
                f"the cost model prices operator {op.id!r} at {value} s; times must be finite and "
                "at least 0"
            )


def _vectorised(
    price: Callable[[float], float],
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """`price` on arrays, 0 where there are no bytes; two calls where it is affine.

    A ring over a thousand devices is expensive to price, and every cost model here is affine in the
    bytes; one that is not (two points do not predict the others) is called for each value.
    """
    low, high = 1.0, 1e13
    slope = (price(high) - price(low)) / (high - low)
    fixed = price(low) - slope * low
    probes = (7.0, 3e3, 5e6, 2e9, 1e11)
    affine = all(abs(price(x) - fixed - slope * x) <= 1e-12 * price(x) for x in probes)

    def evaluate(num_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
        if affine:
            return np.where(num_bytes > 0, fixed + slope * num_bytes, 0.0)
        values, where = np.unique(num_bytes, return_inverse=True)
        return np.array([price(v) if v > 0 else 0.0 for v in values.tolist()])[where]

    return evaluate
