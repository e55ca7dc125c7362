"""Finetuning over HTTP on the real executor: adapters of every kind, memory, checkpoints, trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.conftest import STOP_TIMEOUT_S, Server, running_server
from serve.fake_server import MODEL_NAME
from serve.finetune_client import create, finished, upload, wait
from serve.tiny_model import write_tiny_model

CACHE_BYTES = 2**22
"""What `fake_server` gives the cache of a real model."""
BUDGET_BYTES = CACHE_BYTES + 2**21
ONE_EPOCH = {"n_epochs": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("data")
    with running_server(
        model_dir=str(model), data_dir=str(data), memory_budget_bytes=BUDGET_BYTES
    ) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.openai()


def logprobs(client: openai.OpenAI, model: str) -> list[float]:
    answer = client.completions.create(
        model=model, prompt="row", max_tokens=4, temperature=0, logprobs=0
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    return found.token_logprobs


@pytest.mark.parametrize(
    "adapter",
    [
        {"lora": {"r": 4, "dropout": 0.1}},
        {"ia3": {}},
        {"bottleneck": {"r": 4, "activation": "silu"}},
    ],
    ids=lambda adapter: next(iter(adapter)),
)
def test_adapters_of_every_kind_learn_and_are_served(
    client: openai.OpenAI, adapter: dict[str, Any]
) -> None:
    weft = {**adapter, "optimizer": {"lr": 0.02}}
    job = finished(client, *["row"] * 6, hyperparameters=ONE_EPOCH, extra_body={"weft": weft})
    assert job.fine_tuned_model is not None
    base, tuned = logprobs(client, MODEL_NAME), logprobs(client, job.fine_tuned_model)
    assert base != tuned
    # The last checkpoint holds what the result holds; the first is behind it.
    latest, *_, oldest = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert logprobs(client, latest.fine_tuned_model_checkpoint) == tuned
    assert logprobs(client, oldest.fine_tuned_model_checkpoint) not in (base, tuned)
    assert logprobs(client, MODEL_NAME) == base
    # Both are adapters to start from.
    for start in (job.fine_tuned_model, oldest.fine_tuned_model_checkpoint):
        again = finished(
            client, "row", model=start, hyperparameters=ONE_EPOCH, extra_body={"weft": weft}
        )
        assert again.model == start


def test_a_job_that_cannot_fit_is_refused_with_the_number_that_would(
    client: openai.OpenAI,
) -> None:
    """`test_memory_budget` holds the number to be the least that would do."""
    weft = {"lora": {"r": 256}}
    with pytest.raises(openai.BadRequestError, match=r"budget by \d+ bytes, or lower") as refused:
        create(client, hyperparameters=ONE_EPOCH, extra_body={"weft": weft})
    assert refused.value.code == "out_of_memory"
    assert logprobs(client, MODEL_NAME)
    assert finished(client, hyperparameters=ONE_EPOCH).status == "succeeded"


def test_the_trace_shows_finetuning(
    start_server: Callable[..., Server], model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    server = start_server(model_dir=str(model), policy="coserve", trace_path=str(path))
    client = server.openai()
    job = create(client, hyperparameters=ONE_EPOCH)
    client.completions.create(model=MODEL_NAME, prompt="x" * 40, max_tokens=20)
    assert wait(client, job.id).status == "succeeded"
    server.terminate()
    assert server.process.wait(STOP_TIMEOUT_S) == 0
    events = json.loads(path.read_text())["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tokens: dict[str, int] = {}
    rows: dict[str, int] = {}
    for event in events:
        if event.get("cat") == "segments":
            kind = threads[event["tid"]]
            tokens[kind] = tokens.get(kind, 0) + event["args"]["tokens"]
            rows[kind] = rows.get(kind, 0) + event["args"]["rows"]
    num_tokens = 6 * 6  # six samples of six tokens
    assert tokens["ft_forward"] == num_tokens
    assert tokens["ft_backward"] >= num_tokens
    assert rows["optimizer"] == 3
    assert rows["checkpoint"] == 3 + 1  # and the finished adapter
    assert {"prefill", "decode"} <= set(tokens)


def test_files_that_a_job_needs_stay(client: openai.OpenAI) -> None:
    file = upload(client)
    job = client.fine_tuning.jobs.create(
        model=MODEL_NAME, training_file=file, hyperparameters={"n_epochs": 200}
    )
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted
