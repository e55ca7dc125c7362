"""Where a server's step times come from, and what requests are promised by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve.tiny_model import write_tiny_model
from weft.base.errors import ConfigError
from weft.cli.profile_serve import _refit_lines
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.online_step_time import OnlineStepTime, StepRefit
from weft.cost.step_time import IterationShape
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.serve import model_builder
from weft.serve.engine_config import EngineConfig, EngineInfo
from weft.serve.engine_core import EngineCore
from weft.serve.step_times import RefitFile, cache_directory, find_step_times, kept_refits


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


REFIT = StepRefit(factors=(1.5, 0.5, 2.0, 1.0), residual=0.2, num_observed=99)


def test_what_serving_taught_is_kept_beside_the_sweep(tmp_path: Path) -> None:
    base = find_step_times("auto", key={"a": 1}, measure=Sweep(), directory=tmp_path)
    assert base is not None
    file = RefitFile.beside(base, key={"a": 1}, directory=tmp_path)
    assert file.read() is None
    (sweep,) = tmp_path.iterdir()
    before = sweep.read_bytes()
    file.write(REFIT)
    assert file.read() == REFIT
    assert sweep.read_bytes() == before
    assert kept_refits(base, tmp_path) == [file]
    # Of another sweep it says nothing, and what is damaged is no failure.
    other = RefitFile(path=file.path, base=profile(0.5))
    assert other.read() is None
    for text in ("{", "[]", "{}", file.path.read_text().replace("1.5", "15"), "\0"):
        file.path.write_text(text)
        assert file.read() is None
    RefitFile(path=tmp_path / "none" / "x.json", base=base).write(REFIT)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_server_begins_with_what_the_last_one_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = EngineConfig(
        model=str(write_tiny_model(tmp_path / "model")),
        dtype="float32",
        num_threads=1,
        kv_cache_memory_bytes=2**22,
        step_times="auto",
    )

    def serve(config: EngineConfig, num_tokens: int) -> tuple[StepRefit | None, float]:
        """What it has learnt, and what it foresaw at first."""
        core = EngineCore(config)
        model: OnlineStepTime = core._policy.step_time
        foreseen_s = model.seconds(IterationShape(num_decode_rows=2, num_sampled_rows=2))
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        core.add(Request(id="a", prompt_token_ids=(1, 2, 3), sampling=sampling))
        while core.has_work:
            core.step()
        core.close()
        return model.refit, foreseen_s

    learnt, _ = serve(config, 60)
    assert learnt is not None
    shape = IterationShape(num_decode_rows=2, num_sampled_rows=2)
    (sweep,) = (p for p in cache_directory().iterdir() if "refit" not in p.name)
    measured = StepTimeProfile.read(sweep)
    (file,) = kept_refits(measured)
    assert file.read() == learnt
    again, foreseen_s = serve(config, 2)
    assert again is None  # It learnt too little to say anything.
    assert foreseen_s == pytest.approx(learnt.factors[0] * measured.device_s(shape))
    assert file.read() == learnt
    (line,) = _refit_lines(measured)
    assert f"({learnt.num_observed} iterations): inference x {learnt.factors[0]:.2f}" in line
    # A file that the user named is the user's.
    named = tmp_path / "named" / "profile.json"
    named.parent.mkdir()
    measured.write(named)
    _, foreseen_s = serve(replace(config, step_times=str(named)), 60)
    assert foreseen_s == pytest.approx(measured.device_s(shape))
    assert list(named.parent.iterdir()) == [named]
    assert file.read() == learnt


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
