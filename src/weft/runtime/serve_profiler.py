"""Measures an executor and the policy into a step-time profile, which simulations are run with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.base.clock import Clock, VirtualClock, WallClock
from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.step_time import IterationShape
from weft.engine.batch import Batch, ExecutorInfo
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.executor import BatchExecutor
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.runtime.serve_sweep import Row, SweepBatches, SweepLimits, default_sweep
from weft.sim.batch_executor import SimulatedBatchExecutor, iteration_shape
from weft.sim.serving_setup import profile_settings

Progress = Callable[[str, float], None]
"""Called with what is being measured and the share that is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """How long and on what to measure.

    Raises:
        ConfigError: a number is out of its range.
    """

    max_model_len: int
    max_num_batched_tokens: int
    num_rounds: int = 5
    """Passes over all points; a point's time is the median over all passes, so that a slow moment
    of the machine touches every point a little and none much."""
    num_repeats: int = 2
    """Measured repetitions of a point in one pass, after one that is not counted."""
    time_limit_s: float = 75.0
    """No pass starts after this; the first one always ends."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    points: tuple[tuple[Row, ...], ...] | None = None
    """Iterations to measure; None takes `default_sweep`."""
    measures_host: bool = True

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "num_rounds", "num_repeats"):
            value: int = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


def profile_serving(
    executor: BatchExecutor,
    config: ProfileConfig,
    *,
    model: str,
    dtype: str,
    device: str,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> StepTimeProfile:
    """Sweep an executor that serves nobody else, fit the medians, and describe the executor.

    Overwrites the executor's pages. With several batches in flight the time between results is
    measured, so that what a device overlaps is not counted twice.

    Raises:
        ConfigError: none of the points fits the executor.
    """
    clock = clock or WallClock()
    info = executor.info
    limits = SweepLimits(
        max_num_seqs=info.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    batches = SweepBatches(info, sampling=config.sampling)
    wanted = config.points if config.points is not None else default_sweep(limits)
    points = [rows for rows in wanted if batches.fits(rows)]
    if not points:
        raise ConfigError(
            f"none of {len(wanted)} points fits {info.num_pages - 1} pages and "
            f"{info.max_num_seqs} slots; raise kv_cache_memory_bytes"
        )
    for batch in batches.fill_arena():
        executor.submit(batch)
        executor.collect()
    device_points = _measure_device(executor, batches, points, config, clock, progress)
    host_points = _measure_host(info, config, clock) if config.measures_host else []
    return StepTimeProfile.fitted(
        model=model,
        dtype=dtype,
        device=device,
        device_points=device_points,
        host_points=host_points,
        settings=profile_settings(
            info,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_in_flight=executor.max_in_flight,
        ),
    )


def _measure_device(
    executor: BatchExecutor,
    batches: SweepBatches,
    points: Sequence[Sequence[Row]],
    config: ProfileConfig,
    clock: Clock,
    progress: Progress | None,
) -> list[MeasuredStep]:
    times: list[list[float]] = [[] for _ in points]
    shapes: list[IterationShape] = []
    begin_s = clock.now_s()
    for round_number in range(config.num_rounds):
        if round_number and clock.now_s() - begin_s >= config.time_limit_s:
            break
        for index, rows in enumerate(points):
            depth = executor.max_in_flight
            count = depth + config.num_repeats
            made = [batches.make(rows, starts=i == 0) for i in range(count)]
            if round_number == 0:
                shapes.append(iteration_shape(made[0], executor.info))
            times[index] += _intervals(executor, made, clock)[depth:]
            if progress is not None:
                done = (round_number + (index + 1) / len(points)) / config.num_rounds
                progress(f"pass {round_number + 1} of {config.num_rounds}", done)
    return [_step(shape, seconds) for shape, seconds in zip(shapes, times, strict=True)]


def _intervals(executor: BatchExecutor, batches: Sequence[Batch], clock: Clock) -> list[float]:
    """Seconds from result to result, with the executor kept as full as it allows."""
    waiting = list(reversed(batches))
    num_in_flight = 0
    ends_s = [clock.now_s()]
    while waiting or num_in_flight:
        while waiting and num_in_flight < executor.max_in_flight:
            executor.submit(waiting.pop())
            num_in_flight += 1
        executor.collect()
        num_in_flight -= 1
        ends_s.append(clock.now_s())
    return np.diff(ends_s).tolist()


def _step(shape: IterationShape, seconds: Sequence[float]) -> MeasuredStep:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return MeasuredStep(
        shape=shape,
        seconds=middle,
        num_repeats=len(seconds),
        spread=(high - low) / middle if middle else 0.0,
    )


class _NoTime:
    """A device that takes no time, so that what remains is the policy."""

    def device_s(self, shape: IterationShape) -> float:
        return 0.0

    def host_s(self, shape: IterationShape) -> float:
        return 0.0


def _measure_host(info: ExecutorInfo, config: ProfileConfig, clock: Clock) -> list[MeasuredStep]:
    """Time schedule() and apply() of the production policy at several numbers of sequences."""
    found: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    shapes: dict[tuple[int, int, int], IterationShape] = {}
    num_seqs = 1
    while num_seqs <= info.max_num_seqs:
        for shape, seconds in _policy_steps(info, config, clock, num_seqs):
            key = (shape.num_decode_rows, shape.num_prefill_rows, shape.num_prefill_tokens)
            shapes.setdefault(key, shape)
            found[key].append(seconds)
        num_seqs *= 4
    steps = [_step(shapes[key], seconds) for key, seconds in found.items()]
    return [step for step in steps if step.seconds > 0]


def _policy_steps(
    info: ExecutorInfo, config: ProfileConfig, clock: Clock, num_seqs: int
) -> list[tuple[IterationShape, float]]:
    """Serve `num_seqs` requests on a device that takes no time."""
    policy_config = PolicyConfig(
        max_model_len=config.max_model_len, max_num_batched_tokens=config.max_num_batched_tokens
    )
    policy = ContinuousBatching(policy_config, info, clock)
    executor = SimulatedBatchExecutor(info, _NoTime(), VirtualClock())
    num_prompt = max(1, min(200, config.max_model_len // 2))
    num_output = max(1, min(64, config.max_model_len - num_prompt))
    generator = np.random.default_rng(0)
    for number in range(num_seqs):
        policy.add(
            Request(
                id=str(number),
                prompt_token_ids=tuple(generator.integers(0, info.vocab_size, num_prompt).tolist()),
                sampling=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
            )
        )
    steps: list[tuple[IterationShape, float]] = []
    while policy.has_work:
        start_s = clock.now_s()
        batch = policy.schedule()
        scheduled_s = clock.now_s()
        if batch is None:
            break
        executor.submit(batch)
        result = executor.collect()
        collected_s = clock.now_s()
        policy.apply(result)
        seconds = scheduled_s - start_s + clock.now_s() - collected_s
        steps.append((iteration_shape(batch, info), seconds))
    return steps
