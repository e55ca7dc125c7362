"""Stage graphs built by hand or at random, without any planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from weft.cluster.cluster import Cluster, DeviceType, Link, Node
from weft.plan.in_flight import in_flight_samples
from weft.plan.train_plan import Stage, StageEdge, TrainPlan

FREE = Link(bandwidth_bytes_per_s=1e300)
"""A link whose messages take no measurable time."""


def flat_cluster(num_devices: int, link: Link = FREE, *, memory_bytes: int = 10**12) -> Cluster:
    """Equal devices on one node."""
    return nodes_cluster([num_devices], link, link, memory_bytes=memory_bytes)


def nodes_cluster(
    sizes: Sequence[int],
    intra: Link,
    inter: Link,
    *,
    nic_shared: bool = True,
    memory_bytes: int = 10**12,
) -> Cluster:
    """Nodes of these sizes with equal devices."""
    kind = DeviceType(
        name="unit",
        memory_bytes=memory_bytes,
        peak_flops={"float32": 1e12},
        memory_bandwidth_bytes_per_s=1e12,
    )
    nodes = tuple(
        Node(name=f"n{i}", device_type=kind, num_devices=size, intra=intra)
        for i, size in enumerate(sizes)
    )
    return Cluster(name="test", nodes=nodes, inter=inter, nic_shared=nic_shared)


def stage_plan(
    arcs: Sequence[tuple[int, int]],
    num_stages: int,
    *,
    batch_size: int,
    forward_s: float | Sequence[float] = 1.0,
    backward_s: float | Sequence[float] = 1.0,
    micro_batch: int | Sequence[int] = 1,
    k: int | Sequence[int] = 1,
    dp: Sequence[int] | None = None,
    devices: Sequence[tuple[int, ...]] | None = None,
    cluster: Cluster | None = None,
    edge_bytes: int | Mapping[tuple[int, int], int] = 1,
    saved_bytes: int = 1,
    state_bytes: int = 0,
    all_reduce_s: float = 0.0,
    frozen: Sequence[int] = (),
    in_flight: Sequence[int] | None = None,
    schedule: str = "1f1b",
) -> TrainPlan:
    """A plan of stages with these times, micro-batch sizes and devices, in flight by the rule."""

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, Sequence) else [value] * num_stages

    sizes, groups = each(micro_batch), each(k)
    degrees = list(dp) if dp is not None else [1] * num_stages
    if devices is None:
        starts = [sum(degrees[:i]) for i in range(num_stages)]
        devices = [tuple(range(a, a + d)) for a, d in zip(starts, degrees, strict=True)]
    successors = [[b for a, b in arcs if a == s] for s in range(num_stages)]
    samples = in_flight_samples(successors, sizes, groups, batch_size)
    bytes_of = edge_bytes if isinstance(edge_bytes, Mapping) else dict.fromkeys(arcs, edge_bytes)
    stages = tuple(
        Stage(
            index=s,
            ops=(f"op{s}",),
            devices=devices[s],
            axes={"dp": len(devices[s])},
            micro_batch=sizes[s],
            in_flight=in_flight[s] if in_flight is not None else samples[s],
            k=groups[s],
            forward_s={sizes[s]: each(forward_s)[s]},
            backward_s={sizes[s]: each(backward_s)[s]},
            frozen=s in frozen,
            saved_bytes_per_sample=saved_bytes,
            state_bytes=state_bytes,
            all_reduce_s=all_reduce_s if len(devices[s]) > 1 else 0.0,
        )
        for s in range(num_stages)
    )
    return TrainPlan(
        method="test",
        graph_name="test",
        graph_digest="",
        cluster=cluster or flat_cluster(1 + max(d for group in devices for d in group)),
        batch_size=batch_size,
        stages=stages,
        edges=tuple(
            StageEdge(
                source=a,
                target=b,
                forward_bytes_per_sample=bytes_of[a, b],
                backward_bytes_per_sample=0 if a in frozen else bytes_of[a, b],
            )
            for a, b in arcs
        ),
        schedule=schedule,
    )


def chain(num_stages: int, batch_size: int, **options: Any) -> TrainPlan:
    """A chain of stages, one device each."""
    arcs = [(s, s + 1) for s in range(num_stages - 1)]
    return stage_plan(arcs, num_stages, batch_size=batch_size, **options)


@st.composite
def random_arcs(draw: st.DrawFn, num_stages: int) -> list[tuple[int, int]]:
    """A connected acyclic stage graph with joins, forks and skips."""
    arcs: set[tuple[int, int]] = set()
    for target in range(1, num_stages):
        sources = draw(st.sets(st.integers(0, target - 1), min_size=0, max_size=3))
        arcs |= {(source, target) for source in sources}
    for source in range(num_stages - 1):
        if not any(a == source for a, _ in arcs):
            arcs.add((source, draw(st.integers(source + 1, num_stages - 1))))
    return sorted(arcs)


@st.composite
def random_plans(draw: st.DrawFn, *, mixed: bool = True, replicas: bool = True) -> TrainPlan:
    """Stage graphs with random times, links, data parallelism, micro-batch sizes, frozen stages."""
    num_stages = draw(st.integers(1, 6))
    arcs = draw(random_arcs(num_stages))
    dp = [draw(st.sampled_from((1, 1, 2, 3) if replicas else (1,))) for _ in range(num_stages)]
    base = 6
    sizes = [base * draw(st.sampled_from((1, 1, 2))) if mixed else base for _ in range(num_stages)]
    times = st.floats(0.0, 3.0)
    link = st.builds(
        Link, bandwidth_bytes_per_s=st.floats(1.0, 100.0), latency_s=st.floats(0.0, 0.5)
    )
    node = draw(st.integers(1, 3))
    num_devices = sum(dp)
    sources = {a for a, _ in arcs}
    frozen = [
        s
        for s in range(num_stages)
        if s in sources and not any(b == s for _, b in arcs) and draw(st.integers(0, 4)) == 0
    ]
    return stage_plan(
        arcs,
        num_stages,
        batch_size=base * 2 * draw(st.integers(1, 4)),
        forward_s=[draw(times) for _ in range(num_stages)],
        backward_s=[draw(times) for _ in range(num_stages)],
        micro_batch=sizes,
        dp=dp,
        cluster=nodes_cluster(
            [node] * (-(-num_devices // node)),
            draw(link),
            draw(link),
            nic_shared=draw(st.booleans()),
        ),
        edge_bytes={arc: draw(st.integers(0, 20)) for arc in arcs},
        all_reduce_s=draw(times),
        frozen=frozen,
    )
