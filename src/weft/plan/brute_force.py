"""An oracle for the planners: every set partition of a small graph, tested against the class.

It shares no code with them on purpose. The class is written here a second time, on sets of
operators instead of on a tree, and every price is taken from the cost model directly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster
from weft.cost.model import CostModel, Parallel
from weft.cost.training import TrainingSpec
from weft.graph.graph import Graph

MAX_OPS = 12
"""Operators that the oracle accepts: their set partitions number 4,213,597."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleStage:
    """A stage of the best plan: operator positions, devices, and time per sample."""

    ops: tuple[int, ...]
    dp: int
    recompute: bool
    time_per_sample_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleResult:
    """The best plan, or none: `bottleneck_s` is then infinite and `stages` empty."""

    bottleneck_s: float
    micro_batch: int
    stages: tuple[OracleStage, ...]
    num_partitions: int


def best_bottleneck(
    graph: Graph,
    cluster: Cluster,
    cost: CostModel,
    *,
    training: TrainingSpec,
    batch_size: int,
    micro_batches: Sequence[int],
    recompute_choices: Sequence[bool] = (False,),
    any_convex: bool = False,
) -> OracleResult:
    """The least largest time per sample over every plan of the class, by enumeration.

    With `any_convex` the class test is left out: all partitions into convex stages whose stage
    graph has no cycle, stages across branches included. Devices must be equal.
    """
    if len(graph.ops) > MAX_OPS:
        raise ConfigError(
            f"brute-force enumerates set partitions and takes at most {MAX_OPS} operators, "
            f"not {len(graph.ops)}; use method='graphpipe'"
        )
    oracle = _Oracle(graph, cluster, cost, training, batch_size)
    best = OracleResult(bottleneck_s=math.inf, micro_batch=0, stages=(), num_partitions=0)
    num_partitions = 0
    for blocks in oracle.partitions(cluster.num_devices):
        depths = oracle.in_flight(blocks)
        if depths is None or not (any_convex or oracle.in_class(blocks)):
            continue
        num_partitions += 1
        for micro_batch in micro_batches:
            found = oracle.allocate(
                blocks, depths, micro_batch, recompute_choices, best.bottleneck_s
            )
            if found is not None:
                best = OracleResult(
                    bottleneck_s=max(stage.time_per_sample_s for stage in found),
                    micro_batch=micro_batch,
                    stages=found,
                    num_partitions=0,
                )
    return OracleResult(
        bottleneck_s=best.bottleneck_s,
        micro_batch=best.micro_batch,
        stages=best.stages,
        num_partitions=num_partitions,
    )


