"""The validator names stage and operator for everything that can be wrong with a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from plan.graphs import ToyCost, toy_cluster
from plan.models import chain, towers, with_memory
from weft.cluster.cluster import Link
from weft.plan.api import plan
from weft.plan.diff import diff
from weft.plan.train_plan import PlanError, StageEdge, TrainPlan
from weft.plan.validate import validate_plan

GRAPH = chain(6)
CLUSTER = toy_cluster(4)


def planned(**options: Any) -> TrainPlan:
    options = {"batch_size": 8, "objective": "bottleneck", "micro_batches": (2,)} | options
    return plan(GRAPH, CLUSTER, cost=ToyCost(), **options)


PLAN = planned()


def with_stage(number: int, **changes: Any) -> TrainPlan:
    stages = list(PLAN.stages)
    stages[number] = replace(stages[number], **changes)
    return PLAN.replace(stages=tuple(stages))


def test_a_sound_plan_comes_back() -> None:
    assert PLAN.num_stages > 1
    assert validate_plan(PLAN, GRAPH, CLUSTER) is PLAN
    assert (
        validate_plan(PLAN, replace(GRAPH, name="other name"), replace(CLUSTER, name="x")) is PLAN
    )


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda: PLAN.replace(stages=()), "no stages"),
        (lambda: with_stage(1, index=5), "stage 1 is numbered 5"),
        (lambda: with_stage(1, ops=()), "stage 1 has no operators"),
        (lambda: with_stage(1, devices=()), "stage 1 has no devices"),
        (lambda: with_stage(1, devices=(0, 0)), "stage 1 lists a device twice"),
        (lambda: with_stage(1, devices=(9,)), "stage 1 runs on device 9"),
        (lambda: with_stage(1, axes={"dp": 7}), "7 devices"),
        (lambda: with_stage(1, micro_batch=3), "stage 1 has micro-batches of 3"),
        (lambda: with_stage(0, forward_s={1: 1.0}), "stage 0 has no forward_s"),
        (lambda: with_stage(0, in_flight=0), "stage 0 holds 0 samples"),
        (
            lambda: PLAN.replace(edges=(*PLAN.edges, StageEdge(source=0, target=0))),
            "stage 0 has an edge to itself",
        ),
        (lambda: PLAN.replace(edges=(*PLAN.edges, PLAN.edges[0])), "listed twice"),
        (
            lambda: PLAN.replace(edges=(*PLAN.edges, StageEdge(source=0, target=99))),
            "names stage 99",
        ),
        (
            lambda: PLAN.replace(edges=(*PLAN.edges, StageEdge(source=1, target=0))),
            "cycle through stages",
        ),
        (lambda: PLAN.replace(cluster=with_memory(CLUSTER, 5)), r"device \d+, which has 5"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    broken: Callable[[], TrainPlan], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        validate_plan(broken())


def test_stages_must_partition_the_graph() -> None:
    first, second = PLAN.stages[0].ops, PLAN.stages[1].ops
    with pytest.raises(PlanError, match=rf"{first[-1]!r} is in no stage"):
        validate_plan(with_stage(0, ops=first[:-1]), GRAPH)
    with pytest.raises(PlanError, match=rf"{first[0]!r} is in stages 0 and 1"):
        validate_plan(with_stage(1, ops=(*second, first[0])), GRAPH)
    with pytest.raises(PlanError, match="'stranger', which the graph has not"):
        validate_plan(with_stage(1, ops=(*second, "stranger")), GRAPH)
    with pytest.raises(PlanError, match="there is no edge between the stages"):
        validate_plan(PLAN.replace(edges=PLAN.edges[1:]), GRAPH)


def test_a_stage_that_is_left_and_entered_again_is_refused() -> None:
    stages = list(PLAN.stages)
    # The first stage takes the last operator: everything else lies between.
    last = stages[-1].ops[-1]
    stages[0] = replace(stages[0], ops=(*stages[0].ops, last))
    stages[-1] = replace(stages[-1], ops=stages[-1].ops[:-1])
    extra = StageEdge(source=len(stages) - 1, target=0)
    broken = PLAN.replace(stages=tuple(stages), edges=(*PLAN.edges, extra))
    with pytest.raises(PlanError, match=r"cycle|not convex"):
        validate_plan(broken, GRAPH)


def test_a_plan_for_another_graph_is_refused_with_the_first_difference() -> None:
    with pytest.raises(PlanError, match=rf"{PLAN.graph_digest}.*operator 'layers\.6:0' is in no"):
        validate_plan(PLAN, chain(7))
    with pytest.raises(PlanError, match=r"operator 'embedding:0' of stage 0 is not in the graph"):
        validate_plan(PLAN, towers(2, 2))
    heavier = replace(GRAPH, ops=tuple(replace(op, flops_forward=9.0) for op in GRAPH.ops))
    with pytest.raises(PlanError, match="their costs, parameters or edges differ"):
        validate_plan(PLAN, heavier)


def test_a_plan_for_another_cluster_is_refused_with_the_first_difference() -> None:
    with pytest.raises(PlanError, match=r"nodes has 2 entries in the plan, 3 in the given one"):
        validate_plan(PLAN, GRAPH, toy_cluster(6))
    with pytest.raises(PlanError, match="memory_bytes is 1000000000 in the plan, 77 in"):
        validate_plan(PLAN, GRAPH, with_memory(CLUSTER, 77))
    slower = replace(CLUSTER, inter=Link(bandwidth_bytes_per_s=1.0, latency_s=1e-4))
    with pytest.raises(PlanError, match=r"inter\.bandwidth_bytes_per_s is 10000\.0 in the plan"):
        validate_plan(PLAN, GRAPH, slower)


def test_a_difference_between_plans_is_said_by_stages() -> None:
    assert diff(PLAN, PLAN) == ""
    other = with_stage(0, in_flight=PLAN.stages[0].in_flight + 2)
    (line,) = diff(PLAN, other).splitlines()
    before = PLAN.stages[0].in_flight
    assert f"in_flight {before} -> {before + 2}" in line
    assert "embedding:0" in line
    single = planned(method="data-parallel", micro_batches=(8,))
    text = diff(PLAN, single)
    assert "method: graphpipe -> data-parallel" in text
    assert f"num_stages: {PLAN.num_stages} -> 1" in text
    assert text.count("\n- stage") == PLAN.num_stages
    assert text.count("\n+ stage") == 1
