"""What the simulated executor adds to longest paths: links, memory, all-reduce, bubbles."""

from __future__ import annotations

import numpy as np
import pytest

from plan.plans import chain, flat_cluster, nodes_cluster, stage_plan
from weft.cluster.cluster import Link
from weft.plan.action import Action, ActionKind
from weft.plan.executor import Bubble, Fill, StageExecutor, UnsupportedActionError
from weft.plan.program import Program
from weft.plan.schedule import parse_schedule
from weft.plan.schedules import generate
from weft.sim.stage_executor import SimulatedStageExecutor, simulate
from weft.sim.timeline import Timeline

SLOW = Link(bandwidth_bytes_per_s=1.0, latency_s=0.25)


def fan_in(nic_shared: bool = True, sizes: tuple[int, ...] = (2, 1)) -> Timeline:
    """Two equal stages finish together and both send 4 bytes to a third."""
    plan = stage_plan(
        [(0, 2), (1, 2)],
        3,
        batch_size=1,
        cluster=nodes_cluster(sizes, SLOW, SLOW, nic_shared=nic_shared),
        edge_bytes=4,
    )
    return simulate(plan)


def test_messages_of_a_node_queue_at_its_network_card() -> None:
    shared = fan_in()
    forward = ~shared.messages.backward
    assert shared.message_start_s[forward].tolist() == [1.0, 5.0]
    assert shared.message_arrival_s[forward].tolist() == [5.25, 9.25]
    separate = fan_in(nic_shared=False)
    # Each sender has a card of its own, but the receiver's one card takes them in turn.
    assert separate.message_start_s[~separate.messages.backward].tolist() == [1.0, 1.0]
    assert separate.message_arrival_s[~separate.messages.backward].tolist() == [5.25, 9.25]


def test_a_receiving_network_card_is_shared_too() -> None:
    apart = fan_in(sizes=(1, 1, 1))
    forward = ~apart.messages.backward
    assert apart.message_start_s[forward].tolist() == [1.0, 1.0]
    assert apart.message_arrival_s[forward].tolist() == [5.25, 9.25]


def test_links_inside_a_node_belong_to_their_pair() -> None:
    inside = fan_in(sizes=(3,))
    assert inside.message_arrival_s[~inside.messages.backward].tolist() == [5.25, 5.25]


def test_ties_are_served_by_stage_then_micro_batch() -> None:
    plan = stage_plan(
        [(0, 2), (1, 2)],
        3,
        batch_size=1,
        devices=[(1,), (0,), (2,)],
        cluster=nodes_cluster([2, 1], SLOW, SLOW),
        edge_bytes=4,
    )
    timeline = simulate(plan)
    forward = timeline.messages.take(~timeline.messages.backward)
    order = np.argsort(timeline.message_start_s[~timeline.messages.backward])
    assert forward.sender_stage[order].tolist() == [0, 1]
    assert forward.sender[order].tolist() == [1, 0]


def test_directions_do_not_share_a_link() -> None:
    plan = chain(2, 2, cluster=flat_cluster(2, SLOW), edge_bytes=3, backward_s=2.0)
    timeline = simulate(plan)
    backward = timeline.messages.backward
    # F0 at 1 arrives 4.25; F1 ends at 2 but waits for the link until 4, arrives 7.25.
    assert timeline.message_arrival_s[~backward].tolist() == [4.25, 7.25]
    # B0 ends at 7.25 and leaves at once, although the other direction has just been busy.
    assert timeline.message_start_s[backward].tolist()[0] == 7.25


def test_without_overlap_a_device_waits_until_its_output_has_left() -> None:
    plan = chain(2, 2, cluster=flat_cluster(2, SLOW), edge_bytes=3)
    starts = [
        simulate(plan, overlap=overlap).start_s[simulate(plan).device == 0][:2].tolist()
        for overlap in (True, False)
    ]
    assert starts == [[0.0, 1.0], [0.0, 4.0]]


def test_all_reduce_starts_when_the_last_replica_is_done() -> None:
    inter = Link(bandwidth_bytes_per_s=1.0, latency_s=2.0)
    plan = stage_plan(
        [(0, 1)],
        2,
        batch_size=4,
        micro_batch=2,
        dp=[1, 2],
        cluster=nodes_cluster([2, 1], Link(bandwidth_bytes_per_s=1e9), inter),
        edge_bytes=1,
        all_reduce_s=5.0,
    )
    timeline = simulate(plan)
    reduces = (
        timeline.actions.kind == Program.of([Action(kind=ActionKind.REDUCE_GRAD, stage=1)]).kind[0]
    )
    starts = timeline.start_s[reduces]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    last_end = [timeline.end_s[(timeline.device == d) & ~reduces][:4].max() for d in (1, 2)]
    assert starts[0] == max(last_end) > min(last_end)
    assert timeline.end_s[reduces][0] - starts[0] == 5.0


