"""Samples in flight: the rule is minimal, and repaired plans come close to unlimited buffers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from plan.plans import chain, flat_cluster, stage_plan
from plan.unlimited import unlimited_s
from weft.cluster.cluster import Link
from weft.plan.deadlock import check_deadlock
from weft.plan.replay import step_time_s
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan
from weft.sim.repair import repair_in_flight
from weft.sim.stage_executor import simulate

SHAPES = {
    "chain": [(0, 1), (1, 2), (2, 3)],
    "join": [(0, 3), (1, 3), (2, 3)],
    "fork": [(0, 1), (0, 2), (0, 3)],
    "diamond": [(0, 1), (0, 2), (1, 3), (2, 3)],
    "skip": [(0, 1), (1, 2), (2, 3), (0, 3)],
    "branches": [(0, 1), (1, 4), (2, 3), (3, 4), (4, 5)],
}


def lowered(plan: TrainPlan, index: int) -> TrainPlan:
    stages = list(plan.stages)
    stage = stages[index]
    stages[index] = replace(stage, in_flight=stage.in_flight - stage.micro_batch)
    return plan.replace(stages=tuple(stages))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tf", "tb"), [(1.0, 1.0), (1.0, 2.0)])
def test_the_rule_loses_nothing_and_one_less_loses_throughput(
    shape: str, tf: float, tb: float
) -> None:
    arcs = SHAPES[shape]
    num_stages = 1 + max(b for _, b in arcs)
    plan = stage_plan(arcs, num_stages, batch_size=32, forward_s=tf, backward_s=tb)
    best_s = unlimited_s(plan)
    assert step_time_s(plan) == best_s
    for stage in plan.stages:
        if stage.in_flight > 1:
            assert step_time_s(lowered(plan, stage.index)) > 1.2 * best_s


def test_the_artifacts_plans_hold_what_the_rule_says() -> None:
    """CANDLE-Uno of the sheet §3.2: depth 3 instead of 6, at b = 64."""
    joined = [(1, 0), (2, 0), (3, 0), (4, 0), (0, 5)]
    plan = stage_plan(joined, 6, batch_size=1024, micro_batch=64)
    assert [stage.in_flight for stage in plan.stages] == [128, 192, 192, 192, 192, 64]
    row = chain(6, 1024, micro_batch=64)
    assert [stage.in_flight for stage in row.stages] == [384, 320, 256, 192, 128, 64]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delay", [0.1, 0.35, 0.8])
def test_repaired_plans_hide_communication(shape: str, delay: float) -> None:
    arcs = SHAPES[shape]
    num_stages = 1 + max(b for _, b in arcs)
    link = Link(bandwidth_bytes_per_s=1e12, latency_s=delay)
    plan = stage_plan(
        arcs, num_stages, batch_size=32, backward_s=2.0, cluster=flat_cluster(num_stages, link)
    )
    repaired = repair_in_flight(plan)
    assert repaired.step_time_s <= 1.02 * unlimited_s(plan)
    assert repaired.step_time_s == simulate(repaired.plan, contention=False).step_time_s
    assert repaired.step_time_before_s == step_time_s(plan)
    assert set(repaired.raised.values()) <= set(range(1, 33))
    if delay == 0.8 and shape == "chain":
        assert repaired.step_time_s < 0.9 * repaired.step_time_before_s
    # Nothing that it holds is useless.
    for index in repaired.raised:
        less = lowered(repaired.plan, index)
        starved = any(
            less.stages[index].in_flight < plan_stage.in_flight
            for plan_stage in (repaired.plan.stages[s] for s in plan.successors[index])
        )
        assert starved or step_time_s(less) > repaired.step_time_s


@pytest.mark.parametrize("seed", range(12))
def test_repaired_plans_mix_micro_batch_sizes(seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice(sorted(SHAPES))
    arcs = SHAPES[shape]
    num_stages = 1 + max(b for _, b in arcs)
    sizes = [rng.choice((1, 2, 4)) for _ in range(num_stages)]
    plan = stage_plan(
        arcs,
        num_stages,
        batch_size=64,
        micro_batch=sizes,
        forward_s=[float(size) for size in sizes],
        backward_s=[float(size) for size in sizes],
        cluster=flat_cluster(num_stages, Link(bandwidth_bytes_per_s=1e12, latency_s=0.2)),
    )
    assert repair_in_flight(plan).step_time_s <= 1.02 * unlimited_s(plan)


def test_repair_stops_at_the_memory() -> None:
    link = Link(bandwidth_bytes_per_s=1e12, latency_s=0.8)
    plan = chain(4, 32, saved_bytes=10, cluster=flat_cluster(4, link, memory_bytes=50))
    free = chain(4, 32, saved_bytes=10, cluster=flat_cluster(4, link))
    bound = repair_in_flight(plan)
    assert max(stage.in_flight for stage in bound.plan.stages) == 5
    assert bound.plan.peak_memory_bytes <= 50
    assert repair_in_flight(free).step_time_s < bound.step_time_s < bound.step_time_before_s


def test_repair_under_contention_simulates_the_network() -> None:
    link = Link(bandwidth_bytes_per_s=2.0, latency_s=0.5)
    plan = chain(3, 24, cluster=flat_cluster(3, link))
    repaired = repair_in_flight(plan, contention=True)
    assert repaired.step_time_s == simulate(repaired.plan).step_time_s
    assert repaired.step_time_s <= simulate(plan).step_time_s


@pytest.mark.parametrize("seed", range(6))
def test_repair_of_unbalanced_stages_never_asks_for_a_deadlock(seed: int) -> None:
    rng = random.Random(seed)
    arcs = SHAPES["branches"]
    plan = stage_plan(
        arcs,
        6,
        batch_size=16,
        forward_s=[rng.uniform(0.1, 2.0) for _ in range(6)],
        backward_s=[rng.uniform(0.1, 2.0) for _ in range(6)],
        cluster=flat_cluster(6, Link(bandwidth_bytes_per_s=1e12, latency_s=1.5)),
    )
    repaired = repair_in_flight(plan, contention=bool(seed % 2))
    assert repaired.step_time_s <= repaired.step_time_before_s
    check_deadlock(generate(repaired.plan))
