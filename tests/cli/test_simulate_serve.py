"""`weft simulate --serve`: from files and options to numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.base.errors import ConfigError, OutOfMemoryError
from weft.cli.simulate_serve import main
from weft.cost.fitted_step_time import MeasuredStep, StepTimeProfile
from weft.cost.shapes import MODEL_SHAPES
from weft.cost.step_time import IterationShape
from weft.sim.batch_executor import arena_info
from weft.sim.serving_setup import profile_settings

CARD = ["--device", "v100-16", "--dtype", "float16"]
KEYS = {"ttft_s", "tpot_s", "throughput_tokens_per_s", "kv_peak_share", "num_finished"}


def azure(tmp_path: Path, num_rows: int = 20) -> str:
    rows = [f"2023-11-16 18:15:{i:02d}.5,{100 + 37 * i % 200},{5 + i % 7}" for i in range(num_rows)]
    path = tmp_path / "azure.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return str(path)


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(options))
    code = ended.value.code
    assert isinstance(code, int)
    return code


def results(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run(*options, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_documented_keys_and_the_resolved_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = results(capsys, "--serve", "--trace", azure(tmp_path), "--model", "qwen2.5-0.5b", *CARD)
    assert set(out) >= KEYS | {"num_preempted"}
    assert set(out["ttft_s"]) == set(out["tpot_s"]) == {"p50", "p90", "p99"}
    assert out["simulated"] is True
    assert out["num_finished"] == 20
    assert out["rate_per_s"] == pytest.approx(1.0)
    assert 0 < out["ttft_s"]["p50"] <= out["ttft_s"]["p99"]
    assert out["settings"]["device"] == "v100-16"
    assert out["settings"]["max_model_len"] == 32768


def test_options_reach_the_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--trace", azure(tmp_path), "--model", "110m", *CARD]
    plain = results(capsys, *base)
    options = [
        *("--num-requests", "10", "--rate-scale", "50", "--max-num-seqs", "2"),
        *("--max-num-batched-tokens", "32", "--max-model-len", "256", "--no-enable-prefix-caching"),
        *("--length-scale", "0.5", "--prompt-range", "20:60", "--output-range", "3:4"),
        *("--slo-ttft-s", "1", "--slo-tpot-s", "1", "--host-overhead-s", "0.01"),
    ]
    changed = results(capsys, *base, *options)
    assert plain["num_requests"] == 20
    assert changed["num_requests"] == 10
    assert changed["rate_per_s"] == pytest.approx(50.0)
    assert changed["num_generated_tokens"] in range(30, 41)
    assert changed["tpot_s"]["p50"] > 0.01 > plain["tpot_s"]["p50"]
    assert changed["slo_attainment"] == 1.0
    assert changed["settings"]["max_num_seqs"] == 2
    assert changed["settings"]["enable_prefix_caching"] is False


def test_runs_are_bit_identical_down_to_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for name in ("a", "b"):
        files = [
            "--trace-out",
            str(tmp_path / name),
            "--requests-out",
            str(tmp_path / f"{name}.csv"),
        ]
        out = results(capsys, "--trace", azure(tmp_path), "--model", "110m", *CARD, *files)
        texts.append((out, (tmp_path / name).read_text(), (tmp_path / f"{name}.csv").read_text()))
    assert texts[0] == texts[1]
    assert len(texts[0][2].splitlines()) == 21
    assert len(json.loads(texts[0][1])["traceEvents"]) > 60


def test_arrivals_can_be_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--rate", "4", "--num-requests", "30", "--model", "110m", *CARD]
    first = results(capsys, *drawn)
    assert first["num_finished"] == 30
    assert results(capsys, *drawn, "--seed", "0") == first
    assert results(capsys, *drawn, "--seed", "1")["duration_s"] != first["duration_s"]
    bursty = results(capsys, *drawn, "--burstiness", "0.1")
    assert bursty["duration_s"] != first["duration_s"]


def test_the_table_names_what_went_wrong_with_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trace", azure(tmp_path), "--model", "110m", *CARD, "--max-model-len", "150"]
    assert run(*options) == 0
    text = capsys.readouterr().out
    assert "TTFT" in text
    assert "simulated" in text
    assert "rejected" in text


def written_profile(tmp_path: Path) -> str:
    points = [
        MeasuredStep(
            shape=IterationShape(num_decode_rows=n, num_sampled_rows=n), seconds=0.02 + 0.001 * n
        )
        for n in (1, 4, 16, 64)
    ]
    shape = MODEL_SHAPES["embedded"]
    info = arena_info(shape, dtype="float32", kv_cache_bytes=2**26, max_num_seqs=16)
    profile = StepTimeProfile.fitted(
        model="embedded",
        dtype="float32",
        device="cpu",
        device_points=points,
        settings=profile_settings(
            info, max_model_len=1024, max_num_batched_tokens=128, max_in_flight=1
        ),
    )
    profile.write(tmp_path / "profile.json")
    return str(tmp_path / "profile.json")


def test_a_profile_brings_its_times_and_its_executor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written_profile(tmp_path)
    base = ["--profile", path, "--trace", azure(tmp_path)]
    out = results(capsys, *base)
    assert out["tpot_s"]["p50"] == pytest.approx(0.021, rel=1e-3)
    assert out["settings"]["step_time"] == "profile"
    assert out["settings"]["max_num_seqs"] == 16
    assert out["settings"]["max_num_batched_tokens"] == 128
    smaller = results(capsys, *base, "--model", "embedded", "--kv-cache-memory-bytes", "4000000")
    assert smaller["settings"]["num_pages"] < out["settings"]["num_pages"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "110m"], "name what arrives"),
        (["--rate", "1"], "name what to simulate"),
        (["--rate", "1", "--rate-scale", "2", "--model", "110m"], "--rate and --rate-scale"),
        (["--rate", "1", "--model", "llama-9", *CARD], "neither a known name"),
        (["--rate", "1", "--model", "110m", "--device", "abacus"], "unknown device 'abacus'"),
        (["--rate", "1", "--model", "110m", *CARD, "--prompt-range", "5"], "LOW:HIGH"),
        (["--rate", "1", "--model", "110m", *CARD, "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--rate", "1", "--model", "110m", *CARD, "--max-model-len", "4096"], "holds 2048"),
        (["--rate", "1", "--model", "110m", *CARD, "--num-devices", "0"], "num_devices is 0"),
        (["--trace", "none.csv", "--model", "110m"], "cannot be read"),
        (["--rate", "1", "--profile", "none.json"], "cannot be read"),
        (["--rate", "1", "--model", "110m", "--device", "v100-16"], "no peak for dtype"),
        (["--rate", "1", "--profile", "x", "--dtype", "float16"], "a profile fixes what --dtype"),
    ],
)
def test_wrong_options_say_what_to_do(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(options)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_layers 6; '110m' has 12"):
        main(["--rate", "1", "--profile", written_profile(tmp_path), "--model", "110m"])


def test_a_model_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="2 devices would hold them"):
        main(["--trace", azure(tmp_path), "--model", "llama-3.1-8b", *CARD])


def test_unknown_options_end_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--nope") == 2
    assert "--nope" in capsys.readouterr().err
    assert run("--help") == 0


def test_the_guides_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "simulate-serving.md"
    code = guide.read_text().split("```python\n")[1].split("```")[0]
    Path(azure(tmp_path)).rename(tmp_path / "trace.csv")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["32", "64", "128"]


def test_a_job_shares_the_iterations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--trace", azure(tmp_path), "--rate-scale", "20", "--model", "110m", *CARD]
    base += ["--finetune-tokens", "256"]
    trace = tmp_path / "trace.json"
    found = {
        name: results(capsys, *base, "--finetune", name, *more)
        for name, more in {
            "coserve": ["--max-iteration-ms", "20", "--trace-out", str(trace)],
            "budget": ["--budget-tokens", "64", "--budget-layers", "2"],
            "temporal": ["--temporal-iterations", "0"],
            "inference-only": [],
        }.items()
    }
    alone = found["inference-only"]
    assert "finetune_tokens_per_s" not in alone
    for name in ("coserve", "budget", "temporal"):
        assert found[name]["finetune_tokens_per_s"] > 0
        assert found[name]["num_finetune_steps"] > 0
        assert found[name]["num_generated_tokens"] == alone["num_generated_tokens"]
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert any("backward" in name for name in names)


def test_finetuning_options_that_would_set_nothing_are_refused() -> None:
    base = ["--rate", "5", "--num-requests", "2", "--model", "110m", *CARD]
    for options, message in [
        (["--budget-layers", "3"], "there is no --finetune"),
        (["--finetune", "temporal", "--budget-layers", "3"], "not with --finetune temporal"),
        (["--finetune", "coserve", "--finetune-tokens", "1"], "at least 2"),
        (["--finetune", "coserve", "--slo-tpot-s", "1"], "both objectives"),
    ]:
        with pytest.raises(ConfigError, match=message):
            main([*base, *options])
