"""Measures an executor and the policy into a step-time profile, which simulations are run with."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from weft.base.clock import Clock, WallClock
from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.step_time import IterationShape
from weft.engine.batch import AdapterRef, Batch, ExecutorInfo
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.coserve import CoServing
from weft.engine.executor import AdapterHost, BatchExecutor
from weft.engine.finetune import FinetuneJobSpec, JobChanged, TrainingSample
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.iteration_shape import ShapeCounter, iteration_shape
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterSpec
from weft.runtime.serve_sweep import Row, SweepBatches, SweepLimits, decodes, default_sweep
from weft.sim.serving_setup import profile_settings

_QUICK_WINDOWS = (16, 64, 192)
_QUICK_CONTEXT = 128
_LEAST_POINTS = 3
Progress = Callable[[str, float], None]
"""Called with what is being measured and the share that is done."""
_LONGEST_SAMPLE = 512
"""Tokens of the samples that are trained to measure, at most."""
_WINDOWS = (16, 64, 256, 512)
_PROFILED = "weft-profile"
_LONGEST_SERVED = 1024
"""Tokens of prompt and output together, at most, of the requests that are served to measure."""


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
    finetuning: AdapterSpec | None = field(default_factory=lambda: AdapterSpec(rank=16))
    """Also train such an adapter on random tokens, where the executor holds samples: times windows
    forward and backward, alone and beside decodes, and optimizer steps. None leaves it out."""
    measures_service: bool = True
    """Also serve a few requests: times the policy, and iterations as they follow each other."""

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

    Iterations are measured in two ways: each alone, over the whole range, and as they follow each
    other while the production policy serves, where caches are cold and contexts ragged. Overwrites
    the executor's pages. With several batches in flight the time between results is measured, so
    that what a device overlaps is not counted twice.

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
    host_points: list[MeasuredStep] = []
    if config.measures_service and config.max_model_len > 1:
        steps = _serve(executor, config, clock)
        host_points = _grouped([(step.shape, step.host_s) for step in steps])
        if executor.max_in_flight == 1:
            device_points += _grouped([(step.shape, step.device_s) for step in steps])
    if config.finetuning is not None and info.max_finetune_samples > 0:
        device_points += _equal_shapes(_finetune(executor, config, config.finetuning, clock))
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


def quick_profile(
    executor: BatchExecutor,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    model: str,
    dtype: str,
    device: str,
    finetunes: bool = True,
    time_limit_s: float = 3.0,
    clock: Clock | None = None,
) -> StepTimeProfile:
    """Where a server's predictions start: a few iterations of each kind, the small ones first.

    Lone and many decodes, prompts, and, where it `finetunes` and the executor holds samples,
    windows of a random adapter's training. Nothing is begun after `time_limit_s` but the least of
    each kind, without which nothing can be foreseen. Uses a few pages and slots of an executor that
    serves nobody yet.

    Raises:
        ConfigError: not even one decode fits the executor.
    """
    clock = clock or WallClock()
    begin_s = clock.now_s()
    info = executor.info
    config = ProfileConfig(
        max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens, num_rounds=1
    )
    batches = SweepBatches(info, sampling=config.sampling)
    points: list[MeasuredStep] = []
    for index, rows in enumerate(_quick_points(info, max_model_len, max_num_batched_tokens)):
        is_late = clock.now_s() - begin_s > time_limit_s / 2
        if batches.fits(rows) and (index < _LEAST_POINTS or not is_late):
            points += _measure_device(executor, batches, [rows], config, clock, None)
    holds_samples = info.max_finetune_samples > 0 and max_model_len >= 2 * _QUICK_WINDOWS[0]
    if finetunes and holds_samples:
        points += _equal_shapes(_quick_finetune(executor, config, clock, begin_s + time_limit_s))
    return StepTimeProfile.fitted(
        model=model,
        dtype=dtype,
        device=device,
        device_points=points,
        settings=profile_settings(
            info,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            max_in_flight=executor.max_in_flight,
        ),
    )


def warm_up_finetuning(
    executor: BatchExecutor, *, max_model_len: int, max_num_batched_tokens: int
) -> None:
    """Take one small step of training, if the executor holds samples, and forget it.

    What a first step compiles would otherwise hold up the requests that run when a first job comes.
    """
    # Windows of some tens of tokens meet the kernels for many rows, smaller ones those for few.
    windows = [w for w in _QUICK_WINDOWS[:2] if 2 * w <= max_model_len]
    if executor.info.max_finetune_samples < 1:
        return
    config = ProfileConfig(
        max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens
    )
    for window in windows:
        settings = _windows_of(window)
        lengths = (2 * window, window)
        adapter = AdapterSpec(rank=16)
        _train(executor, config, adapter, WallClock(), settings, lengths, num_requests=0)


def processor_name(device: torch.device) -> str:
    """What a profile of a device holds for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return f"{platform.machine()} CPU {models[0] if models else platform.processor()}"


