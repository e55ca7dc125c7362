"""Random graphs, clusters and a cost model for planner tests, from `random` or from Hypothesis."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Protocol

from hypothesis import strategies as st

from weft.cluster.cluster import Cluster, DeviceType, Link, Node
from weft.cost.communication import Communication
from weft.cost.model import OpCost, Parallel
from weft.cost.training import TrainingSpec
from weft.graph.graph import Edge, Graph, Op, Parameter

STATE_BYTES = 8.0


class Chooser(Protocol):
    """Where random choices come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        ...


@dataclass(frozen=True)
class RandomChooser:
    """Choices of a seeded generator."""

    rng: random.Random

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)


@dataclass(frozen=True)
class DrawChooser:
    """Choices that Hypothesis makes and shrinks."""

    draw: st.DrawFn

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))


@dataclass(frozen=True)
class Spec:
    """A series-parallel tree to be built: an operator with its costs, or children."""

    kind: str
    costs: tuple[int, ...] = ()
    children: tuple[Spec, ...] = ()

    @property
    def num_ops(self) -> int:
        return 1 if self.kind == "op" else sum(child.num_ops for child in self.children)

    @property
    def nesting(self) -> int:
        """Levels of parallel nodes inside each other."""
        deepest = max((child.nesting for child in self.children), default=0)
        return deepest + (self.kind == "parallel")


@dataclass(frozen=True)
class RandomGraph:
    """A generated graph, and which kind it turned out to be."""

    graph: Graph
    is_nested: bool
    has_skips: bool
    is_series_parallel: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyCost(Communication):
    """Seconds from an operator's own figures: fixed plus linear in the local samples."""

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
    ) -> OpCost:
        scale = 1e-3 / parallel.tp
        return OpCost(
            forward_s=scale * (op.fixed_flops + op.flops_forward * local_samples),
            backward_s=scale * (op.fixed_flops + op.flops_backward * local_samples),
        )

    def reserved_bytes(self, op: Op, local_samples: int) -> int:
        return int(op.bytes_accessed) * local_samples


def _costs(choose: Chooser) -> tuple[int, ...]:
    """Forward, backward, fixed work, saved bytes, output bytes, parameters, scratch bytes."""
    return (
        choose.integer(1, 9),
        choose.integer(0, 9),
        choose.integer(0, 3),
        choose.integer(0, 6),
        choose.integer(0, 3),
        choose.integer(0, 5),
        choose.integer(0, 1),
    )


