"""Graph: queries, JSON, digests, and every refusal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from weft.base.errors import GraphError
from weft.graph.graph import Edge, Graph, Kernel, Op, Parameter, merge_kernels


def op(name: str, **fields: object) -> Op:
    defaults: dict[str, object] = {"kind": "linear", "flops_forward": 10.0, "output_bytes": 8}
    return Op(id=name, **(defaults | fields))  # pyright: ignore[reportArgumentType]


def edge(source: str, target: str, num_bytes: int = 8) -> Edge:
    return Edge(source=source, target=target, bytes_per_sample=num_bytes)


def diamond() -> Graph:
    return Graph.ordered(
        "diamond",
        [op("d", is_loss=True), op("b", param_ids=("w",)), op("c", param_ids=("w",)), op("a")],
        [edge("a", "b"), edge("a", "c"), edge("b", "d"), edge("c", "d")],
        [Parameter(id="w", num_elements=10, dtype="bfloat16")],
    )


def test_ordered_sorts_and_keeps_the_listed_order_where_it_can() -> None:
    assert [o.id for o in diamond().ops] == ["a", "b", "c", "d"]


def test_a_shared_parameter_counts_once() -> None:
    graph = diamond()
    assert graph.parameter_bytes(["b", "c"]) == 20
    assert graph.num_parameters == 10


def test_neighbours() -> None:
    graph = diamond()
    assert graph.successors["a"] == ("b", "c")
    assert graph.predecessors["d"] == ("b", "c")


def test_a_tensor_with_two_readers_crosses_a_cut_once() -> None:
    graph = diamond()
    assert graph.distinct_bytes([e for e in graph.edges if e.source == "a"]) == 8
    assert graph.distinct_bytes([e for e in graph.edges if e.target == "d"]) == 16


def test_json_round_trip_keeps_kernels_and_digest() -> None:
    kernels = (Kernel(flops_forward=1.0, count=2), Kernel(bytes_accessed=3.0, is_product=False))
    graph = diamond()
    graph = replace(graph, ops=(replace(graph.ops[0], kernels=kernels), *graph.ops[1:]))
    again = Graph.from_json(graph.to_json())
    assert again == graph
    assert again.digest == graph.digest


def test_the_digest_ignores_the_name_and_nothing_else() -> None:
    graph = diamond()
    assert replace(graph, name="other").digest == graph.digest
    assert replace(graph, edges=graph.edges[:-1]).digest != graph.digest


def test_equal_kernels_are_counted_together() -> None:
    one = Kernel(flops_forward=1.0)
    assert merge_kernels([one, Kernel(flops_forward=2.0), replace(one, count=3)]) == (
        replace(one, count=4),
        Kernel(flops_forward=2.0),
    )


def test_json_of_something_else_is_refused() -> None:
    with pytest.raises(GraphError, match="not a graph"):
        Graph.from_json('{"name": "x"}')


def test_a_cycle_is_refused_and_named() -> None:
    with pytest.raises(GraphError, match=r"cycle: 'b' -> 'c' -> 'b'|cycle: 'c' -> 'b' -> 'c'"):
        Graph.ordered(
            "x", [op("a"), op("b"), op("c")], [edge("a", "b"), edge("b", "c"), edge("c", "b")]
        )


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_costs_that_are_no_costs_are_refused(value: float) -> None:
    with pytest.raises(GraphError, match="flops_forward of operator 'a'"):
        Graph.ordered("x", [op("a", flops_forward=value)], []).validate()


def test_a_total_cost_of_zero_is_refused() -> None:
    with pytest.raises(GraphError, match="total cost of 0"):
        Graph.ordered("x", [op("a", flops_forward=0.0)], []).validate()


def test_a_component_that_reaches_no_loss_is_refused() -> None:
    graph = diamond()
    with pytest.raises(GraphError, match=r"'lost'.*reaches no loss"):
        Graph.ordered("x", [*graph.ops, op("lost")], graph.edges, graph.parameters).validate()


def test_ids_must_be_known_and_unique() -> None:
    with pytest.raises(GraphError, match="'z'"):
        Graph.ordered("x", [op("a")], [edge("a", "z")])
    with pytest.raises(GraphError, match="used twice"):
        Graph.ordered("x", [op("a"), op("a")], [])
    with pytest.raises(GraphError, match="listed twice"):
        Graph.ordered("x", [op("a"), op("b")], [edge("a", "b"), edge("a", "b")])
    with pytest.raises(GraphError, match="parameter 'w'"):
        Graph.ordered("x", [op("a", param_ids=("w",))], []).validate()


def test_a_wrong_order_is_refused_with_its_remedy() -> None:
    graph = Graph(name="x", ops=(op("b"), op("a")), edges=(edge("a", "b"),))
    with pytest.raises(GraphError, match=r"Graph\.ordered"):
        graph.validate()
