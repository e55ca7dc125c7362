"""Where a server's step times come from, and what requests are promised by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.tiny_model import write_tiny_model
from weft.base.errors import ConfigError
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.step_time import IterationShape
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.serve import model_builder
from weft.serve.engine_config import EngineConfig, EngineInfo
from weft.serve.step_times import cache_directory, find_step_times


def profile(seconds: float = 0.01) -> StepTimeProfile:
    point = MeasuredStep(shape=IterationShape(num_decode_rows=1), seconds=seconds)
    return StepTimeProfile.fitted(model="m", dtype="float32", device="cpu", device_points=[point])


class Sweep:
    """Counts how often it is run."""

    def __init__(self) -> None:
        self.num_runs = 0

    def __call__(self) -> StepTimeProfile:
        self.num_runs += 1
        return profile()


def test_an_executor_is_measured_once(tmp_path: Path) -> None:
    sweep = Sweep()
    for _ in range(2):
        found = find_step_times("auto", key={"dtype": "a"}, measure=sweep, directory=tmp_path)
        assert found == profile()
    assert sweep.num_runs == 1
    find_step_times("auto", key={"dtype": "b"}, measure=sweep, directory=tmp_path)
    assert sweep.num_runs == 2


def test_what_cannot_be_read_is_measured_again(tmp_path: Path) -> None:
    sweep = Sweep()
    find_step_times("auto", key={}, measure=sweep, directory=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    assert find_step_times("auto", key={}, measure=sweep, directory=tmp_path) == profile()
    assert sweep.num_runs == 2
    assert StepTimeProfile.read(path) == profile()


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = find_step_times("auto", key={}, measure=profile, directory=tmp_path / "file" / "below")
    assert found == profile()


def test_off_measures_nothing_and_a_file_is_read(tmp_path: Path) -> None:
    sweep = Sweep()
    assert find_step_times("off", key={}, measure=sweep, directory=tmp_path) is None
    profile(0.5).write(tmp_path / "p.json")
    found = find_step_times(str(tmp_path / "p.json"), key={}, measure=sweep, directory=tmp_path)
    assert found == profile(0.5)
    with pytest.raises(ConfigError, match="missing"):
        find_step_times(str(tmp_path / "missing.json"), key={}, measure=sweep)
    assert sweep.num_runs == 0


@pytest.mark.parametrize("policy", [FinetunePolicy.INFERENCE_ONLY, FinetunePolicy.COSERVE])
def test_a_server_that_only_infers_measures_and_warms_up_no_training(
    policy: FinetunePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    warmed: list[bool] = []
    monkeypatch.setattr(
        model_builder, "warm_up_finetuning", lambda *args, **kwargs: warmed.append(True)
    )
    config = EngineConfig(
        model=str(write_tiny_model(tmp_path / "model")),
        dtype="float32",
        num_threads=1,
        kv_cache_memory_bytes=2**22,
        step_times="auto",
        finetune=FinetuneConfig(policy=policy),
    )
    trains = policy is FinetunePolicy.COSERVE
    for _ in range(2):  # By a sweep, then from what it left.
        built = model_builder.build(config)
        built.executor.close()
        found = built.step_time
        assert isinstance(found, StepTimeProfile)
        assert any(point.shape.has_finetuning for point in found.device_points) is trains
        assert any(point.shape.num_decode_rows for point in found.device_points)
    assert warmed == [True] * trains


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/weft/step-times")


def test_long_prompts_are_promised_more_time() -> None:
    info = EngineInfo(
        model_path="",
        sampling_defaults={},
        max_model_len=4096,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        vocab_size=1,
        dtype="float32",
        device="cpu",
        num_pages=1,
        page_bytes=1,
        slo_ttft_s=1.0,
        slo_ttft_by_prompt=((0, 0.0), (1024, 0.8), (2048, 2.0), (4096, 6.0)),
    )
    assert info.slo_ttft_of(100) == 1.0
    assert info.slo_ttft_of(1536) == pytest.approx(1.4)
    assert info.slo_ttft_of(4096) == info.slo_ttft_of(9999) == 6.0
