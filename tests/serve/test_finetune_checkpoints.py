"""Checkpoints over HTTP: they are models while they are kept, and outlive their job."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from serve.conftest import Server, running_server
from serve.fake_engine import greedy_text
from serve.fake_finetune import NAN
from serve.finetune_client import ROWS, create, finished, wait
from weft.engine.job_plan import sample_order
from weft.serve.store import KEPT_CHECKPOINTS


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.openai()


def test_a_failed_job_keeps_its_last_good_checkpoint(client: openai.OpenAI) -> None:
    rows = (*ROWS, f"bad {chr(NAN)}")
    last = len(rows) - 1
    orders = {seed: sample_order(len(rows), seed=seed, epoch=0, shuffles=True) for seed in range(9)}
    seed, num_good = next(
        (seed, order.index(last)) for seed, order in orders.items() if order.index(last) > 1
    )
    options = {"seed": seed, "hyperparameters": {"n_epochs": 1, "batch_size": 1}}
    job = wait(client, create(client, *rows, **options).id)
    assert job.status == "failed"
    assert job.error is not None
    assert f"loss is nan in step {num_good}, sample {num_good}" in job.error.message
    # The samples are shuffled: what the user can look up is the line.
    assert f"(line {len(rows)} of the training file)" in job.error.message
    newest = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id)))
    assert newest.step_number == num_good
    name = newest.fine_tuned_model_checkpoint
    answer = client.completions.create(model=name, prompt="x", max_tokens=1, temperature=0)
    assert answer.choices[0].text == greedy_text("x", 1).upper()
    # Another try may start from it.
    assert finished(client, model=name).model == name


def test_checkpoints_are_models(client: openai.OpenAI) -> None:
    job = finished(client, suffix="kept")
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [6, 5, 4]
    names = [c.fine_tuned_model_checkpoint for c in checkpoints]
    assert names[0] == f"{job.fine_tuned_model}:ckpt-step-6"
    for name in names[:2]:
        assert client.models.retrieve(name).id == name
        answer = client.completions.create(model=name, prompt="x", max_tokens=1, temperature=0)
        assert (answer.model, answer.choices[0].text) == (name, greedy_text("x", 1).upper())
    # Those that were asked for are listed; the others are loaded when they are.
    assert {name for name in names if name in [m.id for m in client.models.list()]} == set(
        names[:2]
    )
    assert client.models.delete(names[0]).deleted
    wrong = (
        names[0],
        f"{job.fine_tuned_model}:ckpt-step-3",
        names[1].replace("kept", "other"),
        f"{job.fine_tuned_model}:ckpt-step-x",
        "ft::ckpt-step-1",
    )
    for name in wrong:
        for look in (
            lambda name=name: client.completions.create(model=name, prompt="x"),
            lambda name=name: client.models.retrieve(name),
            lambda name=name: client.models.delete(name),
            lambda name=name: create(client, model=name),
        ):
            with pytest.raises(openai.NotFoundError):
                look()
    left = [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert left == [5, 4]


def test_a_running_jobs_checkpoints_come_and_go(start_server: Callable[..., Server]) -> None:
    client = start_server(builder="build_slow").openai()
    job = create(client, hyperparameters={"n_epochs": 100, "batch_size": 1})
    wait(client, job.id, lambda j: j.weft["step"] >= 2)  # type: ignore[attr-defined]
    client.fine_tuning.jobs.pause(job.id)
    newest = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id)))
    name = newest.fine_tuned_model_checkpoint
    assert client.completions.create(model=name, prompt="x", max_tokens=1).model == name
    with pytest.raises(openai.ConflictError, match="may go on from it"):
        client.models.delete(name)
    with pytest.raises(openai.ConflictError, match="has not ended"):
        create(client, model=name)
    client.fine_tuning.jobs.resume(job.id)
    step = newest.step_number + KEPT_CHECKPOINTS + 1
    wait(client, job.id, lambda j: j.weft["step"] >= step)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=name, prompt="x", max_tokens=1)
    assert name not in [model.id for model in client.models.list()]
    client.fine_tuning.jobs.cancel(job.id)