def _spec(choose: Chooser, num_ops: int, palette: list[tuple[int, ...]], parallel: bool) -> Spec:
    if num_ops == 1:
        return Spec("op", costs=palette[choose.integer(0, len(palette) - 1)])
    num_children = choose.integer(2, min(num_ops, 4))
    if num_ops % num_children == 0 and choose.integer(0, 2) == 0:
        # Equal branches, so that sharing of structurally equal parts is exercised.
        child = _spec(choose, num_ops // num_children, palette, not parallel)
        children = (child,) * num_children
    else:
        sizes = [1] * num_children
        for _ in range(num_ops - num_children):
            sizes[choose.integer(0, num_children - 1)] += 1
        children = tuple(_spec(choose, size, palette, not parallel) for size in sizes)
    return Spec("parallel" if parallel else "series", children=children)


class _Writer:
    def __init__(self) -> None:
        self.costs: list[tuple[int, ...]] = []
        self.edges: list[tuple[int, int]] = []

    def write(self, spec: Spec) -> tuple[list[int], list[int]]:
        """Add the operators of `spec`; return its sources and sinks."""
        if spec.kind == "op":
            self.costs.append(spec.costs)
            return [len(self.costs) - 1], [len(self.costs) - 1]
        ends = [self.write(child) for child in spec.children]
        if spec.kind == "parallel":
            return [s for row, _ in ends for s in row], [s for _, row in ends for s in row]
        for (_, sinks), (sources, _) in itertools.pairwise(ends):
            self.edges.extend((a, b) for a in sinks for b in sources)
        return ends[0][0], ends[-1][1]


def build_graph(
    choose: Chooser,
    *,
    max_ops: int = 8,
    min_ops: int = 3,
    skips: bool | None = None,
    crossing: bool | None = None,
) -> RandomGraph:
    """A random graph: nested series and parallel parts, perhaps skips, perhaps a crossing edge.

    Operators with equal costs have equal signatures; some parameters are shared or frozen.
    """
    num_ops = choose.integer(min_ops, max_ops)
    palette = [_costs(choose) for _ in range(choose.integer(1, 4))]
    spec = _spec(choose, num_ops, palette, parallel=choose.integer(0, 3) == 0)
    writer = _Writer()
    writer.write(spec)
    below = _reachable(num_ops, writer.edges)
    pairs = [(a, b) for a in range(num_ops) for b in range(a + 1, num_ops)]
    implied = [(a, b) for a, b in pairs if b in below[a] and (a, b) not in writer.edges]
    loose = [(a, b) for a, b in pairs if b not in below[a] and a not in below[b]]
    wants_skips = choose.integer(0, 9) < 5 if skips is None else skips
    wants_crossing = choose.integer(0, 9) < 3 if crossing is None else crossing
    extra: list[tuple[int, int]] = []
    if wants_skips and implied:
        for _ in range(choose.integer(1, 2)):
            extra.append(implied[choose.integer(0, len(implied) - 1)])
    if wants_crossing:
        loose = [pair for pair in loose if _has_n(num_ops, [*writer.edges, pair])]
    crossed = wants_crossing and bool(loose)
    if crossed:
        # Positions are a topological order, so an edge forward in it makes no cycle.
        extra.append(loose[choose.integer(0, len(loose) - 1)])
    edges = list(dict.fromkeys(writer.edges + extra))
    return RandomGraph(
        graph=_graph(choose, writer.costs, edges),
        is_nested=spec.nesting >= 1 and num_ops > 2,
        has_skips=any(edge in implied for edge in extra),
        is_series_parallel=not crossed,
    )


def _graph(choose: Chooser, costs: list[tuple[int, ...]], edges: list[tuple[int, int]]) -> Graph:
    parameters: list[Parameter] = []
    ops: list[Op] = []
    shared = Parameter(id="shared", num_elements=3)
    uses_shared = choose.integer(0, 3) == 0
    for i, (forward, backward, fixed, saved, output, params, scratch) in enumerate(costs):
        own = Parameter(id=f"w{i}", num_elements=params, trainable=backward > 0)
        names = [own.id] if params else []
        parameters += [own] if params else []
        if uses_shared and i % 3 == 0:
            names.append(shared.id)
            parameters += [] if shared in parameters else [shared]
        ops.append(
            Op(
                id=f"op{i}",
                kind="toy",
                flops_forward=float(forward),
                flops_backward=float(backward),
                fixed_flops=float(fixed),
                saved_bytes=saved,
                output_bytes=output,
                bytes_accessed=float(scratch),
                param_ids=tuple(names),
                signature=repr(costs[i]),
            )
        )
    return Graph.ordered(
        "random",
        ops,
        [
            Edge(
                source=f"op{a}",
                target=f"op{b}",
                bytes_per_sample=costs[a][4],
                needs_grad=costs[a][1] > 0,
                saved_bytes=min(costs[b][3], 1),
            )
            for a, b in edges
        ],
        parameters,
    )


def _reachable(num_ops: int, edges: list[tuple[int, int]]) -> list[set[int]]:
    below: list[set[int]] = [set() for _ in range(num_ops)]
    for a in range(num_ops - 1, -1, -1):
        for source, target in edges:
            if source == a:
                below[a] |= {target} | below[target]
    return below


def _has_n(num_ops: int, edges: list[tuple[int, int]]) -> bool:
    """Whether the order holds an N (a<c, b<c, b<d and no other relation): then it is not SP."""
    below = _reachable(num_ops, edges)

    def free(a: int, b: int) -> bool:
        return a != b and b not in below[a] and a not in below[b]

    ops = range(num_ops)
    return any(
        c in below[b] and d in below[b] and free(a, b) and free(c, d) and free(a, d)
        for a in ops
        for c in below[a]
        for b in ops
        if free(a, b)
        for d in below[b]
        if d != c
    )


@dataclass(frozen=True)
class Case:
    """A whole planning problem, small enough for the oracle."""

    random_graph: RandomGraph
    cluster: Cluster
    training: TrainingSpec
    batch_size: int
    micro_batches: tuple[int, ...]
    recompute_choices: tuple[bool, ...]

    @property
    def graph(self) -> Graph:
        return self.random_graph.graph


def toy_cluster(num_devices: int, memory_bytes: int = 10**9, per_node: int = 2) -> Cluster:
    """Equal devices on small nodes, with a fast link inside and a slow one between."""
    kind = DeviceType(
        name="toy",
        memory_bytes=memory_bytes,
        peak_flops={"float32": 1e12},
        memory_bandwidth_bytes_per_s=1e12,
    )
    counts = [per_node] * (num_devices // per_node)
    counts += [num_devices % per_node] if num_devices % per_node else []
    intra = Link(bandwidth_bytes_per_s=5e4, latency_s=1e-5)
    nodes = tuple(
        Node(name=f"n{i}", device_type=kind, num_devices=count, intra=intra)
        for i, count in enumerate(counts)
    )
    inter = Link(bandwidth_bytes_per_s=1e4, latency_s=1e-4)
    return Cluster(name="toy", nodes=nodes, inter=inter)


def build_case(choose: Chooser, *, max_ops: int = 8, max_devices: int = 5) -> Case:
    """A random series-parallel problem; memory is often tight."""
    random_graph = build_graph(choose, max_ops=max_ops, crossing=False)
    num_devices = choose.integer(1, max_devices)
    state = sum(p.num_elements for p in random_graph.graph.parameters) * STATE_BYTES
    saved = sum(op.saved_bytes for op in random_graph.graph.ops)
    batch_size = (4, 6, 8)[choose.integer(0, 2)]
    share = choose.integer(2, 12) / (4 * max(num_devices, 2))
    loose = choose.integer(0, 3) == 0
    memory = 10**9 if loose else max(1, int((state + saved * batch_size) * share))
    divisors = [b for b in range(1, batch_size + 1) if batch_size % b == 0]
    return Case(
        random_graph=random_graph,
        cluster=toy_cluster(num_devices, memory),
        training=TrainingSpec(state_bytes_per_param=STATE_BYTES),
        batch_size=batch_size,
        micro_batches=tuple(divisors),
        recompute_choices=((False,), (False, True))[choose.integer(0, 1)],
    )


@st.composite
def random_graphs(draw: st.DrawFn, max_ops: int = 10) -> RandomGraph:
    """Graphs of every kind: nested, with skips, and not series-parallel."""
    return build_graph(DrawChooser(draw), max_ops=max_ops, min_ops=4)


@st.composite
def cases(draw: st.DrawFn, max_ops: int = 8, max_devices: int = 5) -> Case:
    """Planning problems for the oracle."""
    return build_case(DrawChooser(draw), max_ops=max_ops, max_devices=max_devices)
