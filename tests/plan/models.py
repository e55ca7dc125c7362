"""Small models written out by hand, with paths as capture would give them."""

from __future__ import annotations

from dataclasses import replace

from weft.cluster.cluster import Cluster
from weft.graph.graph import Edge, Graph, Op, Parameter


def layer(
    path: str, work: float = 4.0, *, saved_bytes: int = 2, output_bytes: int = 1, weights: int = 0
) -> Op:
    """An operator of this module: `work` units forward, twice as many backward."""
    return Op(
        id=f"{path}:0",
        kind="linear",
        module_path=path,
        flops_forward=work,
        flops_backward=2 * work,
        bytes_accessed=0.0,
        saved_bytes=saved_bytes,
        output_bytes=output_bytes,
        param_ids=(f"{path}.weight",) if weights else (),
        signature=f"linear {work} {saved_bytes} {output_bytes} {weights}",
    )


def graph_of(name: str, ops: list[Op], pairs: list[tuple[int, int]], weights: int = 0) -> Graph:
    """These operators, joined by position; the last is the loss."""
    ops = [*ops[:-1], replace(ops[-1], is_loss=True)]
    return Graph.ordered(
        name,
        ops,
        [
            Edge(source=ops[a].id, target=ops[b].id, bytes_per_sample=ops[a].output_bytes)
            for a, b in pairs
        ],
        [Parameter(id=param_id, num_elements=weights) for op in ops for param_id in op.param_ids],
    ).validate()


def chain(num_layers: int, *, weights: int = 0, saved_bytes: int = 2) -> Graph:
    """A decoder: embedding, equal layers, head, loss."""
    paths = ["embedding", *(f"layers.{i}" for i in range(num_layers)), "head", "loss"]
    ops = [
        layer(path, 4.0 if "layers" in path else 1.0, saved_bytes=saved_bytes, weights=weights)
        for path in paths
    ]
    return graph_of("chain", ops, [(i, i + 1) for i in range(len(ops) - 1)], weights)


def towers(
    num_branches: int,
    num_layers: int,
    *,
    weights: int = 0,
    work: float = 4.0,
    output_bytes: int = 1,
) -> Graph:
    """Equal branches of layers that a small head joins."""
    ops: list[Op] = []
    pairs: list[tuple[int, int]] = []
    ends: list[int] = []
    for branch in range(num_branches):
        for number in range(num_layers):
            if number:
                pairs.append((len(ops) - 1, len(ops)))
            path = f"branches.{branch}.{number}"
            saved_bytes = 2 * output_bytes
            ops.append(
                layer(
                    path,
                    work,
                    saved_bytes=saved_bytes,
                    output_bytes=output_bytes,
                    weights=weights,
                )
            )
        ends.append(len(ops) - 1)
    ops.append(layer("head", 0.5, weights=weights))
    return graph_of("towers", ops, [*pairs, *((end, len(ops) - 1) for end in ends)], weights)


def with_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    """The same cluster with another size of memory on every device."""
    nodes = tuple(
        replace(node, device_type=replace(node.device_type, memory_bytes=memory_bytes))
        for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes)
