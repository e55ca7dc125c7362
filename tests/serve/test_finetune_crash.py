"""kill -9 at random instants loses at most `checkpoint_every` steps; the result is the same."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from serve.conftest import STOP_TIMEOUT_S, Server, running_server
from serve.fake_engine import BOS, EOS, VOCAB_SIZE, write_model_directory
from serve.fake_finetune import ADAPTER_FILE
from serve.fake_server import MODEL_NAME

WEIGHTS_FILE = "adapter_model.safetensors"
NUM_SAMPLES = 6
NUM_EPOCHS = 8
MAX_WAIT_S = 1.2
FINISH_TIMEOUT_S = 90.0


def _start(client: openai.OpenAI, num_epochs: int) -> str:
    rows = "\n".join(json.dumps({"text": f"row {i}"}) for i in range(NUM_SAMPLES))
    file = client.files.create(file=("train.jsonl", rows.encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL_NAME,
        training_file=file.id,
        seed=11,
        hyperparameters={"n_epochs": num_epochs, "batch_size": 1},
    )
    return job.id


def _finish(client: openai.OpenAI, job_id: str) -> Any:
    deadline_s = time.monotonic() + FINISH_TIMEOUT_S
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert job.status == "succeeded", job.error
    return job


def _adapter(data: Path) -> bytes:
    (path,) = (data / "adapters").iterdir()
    weights = path / WEIGHTS_FILE
    return (weights if weights.exists() else path / ADAPTER_FILE).read_bytes()


def _steps_on_disk(data: Path, job_id: str) -> int:
    """The latest checkpoint that was whole when the server died."""
    names = [path.name for path in (data / "jobs" / job_id).glob("step-*")]
    return max((int(n.removeprefix("step-")) for n in names if n[5:].isdigit()), default=0)


def _steps_reported(client: openai.OpenAI, job_id: str) -> int:
    return client.fine_tuning.jobs.retrieve(job_id).weft["step"]  # type: ignore[attr-defined]


def _kill(server: Server, rng: random.Random) -> None:
    """The API process, its engine, or both; the engine goes with its owner in any case."""
    pids = [server.process.pid, server.engine_pid]
    rng.shuffle(pids)
    for pid in pids[: rng.choice((1, 2))]:
        psutil.Process(pid).send_signal(signal.SIGKILL)
    server.process.wait(STOP_TIMEOUT_S)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while psutil.pid_exists(server.engine_pid):
        assert time.monotonic() < deadline_s, "the engine is an orphan"
        time.sleep(0.01)


def _crash(
    tmp_path: Path,
    *,
    num_kills: int,
    checkpoint_every: int,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    min_kills: int = 2,
    **more: Any,
) -> None:
    rng = random.Random(seed)
    options = {"policy": "finetune-only", "checkpoint_every": checkpoint_every, **more}
    whole = tmp_path / "whole"
    with running_server(data_dir=str(whole), **options) as server:
        expected = _finish(server.openai(), _start(server.openai(), num_epochs))
    data = tmp_path / "killed"
    job_id = ""
    num_kills_in_training = 0
    known = 0
    for _ in range(num_kills):
        with running_server(data_dir=str(data), builder="build_slow", **options) as server:
            client = server.openai()
            if not job_id:
                job_id = _start(client, num_epochs)
            resumed_at = _steps_reported(client, job_id)
            assert resumed_at >= known - checkpoint_every
            time.sleep(rng.uniform(0, MAX_WAIT_S))
            job = client.fine_tuning.jobs.retrieve(job_id)
            known = job.weft["step"]  # type: ignore[attr-defined]
            num_kills_in_training += job.status == "running"
            _kill(server, rng)
        if job.status == "succeeded":
            break
        known = max(known, _steps_on_disk(data, job_id))
    assert num_kills_in_training >= min_kills
    with running_server(data_dir=str(data), **options) as server:
        client = server.openai()
        job = _finish(client, job_id)
        events = list(client.fine_tuning.jobs.list_events(job_id, limit=1000))
        assert job.trained_tokens == expected.trained_tokens
        assert client.completions.create(model=job.fine_tuned_model, prompt="x", max_tokens=1)
    assert any("Resumed after a restart" in event.message for event in events)
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert len(steps) == len(set(steps)), "a step was reported twice"
    assert _adapter(data) == _adapter(whole), "not what an uninterrupted run gives"
    assert not list((data / "jobs").iterdir())


def test_five_kills(tmp_path: Path) -> None:
    _crash(tmp_path, num_kills=5, checkpoint_every=2, seed=1)


def _tiny_model(directory: Path) -> Path:
    """Random weights of a Llama that knows the tokens of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_model_directory(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


@pytest.mark.long
def test_kills_of_a_real_executor_leave_the_same_weights(tmp_path: Path) -> None:
    model = _tiny_model(tmp_path / "model")
    options = {"model_dir": str(model), "min_kills": 1}
    _crash(tmp_path, num_kills=2, checkpoint_every=1, seed=2, num_epochs=8, **options)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path: Path) -> None:
    model = _tiny_model(tmp_path / "model")
    for round_number in range(10):
        directory = tmp_path / str(round_number)
        directory.mkdir()
        # Every other round on a real executor.
        more = {"model_dir": str(model), "num_epochs": 40} if round_number % 2 else {}
        every = 1 + round_number % 3
        _crash(directory, num_kills=5, checkpoint_every=every, seed=round_number, **more)