class _Oracle:
    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        cost: CostModel,
        training: TrainingSpec,
        batch_size: int,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.cost = cost
        self.training = training
        self.batch_size = batch_size
        self.num_ops = len(graph.ops)
        self.device_type = cluster.devices[0].type
        links = [cluster.link(a, b) for a in range(cluster.num_devices) for b in range(a)]
        self.link = min(
            links or [cluster.link(0, 0)],
            key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s),
        )
        self.edges = [(graph.op_index[e.source], graph.op_index[e.target], e) for e in graph.edges]
        self.before = [0] * self.num_ops
        for source, target, _ in sorted(self.edges, key=lambda edge: edge[1]):
            self.before[target] |= self.before[source] | 1 << source
        self.after = [
            sum(1 << j for j in range(self.num_ops) if self.before[j] >> i & 1)
            for i in range(self.num_ops)
        ]
        self._member: dict[tuple[int, ...], bool] = {}
        self._prices: dict[tuple[int, int, int, bool], tuple[float, int]] = {}
        self._convex = [self._is_convex(mask) for mask in range(1 << self.num_ops)]

    def _is_convex(self, mask: int) -> bool:
        """Whether no path leaves the set and comes back."""
        down, up = 0, 0
        for op in _ops(mask):
            down |= self.after[op]
            up |= self.before[op]
        return not down & up & ~mask

    def partitions(self, max_blocks: int) -> Iterator[tuple[int, ...]]:
        """Partitions of all operators into at most `max_blocks` convex sets."""

        def extend(left: int, blocks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            if not left:
                yield blocks
                return
            if len(blocks) == max_blocks:
                return
            first = left & -left
            rest = left ^ first
            subset = rest
            while True:
                block = first | subset
                if self._convex[block]:
                    yield from extend(left ^ block, (*blocks, block))
                if not subset:
                    return
                subset = (subset - 1) & rest

        yield from extend((1 << self.num_ops) - 1, ())

    def in_flight(self, blocks: Sequence[int]) -> list[int] | None:
        """Stages on the longest path from each block to a sink, or None if there is a cycle."""
        follows = []
        for block in blocks:
            reached = 0
            for source, target, _ in self.edges:
                if block >> source & 1 and not block >> target & 1:
                    reached |= 1 << target
            follows.append([j for j, other in enumerate(blocks) if other & reached])
        depths = [0] * len(blocks)
        left = set(range(len(blocks)))
        while left:
            ready = [i for i in left if all(j not in left for j in follows[i])]
            if not ready:
                return None
            for i in ready:
                depths[i] = 1 + max((depths[j] for j in follows[i]), default=0)
            left.difference_update(ready)
        return depths

    def in_class(self, blocks: tuple[int, ...]) -> bool:
        """Whether the recursive rules of the class produce this partition."""
        key = tuple(sorted(blocks))
        if key not in self._member:
            self._member[key] = len(blocks) == 1 or any(
                self.in_class(first) and self.in_class(second)
                for first, second in itertools.chain(
                    self._series_cuts(key), self._parallel_splits(key)
                )
            )
        return self._member[key]

    def _series_cuts(
        self, blocks: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Cuts such that every operator of the first side precedes every one of the second."""
        whole = sum(blocks)
        for size in range(1, len(blocks)):
            for first in itertools.combinations(blocks, size):
                head = sum(first)
                tail = whole ^ head
                if all(self.after[op] & tail == tail for op in _ops(head)):
                    yield first, tuple(b for b in blocks if b not in first)

    def _parallel_splits(
        self, blocks: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Two groups of independent branches, a fork and a join going to either."""
        whole = sum(blocks)
        forks = [op for op in _ops(whole) if self.after[op] & whole == whole ^ 1 << op]
        joins = [op for op in _ops(whole) if self.before[op] & whole == whole ^ 1 << op]
        for fork, join in itertools.product((None, *forks), (None, *joins)):
            ends = (0 if fork is None else 1 << fork) | (0 if join is None else 1 << join)
            branches = self._components(whole & ~ends)
            if len(branches) < 2:
                continue
            for size in range(1, len(blocks)):
                for first in itertools.combinations(blocks, size):
                    group = sum(first) & ~ends
                    rest = whole & ~ends & ~group
                    whole_branches = all(b & group in (0, b) for b in branches)
                    if group and rest and whole_branches:
                        yield first, tuple(b for b in blocks if b not in first)

    def _components(self, mask: int) -> list[int]:
        """Sets of operators that are comparable with each other, directly or through others."""
        found: list[int] = []
        while mask:
            component, frontier = 0, mask & -mask
            while frontier:
                op = frontier.bit_length() - 1
                component |= 1 << op
                frontier = (frontier | ((self.before[op] | self.after[op]) & mask)) & ~component
            found.append(component)
            mask &= ~component
        return found

    def allocate(
        self,
        blocks: tuple[int, ...],
        depths: Sequence[int],
        micro_batch: int,
        recompute_choices: Sequence[bool],
        below: float,
    ) -> tuple[OracleStage, ...] | None:
        """The best devices for each block, if the largest time per sample gets below a value."""
        spare = self.cluster.num_devices - len(blocks)
        options: list[list[OracleStage]] = []
        for block, depth in zip(blocks, depths, strict=True):
            row: list[OracleStage] = []
            for dp in range(1, spare + 2):
                if micro_batch % dp:
                    continue
                for recompute in recompute_choices:
                    seconds, max_samples = self._price(block, micro_batch, dp, recompute)
                    if seconds < below and min(depth * micro_batch, self.batch_size) <= max_samples:
                        row.append(
                            OracleStage(
                                ops=tuple(_ops(block)),
                                dp=dp,
                                recompute=recompute,
                                time_per_sample_s=seconds,
                            )
                        )
            if not row:
                return None
            options.append(row)
        best: tuple[OracleStage, ...] | None = None
        for choice in itertools.product(*options):
            worst = max(stage.time_per_sample_s for stage in choice)
            if worst < below and sum(stage.dp for stage in choice) <= self.cluster.num_devices:
                best, below = choice, worst
        return best

    def _price(self, block: int, micro_batch: int, dp: int, recompute: bool) -> tuple[float, int]:
        """Seconds per sample, and the most samples in flight that fit (-1: not even none)."""
        key = (block, micro_batch, dp, recompute)
        if key not in self._prices:
            self._prices[key] = self._new_price(block, micro_batch, dp, recompute)
        return self._prices[key]

    def _new_price(
        self, block: int, micro_batch: int, dp: int, recompute: bool
    ) -> tuple[float, int]:
        local = micro_batch // dp
        compute_s, saved, reserved = 0.0, 0, 0
        names: set[str] = set()
        for op in (self.graph.ops[i] for i in _ops(block)):
            price = self.cost.op_cost(op, local, Parallel(), self.device_type)
            compute_s += price.forward_s * (2 if recompute else 1) + price.backward_s
            saved += op.saved_bytes
            reserved += self.cost.reserved_bytes(op, local)
            names.update(op.param_ids)
        parameters = [self.graph.parameter_by_id[name] for name in names]
        state = sum(self.training.state_bytes(p) for p in parameters)
        gradients = sum(self.training.gradient_bytes(p) for p in parameters)
        arriving, moved, kept = self._boundary(block)
        saved += kept
        message_s = self.cost.transfer_s(moved * local, self.link) if moved * local else 0.0
        seconds = (compute_s + message_s) / micro_batch
        seconds += self.cost.all_reduce_s(gradients, range(dp), self.cluster) / self.batch_size
        free = (self.device_type.memory_bytes - state - reserved) * dp
        held = saved
        if recompute:
            free, held = free - saved * micro_batch, arriving
        if free < 0:
            return seconds, -1
        return seconds, free // held if held else self.batch_size

    def _boundary(self, block: int) -> tuple[int, int, int]:
        """Bytes per sample arriving forward, all bytes crossing, and saved copies of inputs."""
        crossing: dict[tuple[int, bool, bool], int] = {}
        kept = 0
        for source, target, edge in self.edges:
            inward = bool(block >> target & 1)
            if bool(block >> source & 1) == inward:
                continue
            kept += edge.saved_bytes if inward else 0
            for backward in (False, True):
                if edge.needs_grad or not backward:
                    key = (source, inward, backward)
                    crossing[key] = crossing.get(key, 0) + edge.bytes_per_sample
        moved, arriving = 0, 0
        for (source, inward, backward), num_bytes in crossing.items():
            op = self.graph.ops[source]
            largest = max(e.bytes_per_sample for s, _, e in self.edges if s == source)
            distinct = min(num_bytes, max(op.output_bytes, largest))
            moved += distinct
            arriving += distinct if inward and not backward else 0
        return arriving, moved, kept


def _ops(mask: int) -> list[int]:
    """Positions of the operators in a set."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
