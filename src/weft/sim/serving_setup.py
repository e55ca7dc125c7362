"""What a simulated server is: resolved once, from a model's shape and a device or a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from weft.base.errors import ConfigError
from weft.cluster.device import DeviceType, Link
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.shapes import ModelShape
from weft.cost.step_time import RooflineStepTime, StepTimeModel, kv_capacity_bytes
from weft.engine.batch import CacheGroup, ExecutorInfo
from weft.engine.config import PolicyConfig
from weft.sim.batch_executor import arena_info
from weft.sim.serving import CoServed, simulate_serving
from weft.sim.serving_report import ServingReport
from weft.sim.workload import Workload

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_FINETUNE_SAMPLES = 4
_LONGEST = 2**31 - 1
"""Tokens; positions are 32-bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLimits:
    """Limits of a server; None takes what the profile's executor had, or a default."""

    max_model_len: int | None = None
    """Default: the model's context, or what the KV cache holds where that is less."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    """Default: 90 % of the device's memory less the weights."""
    max_in_flight: int | None = None
    enable_prefix_caching: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingSetup:
    """A server to simulate, nothing left open; `run` serves a workload with it."""

    step_time: StepTimeModel
    info: ExecutorInfo
    config: PolicyConfig
    max_in_flight: int
    origin: Mapping[str, Any]
    """Where the step times come from, for reports."""

    def run(self, workload: Workload, finetune: CoServed | None = None) -> ServingReport:
        """Serve `workload` under the virtual clock, and finetune beside it.

        Raises:
            OutOfMemoryError: a job's longest sample finds no pages beside the longest request.
        """
        info = self.info
        if finetune is not None and info.max_finetune_samples < 1:
            info = replace(info, max_finetune_samples=DEFAULT_MAX_FINETUNE_SAMPLES)
        return simulate_serving(
            workload,
            step_time=self.step_time,
            info=info,
            config=self.config,
            max_in_flight=self.max_in_flight,
            finetune=finetune,
        )

    def settings(self) -> dict[str, Any]:
        """Every resolved number, for JSON."""
        return {
            **self.origin,
            "max_model_len": self.config.max_model_len,
            "max_num_seqs": self.info.max_num_seqs,
            "max_num_batched_tokens": self.config.max_num_batched_tokens,
            "enable_prefix_caching": self.config.enable_prefix_caching,
            "max_in_flight": self.max_in_flight,
            "num_pages": self.info.num_pages,
            "page_bytes": self.info.page_bytes,
            "kv_cache_tokens": _capacity_tokens(self.info, self.config.max_num_batched_tokens),
        }


def setup_from_shape(
    shape: ModelShape,
    device_type: DeviceType,
    *,
    dtype: str = "bfloat16",
    num_devices: int = 1,
    link: Link | None = None,
    host_overhead_s: float = 0.0,
    limits: ServingLimits | None = None,
) -> ServingSetup:
    """A server whose step times are a roofline.

    Raises:
        ConfigError: a number is out of its range.
        OutOfMemoryError: weights, or one sequence, do not fit the memory.
    """
    limits = limits or ServingLimits()
    step_time = RooflineStepTime(
        shape=shape,
        device_type=device_type,
        dtype=dtype,
        num_devices=num_devices,
        link=link,
        host_overhead_s=host_overhead_s,
    )
    if limits.kv_cache_memory_bytes is None:
        kv_bytes = kv_capacity_bytes(shape, device_type, dtype=dtype, num_devices=num_devices)
    else:
        kv_bytes = limits.kv_cache_memory_bytes
    info = arena_info(
        shape,
        dtype=dtype,
        kv_cache_bytes=kv_bytes,
        max_num_seqs=_chosen(limits.max_num_seqs, None, DEFAULT_MAX_NUM_SEQS, "max_num_seqs"),
    )
    origin = {
        "model": shape.name,
        "step_time": "roofline",
        "device": device_type.name,
        "num_devices": num_devices,
        "dtype": dtype,
        "host_overhead_s": host_overhead_s,
    }
    if link is not None and num_devices > 1:
        origin |= {
            "link_bytes_per_s": link.bandwidth_bytes_per_s,
            "link_latency_s": link.latency_s,
        }
    return _resolved(step_time, info, limits, shape.max_model_len, {}, origin)


