"""The series-parallel decomposition: known trees, and agreement with the order on random graphs."""

from __future__ import annotations

import cProfile
import random
from collections.abc import Callable

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


def _diamonds(count: int) -> list[tuple[int, int]]:
    steps = [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)]
    return [(4 * i + a, 4 * i + b) for i in range(count) for a, b in steps]


def _wide(count: int) -> list[tuple[int, int]]:
    return [edge for i in range(1, 4 * count) for edge in ((0, i), (i, 4 * count))]


def _skips(count: int) -> list[tuple[int, int]]:
    n = 4 * count
    return [(i, i + 1) for i in range(n)] + [(i, n - i) for i in range(n // 2 - 1)]


def _irreducible(count: int) -> list[tuple[int, int]]:
    """Blocks of the shape N, each pair of outputs feeding both inputs of the next."""
    inside = [(4 * i + a, 4 * i + b) for i in range(count) for a, b in ((0, 2), (0, 3), (1, 3))]
    ends = [(4 * i - a, 4 * i + b) for i in range(1, count) for a in (1, 2) for b in (0, 1)]
    return inside + ends


@pytest.mark.parametrize("shape", [_diamonds, _wide, _skips, _irreducible])
def test_the_work_is_linear_in_the_graph(shape: Callable[[int], list[tuple[int, int]]]) -> None:
    calls: list[int] = []
    for count in (100, 400):
        edges = shape(count)
        graph = Graph.ordered(
            "large",
            [Op(id=f"op{i}", kind="op") for i in range(1 + max(b for _, b in edges))],
            [Edge(source=f"op{a}", target=f"op{b}", bytes_per_sample=1) for a, b in edges],
        )
        profile = cProfile.Profile()
        profile.runcall(decompose, graph)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    # Function calls do not depend on the machine; four times the graph may not cost more than
    # five times the work.
    assert calls[1] < 5 * calls[0]


def _prime_blocks(ops: frozenset[str], orders: set[tuple[str, str]]) -> list[frozenset[str]]:
    """Sets of operators that neither series nor parallel composition takes apart."""
    if len(ops) == 1:
        return []
    for is_joined in (
        lambda a, b: (a, b) in orders or (b, a) in orders,
        lambda a, b: (a, b) not in orders and (b, a) not in orders,
    ):
        parts: list[frozenset[str]] = []
        left = set(ops)
        while left:
            found, frontier = set[str](), {min(left)}
            while frontier:
                a = frontier.pop()
                found.add(a)
                frontier |= {b for b in left - found if is_joined(a, b)}
            parts.append(frozenset(found))
            left -= found
        if len(parts) > 1:
            return [block for part in parts for block in _prime_blocks(part, orders)]
    return [ops]


@settings(max_examples=150, deadline=None)
@given(random_graphs(max_ops=12))
def test_layers_stay_inside_the_blocks_that_no_composition_takes_apart(model: RandomGraph) -> None:
    found = decompose(model.graph)
    ops = frozenset(op.id for op in model.graph.ops)
    orders = _closure(model.graph)
    block_of = {op: block for block in _prime_blocks(ops, orders) for op in block}
    assert found.is_series_parallel == (not block_of)
    assert set(found.layered_ops) <= set(block_of)
    for a, b in _orders(found.root) - orders:
        assert a in block_of
        assert block_of[a] is block_of.get(b), "order was added between blocks"
