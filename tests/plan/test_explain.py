"""What a plan's explanation says, on plans whose limits are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plan.graphs import ToyCost, toy_cluster
from plan.models import chain
from plan.plans import flat_cluster, stage_plan
from weft.cluster.cluster import Link
from weft.plan.api import plan
from weft.plan.explain import Bound, explain
from weft.plan.train_plan import TrainPlan


def pipeline(**options: Any) -> TrainPlan:
    """Two stages in series on two devices, four micro-batches."""
    return stage_plan([(0, 1)], 2, **{"batch_size": 4, "backward_s": 2.0} | options)


def said(plan_: TrainPlan, words: str) -> bool:
    return any(words in sentence for sentence in explain(plan_).sentences)


def test_the_slowest_stage_sets_the_rate() -> None:
    found = explain(pipeline(forward_s=[1.0, 2.0], cluster=flat_cluster(2)))
    assert [report.is_bottleneck for report in found.stages] == [False, True]
    assert [report.compute_s for report in found.stages] == [12.0, 16.0]
    assert [report.num_in_flight for report in found.stages] == [2, 1]
    assert "stage 1 (op1) sets the rate: 16 s of each step on 1 device" in found.sentences[0]
    assert "the mean stage is busy for 88 %" in found.sentences[0]
    balanced = explain(pipeline(cluster=flat_cluster(2)))
    assert "the stages are balanced" in balanced.sentences[0]


def test_compute_binds_where_every_device_works() -> None:
    wide = pipeline(cluster=flat_cluster(2))
    several = wide.replace(
        stages=tuple(replace(stage, ops=(*stage.ops, "more")) for stage in wide.stages)
    )
    assert explain(several).binds == (Bound.COMPUTE,)
    assert said(several, "compute binds: all 2 devices are used")


def test_one_operator_binds_where_no_cut_is_left() -> None:
    assert Bound.OPERATOR in explain(pipeline(cluster=flat_cluster(2))).binds
    assert said(pipeline(cluster=flat_cluster(2)), "one operator binds: op0")


def test_the_batch_binds_where_idle_devices_cannot_divide_it() -> None:
    found = pipeline(cluster=flat_cluster(4))
    assert Bound.BATCH in explain(found).binds
    assert said(found, "2 devices idle, but no degree above 1")
    # With micro-batches of 2 a second replica could join.
    assert Bound.BATCH not in explain(pipeline(micro_batch=2, cluster=flat_cluster(4))).binds


def test_memory_binds_where_no_further_micro_batch_fits() -> None:
    # Stage 0 holds 2 micro-batches of 10 bytes beside 5 of state.
    tight = pipeline(saved_bytes=10, state_bytes=5, cluster=flat_cluster(2, memory_bytes=34))
    found = explain(tight)
    assert Bound.MEMORY in found.binds
    assert said(tight, "25 of 34 bytes, 9 free; 5 are weights with their state, 20 activations")
    assert [(row.device, row.memory_bytes, row.headroom_bytes) for row in found.devices] == [
        (0, 25, 9),
        (1, 15, 19),
    ]
    loose = pipeline(saved_bytes=10, state_bytes=5, cluster=flat_cluster(2, memory_bytes=35))
    assert Bound.MEMORY not in explain(loose).binds


def test_communication_binds_where_messages_take_longer_than_work() -> None:
    slow = flat_cluster(2, Link(bandwidth_bytes_per_s=1.0, latency_s=0.5))
    found = pipeline(edge_bytes=2, cluster=slow)
    # Each stage sends and receives 2 bytes a micro-batch: 4 * 2 * (0.5 + 2) s beside 4 * 3 s.
    assert [report.message_s for report in explain(found).stages] == [20.0, 20.0]
    assert Bound.COMMUNICATION in explain(found).binds
    assert said(found, "20 s of messages a step beside 12 s of compute")
    assert Bound.COMMUNICATION not in explain(pipeline(cluster=flat_cluster(2))).binds


def test_gradient_reduction_is_named_where_it_counts() -> None:
    found = stage_plan([], 1, batch_size=4, micro_batch=2, dp=[2], backward_s=2.0, all_reduce_s=2.0)
    assert said(found, "stage 0 spends 25 % of its time reducing")
    assert said(found, "there is one stage")


def test_depth_is_the_longest_path() -> None:
    arcs = [(0, 3), (1, 3), (2, 3)]
    wide = stage_plan(arcs, 4, batch_size=9, cluster=flat_cluster(4))
    assert said(wide, "4 stages, 2 on the longest path: with 9 micro-batches a step")
    assert said(wide, "take about 10 % of it")


@pytest.mark.parametrize("method", ["graphpipe", "spp", "megatron", "2bw", "data-parallel"])
def test_every_plan_can_be_explained(method: str) -> None:
    found = plan(chain(6, weights=5), toy_cluster(4), batch_size=8, method=method, cost=ToyCost())
    told = explain(found)
    assert len(told.stages) == found.num_stages
    assert [row.device for row in told.devices] == [*found.used_devices]
    assert set(found.notes) <= set(told.sentences)
    assert told.binds or len(found.used_devices) < 4
