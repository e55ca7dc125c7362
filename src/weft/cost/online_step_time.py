"""A step-time model that goes on learning while it serves: bounded, and robust to outliers.

The model's prediction is split into parts (inference, finetuning forward, backward, optimizer
steps), each with one factor. Factors come from the latest iterations by weighted least squares on
relative errors, pulled to 1, within bounds, with Huber weights, so that a single slow iteration
moves nothing and a machine that became slower moves all of them. (FlexLLM sheet
§4.3: f(c, s) fitted offline and refitted online.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from operator import attrgetter

import numpy as np
from scipy.optimize import lsq_linear

from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.step_time import IterationShape, StepTimeModel

_WINDOW = 256
_REFIT_EVERY = 16
_PRIOR = 4.0
"""Iterations that the prior factor of 1 counts for."""
_HUBER = 0.15
"""Relative error beyond which an iteration counts less and less."""
_MEASURED_BOUNDS = (0.25, 4.0)
_GUESSED_BOUNDS = (1e-3, 1e3)
_FIRST_RESIDUAL = 0.10
_LEAST_RESIDUAL = 0.01
_MOST_RESIDUAL = 1.0
_MOST_CACHED = 256
REFIT_PARTS = ("inference", "forward", "backward", "step")
"""Of an iteration's time, those that a measured model's refit has a factor for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRefit:
    """What serving taught about a measured model, which itself stays as it was measured.

    Raises:
        ConfigError: a number is out of its range.
    """

    factors: tuple[float, ...]
    """Of each of `REFIT_PARTS`, what it takes beside what was measured."""
    residual: float
    """As `OnlineStepTime.residual`."""
    num_observed: int
    """Iterations that it was learnt from."""

    def __post_init__(self) -> None:
        low, high = _MEASURED_BOUNDS
        if len(self.factors) != len(REFIT_PARTS) or not all(low <= f <= high for f in self.factors):
            raise ConfigError(
                f"the factors of a refit are {list(self.factors)}; it needs {len(REFIT_PARTS)} in "
                f"[{low}, {high}]"
            )
        if not _LEAST_RESIDUAL <= self.residual <= _MOST_RESIDUAL:
            raise ConfigError(
                f"the residual of a refit is {self.residual}; it must be in "
                f"[{_LEAST_RESIDUAL}, {_MOST_RESIDUAL}]"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuessedStepTime:
    """Orders of magnitude, for a machine that nobody measured; refitting does the rest."""

    num_layers: int

    def parts(self, shape: IterationShape) -> tuple[float, ...]:
        """Constant, tokens, context, finetuning forward, backward, steps."""
        if shape.is_empty:
            return (0.0,) * 6
        context = shape.decode_context_tokens + shape.prefill_pairs
        backward = shape.num_ft_token_layers + 1e-3 * shape.ft_pair_layers
        return (
            2e-3,
            1e-4 * (shape.num_decode_rows + shape.num_prefill_tokens),
            1e-7 * context,
            1e-4 * shape.num_ft_tokens + 1e-7 * shape.ft_pairs,
            1e-4 / self.num_layers * backward,
            2e-3 * shape.num_ft_steps,
        )


class OnlineStepTime:
    """Predicts iterations by a model and by how the latest ones went."""

    def __init__(self, model: StepTimeModel | None, *, num_layers: int = 1) -> None:
        """Without a model it starts from `GuessedStepTime`.

        Raises:
            ConfigError: `num_layers` is below 1.
        """
        if num_layers < 1:
            raise ConfigError(f"num_layers is {num_layers}; it must be at least 1")
        self._model = model
        self._guess = GuessedStepTime(num_layers=num_layers)
        self._bounds = _GUESSED_BOUNDS if model is None else _MEASURED_BOUNDS
        self._cache: dict[tuple[str | float, ...], float] = {}
        self._latest_inference: tuple[tuple[float, ...], float] = ((), 0.0)
        self._parts: deque[tuple[float, ...]] = deque(maxlen=_WINDOW)
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._num_observed = 0
        size = 6 if model is None else 4
        self.factors = (1.0,) * size
        """Of each part."""
        self._start = self.factors
        """As they began."""
        self._num_of_part = [0] * size
        """Observed iterations that hold each part."""
        self.residual = _FIRST_RESIDUAL
        """Share by which 95 % of iterations stay below what was predicted, plus one."""
        if isinstance(model, StepTimeProfile):
            self.residual = _clipped(model.device_fit.residuals.p95)

    def begin_with(self, refit: StepRefit) -> None:
        """Start from what an earlier sitting learnt about the same measured model.

        It holds until the first iterations have been observed.

        Raises:
            ConfigError: this has no measured model.
        """
        if self._model is None:
            raise ConfigError("a refit needs the measured model that it was made of")
        self.factors = self._start = refit.factors
        self.residual = refit.residual

    @property
    def refit(self) -> StepRefit | None:
        """What this sitting has learnt; None without a measured model, or before it learnt much.

        A part that it hardly met goes half the way back to what was measured: what a disturbed
        sitting says of training must not outlive all those that do not train.
        """
        if self._model is None or self._num_observed < 2 * _REFIT_EVERY:
            return None
        factors = (
            factor if count >= _REFIT_EVERY else sqrt(start)
            for factor, start, count in zip(
                self.factors, self._start, self._num_of_part, strict=True
            )
        )
        return StepRefit(
            factors=tuple(factors), residual=self.residual, num_observed=self._num_observed
        )

    def seconds(self, shape: IterationShape) -> float:
        """Expected seconds of an iteration, the policy's own included."""
        return sum(f * p for f, p in zip(self.factors, self._split(shape), strict=True))

    def upper_s(self, shape: IterationShape) -> float:
        """Seconds that 95 % of such iterations stay below."""
        return self.seconds(shape) * (1.0 + self.residual)

    def device_s(self, shape: IterationShape) -> float:
        """As `seconds`: this is a `StepTimeModel` too."""
        return self.seconds(shape)

    def host_s(self, shape: IterationShape) -> float:
        """0: it is within `device_s`."""
        return 0.0

    def observe(self, shape: IterationShape, seconds: float) -> None:
        """Learn from an iteration; refits now and then."""
        if shape.is_empty or not 0 < seconds < float("inf"):
            return
        parts = self._split(shape)
        self._parts.append(parts)
        for index, part in enumerate(parts):
            self._num_of_part[index] += part > 0
        self._seconds.append(seconds)
        self._num_observed += 1
        is_early = self._model is None and self._num_observed in (1, 2, 4, 8)
        if is_early or self._num_observed % _REFIT_EVERY == 0:
            self._refit()

    def _split(self, shape: IterationShape) -> tuple[float, ...]:
        model = self._model
        if model is None:
            return self._guess.parts(shape)
        if isinstance(model, StepTimeProfile):
            return self._split_fit(model, shape)
        whole_s = model.device_s(shape)
        host_s = model.host_s(shape)
        if not shape.has_finetuning:
            return whole_s + host_s, 0.0, 0.0, 0.0
        stepless_s = whole_s
        if shape.num_ft_steps:
            stepless_s = model.device_s(replace(shape, num_ft_steps=0))
        forward_s = stepless_s
        if shape.num_ft_layer_rows:
            forward_s = self._known(("forward", *_forward_key(shape)), _forward_only, shape)
        inference_s = self._known(_inference_key(shape), _inference_only, shape)
        return (
            inference_s + host_s,
            forward_s - inference_s,
            stepless_s - forward_s,
            whole_s - stepless_s,
        )

    def _split_fit(
        self, model: StepTimeProfile, shape: IterationShape
    ) -> tuple[float, float, float, float]:
        """The same of a sum of terms, each looked at once: a policy asks dozens of times."""
        key = _inference_key(shape)
        known = self._latest_inference
        if known[0] == key:
            inference_s = known[1]
        else:
            bare = shape.without_finetuning()
            inference_s = model.device_s(bare) + model.host_s(bare)
            self._latest_inference = (key, inference_s)
        forward_s, backward_s, step_s = model.device_fit.parts(shape)
        if not (shape.num_decode_rows or shape.num_prefill_tokens):
            # Nothing else pays what every iteration costs.
            constant_s = model.device_fit.constant_s
            if shape.num_ft_tokens:
                forward_s += constant_s
            elif shape.num_ft_layer_rows:
                backward_s += constant_s
            elif shape.num_ft_steps:
                step_s += constant_s
        return inference_s, forward_s, backward_s, step_s

    def _known(
        self,
        key: tuple[str | float, ...],
        reduce: Callable[[IterationShape], IterationShape],
        shape: IterationShape,
    ) -> float:
        """The model's seconds of a part that stays the same while a policy tries what else fits."""
        assert self._model is not None
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= _MOST_CACHED:
                self._cache.clear()
            found = self._cache[key] = self._model.device_s(reduce(shape))
        return found

    def _refit(self) -> None:
        seconds = np.array(self._seconds)
        matrix = np.array(self._parts) / seconds[:, None]
        factors = np.array(self.factors)
        low, high = self._bounds
        # The prior weighs a part by how much of an iteration it usually is.
        prior = np.sqrt(_PRIOR) * np.maximum(matrix.mean(axis=0), 1e-3)
        if self._model is None:
            prior *= 0.02
        # What was measured, not what was learnt before: a disturbed sitting counts for nothing once
        # there is anything to learn from. A part that was not met stays as it began.
        centre = np.where(np.array(self._num_of_part) > 0, 1.0, self._start)
        for _ in range(3):
            errors = np.abs(matrix @ factors - 1.0)
            weights = np.sqrt(np.minimum(1.0, _HUBER / np.maximum(errors, 1e-12)))
            rows = np.vstack([matrix * weights[:, None], np.diag(prior)])
            wanted = np.concatenate([weights, prior * centre])
            factors = lsq_linear(rows, wanted, bounds=(low, high)).x
        self.factors = tuple(float(f) for f in factors)
        if self._num_observed >= 2 * _REFIT_EVERY:
            over = 1.0 / np.maximum(matrix @ factors, 1e-12) - 1.0
            self.residual = _clipped(float(np.quantile(over, 0.95)))


_inference_key = attrgetter(
    "num_decode_rows",
    "num_prefill_rows",
    "num_prefill_tokens",
    "num_sampled_rows",
    "decode_context_tokens",
    "prefill_context_tokens",
    "prefill_pairs",
)
_forward_terms = attrgetter(
    "num_ft_rows", "num_ft_tokens", "ft_context_tokens", "ft_pairs", "num_ft_loss_tokens"
)


def _forward_key(shape: IterationShape) -> tuple[float, ...]:
    return (*_inference_key(shape), *_forward_terms(shape))


def _forward_only(shape: IterationShape) -> IterationShape:
    return replace(
        shape, num_ft_steps=0, num_ft_layer_rows=0, num_ft_token_layers=0, ft_pair_layers=0.0
    )


def _inference_only(shape: IterationShape) -> IterationShape:
    return shape.without_finetuning()


def _clipped(residual: float) -> float:
    return min(max(residual, _LEAST_RESIDUAL), _MOST_RESIDUAL)
