"""Plans at other prices."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from plan.graphs import RandomChooser, ToyCost, build_graph, toy_cluster
from plan.plans import flat_cluster, stage_plan
from weft.cluster.cluster import Cluster, Link
from weft.cost.model import OpCost, Parallel
from weft.cost.training import TrainingSpec
from weft.graph.graph import Graph, Op
from weft.plan.api import plan
from weft.plan.reprice import on_cluster, reprice
from weft.plan.train_plan import PlanError, TrainPlan


class TwiceAsSlow(ToyCost):
    """Every operator takes twice its time."""

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: object
    ) -> OpCost:
        once = ToyCost().op_cost(op, local_samples, parallel, device_type)  # type: ignore[arg-type]
        return OpCost(forward_s=2 * once.forward_s, backward_s=2 * once.backward_s)


def planned(seed: int, method: str = "graphpipe") -> tuple[Graph, Cluster, TrainPlan]:
    graph = build_graph(RandomChooser(random.Random(seed)), max_ops=10, min_ops=6).graph
    cluster = toy_cluster(4)
    found = plan(
        graph,
        cluster,
        batch_size=8,
        method=method,
        objective="bottleneck",
        training=TrainingSpec(state_bytes_per_param=8.0),
        cost=ToyCost(),
    )
    return graph, cluster, found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", ["graphpipe", "spp"])
def test_the_same_prices_give_the_same_plan(seed: int, method: str) -> None:
    graph, cluster, found = planned(seed, method)
    again = reprice(found, graph, ToyCost(), cluster)
    assert again.stages == found.stages
    assert again.edges == found.edges
    assert again.bottleneck_s == pytest.approx(found.bottleneck_s, rel=1e-12)


def test_other_costs_change_times_and_nothing_else() -> None:
    graph, cluster, found = planned(3)
    slow = reprice(found, graph, TwiceAsSlow(), cluster)
    for before, after in zip(found.stages, slow.stages, strict=True):
        assert after.micro_batch_s == pytest.approx(2 * before.micro_batch_s)
        assert after.ops == before.ops
        assert after.in_flight == before.in_flight
        assert after.memory_bytes == before.memory_bytes


def test_another_graph_is_refused_with_both_digests() -> None:
    graph, cluster, found = planned(1)
    other, _, _ = planned(2)
    with pytest.raises(PlanError, match=found.graph_digest[:12]):
        reprice(found, other, ToyCost(), cluster)
    assert graph.digest == found.graph_digest


def test_another_cluster_reprices_all_reduces_and_keeps_compute() -> None:
    fast = flat_cluster(2, Link(bandwidth_bytes_per_s=1e9))
    base = stage_plan([], 1, batch_size=4, micro_batch=2, dp=[2], cluster=fast)
    stage = replace(base.stages[0], gradient_bytes=1000, all_reduce_s=123.0)
    slow = flat_cluster(2, Link(bandwidth_bytes_per_s=100.0, latency_s=0.5))
    moved = on_cluster(base.replace(stages=(stage,)), slow)
    # A ring of two: 2 (n - 1) steps of half the bytes.
    assert moved.stages[0].all_reduce_s == 2 * (0.5 + 500 / 100.0)
    assert moved.stages[0].forward_s == stage.forward_s
