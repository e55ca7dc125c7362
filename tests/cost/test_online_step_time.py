"""Predictions that learn: from wrong starts, past outliers, within bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.online_step_time import OnlineStepTime, StepRefit
from weft.cost.step_time import IterationShape


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A closed form with a factor for each part."""

    inference: float = 1.0
    forward: float = 1.0
    backward: float = 1.0
    step: float = 1.0

    def device_s(self, shape: IterationShape) -> float:
        if shape.is_empty:
            return 0.0
        inference = 2e-3 + 1e-4 * shape.num_decode_rows + 1e-4 * shape.num_prefill_tokens
        return (
            self.inference * inference
            + self.forward * 1e-4 * shape.num_ft_tokens
            + self.backward * 2e-5 * shape.num_ft_token_layers
            + self.step * 3e-3 * shape.num_ft_steps
        )

    def host_s(self, shape: IterationShape) -> float:
        return 0.0


def shapes(count: int, seed: int = 0) -> list[IterationShape]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        shape = IterationShape(
            num_decode_rows=int(random.integers(1, 30)),
            num_prefill_tokens=int(random.integers(0, 2)) * int(random.integers(16, 256)),
        )
        if random.random() < 0.5:
            shape = replace(shape, num_ft_tokens=int(random.integers(16, 256)))
        if random.random() < 0.5:
            shape = replace(
                shape, num_ft_layer_rows=2, num_ft_token_layers=int(random.integers(50, 900))
            )
        if random.random() < 0.2:
            shape = replace(shape, num_ft_steps=1)
        made.append(shape)
    return made


def errors(model: OnlineStepTime, truth: Machine) -> np.ndarray:
    return np.array([model.seconds(s) / truth.device_s(s) - 1 for s in shapes(100, seed=9)])


def test_each_part_is_learnt_by_itself() -> None:
    truth = Machine(inference=1.5, forward=0.7, backward=2.5, step=1.2)
    model = OnlineStepTime(Machine())
    assert np.abs(errors(model, truth)).max() > 0.3
    for shape in shapes(256):
        model.observe(shape, truth.device_s(shape))
    assert np.abs(errors(model, truth)).max() < 0.05
    assert model.residual < 0.05


def test_slow_iterations_now_and_then_move_nothing() -> None:
    random = np.random.default_rng(1)
    model = OnlineStepTime(Machine())
    for shape in shapes(256):
        slow = 20.0 if random.random() < 0.04 else 1.0
        model.observe(shape, slow * Machine().device_s(shape))
    assert np.abs(errors(model, Machine())).max() < 0.05
    assert model.residual < 0.1


def test_noise_is_kept_free_above_predictions() -> None:
    random = np.random.default_rng(2)
    model = OnlineStepTime(Machine())
    for shape in shapes(256):
        model.observe(shape, Machine().device_s(shape) * random.uniform(0.8, 1.2))
    over = [
        Machine().device_s(s) * random.uniform(0.8, 1.2) > model.upper_s(s)
        for s in shapes(400, seed=5)
    ]
    assert np.mean(over) < 0.1
    assert 0.05 < model.residual < 0.35


def test_factors_stay_within_bounds() -> None:
    model = OnlineStepTime(Machine())
    for shape in shapes(64):
        model.observe(shape, 1000.0)
    assert max(model.factors) <= 4.0
    for shape in shapes(512):
        model.observe(shape, 1e-9)
    assert min(model.factors) >= 0.25
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        before = model.factors
        model.observe(shapes(1)[0], bad)
        assert model.factors == before


@pytest.mark.parametrize("speed", [0.2, 1.0, 30.0])
def test_without_a_model_it_learns_from_nothing(speed: float) -> None:
    truth = Machine(inference=speed, forward=speed, backward=speed, step=speed)
    model = OnlineStepTime(None, num_layers=4)
    for shape in shapes(256):
        model.observe(shape, truth.device_s(shape))
    assert np.median(np.abs(errors(model, truth))) < 0.1


def test_a_profile_brings_its_own_residual() -> None:
    points = [
        MeasuredStep(shape=shape, seconds=Machine().device_s(shape) * (1.3 if i % 5 == 0 else 1.0))
        for i, shape in enumerate(shapes(60))
    ]
    profile = StepTimeProfile.fitted(model="m", dtype="f", device="d", device_points=points)
    assert OnlineStepTime(profile).residual == pytest.approx(profile.device_fit.residuals.p95)
    with pytest.raises(ConfigError, match="num_layers"):
        OnlineStepTime(None, num_layers=0)


def test_the_parts_of_a_fit_add_up_to_it() -> None:
    measured = [
        MeasuredStep(shape=shape, seconds=Machine(forward=1.3).device_s(shape) + 1e-5 * index)
        for index, shape in enumerate(shapes(60, seed=4))
    ]
    profile = StepTimeProfile.fitted(
        model="m", dtype="float32", device="cpu", device_points=measured
    )
    model = OnlineStepTime(profile)
    alone = [replace(s, num_decode_rows=0, num_prefill_tokens=0) for s in shapes(60, seed=5)]
    assert any(s.num_ft_layer_rows and not s.num_ft_tokens for s in alone)
    for shape in (*shapes(60, seed=6), *alone):
        assert model.seconds(shape) == pytest.approx(profile.device_s(shape), rel=1e-9)


def _decodes(rows: int = 4) -> IterationShape:
    return IterationShape(num_decode_rows=rows, num_sampled_rows=rows, decode_context_tokens=99.0)


def test_what_one_sitting_learns_the_next_begins_with() -> None:
    measured, true = Machine(), Machine(inference=1.5, forward=0.8, backward=1.2)
    first = OnlineStepTime(measured)
    assert first.refit is None
    for shape in shapes(256):
        first.observe(shape, true.device_s(shape))
    learnt = first.refit
    assert learnt is not None
    assert learnt.num_observed == 256
    assert learnt.factors[0] == pytest.approx(1.5, rel=0.1)
    second = OnlineStepTime(measured)
    second.begin_with(learnt)
    for shape in shapes(8, seed=1):
        assert second.seconds(shape) == first.seconds(shape)
        assert second.upper_s(shape) == first.upper_s(shape)
    with pytest.raises(ConfigError, match="measured model"):
        OnlineStepTime(None).begin_with(learnt)


def test_a_disturbed_sitting_is_forgotten() -> None:
    """By what it says of inference within some iterations, by what of training within sittings."""
    refit = StepRefit(factors=(4.0, 4.0, 4.0, 4.0), residual=1.0, num_observed=99)
    seen: list[float] = []
    for _ in range(8):
        model = OnlineStepTime(Machine())
        model.begin_with(refit)
        for rows in range(1, 33):  # Nobody trains.
            model.observe(_decodes(rows), Machine().device_s(_decodes(rows)))
        found = model.refit
        assert found is not None
        assert found.factors[0] == pytest.approx(1.0, rel=0.15)
        assert found.residual < 0.2
        seen.append(found.factors[2])
        refit = found
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 1.01


@pytest.mark.parametrize(
    ("factors", "residual"),
    [((1.0,), 0.1), ((1.0, 1.0, 1.0, 5.0), 0.1), ((1.0, 1.0, float("nan"), 1.0), 0.1)]
    + [((1.0,) * 4, value) for value in (-1.0, 2.0, float("nan"))],
)
def test_a_refit_out_of_bounds_is_none(factors: tuple[float, ...], residual: float) -> None:
    with pytest.raises(ConfigError, match="of a refit"):
        StepRefit(factors=factors, residual=residual, num_observed=1)
