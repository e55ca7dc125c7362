"""The graphpipe planner against brute force over the class, and against all convex stage graphs."""

from __future__ import annotations

import math
import random

import pytest

from plan.graphs import Case, RandomChooser, ToyCost, build_case
from weft.plan.api import plan
from weft.plan.brute_force import OracleResult, best_bottleneck
from weft.plan.problem import InfeasiblePlanError
from weft.plan.train_plan import TrainPlan
from weft.plan.validate import validate_plan

REL = 1e-12


def planned(case: Case, method: str = "graphpipe") -> TrainPlan | None:
    try:
        return plan(
            case.graph,
            case.cluster,
            batch_size=case.batch_size,
            method=method,
            objective="bottleneck",
            training=case.training,
            micro_batches=case.micro_batches,
            cost=ToyCost(),
            per_stage_recompute=len(case.recompute_choices) > 1,
        )
    except InfeasiblePlanError:
        return None


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


def assert_equal_to_oracle(seeds: range, max_ops: int = 8) -> None:
    infeasible, nested, memory_bound, recomputed, several = 0, 0, 0, 0, 0
    for seed in seeds:
        case = build_case(RandomChooser(random.Random(seed)), max_ops=max_ops)
        expected, found = oracle(case), planned(case)
        nested += case.random_graph.is_nested
        if found is None:
            infeasible += 1
            assert math.isinf(expected.bottleneck_s), f"seed {seed}: the oracle has a plan"
            continue
        assert found.bottleneck_s == pytest.approx(expected.bottleneck_s, rel=REL), f"seed {seed}"
        validate_plan(found, case.graph, case.cluster)
        several += found.num_stages > 1
        recomputed += any(stage.recompute for stage in found.stages)
        memory_bound += found.peak_memory_bytes > 0.7 * case.cluster.devices[0].type.memory_bytes
    # The equality means something only where memory, depth and recomputation bite.
    assert infeasible >= 0.02 * len(seeds)
    assert nested >= 0.6 * len(seeds)
    assert memory_bound >= 0.2 * len(seeds)
    assert several >= 0.4 * len(seeds)
    assert recomputed > 0


def test_graphpipe_equals_brute_force_on_500_random_graphs() -> None:
    assert_equal_to_oracle(range(500))


@pytest.mark.long
def test_graphpipe_equals_brute_force_on_10000_random_graphs() -> None:
    assert_equal_to_oracle(range(1000, 11000))


@pytest.mark.long
def test_graphpipe_equals_brute_force_on_larger_graphs() -> None:
    assert_equal_to_oracle(range(20_000, 20_400), max_ops=10)


def test_all_convex_stage_graphs_bound_the_class_from_below() -> None:
    lost = 0
    for seed in range(120):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=7)
        inside, convex = oracle(case), oracle(case, any_convex=True)
        assert convex.bottleneck_s <= inside.bottleneck_s
        lost += convex.bottleneck_s < inside.bottleneck_s * (1 - REL)
    assert lost > 0, "no graph where a stage across branches helps: the class test is vacuous"


def test_in_flight_counts_decide_what_fits() -> None:
    """With twice the samples in flight, some plans that fit would not: they are in the check."""
    fits = 0
    for seed in range(80):
        case = build_case(RandomChooser(random.Random(seed)))
        found = planned(case)
        if found is None or found.depth < 2:
            continue
        limit = case.cluster.devices[0].type.memory_bytes
        fits += any(
            stage.state_bytes + stage.activation_bytes_at(2 * stage.in_flight) > limit
            for stage in found.stages
        )
    assert fits >= 5


def test_spp_equals_graphpipe_on_chains_and_never_beats_convex() -> None:
    for seed in range(60):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=6)
        sequential = planned(case, "spp")
        if sequential is None:
            continue
        convex = oracle(case, any_convex=True).bottleneck_s
        assert sequential.bottleneck_s >= convex * (1 - REL)
