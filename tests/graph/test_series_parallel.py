"""The series-parallel decomposition: known trees, and agreement with the order on random graphs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from plan.graphs import RandomChooser, RandomGraph, build_graph, random_graphs
from weft.graph.graph import Edge, Graph, Op
from weft.graph.series_parallel import Composition, SeriesParallel, decompose


def graph_of(text: str) -> Graph:
    pairs = [tuple(pair) for pair in text.split()]
    names = sorted({name for pair in pairs for name in pair})
    return Graph.ordered(
        "text",
        [Op(id=name, kind="op", flops_forward=1.0) for name in names],
        [Edge(source=a, target=b, bytes_per_sample=1) for a, b in pairs],
    )


@pytest.mark.parametrize(
    ("edges", "tree"),
    [
        ("ab bc cd", "(a b c d)"),
        ("ab ac bd cd", "(a (b | c) d)"),
        ("ac bc", "((a | b) c)"),
        ("ac ad bc bd", "((a | b) (c | d))"),
        ("ab bc ce ad de bd", "(a b (c | d) e)"),
        ("ab ac ae bd cd de", "(a (b | c) d e)"),
        ("ab bf ac cd ce dg eg fh gh", "(a ((b f) | (c (d | e) g)) h)"),
    ],
)
def test_known_trees(edges: str, tree: str) -> None:
    found = decompose(graph_of(edges))
    assert str(found.root) == tree
    assert found.is_series_parallel


def test_implied_edges_leave_the_order_and_are_reported() -> None:
    found = decompose(graph_of("ab bc cd ad"))
    assert str(found.root) == "(a b c d)"
    assert found.redundant_edges == (("a", "d"),)


def test_an_irreducible_block_is_layered_and_the_rest_stays_as_it_is() -> None:
    # Two chains with one edge across, inside a branch of a larger model beside the branch y.
    found = decompose(graph_of("sa ab bc sd de ef bf ct ft sy yt"))
    assert not found.is_series_parallel
    assert "y" not in found.layered_ops
    assert set(found.layered_ops) == set("abcdef")
    assert str(found.root) == "(s (((a b) | (d e)) (c | f) | y) t)".replace(
        "(((a b) | (d e)) (c | f) | y)", "((((a b) | (d e)) (c | f)) | y)"
    )


def _orders(tree: SeriesParallel) -> set[tuple[str, str]]:
    """Pairs of operators that a tree puts in order."""
    found: set[tuple[str, str]] = set()
    for node in tree.nodes():
        if node.composition is Composition.SERIES:
            rows = [list(child.ops()) for child in node.children]
            for i, row in enumerate(rows):
                found |= {(a, b) for later in rows[i + 1 :] for a in row for b in later}
    return found


def _closure(graph: Graph) -> set[tuple[str, str]]:
    below: dict[str, set[str]] = {}
    for op in reversed(graph.ops):
        below[op.id] = set()
        for target in graph.successors[op.id]:
            below[op.id] |= {target} | below[target]
    return {(a, b) for a, row in below.items() for b in row}


@settings(max_examples=150, deadline=None)
@given(random_graphs(max_ops=12))
def test_a_tree_has_the_graphs_order_or_more_where_it_says_so(model: RandomGraph) -> None:
    found = decompose(model.graph)
    assert sorted(found.root.ops()) == sorted(op.id for op in model.graph.ops)
    orders, wanted = _orders(found.root), _closure(model.graph)
    assert found.is_series_parallel == model.is_series_parallel
    if model.is_series_parallel:
        assert orders == wanted
        return
    assert orders > wanted
    for a, b in orders - wanted:
        assert {a, b} <= set(found.layered_ops), "order was added outside the irreducible blocks"
    for node in found.root.nodes():
        kinds = {child.composition for child in node.children}
        assert node.composition not in kinds, "a node has a child of its own composition"


def test_generated_graphs_cover_what_planners_meet() -> None:
    rng = random.Random(5)
    models = [build_graph(RandomChooser(rng), max_ops=10, min_ops=4) for _ in range(400)]
    assert sum(model.is_nested for model in models) >= 0.6 * len(models)
    assert sum(model.has_skips for model in models) >= 0.3 * len(models)
    assert sum(not model.is_series_parallel for model in models) >= 0.1 * len(models)


def test_a_chain_of_thousands_of_operators_decomposes() -> None:
    ops = [Op(id=f"op{i}", kind="op", flops_forward=1.0) for i in range(5000)]
    edges = [Edge(source=f"op{i}", target=f"op{i + 1}", bytes_per_sample=1) for i in range(4999)]
    found = decompose(Graph.ordered("chain", ops, edges))
    assert len(found.root.children) == 5000
