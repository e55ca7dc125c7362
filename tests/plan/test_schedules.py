"""Generators against published orders, torch's own code, and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase

from plan.plans import chain, random_plans, stage_plan
from weft.base.errors import UnsupportedError
from weft.plan.action import ActionKind
from weft.plan.compute_index import check_complete
from weft.plan.schedule import Schedule, ScheduleError, parse_schedule
from weft.plan.schedules import SCHEDULES, generate
from weft.plan.train_plan import TrainPlan


class _TorchStage(_PipelineStageBase):
    """As much of a torch stage as its schedules look at when they make their order."""

    def __init__(self, index: int, num_stages: int, num_ranks: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = 0, num_ranks
        self.has_backward, self.submod = True, None  # type: ignore[assignment]

    def _create_grad_recv_info(self, *_: Any) -> Any: ...
    def _prepare_forward_infra(self, *_: Any) -> Any: ...
    def _prepare_backward_infra(self, *_: Any) -> Any: ...


def compute(schedule: Schedule, device: int) -> str:
    kept = schedule.program(device).of_kinds(
        [ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W]
    )
    return str(kept)


def test_1f1b_is_the_published_order() -> None:
    schedule = generate(chain(4, 8), "1f1b")
    assert compute(schedule, 0) == (
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7"
    )
    assert compute(schedule, 2) == (
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7"
    )


def test_gpipe_runs_all_forwards_first() -> None:
    assert compute(generate(chain(2, 3), "gpipe"), 1) == "1F0 1F1 1F2 1B0 1B1 1B2"


def looped(num_ranks: int, chunks: int, num_micro_batches: int) -> TrainPlan:
    devices = [(s % num_ranks,) for s in range(num_ranks * chunks)]
    return chain(num_ranks * chunks, num_micro_batches, devices=devices)


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches", "chunks"),
    [(4, 8, 2), (8, 16, 4), (4, 4, 2), (2, 6, 3), (4, 10, 2), (4, 3, 2), (3, 9, 1)],
)
def test_interleaved_equals_torch(num_ranks: int, num_micro_batches: int, chunks: int) -> None:
    stages = [_TorchStage(c * num_ranks, num_ranks * chunks, num_ranks) for c in range(chunks)]
    torch_order = ScheduleInterleaved1F1B(stages, num_micro_batches).pipeline_order
    schedule = generate(looped(num_ranks, chunks, num_micro_batches), "interleaved")
    for rank in range(num_ranks):
        expected = " ".join(str(action) for action in torch_order[rank] if action is not None)
        assert compute(schedule, rank) == expected


def test_interleaved_refuses_what_torch_refuses() -> None:
    with pytest.raises(ScheduleError, match="do not divide 9 micro-batches; 8 would do"):
        generate(looped(4, 2, 9), "interleaved")
    with pytest.raises(ScheduleError, match="not a chain"):
        generate(stage_plan([(0, 1), (0, 2)], 3, batch_size=4), "interleaved")


def test_kfkb_runs_groups_of_k() -> None:
    plan = chain(2, 8, k=2, in_flight=[4, 2])
    assert compute(generate(plan, "kfkb"), 1) == (
        "1F0 1F1 1B0 1B1 1F2 1F3 1B2 1B3 1F4 1F5 1B4 1B5 1F6 1F7 1B6 1B7"
    )
    assert compute(generate(plan, "kfkb"), 0).startswith("0F0 0F1 0F2 0F3 0B0 0B1 0F4 0F5 0B2")
    with pytest.raises(ScheduleError, match="stage 1 keeps 1 micro-batches in flight"):
        generate(chain(2, 8, k=2, in_flight=[4, 1]), "kfkb")


def test_zero_bubble_splits_every_backward_and_delays_weight_halves() -> None:
    schedule = generate(chain(3, 4), "zero-bubble")
    assert compute(schedule, 0) == "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3"
    assert compute(schedule, 2) == "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3"


@pytest.mark.parametrize(("depth", "num_micro_batches"), [(4, 4), (4, 8), (8, 8), (2, 4)])
def test_2bw_never_uses_a_version_that_is_not_there(depth: int, num_micro_batches: int) -> None:
    """Micro-batch k (from 0) uses version max(k // m - 1, 0), both ways; two versions suffice."""
    plan = chain(depth, num_micro_batches)
    run = generate(plan, "2bw").unrolled(5)
    check_complete(run)
    for program in run.body:
        made, oldest_needed = 0, 0
        for action in program:
            if action.kind is ActionKind.STEP:
                made += 1
            else:
                expected = max(action.micro_batch // num_micro_batches - 1, 0)
                assert action.version == expected <= made
                oldest_needed = max(oldest_needed, action.version)
                assert made - action.version <= 1 or action.version == made - 1
        assert made == 5
        assert oldest_needed == 3


def test_2bw_needs_as_many_micro_batches_as_are_in_flight() -> None:
    with pytest.raises(ScheduleError, match="3 < 4"):
        generate(chain(4, 3, in_flight=[4, 3, 2, 1]), "2bw")


@settings(max_examples=80, deadline=None)
@given(random_plans())
def test_schedules_of_random_stage_graphs_are_complete_and_print(plan: TrainPlan) -> None:
    for name in ("gpipe", "1f1b", "zero-bubble"):
        schedule = generate(plan, name)
        check_complete(schedule)
        assert parse_schedule(schedule.to_text()) == schedule
        for stage in plan.stages:
            held = most = 0
            for action in schedule.program(stage.devices[0]):
                if action.kind is ActionKind.F:
                    held += 1
                elif action.kind in (ActionKind.B, ActionKind.W):
                    held -= 1
                most = max(most, held)
            if name == "1f1b" and not stage.frozen:
                assert most * stage.micro_batch == min(
                    stage.num_in_flight * stage.micro_batch, plan.batch_size
                )


def test_shared_devices_get_one_order_that_runs() -> None:
    plan = stage_plan(
        [(0, 1), (1, 2), (2, 3), (0, 3)], 4, batch_size=6, devices=[(0,), (1,), (0,), (1,)]
    )
    schedule = generate(plan, "1f1b")
    check_complete(schedule)
    assert len(schedule.program(0).of_kinds([ActionKind.F])) == 12
    overlapping = stage_plan([(0, 1)], 2, batch_size=4, devices=[(0, 1), (1, 2)])
    with pytest.raises(ScheduleError, match="share all of their devices or none"):
        generate(overlapping, "1f1b")


def test_data_parallel_stages_reduce_and_frozen_ones_do_not_train() -> None:
    plan = stage_plan([(0, 1)], 2, batch_size=4, micro_batch=2, dp=[2, 1], frozen=[0])
    schedule = generate(plan)
    assert str(schedule.program(0)) == "0F0 0F1"
    trained = stage_plan([(0, 1)], 2, batch_size=4, micro_batch=2, dp=[2, 1])
    assert str(generate(trained).program(1)).endswith("0REDUCE_GRAD 0STEP")
    assert "REDUCE_GRAD" not in str(generate(trained).program(2))


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="1f1b"):
        generate(chain(2, 2), "zigzag")
    assert set(SCHEDULES) == {"gpipe", "1f1b", "kfkb", "zero-bubble", "interleaved", "2bw"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("body 0:", "corpus 0:", "line 4"),
        ("devices 0 ", "devices x ", "'x' where a number belongs"),
        ("micro-batches 4", "micro-batches 3", "which does not divide it"),
        ("stage 1 ", "stage 7 ", "list every stage once"),
    ],
)
def test_bad_schedule_text_is_refused_with_its_line(old: str, new: str, message: str) -> None:
    text = (
        generate(chain(2, 4)).to_text().replace("edge 0 1 forward-bytes 1 backward-bytes 1\n", "")
    )
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(text.replace(old, new, 1))
