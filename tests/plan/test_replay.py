"""Longest paths: replay and event kernel against an oracle that shares nothing with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan.longest_path import makespan_s
from plan.plans import chain, flat_cluster, nodes_cluster, random_plans, stage_plan
from weft.cluster.cluster import Link
from weft.plan import replay as replay_module
from weft.plan.communicate import insert_communication
from weft.plan.deadlock import check_deadlock
from weft.plan.lower import lower
from weft.plan.replay import replay, step_time_s
from weft.plan.replicas import merge_replicas
from weft.plan.schedule import ScheduleError, parse_schedule
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan
from weft.sim.stage_executor import simulate


@settings(max_examples=120, deadline=None)
@given(random_plans())
def test_every_plan_is_deadlock_free_and_takes_exactly_its_longest_path(plan: TrainPlan) -> None:
    schedule = generate(plan)
    check_deadlock(schedule)
    expected = makespan_s(plan, schedule)
    assert step_time_s(plan, schedule) == expected
    assert step_time_s(plan) == expected
    assert simulate(plan, schedule, contention=False).step_time_s == expected
    assert step_time_s(plan, insert_communication(schedule)) == expected
    assert simulate(plan, schedule).step_time_s >= expected


@settings(max_examples=40, deadline=None)
@given(random_plans(replicas=False))
def test_gpipe_and_zero_bubble_agree_with_the_kernel(plan: TrainPlan) -> None:
    for name in ("gpipe", "zero-bubble"):
        schedule = generate(plan, name)
        check_deadlock(schedule)
        assert step_time_s(plan, schedule) == simulate(plan, schedule, contention=False).step_time_s


@settings(max_examples=60, deadline=None)
@given(random_plans())
def test_both_replays_give_equal_times(plan: TrainPlan) -> None:
    tasks = lower(plan, generate(plan))
    out = replay_module._Outgoing.of(tasks)
    waves, num_waves = replay_module._run_waves(tasks, out)
    loop, num_loop = replay_module._run_loop(tasks, out)
    assert num_waves == num_loop == tasks.num_tasks
    np.testing.assert_array_equal(waves, loop)


def test_replay_starts_agree_with_the_kernel_action_by_action() -> None:
    link = Link(bandwidth_bytes_per_s=7.0, latency_s=0.1)
    plan = stage_plan(
        [(0, 2), (1, 2), (2, 3), (0, 3)],
        4,
        batch_size=12,
        forward_s=[0.7, 0.3, 1.1, 0.9],
        micro_batch=2,
        dp=[2, 1, 2, 1],
        cluster=nodes_cluster([3, 3], link, Link(bandwidth_bytes_per_s=3.0, latency_s=0.2)),
    )
    tasks = lower(plan, generate(plan))
    timeline = simulate(plan, contention=False)
    np.testing.assert_array_equal(replay(tasks).start_s[: tasks.num_actions], timeline.start_s)


def test_a_chain_with_latency_takes_its_closed_form() -> None:
    plan = chain(3, 1, cluster=flat_cluster(3, Link(bandwidth_bytes_per_s=2.0, latency_s=0.25)))
    # F F F B B B, and four messages of one byte: 0.25 + 0.5 each.
    assert step_time_s(plan) == 6 + 4 * 0.75


def test_asynchronous_step_time_has_no_bubble() -> None:
    assert step_time_s(chain(4, 8, backward_s=2.0, schedule="2bw")) == 8 * 3


@pytest.mark.parametrize("num_stages", [3, 40])
def test_replay_refuses_a_schedule_that_cannot_finish(num_stages: int) -> None:
    schedule = generate(chain(num_stages, 4))
    text = schedule.to_text()
    # Device 0 waits for a gradient before it forwards what device 1 wants first.
    line = f"body 0: {schedule.body[0]}"
    swapped = line.replace("0F1 ", "", 1).replace("0B0 ", "0B0 0F1 ", 1)
    last = f"body {num_stages - 1}: {schedule.body[-1]}"
    late = last.replace(f"{num_stages - 1}B0 ", "", 1).replace(
        f"{num_stages - 1}F1 ", f"{num_stages - 1}F1 {num_stages - 1}B0 ", 1
    )
    hung = parse_schedule(text.replace(line, swapped).replace(last, late))
    with pytest.raises(ScheduleError, match="cannot finish"):
        step_time_s(chain(num_stages, 4), hung)
    with pytest.raises(ScheduleError, match="cannot finish"):
        simulate(chain(num_stages, 4), hung)


def test_equal_replicas_are_replayed_once_and_unequal_ones_bound_the_time() -> None:
    link = Link(bandwidth_bytes_per_s=50.0, latency_s=0.1)
    equal = stage_plan(
        [(0, 1)], 2, batch_size=32, micro_batch=8, dp=[4, 4], cluster=flat_cluster(8, link)
    )
    merged = merge_replicas(equal)
    assert merged is not None
    assert merged.is_exact
    assert merged.plan.used_devices == (0, 4)
    assert step_time_s(equal) == step_time_s(equal, generate(equal))
    mixed = equal.replace(
        cluster=nodes_cluster([5, 3], link, Link(bandwidth_bytes_per_s=5.0, latency_s=0.5))
    )
    unequal = merge_replicas(mixed)
    assert unequal is not None
    assert not unequal.is_exact
    bound_s = replay(
        lower(unequal.plan, generate(unequal.plan), edge_delays_s=unequal.delays_s)
    ).makespan_s
    assert bound_s >= step_time_s(mixed)
    assert merge_replicas(chain(4, 2, devices=[(0,), (1,), (0,), (1,)])) is None


def test_replicas_with_parts_of_a_micro_batch_wait_for_their_part_of_an_edge_of_no_bytes() -> None:
    plan = stage_plan(
        [(0, 1), (1, 2)],
        3,
        batch_size=12,
        micro_batch=[6, 12, 6],
        dp=[1, 2, 1],
        forward_s=[1.0, 0.0, 0.0],
        backward_s=[0.0, 0.0, 1.0],
        edge_bytes=0,
        frozen=[0],
    )
    merged = merge_replicas(plan)
    assert merged is not None
    assert not merged.is_exact
    assert step_time_s(plan) == step_time_s(plan, generate(plan)) == 3.0


@settings(max_examples=25, deadline=None)
@given(random_plans(mixed=False, replicas=False), st.integers(330, 700))
def test_many_micro_batches_are_extrapolated_to_rounding(plan: TrainPlan, count: int) -> None:
    size = plan.micro_batch
    long = plan.replace(batch_size=size * count)
    exact_s = step_time_s(long, generate(long))
    assert step_time_s(long) == pytest.approx(exact_s, rel=1e-8)


def test_extrapolation_happens_and_is_close() -> None:
    plan = chain(6, 4000, forward_s=[0.7, 0.9, 1.0, 0.8, 1.1, 0.6], backward_s=1.5)
    merged = merge_replicas(plan)
    assert merged is not None
    found_s = replay_module._extrapolated_step_s(merged)
    assert found_s == pytest.approx(step_time_s(plan, generate(plan)), rel=1e-12)
    short = merge_replicas(chain(6, 100))
    assert short is not None
    assert replay_module._extrapolated_step_s(short) is None
