"""An iteration's time from measured points: a piecewise-linear fit, its residuals, its file.

The fit is a sum of terms that can only grow: a constant, monotone piecewise-linear curves in the
numbers of tokens, of decodes, of prefill tokens and of tokens that decodes read (so that a flat,
memory-bound start, the steps of a GEMM library and the edges of caches are all followed), and
linear terms in what else the iteration carries. Coefficients come from non-negative least squares
on relative errors, so that a short iteration counts as much as a long one. Source of the form:
FlexLLM sheet §4.3 (flat while memory-bound, then linear).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from weft.base.errors import ConfigError
from weft.cost.step_time import IterationShape

FORMAT = "weft-step-time"
VERSION = 1
_LINEAR_TERMS = (
    "num_sampled_rows",
    "num_prefill_rows",
    "prefill_context_tokens",
    "prefill_pairs",
    "num_ft_rows",
    "num_ft_tokens",
    "ft_context_tokens",
    "ft_pairs",
    "num_ft_loss_tokens",
    "num_ft_layer_rows",
    "num_ft_token_layers",
    "ft_pair_layers",
    "num_ft_steps",
)
_CURVE_TERMS = {
    "num_tokens": 1.9,
    "num_decode_rows": 1.25,
    "num_prefill_tokens": 1.4,
    "decode_context_tokens": 3.0,
}
"""Curve -> least ratio of neighbouring knots: a denser one follows more, a coarser one smooths."""
_USUAL_SPREAD = 0.05
"""Spread of a point on a quiet machine; a point with this much counts half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """One point of a sweep: an iteration and the median of its repetitions."""

    shape: IterationShape
    seconds: float
    num_repeats: int = 1
    spread: float = 0.0
    """(75th - 25th percentile) / median of the repetitions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A piecewise-linear function of a count: 0 at 0, `heights` at `knots`, then the last slope."""

    knots: tuple[int, ...]
    heights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.heights):
            raise ConfigError(
                f"a curve has {len(self.knots)} knots and {len(self.heights)} heights; it needs "
                "equally many, at least one"
            )
        if self.knots[0] < 1 or list(self.knots) != sorted(set(self.knots)):
            raise ConfigError(f"knots are {list(self.knots)}; they must grow, from 1 or more")

    def at(self, count: float) -> float:
        """The curve's value at `count`."""
        # The segment that holds the count; beyond the last knot, the last one goes on.
        i = min(bisect_left(self.knots, count), len(self.knots) - 1)
        left, low = (self.knots[i - 1], self.heights[i - 1]) if i else (0, 0.0)
        return low + (self.heights[i] - low) * (count - left) / (self.knots[i] - left)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residuals:
    """How far a fit lies from the points it was made of, relative to them."""

    median: float
    p95: float
    max: float
    worst: IterationShape | None = None
    """The point with the largest residual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFit:
    """Seconds of an iteration as constant + curves + linear terms; `fit_steps` makes it."""

    constant_s: float
    curves: Mapping[str, Curve]
    slopes: Mapping[str, float]
    """Seconds per unit of each linear term."""
    residuals: Residuals

    def parts(self, shape: IterationShape) -> tuple[float, float, float]:
        """What finetuning adds to an iteration's inference: forward, backward, steps."""
        slopes = self.slopes
        forward_s = backward_s = 0.0
        if shape.num_ft_tokens:
            curve = self.curves.get("num_tokens")
            if curve is not None:
                num_tokens = shape.num_tokens
                forward_s = curve.at(num_tokens) - curve.at(num_tokens - shape.num_ft_tokens)
            forward_s += (
                slopes.get("num_ft_rows", 0.0) * shape.num_ft_rows
                + slopes.get("num_ft_tokens", 0.0) * shape.num_ft_tokens
                + slopes.get("ft_context_tokens", 0.0) * shape.ft_context_tokens
                + slopes.get("ft_pairs", 0.0) * shape.ft_pairs
                + slopes.get("num_ft_loss_tokens", 0.0) * shape.num_ft_loss_tokens
            )
        if shape.num_ft_layer_rows:
            backward_s = (
                slopes.get("num_ft_layer_rows", 0.0) * shape.num_ft_layer_rows
                + slopes.get("num_ft_token_layers", 0.0) * shape.num_ft_token_layers
                + slopes.get("ft_pair_layers", 0.0) * shape.ft_pair_layers
            )
        return forward_s, backward_s, slopes.get("num_ft_steps", 0.0) * shape.num_ft_steps

    def seconds(self, shape: IterationShape) -> float:
        """The fitted seconds; at least the constant."""
        total = self.constant_s
        for name, curve in self.curves.items():
            total += curve.at(getattr(shape, name))
        for name, slope in self.slopes.items():
            total += slope * getattr(shape, name)
        return total


