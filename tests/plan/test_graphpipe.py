"""The class of the graphpipe planner on cases worked by hand, for planner and oracle alike."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

import weft.plan.brute_force as brute_force_module
from plan.graphs import ToyCost, toy_cluster
from weft.cost.training import TrainingSpec
from weft.graph.graph import Edge, Graph, Op
from weft.plan.api import plan
from weft.plan.brute_force import best_bottleneck
from weft.plan.validate import validate_plan

TRAINING = TrainingSpec(state_bytes_per_param=8.0)


def unit_graph(num_ops: int, edges: list[tuple[int, int]], **costs: float) -> Graph:
    return Graph.ordered(
        "hand",
        [
            Op(id=f"op{i}", kind="toy", flops_forward=costs.get(f"op{i}", 1.0), signature="")
            for i in range(num_ops)
        ],
        [Edge(source=f"op{a}", target=f"op{b}", bytes_per_sample=0) for a, b in edges],
    )


def count(graph: Graph, *, any_convex: bool = False) -> int:
    return best_bottleneck(
        graph,
        toy_cluster(len(graph.ops)),
        ToyCost(),
        training=TRAINING,
        batch_size=1,
        micro_batches=(1,),
        any_convex=any_convex,
    ).num_partitions


@pytest.mark.parametrize(
    ("num_ops", "edges", "in_class", "convex"),
    [
        # A chain of n may be cut in 2^(n-1) ways, and nothing else is convex.
        (5, [(0, 1), (1, 2), (2, 3), (3, 4)], 16, 16),
        # Independent operators: any grouping, Bell(4).
        (4, [], 15, 15),
        # A diamond: of Bell(4) = 15 partitions, 4 have both ends in a stage without a middle.
        (4, [(0, 1), (0, 2), (1, 3), (2, 3)], 11, 11),
        # Two chains of two: all in one, or each chain cut or not; no stage across branches.
        (4, [(0, 1), (2, 3)], 5, None),
        # An N is not series-parallel: nothing but one stage.
        (4, [(0, 2), (1, 2), (1, 3)], 1, None),
    ],
)
def test_the_oracle_counts_classes_worked_by_hand(
    num_ops: int, edges: list[tuple[int, int]], in_class: int, convex: int | None
) -> None:
    graph = unit_graph(num_ops, edges)
    assert count(graph) == in_class
    if convex is not None:
        assert count(graph, any_convex=True) == convex
    else:
        assert count(graph, any_convex=True) > in_class


def test_the_oracle_shares_no_code_with_the_planner() -> None:
    tree = ast.parse(inspect.getsource(brute_force_module))
    modules = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weft")
    }
    assert modules == {
        "weft.base.errors",
        "weft.cluster.cluster",
        "weft.cost.model",
        "weft.cost.training",
        "weft.graph.graph",
    }
    assert not any(
        alias.name.startswith("weft")
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    )


def test_unequal_branches_train_at_the_same_time() -> None:
    # Two branches of 2 and a join of 1 on 3 devices: one stage each, no cross-branch stage.
    graph = unit_graph(5, [(0, 1), (2, 3), (1, 4), (3, 4)])
    found = plan(
        graph,
        toy_cluster(3),
        batch_size=8,
        micro_batches=(1,),
        objective="bottleneck",
        training=TRAINING,
        cost=ToyCost(),
    )
    assert {frozenset(stage.ops) for stage in found.stages} == {
        frozenset({"op0", "op1"}),
        frozenset({"op2", "op3"}),
        frozenset({"op4"}),
    }
    assert found.depth == 2
    assert found.bottleneck_s == pytest.approx(2e-3)
    assert [stage.in_flight for stage in found.stages] == [2, 2, 1]


def test_more_devices_than_help_stay_idle_and_are_named() -> None:
    found = plan(
        unit_graph(2, [(0, 1)]),
        toy_cluster(6),
        batch_size=1,
        objective="bottleneck",
        training=TRAINING,
        cost=ToyCost(),
    )
    assert len(found.used_devices) == 2
    assert any("4 of 6 devices stay idle" in note for note in found.notes)


def test_wide_parallel_nodes_say_that_groups_are_contiguous() -> None:
    graph = unit_graph(12, [], **{f"op{i}": float(i + 1) for i in range(12)})
    found = plan(
        graph,
        toy_cluster(4),
        batch_size=4,
        micro_batches=(1,),
        objective="bottleneck",
        training=TRAINING,
        cost=ToyCost(),
    )
    validate_plan(found, graph)
    assert any("contiguous in order of work" in note for note in found.notes)
    # Work of 78 units on 4 devices, groups of neighbours by work: {12}, {11, 10}, ... at best 21.
    work = sorted(range(1, 13), reverse=True)
    assert found.bottleneck_s == pytest.approx(1e-3 * _best_contiguous(work, 4))


def _best_contiguous(work: list[int], num_groups: int) -> int:
    if num_groups == 1 or len(work) == 1:
        return sum(work)
    return min(
        max(sum(work[:i]), _best_contiguous(work[i:], num_groups - 1)) for i in range(1, len(work))
    )


def test_equal_branches_need_no_grouping_of_each_subset() -> None:
    # 24 equal branches: groups are told apart by how many branches they hold.
    graph = unit_graph(25, [(i, 24) for i in range(24)])
    graph = Graph.ordered(
        "equal",
        [
            dataclasses.replace(op, signature="same" if op.id != "op24" else "join")
            for op in graph.ops
        ],
        list(graph.edges),
    )
    found = plan(
        graph,
        toy_cluster(9),
        batch_size=8,
        micro_batches=(1,),
        objective="bottleneck",
        training=TRAINING,
        cost=ToyCost(),
    )
    assert not any("contiguous" in note for note in found.notes)
    assert found.bottleneck_s == pytest.approx(3e-3)