def test_memory_rises_and_falls_with_what_is_held() -> None:
    plan = chain(3, 4, saved_bytes=7, state_bytes=100)
    curve = simulate(plan).memory
    assert [curve.peak_bytes(d) for d in range(3)] == [100 + 7 * n for n in (3, 2, 1)]
    assert curve.used_at(0, 0.5) == 107
    assert curve.used_at(0, 2.5) == 121
    assert curve.used_at(0, 1e9) == 100
    assert simulate(plan).peak_memory_bytes == plan.peak_memory_bytes


def test_recomputing_stages_hold_inputs_and_one_micro_batch() -> None:
    base = chain(2, 6, saved_bytes=50, state_bytes=10, in_flight=[4, 2])
    stages = tuple(
        stage.__class__(
            **{
                **{f: getattr(stage, f) for f in stage.__dataclass_fields__},
                "recompute": True,
                "input_bytes_per_sample": 3,
            }
        )
        for stage in base.stages
    )
    plan = base.replace(stages=stages)
    assert simulate(plan).peak_memory_by_device == {0: 10 + 4 * 3 + 50, 1: 10 + 2 * 3 + 50}
    assert dict(plan.memory_bytes) == simulate(plan).peak_memory_by_device


def test_devices_over_their_memory_are_named() -> None:
    plan = chain(3, 4, saved_bytes=10, cluster=flat_cluster(3, memory_bytes=25))
    assert simulate(plan).devices_over_capacity == (0,)


def test_bubbles_are_offered_with_deadline_and_free_bytes() -> None:
    plan = chain(3, 3, saved_bytes=10, cluster=flat_cluster(3, memory_bytes=100))
    text = generate(plan).to_text().replace("2F0", "2BUBBLE 2F0").replace("0F2", "0F2 0BUBBLE")
    seen: list[Bubble] = []

    def fill(bubble: Bubble) -> Fill | None:
        seen.append(bubble)
        return Fill(job="ft", duration_s=bubble.deadline_s - bubble.start_s)

    plain = simulate(plan)
    filled = simulate(plan, parse_schedule(text), on_bubble=fill)
    assert filled.step_time_s == plain.step_time_s
    by_device = {bubble.device: bubble for bubble in seen}
    assert (by_device[2].start_s, by_device[2].deadline_s, by_device[2].free_bytes) == (0, 2, 100)
    assert (by_device[0].start_s, by_device[0].deadline_s, by_device[0].free_bytes) == (3, 5, 70)
    assert filled.jobs == ("train", "ft")
    rows = filled.job == 1
    assert sorted((filled.end_s - filled.start_s)[rows].tolist()) == [2.0, 2.0]
    assert filled.bubble_fraction == plain.bubble_fraction


def test_a_fill_that_overruns_delays_the_training() -> None:
    plan = chain(2, 2)
    text = generate(plan).to_text().replace("1F0", "1BUBBLE 1F0")
    late = simulate(
        plan, parse_schedule(text), on_bubble=lambda b: Fill(job="ft", duration_s=b.deadline_s + 1)
    )
    assert late.step_time_s == simulate(plan).step_time_s + 1
    nothing = simulate(plan, parse_schedule(text), on_bubble=lambda b: None)
    assert nothing.step_time_s == simulate(plan).step_time_s


def test_kinds_that_the_simulator_lacks_are_refused_by_name() -> None:
    plan = chain(2, 2)
    text = generate(plan).to_text().replace("0STEP", "0RESHARD 0UNSHARD 0STEP")
    with pytest.raises(
        UnsupportedActionError, match=r"RESHARD, UNSHARD, which the simulator lacks"
    ):
        simulate(plan, parse_schedule(text))
    executor: StageExecutor[Timeline] = SimulatedStageExecutor(plan=plan)
    assert ActionKind.TRANSMIT not in executor.supported_kinds


def test_explicit_recompute_takes_its_part_of_the_backward() -> None:
    base = chain(1, 2, forward_s=1.0, backward_s=3.0)
    stage = base.stages[0]
    fields = {f: getattr(stage, f) for f in stage.__dataclass_fields__}
    plan = base.replace(stages=(stage.__class__(**{**fields, "recompute": True}),))
    text = generate(plan).to_text().replace("0B0", "0RECOMPUTE0 0B0")
    assert simulate(plan).step_time_s == 8.0
    explicit = simulate(plan, parse_schedule(text.replace("0B1", "0RECOMPUTE1 0B1")))
    assert explicit.step_time_s == 8.0
    assert explicit.seconds_by_kind[ActionKind.RECOMPUTE] == 2.0


def test_the_critical_path_explains_the_step_time() -> None:
    plan = stage_plan(
        [(0, 1), (0, 2), (1, 3), (2, 3)],
        4,
        batch_size=6,
        forward_s=[1.0, 5.0, 1.0, 1.0],
        cluster=nodes_cluster([2, 2], SLOW, SLOW),
    )
    timeline = simulate(plan)
    rows = timeline.critical_rows
    assert timeline.start_s[rows[0]] == 0.0
    assert timeline.end_s[rows[-1]] == timeline.makespan_s
    assert (np.diff(timeline.start_s[rows]) >= 0).all()
    share = np.bincount(
        timeline.actions.stage[rows], weights=(timeline.end_s - timeline.start_s)[rows]
    )
    assert int(np.argmax(share)) == 1
