"""The graphpipe planner against an oracle that enumerates its class, and the oracle itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import random
from collections import Counter

import pytest

import weft.plan.brute_force as brute_force_module
from plan.graphs import Case, RandomChooser, ToyCost, build_case, toy_cluster
from weft.cost.training import TrainingSpec
from weft.graph.graph import Edge, Graph, Op
from weft.plan.api import plan
from weft.plan.brute_force import OracleResult, best_bottleneck
from weft.plan.problem import InfeasiblePlanError
from weft.plan.validate import validate_plan

NUM_CASES = 600
TRAINING = TrainingSpec(state_bytes_per_param=8.0)


def oracle(case: Case, *, any_convex: bool = False) -> OracleResult:
    return best_bottleneck(
        case.graph,
        case.cluster,
        ToyCost(),
        training=case.training,
        batch_size=case.batch_size,
        micro_batches=case.micro_batches,
        recompute_choices=case.recompute_choices,
        any_convex=any_convex,
    )


def planned_s(case: Case) -> float:
    """The planner's bottleneck, infinite where it finds nothing; its plan must hold."""
    try:
        found = plan(
            case.graph,
            case.cluster,
            batch_size=case.batch_size,
            objective="bottleneck",
            training=case.training,
            micro_batches=case.micro_batches,
            per_stage_recompute=len(case.recompute_choices) > 1,
            cost=ToyCost(),
        )
    except InfeasiblePlanError:
        return math.inf
    validate_plan(found, case.graph, case.cluster)
    return found.bottleneck_s


def assert_equal(case: Case, seed: int) -> float:
    expected, found = oracle(case).bottleneck_s, planned_s(case)
    equal = found == expected or math.isclose(found, expected, rel_tol=1e-12)
    assert equal, f"case {seed}: graphpipe {found!r}, oracle {expected!r}"
    return expected


def test_equals_the_oracle_on_random_graphs() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(NUM_CASES):
        case = build_case(RandomChooser(random.Random(seed)))
        best = assert_equal(case, seed)
        parameters = [name for op in case.graph.ops for name in set(op.param_ids)]
        kinds["infeasible"] += math.isinf(best)
        kinds["tight"] += case.cluster.devices[0].type.memory_bytes < 10**9
        kinds["nested"] += case.random_graph.is_nested
        kinds["skips"] += case.random_graph.has_skips
        kinds["tied"] += len(set(parameters)) < len(parameters)
        kinds["frozen"] += any(not p.trainable for p in case.graph.parameters)
        kinds["large"] += len(case.graph.ops) >= 7 and case.cluster.num_devices >= 4
        kinds["recompute"] += len(case.recompute_choices) > 1
    # The cases are only worth their number if every kind is well represented, mostly feasible.
    assert kinds["infeasible"] < NUM_CASES / 3, kinds
    assert kinds["tight"] > NUM_CASES / 2, kinds
    assert kinds["nested"] > 0.6 * NUM_CASES, kinds
    for kind in ("skips", "tied", "frozen", "large", "recompute"):
        assert kinds[kind] > NUM_CASES / 12, (kind, kinds)


@pytest.mark.long
def test_equals_the_oracle_on_many_more_and_larger_graphs() -> None:
    for seed in range(10_000, 13_000):
        rng = RandomChooser(random.Random(seed))
        assert_equal(build_case(rng), seed)
    for seed in range(20_000, 20_400):
        rng = RandomChooser(random.Random(seed))
        assert_equal(build_case(rng, max_ops=9, max_devices=6), seed)


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


def test_the_plan_is_the_same_every_time() -> None:
    case = build_case(RandomChooser(random.Random(5)))
    first, second = (
        plan(
            case.graph,
            case.cluster,
            batch_size=case.batch_size,
            objective="bottleneck",
            training=case.training,
            cost=ToyCost(),
        )
        for _ in range(2)
    )
    assert first == second
    assert first.search == second.search
