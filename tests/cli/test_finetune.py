"""`weft finetune` and `weft export` as a user types them, over the closed-form model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from serve.fake_engine import write_model_directory
from serve.fake_finetune import ADAPTER_FILE, NAN, loss_of
from weft.base.errors import ConfigError, InvalidRequestError, UnsupportedError, WeftError
from weft.cli import export, finetune
from weft.serve.llm import LLM


@pytest.fixture(autouse=True)
def _closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "LLM", partial(LLM, builder="serve.fake_engine:build"))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    model = write_model_directory(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(4)))
    return [
        *("--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")),
        *("--epochs", "2", "--batch-size", "2"),
    ]


def test_an_adapter_is_written_and_progress_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main([*arguments, "--validation", arguments[3]]) == 0
    told = capsys.readouterr()
    assert f"step 4/4  loss {loss_of(3):.4f}  validation" in told.err
    assert "tokens/s" in told.err
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {ADAPTER_FILE, finetune.SUMMARY}
    summary = json.loads((out / finetune.SUMMARY).read_text())
    assert (summary["num_steps"], summary["num_tokens"]) == (4, 2 * 4 * 6)
    assert summary["loss"] == [loss_of(step) for step in range(4)]
    with pytest.raises(ConfigError, match="finished adapter already"):
        finetune.main(arguments)


def test_recorded_windows_are_replayed(arguments: list[str], tmp_path: Path) -> None:
    model, data, first = arguments[1], arguments[3], tmp_path / "first"
    log = tmp_path / "windows"
    with LLM(model, builder="serve.fake_engine:build", record_windows=log) as llm:
        llm.finetune(
            data,
            adapter="job",
            lora={"rank": 16, "alpha": 32.0},
            num_epochs=2,
            batch_size=2,
            output_dir=first,
        ).wait()
    replay = ["--replay-windows", str(log / "job.jsonl")]
    with pytest.raises(ConfigError, match="a replay runs from its start"):
        finetune.main([*arguments, *replay, "--resume"])
    with pytest.raises(ConfigError, match="does not fit this job"):
        finetune.main([*arguments, *replay, "--seed", "3", "--batch-size", "4"])
    (tmp_path / "out").rename(tmp_path / "failed")
    assert finetune.main([*arguments, *replay]) == 0
    wanted = (first / "final" / ADAPTER_FILE).read_text()
    assert (tmp_path / "out" / ADAPTER_FILE).read_text() == wanted


def test_a_run_that_failed_goes_on(arguments: list[str], tmp_path: Path) -> None:
    data = Path(arguments[3])
    whole = data.read_text()
    with pytest.raises(ConfigError, match="no checkpoint"):
        finetune.main([*arguments, "--resume"])
    data.write_text(whole + f'{{"text": "bad \\u000{NAN}"}}\n')
    with pytest.raises(WeftError, match="loss is nan"):
        finetune.main([*arguments, "--checkpoint-every", "1", "--epochs", "5"])
    checkpoints = list((tmp_path / "out" / finetune.CHECKPOINTS).glob("step-*"))
    if not checkpoints:
        pytest.skip("the bad row came first")
    with pytest.raises(ConfigError, match="--resume"):
        finetune.main(arguments)
    data.write_text(whole)
    latest = finetune.latest_checkpoint(tmp_path / "out" / finetune.CHECKPOINTS)
    done = int(latest.name.removeprefix("step-"))
    assert finetune.main([*arguments, "--resume"]) == 0
    summary = json.loads((tmp_path / "out" / finetune.SUMMARY).read_text())
    assert summary["first_step"] == done + 1
    assert summary["num_steps"] == done + len(summary["loss"])


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--rank", "0"], ConfigError, "rank is 0"),
        (["--learning-rate", "0"], ConfigError, "learning rate is 0"),
        (["--learning-rate", "nan"], ConfigError, "learning rate is nan"),
        (["--target-modules", "w_proj"], ConfigError, "match no module"),
        (["--max-sample-tokens", "3"], InvalidRequestError, "line 1: it has 6 tokens"),
        (["--max-model-len", "4"], InvalidRequestError, "line 1: it has 6 tokens"),
        (["--kv-cache-memory-bytes", "0"], ConfigError, "kv_cache_memory_bytes is 0"),
        (["--data", "/nowhere"], ConfigError, "cannot be read"),
    ],
)
def test_mistakes_are_refused(
    arguments: list[str], more: list[str], error: type[WeftError], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune.main([*arguments, *more])


def test_an_export_without_merge_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="--merge"):
        export.main(["--model", "a", "--adapter", "b", "--out", "c"])