def _quick_points(
    info: ExecutorInfo, max_model_len: int, max_num_batched_tokens: int
) -> list[tuple[Row, ...]]:
    """The least ones first: a decode, two lengths of prompts."""
    context = max(1, min(_QUICK_CONTEXT, max_model_len))
    most = min(max_model_len, max_num_batched_tokens)
    points = [decodes(1, context)]
    points += [(Row(before=0, count=count),) for count in (16, 64) if count <= most]
    many = [n for n in (4, 8, 16, 32) if n <= min(info.max_num_seqs, max_num_batched_tokens)]
    points += [decodes(n, context) for n in many]
    points += [(*decodes(n, context), Row(before=0, count=64)) for n in many[:1] if most >= 64 + n]
    points += [(Row(before=0, count=count),) for count in (256, 512) if count <= most]
    return points


def _quick_finetune(
    executor: BatchExecutor, config: ProfileConfig, clock: Clock, until_s: float
) -> list[_ServedStep]:
    """Windows of growing size, two at least, so that a row's price is told from a token's."""
    steps: list[_ServedStep] = []
    for index, window in enumerate(_QUICK_WINDOWS):
        start_s = clock.now_s()
        last_s = steps[-1].device_s if steps else 0.0
        # Two rounds of three windows, forward and backward, each about four times as long.
        is_late = start_s + 24 * last_s > until_s
        if 2 * window > config.max_model_len or (index >= 2 and is_late):
            break
        settings = _windows_of(window)
        adapter = AdapterSpec(rank=16)
        lengths = (2 * window, window)
        # Kernels are compiled when a window of a size is first seen.
        for is_counted in (False, True):
            found = _train(executor, config, adapter, clock, settings, lengths, num_requests=0)
            steps += found if is_counted else []
    return steps


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _ServedStep:
    shape: IterationShape
    device_s: float
    host_s: float
    """schedule() and apply()."""


