"""Model shapes, the roofline of an iteration, and fits of measured iterations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weft.base.errors import ConfigError, ModelLoadError, OutOfMemoryError
from weft.cluster.device import DeviceType, Efficiency, Link
from weft.cost.fitted_step_time import Curve, MeasuredStep, StepTimeProfile, fit_steps
from weft.cost.shapes import MODEL_SHAPES, load_shape, shape_from_config
from weft.cost.step_time import IterationShape, RooflineStepTime, kv_capacity_bytes

LLAMA_8B = MODEL_SHAPES["llama-3.1-8b"]
CARD = DeviceType(
    name="card",
    memory_bytes=80 * 2**30,
    peak_flops={"bfloat16": 1e15},
    memory_bandwidth_bytes_per_s=2e12,
    efficiency=Efficiency(),
    launch_s=1e-6,
)


def decode(rows: int, context: int) -> IterationShape:
    return IterationShape(
        num_decode_rows=rows, num_sampled_rows=rows, decode_context_tokens=float(rows * context)
    )


def prefill(tokens: int, before: int = 0) -> IterationShape:
    return IterationShape(
        num_prefill_rows=1,
        num_prefill_tokens=tokens,
        num_sampled_rows=1,
        prefill_context_tokens=float(before + tokens),
        prefill_pairs=float(sum(range(before + 1, before + tokens + 1))),
    )


# ---- shapes ----


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 1.236),
        ("llama-3.1-8b", 8.030),
        ("llama-3.1-70b", 70.55),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-14b", 14.77),
        ("qwen2.5-32b", 32.76),
        ("qwen3-8b", 8.19),
        ("mistral-7b", 7.248),
    ],
)
def test_named_shapes_have_the_published_number_of_weights(name: str, billions: float) -> None:
    assert load_shape(name).num_params / 1e9 == pytest.approx(billions, rel=2e-3)


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert LLAMA_8B.kv_bytes_per_token("bfloat16") == 2 * 32 * 8 * 128 * 2
    assert LLAMA_8B.kv_bytes_per_token("float32") == 2 * LLAMA_8B.kv_bytes_per_token("bfloat16")


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def test_config_json_gives_the_shape_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shape = load_shape(str(tmp_path))
    assert (shape.num_kv_heads, shape.head_dim, shape.max_model_len) == (4, 16, 2048)
    assert not shape.tied_embeddings
    assert shape.window is None
    assert load_shape(str(tmp_path / "config.json")).num_params == shape.num_params


def test_a_window_counts_only_where_it_is_used() -> None:
    windowed = CONFIG | {"sliding_window": 8}
    assert shape_from_config(windowed, "m").window == 8
    assert shape_from_config(windowed | {"use_sliding_window": False}, "m").window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_unusable_configs_are_refused_by_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        shape_from_config(CONFIG | change, "m")


def test_an_unknown_shape_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3.1-8b'"):
        load_shape("llama-3.1-8B")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not JSON"):
        load_shape(str(tmp_path))


# ---- roofline ----


def test_one_decode_costs_reading_the_weights_and_its_context() -> None:
    roofline = RooflineStepTime(shape=LLAMA_8B, device_type=CARD)
    weights = 2 * (LLAMA_8B.num_linear_params + LLAMA_8B.num_head_params)
    context = 1000 * LLAMA_8B.kv_bytes_per_token("bfloat16")
    assert roofline.device_s(decode(1, 1000)) == pytest.approx((weights + context) / 2e12)
    assert roofline.device_s(IterationShape()) == 0.0


def test_a_long_prefill_costs_its_arithmetic() -> None:
    roofline = RooflineStepTime(shape=LLAMA_8B, device_type=CARD)
    n = 4096
    linear = 2 * LLAMA_8B.num_linear_params * n
    attention = 4 * 32 * 32 * 128 * n * (n + 1) / 2
    head_s = 2 * LLAMA_8B.num_head_params / 2e12
    expected = (linear + attention) / 1e15 + head_s
    assert roofline.device_s(prefill(n)) == pytest.approx(expected, rel=1e-6)


def test_launches_bound_a_small_prefill_and_never_a_decode() -> None:
    slow = replace(CARD, launch_s=1e-3)
    roofline = RooflineStepTime(shape=MODEL_SHAPES["110m"], device_type=slow)
    assert roofline.device_s(prefill(4)) == pytest.approx(12 * 8 * 1e-3)
    assert roofline.device_s(decode(4, 4)) < 1e-3


def test_devices_share_the_work_and_pay_for_all_reduces() -> None:
    one = RooflineStepTime(shape=LLAMA_8B, device_type=CARD)
    link = Link(bandwidth_bytes_per_s=1e11, latency_s=1e-6)
    two = replace(one, num_devices=2, link=link)
    shape = decode(8, 500)
    reduce_s = 2 * 32 * 2 * (1e-6 + 8 * 4096 * 2 / 2 / 1e11)
    assert two.device_s(shape) == pytest.approx(one.device_s(shape) / 2 + reduce_s)
    with pytest.raises(ConfigError, match="no link"):
        replace(one, num_devices=2)


def test_a_dtype_without_a_peak_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="no peak for dtype 'float16'"):
        RooflineStepTime(shape=LLAMA_8B, device_type=CARD, dtype="float16")


def test_weights_that_do_not_fit_name_the_devices_that_would_do() -> None:
    shape = MODEL_SHAPES["llama-3.1-70b"]
    with pytest.raises(OutOfMemoryError, match="2 devices would hold them"):
        kv_capacity_bytes(shape, CARD, dtype="bfloat16")
    left = kv_capacity_bytes(shape, CARD, dtype="bfloat16", num_devices=2)
    assert left == int(0.9 * 80 * 2**30 * 2) - shape.weight_bytes("bfloat16")


# ---- fits ----


def truth(shape: IterationShape) -> float:
    """Flat to 8 tokens, then linear; the head costs 1 us a row; attention by context and pairs."""
    return (
        1e-3
        + max(shape.num_tokens - 8, 0) * 2e-5
        + shape.num_sampled_rows * 1e-6
        + shape.decode_context_tokens * 3e-8
        + shape.prefill_pairs * 1e-9
        + shape.num_prefill_rows * 5e-5
    )


def mixed(rows: int, context: int, tokens: int) -> IterationShape:
    chunk = prefill(tokens)
    return replace(
        chunk,
        num_decode_rows=rows,
        num_sampled_rows=rows + 1,
        decode_context_tokens=float(rows * context),
    )


SWEEP = [
    *(decode(rows, context) for rows in (1, 2, 4, 8, 16, 32, 64) for context in (16, 256, 1024)),
    *(prefill(tokens, before) for tokens in (8, 32, 128, 512) for before in (0, 512)),
    *(mixed(rows, 512, tokens) for rows in (2, 16, 64) for tokens in (16, 64, 256)),
]


def measured(noise: float = 0.0) -> list[MeasuredStep]:
    factors = 1 + noise * np.random.default_rng(0).standard_normal(len(SWEEP))
    return [
        MeasuredStep(shape=shape, seconds=truth(shape) * factor)
        for shape, factor in zip(SWEEP, factors.tolist(), strict=True)
    ]


def test_a_fit_recovers_times_that_have_its_form_also_where_nothing_was_measured() -> None:
    fit = fit_steps(measured())
    assert fit.residuals.max < 1e-6
    for unseen in (mixed(5, 700, 100), mixed(40, 100, 30), decode(11, 600), prefill(300, 100)):
        assert fit.seconds(unseen) == pytest.approx(truth(unseen), rel=0.03)
    # Beyond the last knot the last slope goes on.
    assert fit.seconds(prefill(2048)) == pytest.approx(truth(prefill(2048)), rel=0.01)


def test_residuals_tell_the_noise_and_more_work_never_costs_less() -> None:
    fit = fit_steps(measured(noise=0.05))
    assert 0.003 < fit.residuals.median < 0.06
    assert fit.residuals.median <= fit.residuals.p95 <= fit.residuals.max
    assert fit.residuals.worst in SWEEP
    times = [fit.seconds(decode(rows, 300)) for rows in range(1, 200)]
    assert times == sorted(times)


def test_a_curve_starts_at_zero_and_goes_on_after_its_end() -> None:
    curve = Curve(knots=(2, 4), heights=(1.0, 5.0))
    assert [curve.at(x) for x in (0, 1, 2, 3, 4, 6)] == [0.0, 0.5, 1.0, 3.0, 5.0, 9.0]
    with pytest.raises(ConfigError, match="must grow"):
        Curve(knots=(4, 2), heights=(1.0, 5.0))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_points_without_a_time_are_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="positive time"):
        fit_steps([MeasuredStep(shape=decode(1, 1), seconds=seconds)])
    with pytest.raises(ConfigError, match="at least one"):
        fit_steps([])


def profile() -> StepTimeProfile:
    host = [MeasuredStep(shape=decode(rows, 16), seconds=1e-4 + rows * 1e-6) for rows in (1, 8, 64)]
    return StepTimeProfile.fitted(
        model="m",
        dtype="float32",
        device="cpu, 2 threads",
        device_points=measured(noise=0.01),
        host_points=host,
        settings={"max_model_len": 64},
    )


def test_a_profile_survives_its_file_bit_for_bit(tmp_path: Path) -> None:
    before = profile()
    before.write(tmp_path / "p.json")
    after = StepTimeProfile.read(tmp_path / "p.json")
    assert after == before
    shape = decode(5, 333)
    assert after.device_s(shape) == before.device_s(shape)
    assert after.host_s(shape) == before.host_s(shape) == pytest.approx(1.05e-4)
    assert after.device_s(IterationShape()) == 0.0
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def damaged(change: dict[str, object]) -> str:
    return json.dumps(json.loads(profile().to_json()) | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no step-time profile"),
        (damaged({"version": 9}), "version 9"),
        (damaged({"device_points": [{"seconds": 1}]}), "damaged: KeyError"),
        (damaged({"device_fit": {"curves": {"num_cats": {}}, "slopes": {}}}), "num_cats"),
    ],
)
def test_unusable_profiles_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepTimeProfile.from_json(text)


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        StepTimeProfile.read(tmp_path / "none.json")
