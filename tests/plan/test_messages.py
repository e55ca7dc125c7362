"""Messages against the owner of every single sample."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings

from plan.longest_path import owner
from plan.plans import random_plans, stage_plan
from weft.plan.communicate import insert_communication
from weft.plan.messages import messages
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan


@settings(max_examples=100, deadline=None)
@given(random_plans())
def test_every_sample_goes_from_its_owner_to_its_owner_once(plan: TrainPlan) -> None:
    table = messages(generate(plan))
    seen: Counter[tuple[bool, int, int, int]] = Counter()
    for message in table:
        assert message.num_samples > 0
        edge = plan.edge_by_pair[
            (message.receiver_stage, message.sender_stage)
            if message.backward
            else (message.sender_stage, message.receiver_stage)
        ]
        per_sample = (
            edge.backward_bytes_per_sample if message.backward else edge.forward_bytes_per_sample
        )
        assert message.num_bytes == per_sample * message.num_samples
        for sample in range(message.first_sample, message.first_sample + message.num_samples):
            sender, receiver = (
                plan.stages[message.sender_stage],
                plan.stages[message.receiver_stage],
            )
            assert owner(sender, sample) == (message.sender, message.sender_micro_batch)
            assert owner(receiver, sample) == (message.receiver, message.receiver_micro_batch)
            seen[message.backward, message.sender_stage, message.receiver_stage, sample] += 1
    expected = {
        (backward, *((e.target, e.source) if backward else (e.source, e.target)), sample)
        for e in plan.edges
        for backward in (False, True)
        if (e.backward_bytes_per_sample if backward else e.forward_bytes_per_sample)
        for sample in range(plan.batch_size)
    }
    assert set(seen) == expected
    assert set(seen.values()) <= {1}


def test_different_degrees_and_micro_batches_cut_samples_at_every_border() -> None:
    plan = stage_plan([(0, 1)], 2, batch_size=12, micro_batch=[6, 12], dp=[3, 2], edge_bytes=10)
    forward = [m for m in messages(generate(plan)) if not m.backward]
    found = [(m.sender, m.receiver, m.first_sample, m.num_samples) for m in forward]
    assert found == [
        (0, 3, 0, 2), (1, 3, 2, 2), (2, 3, 4, 2), (0, 4, 6, 2), (1, 4, 8, 2), (2, 4, 10, 2),
    ]  # fmt: skip
    assert {m.num_bytes for m in forward} == {20}


def test_receives_follow_the_order_of_their_sends() -> None:
    """A consumer that needs the second message first still receives the first one before it."""
    plan = stage_plan([(0, 2), (1, 2)], 3, batch_size=2, devices=[(0,), (0,), (1,)])
    text = str(insert_communication(generate(plan)).program(1))
    sends = [a for a in str(insert_communication(generate(plan)).program(0)).split() if "SEND" in a]
    receives = [a for a in text.split() if "RECV_F" in a]
    sent = [(a[0], a.split("SEND_F")[1].split(">")[0]) for a in sends]
    received = [(a.split(">")[1], a.split("RECV_F")[1].split(">")[0]) for a in receives]
    assert received == sent


@settings(max_examples=40, deadline=None)
@given(random_plans())
def test_inserting_communication_keeps_the_compute_order(plan: TrainPlan) -> None:
    schedule = generate(plan)
    full = insert_communication(schedule)
    for before, after in zip(schedule.body, full.body, strict=True):
        assert after.of_kinds(before.kinds) == before
    assert insert_communication(full) == full
