"""What ranks really run, in order, is what torch.distributed.pipelining runs for the same chain.

Torch's one-stage schedules are run on a stage that only notes its calls; the others publish their
order. Ours is read off the recorded timeline of a run over loopback.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.stage import _PipelineStageBase

from runtime.test_stage_numerics import TOLERANCE, assert_equal, run, sgd
from runtime.train_plans import Case, case_of, chain_cut, plan_of_cut
from runtime.train_reference import train_plain
from weft.model.zoo.registry import ZooModel
from weft.plan.action import COMPUTE_KINDS
from weft.plan.schedule import ScheduleError
from weft.plan.train_plan import TrainPlan


class NotingStage(_PipelineStageBase):
    """A torch stage that computes and moves nothing, and notes what its schedule makes it do."""

    def __init__(self, index: int, num_stages: int, num_ranks: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = index % num_ranks, num_ranks
        self.has_backward, self.submod = True, None  # type: ignore[assignment]
        self.noted: list[str] = []

    def forward_one_chunk(self, fwd_chunk_id: int, *_: Any, **__: Any) -> Any:
        self.noted.append(f"{self.stage_index}F{fwd_chunk_id}")

    def backward_one_chunk(self, bwd_chunk_id: int, *_: Any, **__: Any) -> None:
        self.noted.append(f"{self.stage_index}B{bwd_chunk_id}")

    def get_fwd_recv_ops(self, *_: Any) -> list[Any]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, *_: Any) -> None: ...
    def _create_grad_recv_info(self, *_: Any) -> Any: ...
    def _prepare_forward_infra(self, *_: Any) -> Any: ...
    def _prepare_backward_infra(self, *_: Any) -> Any: ...


def noted_by_torch(kind: Any, num_stages: int, num_micro_batches: int) -> list[str]:
    """By rank, what a one-stage schedule of torch makes its stage do."""
    found: list[str] = []
    for rank in range(num_stages):
        stage = NotingStage(rank, num_stages, num_stages)
        schedule = kind(stage, num_micro_batches, loss_fn=lambda *_: 0)
        schedule._initialize_stage = lambda *_: None
        schedule._step_microbatches(target_mbs=[None] * num_micro_batches, losses=None)
        found.append(" ".join(stage.noted))
    return found


def published_by_torch(kind: Any, num_ranks: int, chunks: int, num_micro_batches: int) -> list[str]:
    """By rank, the compute order that a schedule of torch publishes."""
    stages = [NotingStage(c * num_ranks, num_ranks * chunks, num_ranks) for c in range(chunks)]
    order = kind(stages, num_micro_batches).pipeline_order
    return [
        " ".join(str(action) for action in order[rank] if action is not None)
        for rank in range(num_ranks)
    ]


@pytest.fixture(scope="module")
def chain() -> Case:
    """Sixteen operators, one after another."""
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(3, 3), nn.Tanh())]
    model = ZooModel(
        name="chain",
        module=nn.Sequential(*layers),
        example_inputs=(torch.zeros(2, 3),),
        targets=(torch.zeros(2, 3),),
        loss=lambda output, wanted: ((output - wanted) ** 2).mean(),
    )
    return case_of(model, batch_size=24, num_steps=1)


def plan_of(case: Case, num_stages: int, num_micro_batches: int, schedule: str) -> TrainPlan:
    graph = case.capture.graph
    cut = chain_cut(graph, num_stages, micro_batch=24 // num_micro_batches)
    return plan_of_cut(graph, cut, 24, schedule=schedule)


def looped(plan: TrainPlan, num_ranks: int) -> TrainPlan:
    """The same stages, stage s on device s mod `num_ranks`."""
    stages = tuple(replace(s, devices=(s.index % num_ranks,)) for s in plan.stages)
    return plan.replace(stages=stages)


def recorded(case: Case, plan: TrainPlan) -> list[str]:
    """By rank, the compute actions of one step in the order in which they began.

    The step must be the reference's.
    """
    executor, (result,) = run(case, plan, num_steps=1, record=True)
    assert case.model.loss is not None
    wanted = train_plain(case.model.module, case.model.loss, case.batches, sgd)
    assert result.loss == pytest.approx(wanted.losses[0], abs=TOLERANCE)
    assert_equal(executor, wanted.module)
    timeline = executor.gather_timeline()
    found: list[str] = []
    for device in timeline.devices:
        rows = np.nonzero(timeline.device == device)[0]
        rows = rows[np.argsort(timeline.start_s[rows], kind="stable")]
        found.append(str(timeline.actions.take(rows).of_kinds(list(COMPUTE_KINDS))))
    return found


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 3), (2, 2), (3, 4), (4, 12)])
@pytest.mark.parametrize(("name", "kind"), [("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)])
def test_chains_run_as_torchs_schedules_do(
    chain: Case, name: str, kind: Any, num_stages: int, num_micro_batches: int
) -> None:
    wanted = noted_by_torch(kind, num_stages, num_micro_batches)
    assert recorded(chain, plan_of(chain, num_stages, num_micro_batches, name)) == wanted


@pytest.mark.parametrize(
    ("num_ranks", "chunks", "num_micro_batches"), [(2, 2, 4), (2, 3, 2), (4, 2, 8), (3, 2, 3)]
)
def test_interleaved_stages_run_as_torchs_do(
    chain: Case, num_ranks: int, chunks: int, num_micro_batches: int
) -> None:
    """Several stages a device, a message or a hand-over between any two."""
    wanted = published_by_torch(ScheduleInterleaved1F1B, num_ranks, chunks, num_micro_batches)
    plan = plan_of(chain, num_ranks * chunks, num_micro_batches, "interleaved")
    assert recorded(chain, looped(plan, num_ranks)) == wanted


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 4), (3, 6), (4, 12)])
def test_zero_bubble_runs_as_torchs_does(
    chain: Case, num_stages: int, num_micro_batches: int
) -> None:
    wanted = published_by_torch(ScheduleInterleavedZeroBubble, num_stages, 1, num_micro_batches)
    assert recorded(chain, plan_of(chain, num_stages, num_micro_batches, "zero-bubble")) == wanted


def test_interleaving_where_stages_do_not_loop_is_refused_by_name(chain: Case) -> None:
    plan = plan_of(chain, 4, 4, "interleaved")
    stages = tuple(replace(s, devices=(s.index // 2,)) for s in plan.stages)
    with pytest.raises(ScheduleError, match=r"interleaved 1F1B needs a chain .* stage s on device"):
        run(chain, plan.replace(stages=stages), num_steps=1)
