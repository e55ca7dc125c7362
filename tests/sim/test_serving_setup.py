"""How a simulated server is settled from limits, a shape, or a profile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft.base.errors import ConfigError, OutOfMemoryError
from weft.cluster.device import DeviceType
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.shapes import MODEL_SHAPES
from weft.cost.step_time import IterationShape, RooflineStepTime
from weft.engine.batch import CacheGroup, ExecutorInfo
from weft.sim.serving_setup import (
    ServingLimits,
    ServingSetup,
    profile_settings,
    setup_from_profile,
    setup_from_shape,
)
from weft.sim.workload import synthetic

CARD = DeviceType(
    name="card",
    memory_bytes=2**30,
    peak_flops={"float16": 1e13},
    memory_bandwidth_bytes_per_s=1e11,
)
SMALL = MODEL_SHAPES["110m"]
INFO = ExecutorInfo(
    num_pages=40,
    page_bytes=4096,
    groups=(
        CacheGroup(layers=(0,), page_tokens=16),
        CacheGroup(layers=(1,), page_tokens=32, window=100),
    ),
    num_layers=2,
    vocab_size=50,
    max_num_seqs=4,
)


def from_shape(**limits: int) -> ServingSetup:
    return setup_from_shape(SMALL, CARD, dtype="float16", limits=ServingLimits(**limits))


def profile(changed: dict[str, object] | None = None) -> StepTimeProfile:
    point = MeasuredStep(shape=IterationShape(num_decode_rows=1, num_sampled_rows=1), seconds=0.01)
    described = profile_settings(
        INFO, max_model_len=4096, max_num_batched_tokens=64, max_in_flight=2
    )
    return StepTimeProfile.fitted(
        model="m",
        dtype="float16",
        device="d",
        device_points=[point],
        settings=described | (changed or {}),
    )


def test_memory_left_by_the_weights_becomes_pages() -> None:
    setup = from_shape()
    left = int(0.9 * 2**30) - SMALL.weight_bytes("float16")
    assert setup.info.num_pages == left // (16 * SMALL.kv_bytes_per_token("float16"))
    assert setup.config.max_model_len == SMALL.max_model_len
    assert isinstance(setup.step_time, RooflineStepTime)
    assert setup.settings()["num_pages"] == setup.info.num_pages


def test_a_cache_shorter_than_the_context_shortens_the_longest_sequence() -> None:
    page = 16 * SMALL.kv_bytes_per_token("float16")
    setup = from_shape(kv_cache_memory_bytes=11 * page)
    assert setup.config.max_model_len == 160
    assert setup.settings()["kv_cache_tokens"] == 160
    report = setup.run(synthetic(3, 1.0, num_prompt_tokens=150, num_output_tokens=10))
    assert report.num_finished == 3
    with pytest.raises(OutOfMemoryError, match="needs 11"):
        from_shape(kv_cache_memory_bytes=11 * page, max_model_len=161).run(synthetic(1, 1.0))


def test_windowed_groups_count_no_more_than_their_window() -> None:
    # 39 pages: 7 of 32 tokens for a window of 100, a chunk of 64 and a partial page; 32 of 16.
    setup = setup_from_profile(profile())
    assert setup.config.max_model_len == 32 * 16
    report = setup.run(synthetic(2, 1.0, num_prompt_tokens=500, num_output_tokens=12))
    assert report.num_finished == 2


def test_a_profile_mirrors_its_executor_and_limits_override_it() -> None:
    setup = setup_from_profile(profile())
    assert setup.info == INFO
    assert (setup.max_in_flight, setup.config.max_num_batched_tokens) == (2, 64)
    limits = ServingLimits(max_num_seqs=2, max_in_flight=1, kv_cache_memory_bytes=20 * 4096)
    changed = setup_from_profile(profile(), limits=limits)
    assert changed.info == replace(INFO, max_num_seqs=2, num_pages=20)
    assert changed.max_in_flight == 1


@pytest.mark.parametrize(
    "settings", [{"info": None}, {"info": {"groups": []}}, {"max_model_len": "x"}]
)
def test_a_profile_that_does_not_describe_its_executor_is_refused(
    settings: dict[str, object],
) -> None:
    with pytest.raises(ConfigError, match="does not describe its executor"):
        setup_from_profile(profile(settings))


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_in_flight"])
def test_limits_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        from_shape(**{name: 0})
