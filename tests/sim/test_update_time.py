"""The optimizer's update takes the time that a profile says, once a step and stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan.plans import stage_plan
from weft.base.errors import ConfigError
from weft.cluster.device_types import cpu_device_type
from weft.cost.profiled import BlockProfile, BlockTimes, ProfiledCost
from weft.cost.training import ADAM_BF16, ADAM_FP32, SGD_FP32
from weft.plan.replay import step_time_s
from weft.plan.train_plan import TrainPlan
from weft.sim.stage_executor import simulate

PROFILE = BlockProfile(
    model="m",
    device="cpu",
    dtype="float32",
    blocks={"b": BlockTimes(op_id="b", batch_sizes=(1,), forward_s=(1.0,), backward_s=(1.0,))},
    update_s={"sgd": 1e-9, "adam": 4e-9},
)


def test_a_step_ends_when_the_slowest_update_has() -> None:
    plan = stage_plan([(0, 1)], 2, batch_size=4, micro_batch=2)
    before_s = simulate(plan).step_time_s
    # Stage 0 runs the step's last backward, so its update is at the end whatever stage 1 does.
    stages = (replace(plan.stages[0], step_s=0.75), replace(plan.stages[1], step_s=0.25))
    slower = plan.replace(stages=stages)
    assert simulate(slower).step_time_s == before_s + 0.75
    assert step_time_s(slower) == before_s + 0.75
    assert TrainPlan.from_json(slower.to_json()) == slower


def test_a_profile_prices_the_optimizer_by_its_state() -> None:
    cost, device = ProfiledCost(profile=PROFILE), cpu_device_type(1, 2**30)
    assert cost.step_s(10**9, SGD_FP32, device) == pytest.approx(1.0)
    assert cost.step_s(10**9, ADAM_FP32, device) == pytest.approx(4.0)
    assert cost.step_s(10**9, ADAM_BF16, device) == pytest.approx(4.0)
    assert BlockProfile.from_json(PROFILE.to_json()) == PROFILE
    old = replace(PROFILE, update_s={})
    assert ProfiledCost(profile=old).step_s(10**9, ADAM_FP32, device) == 0


def test_an_update_of_no_finite_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="adam"):
        replace(PROFILE, update_s={"adam": float("nan")})