def setup_from_profile(
    profile: StepTimeProfile,
    *,
    shape: ModelShape | None = None,
    limits: ServingLimits | None = None,
) -> ServingSetup:
    """A server whose step times and, where `limits` say nothing else, whose memory were measured.

    Raises:
        ConfigError: the profile does not describe its executor, or `shape` is another model's.
    """
    limits = limits or ServingLimits()
    settings = profile.settings
    try:
        info = _info_from(settings["info"])
        model_len = int(settings["max_model_len"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the profile of {profile.model!r} does not describe its executor "
            f"({type(error).__name__}: {error}); measure it again with `weft profile --serve`"
        ) from None
    if shape is not None:
        _check_same_model(profile, info, shape)
    num_pages = info.num_pages
    if limits.kv_cache_memory_bytes is not None:
        num_pages = limits.kv_cache_memory_bytes // info.page_bytes
    info = ExecutorInfo(
        num_pages=num_pages,
        page_bytes=info.page_bytes,
        groups=info.groups,
        num_layers=info.num_layers,
        vocab_size=info.vocab_size,
        max_num_seqs=_chosen(limits.max_num_seqs, None, info.max_num_seqs, "max_num_seqs"),
        max_finetune_samples=info.max_finetune_samples,
    )
    residuals = profile.device_fit.residuals
    origin = {
        "model": profile.model,
        "step_time": "profile",
        "device": profile.device,
        "dtype": profile.dtype,
        "fit_median_error": residuals.median,
        "fit_p95_error": residuals.p95,
    }
    return _resolved(profile, info, limits, model_len, settings, origin)


def profile_settings(
    info: ExecutorInfo, *, max_model_len: int, max_num_batched_tokens: int, max_in_flight: int
) -> dict[str, Any]:
    """The part of a profile's `settings` from which `setup_from_profile` mirrors the executor."""
    return {
        "info": asdict(info),
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_in_flight": max_in_flight,
    }


def _resolved(
    step_time: StepTimeModel,
    info: ExecutorInfo,
    limits: ServingLimits,
    model_len: int,
    settings: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> ServingSetup:
    budget = _chosen(
        limits.max_num_batched_tokens,
        settings.get("max_num_batched_tokens"),
        DEFAULT_MAX_NUM_BATCHED_TOKENS,
        "max_num_batched_tokens",
    )
    max_len = limits.max_model_len
    if max_len is None:
        max_len = max(1, min(model_len, _capacity_tokens(info, budget)))
    elif max_len > model_len:
        raise ConfigError(
            f"max_model_len is {max_len}; the model's context holds {model_len} tokens"
        )
    config = PolicyConfig(
        max_model_len=max_len,
        max_num_batched_tokens=budget,
        enable_prefix_caching=limits.enable_prefix_caching,
    )
    return ServingSetup(
        step_time=step_time,
        info=info,
        config=config,
        max_in_flight=_chosen(
            limits.max_in_flight, settings.get("max_in_flight"), 1, "max_in_flight"
        ),
        origin=origin,
    )


def _chosen(asked: int | None, measured: int | None, default: int, name: str) -> int:
    value = asked if asked is not None else measured if measured is not None else default
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1")
    return value


def _capacity_tokens(info: ExecutorInfo, chunk: int) -> int:
    """Tokens of the longest sequence that the pages hold, computed `chunk` tokens at a time."""

    def num_pages(num_tokens: int) -> int:
        total = 0
        for group in info.groups:
            held = num_tokens
            if group.window is not None:
                held = min(held, group.window + chunk + group.page_tokens)
            total += -(-held // group.page_tokens)
        return total

    low, high = 0, _LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if num_pages(middle) < info.num_pages else (low, middle - 1)
    return low


def _info_from(data: Mapping[str, Any]) -> ExecutorInfo:
    groups = tuple(
        CacheGroup(
            layers=tuple(group["layers"]),
            page_tokens=int(group["page_tokens"]),
            window=group["window"],
            model=int(group["model"]),
        )
        for group in data["groups"]
    )
    numbers = {key: int(data[key]) for key in data if key != "groups"}
    return ExecutorInfo(groups=groups, **numbers)


def _check_same_model(profile: StepTimeProfile, info: ExecutorInfo, shape: ModelShape) -> None:
    for name in ("num_layers", "vocab_size"):
        measured, given = getattr(info, name), getattr(shape, name)
        if measured != given:
            raise ConfigError(
                f"the profile is of {profile.model!r} with {name} {measured}; {shape.name!r} has "
                f"{given}: leave --model out, or give a profile of that model"
            )
