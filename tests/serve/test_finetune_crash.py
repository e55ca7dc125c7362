"""kill -9 at random instants loses at most `checkpoint_every` steps; the result is the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from serve.conftest import STOP_TIMEOUT_S, Server, running_server
from serve.fake_finetune import ADAPTER_FILE
from serve.fake_server import MODEL_NAME
from serve.real_server import Load, running_weft_serve, start_weft_serve, wait_until_ready
from serve.tiny_model import write_tiny_model
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.serve.llm import LLM
from weft.serve.store import KEPT_CHECKPOINTS

WEIGHTS_FILE = "adapter_model.safetensors"
NUM_SAMPLES = 6
NUM_EPOCHS = 8
MAX_WAIT_S = 1.2
FINISH_TIMEOUT_S = 300.0


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


def _check_no_orphans(data: Path, job_id: str) -> None:
    """Of the job, its latest checkpoints are left, without what only training needs."""
    assert [path.name for path in (data / "jobs").iterdir()] == [job_id]
    kept = list((data / "jobs" / job_id).iterdir())
    assert 0 < len(kept) <= KEPT_CHECKPOINTS
    assert all(re.fullmatch(r"step-\d+", path.name) for path in kept)
    inside = {file.name for path in kept for file in path.iterdir()}
    assert inside <= {ADAPTER_FILE, WEIGHTS_FILE}
    assert not [path for path in data.rglob("*") if "partial" in path.name]


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
    _check_no_orphans(data, job_id)


def test_five_kills(tmp_path: Path) -> None:
    _crash(tmp_path, num_kills=5, checkpoint_every=2, seed=1)


@pytest.mark.long
def test_kills_of_a_real_executor_leave_the_same_weights(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    options = {"model_dir": str(model), "min_kills": 1}
    _crash(tmp_path, num_kills=2, checkpoint_every=1, seed=2, num_epochs=40, **options)


SOAK_ROWS = [f"{i}: " + "the quick brown fox " * (i % 4 + 1) for i in range(6)]
SOAK_KILLS = int(os.environ.get("WEFT_SOAK_KILLS", "50"))
"""Of the two runs together; fewer for a quick look."""
SOAK_SEED = os.environ.get("WEFT_SOAK_SEED", "")
"""Another one kills at other instants."""
SOAK_EPOCHS = 8 * SOAK_KILLS
"""Enough that the job outlives all kills."""


def _soak_job(client: openai.OpenAI) -> str:
    rows = "\n".join(json.dumps({"text": row}) for row in SOAK_ROWS)
    file = client.files.create(file=("train.jsonl", rows.encode()), purpose="fine-tune")
    hyperparameters = {"n_epochs": SOAK_EPOCHS, "batch_size": 1}
    options: dict[str, Any] = {"seed": 11, "hyperparameters": hyperparameters}
    return client.fine_tuning.jobs.create(model="tiny", training_file=file.id, **options).id


def _kill_many(
    start: Callable[[], subprocess.Popen[str]], data: Path, rng: random.Random, every: int
) -> tuple[str, int]:
    """Kill a server under load again and again; the job, and how many requests were answered."""
    job_id, known, num_answered, num_before_ready = "", 0, 0, 0
    for number in range(SOAK_KILLS // 2):
        process = start()
        if number and rng.random() < 0.2:  # Also while it starts and sweeps.
            time.sleep(rng.uniform(0, 4))
            process.kill()
            process.wait()
            num_before_ready += 1
            continue
        server = wait_until_ready(process, data)
        client = server.openai()
        job_id = job_id or _soak_job(client)
        with Load(server) as load:
            assert _steps_reported(client, job_id) >= known - every
            time.sleep(rng.uniform(0, 1))
            job = client.fine_tuning.jobs.retrieve(job_id)
            assert job.status == "running", f"{job.status} after {number} kills: {job.error}"
            _kill(server, rng)
        num_answered += load.num_answered
        reported = job.weft["step"]  # type: ignore[attr-defined]
        known = _steps_on_disk(data, job_id)
        assert known >= reported - every, "more steps were lost than lie between checkpoints"
    assert num_before_ready < SOAK_KILLS // 4 or SOAK_KILLS < 20
    return job_id, num_answered


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["finetune-only", "coserve"])
def test_fifty_kills_of_weft_serve_under_load(policy: str, tmp_path: Path) -> None:
    """Half of them by each policy. Where windows follow the load, their log is replayed."""
    model = write_tiny_model(tmp_path / "model")
    data, windows = tmp_path / "killed", tmp_path / "windows"
    every = 1 if policy == "coserve" else 3
    flags = ["--policy", policy, "--checkpoint-every", str(every)]
    flags += ["--record-windows", str(windows)]
    start = partial(start_weft_serve, model, data, *flags)
    job_id, num_answered = _kill_many(start, data, random.Random(policy + SOAK_SEED), every)
    with running_weft_serve(model, data, *flags) as server, Load(server) as load:
        client = server.openai()
        job = _finish(client, job_id)
        events = list(client.fine_tuning.jobs.list_events(job_id, limit=10_000))
        assert client.completions.create(model=job.fine_tuned_model, prompt="x", max_tokens=1)
    num_answered += load.num_answered
    assert num_answered > 0
    metrics = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert len(metrics) == len(set(metrics)), "a step was reported twice"
    messages = [event.message for event in events]
    assert messages.count(f"New fine-tuned model created: {job.fine_tuned_model}") == 1
    assert any("Resumed after a restart" in message for message in messages)
    _check_no_orphans(data, job_id)
    options = {"replay_windows": windows / f"{job_id}.jsonl"} if policy == "coserve" else {}
    with LLM(
        model,
        dtype="float32",
        num_threads=1,
        finetune_config=FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY),
        **options,
    ) as llm:
        llm.finetune(
            SOAK_ROWS,
            lora={"rank": 16, "alpha": 32.0},
            optimizer={"lr": 2e-4},
            num_epochs=SOAK_EPOCHS,
            seed=11,
            checkpoint_every=10**6,
            output_dir=tmp_path / "alone",
        ).wait()
    wanted = (tmp_path / "alone" / "final" / WEIGHTS_FILE).read_bytes()
    assert _adapter(data) == wanted, f"not what an uninterrupted run gives ({num_answered})"
    print(f"{policy}: {SOAK_KILLS // 2} kills, {num_answered} requests answered, the same bits")
