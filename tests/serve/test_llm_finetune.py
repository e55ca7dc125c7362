"""`LLM.finetune`: jobs that advance within the caller's own calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.fake_engine import greedy_text
from serve.fake_finetune import ADAPTER_FILE, NAN, loss_of
from weft.base.errors import ConfigError, InvalidRequestError
from weft.engine.finetune import JobStatus, StepMetrics
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.sampling import SamplingParams
from weft.serve.llm import LLM
from weft.serve.offline_finetune import JobFailedError

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def llm(model_dir: Path) -> Iterator[LLM]:
    config = FinetuneConfig(policy=FinetunePolicy.BUDGET, budget_tokens=16)
    with LLM(model_dir, builder="serve.fake_engine:build", finetune_config=config) as opened:
        yield opened
        opened.check_integrity()


def test_a_job_advances_only_within_calls(llm: LLM) -> None:
    job = llm.finetune(["some text"] * 40, num_epochs=2, adapter="mine")
    assert (job.id, job.status, job.adapter) == ("mine", JobStatus.QUEUED, None)
    assert job.metrics == []
    (output,) = llm.generate("x", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    assert output.outputs[0].text == greedy_text("x", 40)
    done = len(job.metrics)
    assert 0 < done < 80
    assert job.status is JobStatus.RUNNING
    seen: list[StepMetrics] = []
    assert job.wait(seen.append) is job
    assert job.status is JobStatus.SUCCEEDED
    assert [metrics.step for metrics in seen] == list(range(done + 1, 81))
    assert [metrics.loss for metrics in job.metrics[:3]] == [loss_of(0), loss_of(1), loss_of(2)]
    assert job.num_tokens == 80 * len("some text$")
    (output,) = llm.generate("x", GREEDY, lora_request=job.adapter, use_tqdm=False)
    assert output.outputs[0].text[0] == greedy_text("x", 1).upper()


def test_a_file_and_an_output_directory(llm: LLM, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    out = tmp_path / "out"
    llm.finetune(data, validation=data, batch_size=2, output_dir=out).wait()
    assert json.loads((out / "final" / ADAPTER_FILE).read_text())["num_steps"] == 3
    assert (out / "step-3").is_dir()
    again = llm.finetune(
        data, num_epochs=4, batch_size=2, output_dir=out, resume_from=out / "step-3"
    )
    assert [metrics.step for metrics in again.wait().metrics] == [4]


def test_jobs_are_paused_and_cancelled(llm: LLM) -> None:
    job = llm.finetune(["text"] * 4)
    job.pause()
    assert job.status is JobStatus.PAUSED
    with pytest.raises(ConfigError, match="resume it"):
        job.wait()
    llm.generate("x", GREEDY, use_tqdm=False)
    assert job.metrics == []
    job.resume()
    other = llm.finetune(["other"])
    other.cancel()
    assert other.status is JobStatus.CANCELLED
    assert job.wait().status is JobStatus.SUCCEEDED
    job.cancel()  # Too late: nothing happens.
    assert job.status is JobStatus.SUCCEEDED


def test_a_failure_is_raised_where_one_waits(llm: LLM) -> None:
    job = llm.finetune([f"bad {chr(NAN)}"])
    with pytest.raises(JobFailedError, match="loss is nan in step 0"):
        job.wait()
    assert job.status is JobStatus.FAILED
    assert llm.generate("x", GREEDY, use_tqdm=False)[0].outputs[0].text == greedy_text("x", 4)


def test_mistakes_are_refused_at_once(llm: LLM, tmp_path: Path) -> None:
    for message, options in (
        ("rank is 0", {"lora": {"rank": 0}}),
        ("unexpected keyword", {"lora": {"r": 8}}),
        ("learning rate", {"optimizer": {"lr": -1.0}}),
        ("one of token, sample", {"loss_normalization": "x"}),
        ("one of refuse, truncate", {"overlong_samples": "x"}),
        ("one of none, pruned, layer-input", {"remat": "x"}),
        ("num_epochs", {"num_epochs": 0}),
        ("num_epochs is 1.5; it must be a whole number", {"num_epochs": 1.5}),
        ("batch_size is '2'", {"batch_size": "2"}),
        ("checkpoint_every is 0", {"checkpoint_every": 0}),
        ("seed is -1", {"seed": -1}),
        ("max_sample_tokens is 0", {"max_sample_tokens": 0}),
        ("must be one of adamw, sgd", {"optimizer": {"name": "adam"}}),
        ("no module", {"lora": {"target_modules": ("w",)}}),
    ):
        with pytest.raises(ConfigError, match=message):
            llm.finetune(["text"], **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="line 1: it has 301 tokens"):
        llm.finetune(["x" * 300])
    with pytest.raises(ConfigError, match="cannot be read"):
        llm.finetune(tmp_path / "none.jsonl")
    first = llm.finetune(["text"], adapter="name")
    with pytest.raises(ConfigError, match="in use"):
        llm.finetune(["text"], adapter="name")
    first.wait()
    with pytest.raises(ConfigError, match="an adapter is served as 'name'"):
        llm.finetune(["text"], adapter="name")
    for row in (3, {"text": {1}}, {"text": b"bytes"}):
        with pytest.raises(InvalidRequestError, match="the data, line 2: it"):
            llm.finetune(["text", row])  # type: ignore[list-item]
