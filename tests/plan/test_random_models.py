"""Every plan of a random model: valid, free of deadlock, and as long as its longest path."""

from __future__ import annotations

from hypothesis import event, given, settings

from plan.graphs import RandomGraph, ToyCost, random_graphs, toy_cluster
from plan.longest_path import makespan_s
from weft.cost.training import TrainingSpec
from weft.plan.api import plan
from weft.plan.deadlock import check_deadlock
from weft.plan.replay import step_time_s
from weft.plan.schedules import generate
from weft.plan.validate import validate_plan
from weft.sim.stage_executor import simulate


@settings(max_examples=60, deadline=None)
@given(random_graphs())
def test_plans_of_random_models_hold_in_every_respect(model: RandomGraph) -> None:
    event(f"nested {model.is_nested}")
    event(f"skips {model.has_skips}")
    event(f"series-parallel {model.is_series_parallel}")
    cluster = toy_cluster(4)
    for method, objective in (("graphpipe", "bottleneck"), ("spp", "bottleneck")):
        found = plan(
            model.graph,
            cluster,
            batch_size=12,
            method=method,
            objective=objective,
            training=TrainingSpec(state_bytes_per_param=8.0),
            cost=ToyCost(),
        )
        validate_plan(found, model.graph, cluster)
        schedule = generate(found)
        check_deadlock(schedule)
        expected = makespan_s(found, schedule)
        assert step_time_s(found) == expected
        timeline = simulate(found, schedule, contention=False)
        assert timeline.step_time_s == expected
        assert timeline.peak_memory_bytes <= found.peak_memory_bytes