def _serve(executor: BatchExecutor, config: ProfileConfig, clock: Clock) -> list[_ServedStep]:
    """Serve waves of 1, 4, 16, ... requests of mixed lengths, one iteration after another."""
    # A sequence that the sweep left in a slot gives way when the policy starts another there.
    policy = ContinuousBatching(
        PolicyConfig(
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
        ),
        executor.info,
        clock,
    )
    longest = max(1, min(config.max_model_len, _LONGEST_SERVED) // 2)
    generator = np.random.default_rng(0)
    steps: list[_ServedStep] = []
    num_requests = 1
    while num_requests < 4 * executor.info.max_num_seqs:
        # The last wave fills every slot, and a few requests wait.
        for number in range(num_requests):
            num_prompt = int(generator.integers(max(1, longest // 8), longest + 1))
            num_output = min(int(generator.integers(8, 33)), config.max_model_len - num_prompt)
            policy.add(
                _request(
                    f"{num_requests}-{number}",
                    num_prompt,
                    num_output,
                    generator,
                    executor.info,
                    config,
                )
            )
        steps += _run(policy, executor, clock)
        num_requests *= 4
    return steps


def _finetune(
    executor: BatchExecutor, config: ProfileConfig, adapter: AdapterSpec, clock: Clock
) -> list[_ServedStep]:
    """Train a few samples: alone in windows of several sizes, then beside decodes."""
    longest = min(config.max_model_len, _LONGEST_SAMPLE)
    steps: list[_ServedStep] = []
    begin_s = clock.now_s()
    for window in _WINDOWS:
        if window > longest or (steps and clock.now_s() - begin_s > config.time_limit_s / 2):
            break
        settings = _windows_of(window)
        # Small windows of a long sample would take for ever and teach no more.
        length = min(longest, 4 * window)
        # Kernels are compiled when they are first met: that is not what a window takes.
        _train(executor, config, adapter, clock, settings, (length,), num_requests=0)
        steps += _train(executor, config, adapter, clock, settings, (length,) * 2, num_requests=0)
    num_requests = min(4, executor.info.max_num_seqs)
    for tokens, layers in ((32, 1), (128, 2)):
        settings = FinetuneConfig(
            policy=FinetunePolicy.BUDGET, budget_tokens=tokens, budget_layers=layers
        )
        length = min(longest, 2 * tokens)
        steps += _train(
            executor, config, adapter, clock, settings, (length,), num_requests=num_requests
        )
    return steps


def _windows_of(num_tokens: int) -> FinetuneConfig:
    """Finetuning alone, in windows of one size."""
    return FinetuneConfig(
        policy=FinetunePolicy.FINETUNE_ONLY,
        forward_window=num_tokens,
        backward_window=num_tokens,
        max_window_tokens=num_tokens,
    )


def _train(
    executor: BatchExecutor,
    config: ProfileConfig,
    adapter: AdapterSpec,
    clock: Clock,
    settings: FinetuneConfig,
    lengths: Sequence[int],
    *,
    num_requests: int,
) -> list[_ServedStep]:
    info = executor.info
    policy = CoServing(
        PolicyConfig(
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
        ),
        info,
        clock,
        finetune=settings,
    )
    generator = np.random.default_rng(1)
    samples = tuple(
        TrainingSample(
            token_ids=generator.integers(0, info.vocab_size, length).astype(np.int32),
            label_weights=np.ones(length, np.float32),
        )
        for length in lengths
    )
    policy.add_job(FinetuneJobSpec(id=_PROFILED, adapter=adapter, samples=samples))
    for number in range(num_requests):
        count = max(1, min(16, config.max_model_len // 2))
        name = f"beside-{number}"
        policy.add(_request(name, count, count, generator, info, config))
    steps = _run(policy, executor, clock)
    for event in policy.take_finetune_events():
        if isinstance(event, JobChanged) and event.adapter_id and isinstance(executor, AdapterHost):
            ref = AdapterRef(id=event.adapter_id, version=event.adapter_version)
            executor.unload_adapter(ref)
    return steps


def _request(
    name: str,
    num_prompt: int,
    num_output: int,
    generator: np.random.Generator,
    info: ExecutorInfo,
    config: ProfileConfig,
) -> Request:
    return Request(
        id=name,
        prompt_token_ids=tuple(generator.integers(0, info.vocab_size, num_prompt).tolist()),
        sampling=replace(config.sampling, max_tokens=num_output, ignore_eos=True),
    )


def _run(policy: ContinuousBatching, executor: BatchExecutor, clock: Clock) -> list[_ServedStep]:
    steps: list[_ServedStep] = []
    counter = ShapeCounter(executor.info)
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
        end_s = clock.now_s()
        steps.append(
            _ServedStep(
                shape=counter.count(batch),
                device_s=collected_s - scheduled_s,
                host_s=scheduled_s - start_s + end_s - collected_s,
            )
        )
    return steps


def _equal_shapes(steps: Sequence[_ServedStep]) -> list[MeasuredStep]:
    """One point for all iterations that carried exactly the same; empty ones are left out."""
    groups: dict[IterationShape, list[float]] = defaultdict(list)
    for step in steps:
        if not step.shape.is_empty and step.device_s > 0:
            groups[step.shape].append(step.device_s)
    return [_step(shape, seconds) for shape, seconds in groups.items()]


def _grouped(steps: Sequence[tuple[IterationShape, float]]) -> list[MeasuredStep]:
    """One point for the iterations that carry about the same, as they grow token by token.

    Iterations without a prefill are grouped by their number of decodes; others stay alone. A
    group's shape is its middle one, by context.
    """
    groups: dict[tuple[int, int], list[tuple[IterationShape, float]]] = defaultdict(list)
    for index, (shape, seconds) in enumerate(steps):
        if seconds > 0:
            key = (shape.num_decode_rows, index if shape.num_prefill_rows else -1)
            groups[key].append((shape, seconds))
    points: list[MeasuredStep] = []
    for members in groups.values():
        members.sort(key=lambda member: member[0].decode_context_tokens)
        shape = members[len(members) // 2][0]
        points.append(_step(shape, [seconds for _, seconds in members]))
    return points