def fit_steps(points: Sequence[MeasuredStep]) -> StepFit:
    """Fit the points; needs one or more.

    Knots of the curves are the counts that were measured, thinned to ratios of 1.25 to 3. Terms
    that no point exercises get the coefficient 0.

    Raises:
        ConfigError: no points, or one whose time is not a positive number.
    """
    if not points:
        raise ConfigError("a step-time fit needs at least one measured point; there are none")
    for point in points:
        if not (math.isfinite(point.seconds) and point.seconds > 0):
            raise ConfigError(
                f"a measured step took {point.seconds} s; every point needs a positive time "
                f"({point.shape})"
            )
    shapes = [point.shape for point in points]
    seconds = np.array([point.seconds for point in points])
    knots = {
        name: _knots([getattr(s, name) for s in shapes], ratio)
        for name, ratio in _CURVE_TERMS.items()
    }
    columns: list[list[float]] = [[1.0] * len(points)]
    for name, positions in knots.items():
        left = 0
        for i, knot in enumerate(positions):
            top = math.inf if i == len(positions) - 1 else 1.0
            columns.append([_ramp(getattr(s, name), left, knot, top) for s in shapes])
            left = knot
    columns += [[float(getattr(s, name)) for s in shapes] for name in _LINEAR_TERMS]
    # Relative errors: each row divided by what was measured. A point with few repetitions, or with
    # repetitions that disagree, says less than others.
    matrix = np.array(columns).T / seconds[:, None]
    trust = np.array([_trust(point) for point in points])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    solution = nnls(matrix / scale * trust[:, None], trust, maxiter=100 * matrix.shape[1])[0]
    coefficients = solution / scale
    rest = iter(coefficients.tolist())
    constant_s = next(rest)
    curves: dict[str, Curve] = {}
    for name, positions in knots.items():
        if positions:
            rises = [next(rest) for _ in positions]
            curves[name] = Curve(knots=positions, heights=tuple(float(h) for h in np.cumsum(rises)))
    slopes = {name: next(rest) for name in _LINEAR_TERMS}
    errors = np.abs(matrix @ coefficients - 1.0)
    return StepFit(
        constant_s=constant_s,
        curves=curves,
        slopes=slopes,
        residuals=Residuals(
            median=float(np.median(errors)),
            p95=float(np.quantile(errors, 0.95)),
            max=float(errors.max()),
            worst=shapes[int(errors.argmax())],
        ),
    )


def _trust(point: MeasuredStep) -> float:
    return point.num_repeats / (point.num_repeats + 2) / (1.0 + point.spread / _USUAL_SPREAD)


def _ramp(count: float, left: int, right: int, top: float) -> float:
    return min(max((count - left) / (right - left), 0.0), top)


