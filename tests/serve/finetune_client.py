"""What tests of finetuning over HTTP do all the time, by the unmodified openai client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

from serve.conftest import STOP_TIMEOUT_S
from serve.fake_server import MODEL_NAME

ROWS = tuple(f"row {i}" for i in range(6))
FINAL = ("succeeded", "failed", "cancelled")


def lines(*rows: str) -> bytes:
    return "\n".join(json.dumps({"text": row}) for row in rows).encode()


def upload(client: openai.OpenAI, *rows: str) -> str:
    data = lines(*(rows or ROWS))
    return client.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def create(client: openai.OpenAI, *rows: str, **options: Any) -> FineTuningJob:
    options.setdefault("hyperparameters", {"n_epochs": 2, "batch_size": 2})
    options.setdefault("model", MODEL_NAME)
    return client.fine_tuning.jobs.create(training_file=upload(client, *rows), **options)


def wait(
    client: openai.OpenAI, job_id: str, until: Callable[[FineTuningJob], bool] | None = None
) -> FineTuningJob:
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if until(job) if until is not None else job.status in FINAL:
            return job
        assert time.monotonic() < deadline_s, job
        assert job.status not in FINAL, job
        time.sleep(0.02)


def finished(client: openai.OpenAI, *rows: str, **options: Any) -> FineTuningJob:
    job = wait(client, create(client, *rows, **options).id)
    assert job.status == "succeeded", job.error
    return job