def _knots(counts: Sequence[float], ratio: float) -> tuple[int, ...]:
    kept: list[int] = []
    for count in sorted({round(c) for c in counts if round(c) > 0}):
        if not kept or count >= ratio * kept[-1]:
            kept.append(count)
    return tuple(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimeProfile:
    """Measured points of one model on one machine with their fits: a `StepTimeModel` with a file.

    `model`, `dtype`, `device` and `settings` say where the points come from; `settings` holds the
    executor's plain numbers (pages, slots, limits), so that a simulation can mirror it.
    """

    model: str
    dtype: str
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    device_points: tuple[MeasuredStep, ...]
    host_points: tuple[MeasuredStep, ...] = ()
    """Seconds of the policy and its loop, outside the executor."""
    device_fit: StepFit
    host_fit: StepFit | None = None

    def device_s(self, shape: IterationShape) -> float:
        """Seconds that the executor is busy; 0 for an empty iteration."""
        return 0.0 if shape.is_empty else self.device_fit.seconds(shape)

    def host_s(self, shape: IterationShape) -> float:
        """Seconds of the policy; 0 where it was not measured."""
        return self.host_fit.seconds(shape) if self.host_fit is not None else 0.0

    @classmethod
    def fitted(
        cls,
        *,
        model: str,
        dtype: str,
        device: str,
        device_points: Sequence[MeasuredStep],
        host_points: Sequence[MeasuredStep] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> StepTimeProfile:
        """Fit the points and keep both."""
        return cls(
            model=model,
            dtype=dtype,
            device=device,
            settings=dict(settings or {}),
            device_points=tuple(device_points),
            host_points=tuple(host_points),
            device_fit=fit_steps(device_points),
            host_fit=fit_steps(host_points) if host_points else None,
        )

    def to_json(self) -> str:
        """The profile's file: format, origin, points and fits."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "profile") -> StepTimeProfile:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: not such a file, a later version, or a value out of its range.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(
                f'{where} is no step-time profile: it lacks "format": "{FORMAT}"; make one with '
                "`weft profile --serve MODEL --out FILE`"
            )
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{where} has version {data.get('version')}; this program reads {VERSION}"
            )
        try:
            return cls(
                model=str(data["model"]),
                dtype=str(data["dtype"]),
                device=str(data["device"]),
                settings=dict(data["settings"]),
                device_points=tuple(_point(p) for p in data["device_points"]),
                host_points=tuple(_point(p) for p in data["host_points"]),
                device_fit=_fit(data["device_fit"]),
                host_fit=_fit(data["host_fit"]) if data["host_fit"] is not None else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise ConfigError(f"{where}: {error}") from None
            raise ConfigError(f"{where} is damaged: {type(error).__name__}: {error}") from None

    def write(self, path: str | Path) -> None:
        """Write the file; it is complete or absent."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(target)

    @classmethod
    def read(cls, path: str | Path) -> StepTimeProfile:
        """Read the file at `path`; ConfigError as `from_json`, and where it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"profile {path} cannot be read: {error}") from None
        return cls.from_json(text, where=str(path))


_SHAPE_FIELDS = {f.name for f in fields(IterationShape)}


def _shape(data: Mapping[str, Any]) -> IterationShape:
    unknown = set(data) - _SHAPE_FIELDS
    if unknown:
        raise ConfigError(f"a point counts {sorted(unknown)}, which this program does not know")
    return IterationShape(**data)


def _point(data: Mapping[str, Any]) -> MeasuredStep:
    return MeasuredStep(
        shape=_shape(data["shape"]),
        seconds=float(data["seconds"]),
        num_repeats=int(data["num_repeats"]),
        spread=float(data["spread"]),
    )


def _fit(data: Mapping[str, Any]) -> StepFit:
    for name, known in (("curves", _CURVE_TERMS), ("slopes", _LINEAR_TERMS)):
        unknown = set(data[name]) - set(known)
        if unknown:
            raise ConfigError(f"a fit has {name} {sorted(unknown)}; known: {', '.join(known)}")
    worst = data["residuals"]["worst"]
    return StepFit(
        constant_s=float(data["constant_s"]),
        curves={
            name: Curve(knots=tuple(curve["knots"]), heights=tuple(curve["heights"]))
            for name, curve in data["curves"].items()
        },
        slopes={name: float(slope) for name, slope in data["slopes"].items()},
        residuals=Residuals(
            median=float(data["residuals"]["median"]),
            p95=float(data["residuals"]["p95"]),
            max=float(data["residuals"]["max"]),
            worst=_shape(worst) if worst is not None else None,
        ),
    )
