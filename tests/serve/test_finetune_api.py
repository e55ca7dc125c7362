"""The files and fine-tuning APIs, asked by the unmodified openai client."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.conftest import STOP_TIMEOUT_S, Server, running_server
from serve.fake_engine import greedy_text
from serve.fake_finetune import FULL_DISK, NAN, loss_of
from serve.fake_server import MODEL_NAME
from serve.finetune_client import create, finished, lines, upload, wait


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Server]:
    """20 ms an iteration: a test can act while a job runs."""
    with running_server(builder="build_slow") as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.openai()


# ---- files ----


def test_files_come_and_go(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", lines("x")), purpose="fine-tune")
    assert (file.filename, file.purpose, file.object) == ("a.jsonl", "fine-tune", "file")
    assert file.bytes == len(lines("x"))
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == lines("x")
    assert file.id in [found.id for found in client.files.list(purpose="fine-tune")]
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match=file.id):
        client.files.retrieve(file.id)


def test_file_lists_have_cursors(client: openai.OpenAI) -> None:
    ids = [upload(client, f"{i}") for i in range(5)]
    newest_first = [file.id for file in client.files.list(limit=2)]
    assert newest_first[:5] == ids[::-1]
    oldest_first = [file.id for file in client.files.list(limit=2, order="asc")]
    assert oldest_first == newest_first[::-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no line"),
        (b"not json", "line 1: it is not JSON"),
        (b'{"text": "a"}\n{"messages": [{"role": "robot", "content": "x"}]}', "line 2"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "line 1: it has no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "tools": [1]}', "`tools`"),
    ],
)
def test_malformed_files_are_refused_at_upload(
    client: openai.OpenAI, content: bytes, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.files.create(file=("a.jsonl", content), purpose="fine-tune")


def test_other_uploads_are_refused(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose must be fine-tune"):
        client.files.create(file=("a.jsonl", lines("x")), purpose="batch")
    with server.http() as http:
        refused = http.post("/v1/files", data={"purpose": "fine-tune"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "file"
        assert http.post("/v1/files", json={}).status_code == 400


def test_a_file_that_is_too_large_is_refused(start_server: Callable[..., Server]) -> None:
    client = start_server(limits={"max_file_bytes": 1000}).openai()
    with pytest.raises(openai.APIStatusError, match="max-file-bytes") as refused:
        client.files.create(file=("a.jsonl", lines("x" * 2000)), purpose="fine-tune")
    assert refused.value.status_code == 413


# ---- jobs ----


def test_a_job_runs_and_its_model_answers(client: openai.OpenAI) -> None:
    validation = upload(client, "held out")
    created = create(client, suffix="demo", seed=7, validation_file=validation, metadata={"a": "b"})
    assert created.object == "fine_tuning.job"
    assert created.status in ("queued", "running", "succeeded")
    job = wait(client, created.id)
    assert job.status == "succeeded"
    name = f"ft:{MODEL_NAME}:weft:demo:{job.id.removeprefix('ftjob-')}"
    assert job.fine_tuned_model == name
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert (job.seed, job.metadata) == (7, {"a": "b"})
    # Two epochs of six samples of six tokens, EOS included.
    assert job.trained_tokens == 2 * 6 * 6
    assert (job.model, job.error, job.estimated_finish) == (MODEL_NAME, None, None)

    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).id == name
    answer = client.completions.create(model=name, prompt="x", max_tokens=5, temperature=0)
    assert answer.model == name
    assert answer.choices[0].text[0] == greedy_text("x", 1).upper()
    base = client.completions.create(model=MODEL_NAME, prompt="x", max_tokens=5, temperature=0)
    assert base.choices[0].text == greedy_text("x", 5)


def test_the_result_file_holds_every_step(client: openai.OpenAI) -> None:
    job = finished(client, validation_file=upload(client, "held out"))
    (file_id,) = job.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for number, row in enumerate(rows):
        assert float(row["train_loss"]) == pytest.approx(loss_of(number))
    assert [row["valid_loss"] for row in rows[:2]] == ["", ""]
    assert float(rows[2]["valid_loss"]) == pytest.approx(loss_of(3) / 2)


def test_events_tell_the_story_newest_first(client: openai.OpenAI) -> None:
    job = finished(client)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # The client follows.
    texts = [event.message for event in events][::-1]
    assert texts[0] == f"Created fine-tuning job: {job.id}"
    assert texts[1] == "Fine-tuning job started"
    assert texts[-1] == f"New fine-tuned model created: {job.fine_tuned_model}"
    metrics = [event.data for event in events if event.type == "metrics"][::-1]
    assert [data["step"] for data in metrics] == [1, 2, 3, 4, 5, 6]  # type: ignore[index]
    assert metrics[0]["train_loss"] == loss_of(0)  # type: ignore[index]
    assert len({event.id for event in events}) == len(events)


def test_open_settings_are_resolved_and_echoed(client: openai.OpenAI) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = create(client, hyperparameters=auto)
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 3,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    assert job.method is not None
    assert job.method.type == "supervised"
    supervised = job.method.supervised
    assert supervised is not None
    assert supervised.hyperparameters is not None
    assert supervised.hyperparameters.n_epochs == 3
    weft = job.weft  # type: ignore[attr-defined]
    assert weft["lora"] == {
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
    }
    assert weft["optimizer"] == {"name": "adamw", "lr": 2e-4, "weight_decay": 0.0}
    assert (weft["schedule"], weft["loss_normalization"]) == ("constant", "token")
    wait(client, job.id)


def test_settings_of_our_own_are_taken(client: openai.OpenAI) -> None:
    given = {
        "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"name": "sgd", "lr": 0.5, "weight_decay": 0.1},
        "schedule": "cosine",
        "num_warmup_steps": 2,
        "max_grad_norm": 1.0,
        "loss_normalization": "sample",
        "overlong_samples": "truncate",
        "max_sample_tokens": 32,
        "remat": "layer-input",
    }
    method = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 3}},
    }
    job = client.fine_tuning.jobs.create(
        model=MODEL_NAME,
        training_file=upload(client, "x" * 99),
        method=method,  # type: ignore[arg-type]
        extra_body={"weft": given},
    )
    weft = job.weft  # type: ignore[attr-defined]
    assert {key: weft[key] for key in given} == given
    assert wait(client, job.id).trained_tokens == 32


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (
            {"ia3": {}},
            {
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            },
        ),
        (
            {"ia3": {"target_modules": "all-linear", "feedforward_modules": []}},
            {"target_modules": "all-linear", "feedforward_modules": []},
        ),
        (
            {"bottleneck": {"r": 4, "activation": "gelu"}},
            {"r": 4, "target_modules": "all-linear", "activation": "gelu"},
        ),
    ],
)
def test_other_adapters_are_taken(
    client: openai.OpenAI, given: dict[str, Any], echoed: dict[str, Any]
) -> None:
    job = create(client, extra_body={"weft": given})
    (kind,) = given
    shown = job.weft  # type: ignore[attr-defined]
    assert shown[kind] == echoed
    assert not {"lora", "ia3", "bottleneck"} & set(shown) - {kind}
    assert wait(client, job.id).status == "succeeded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nobody"}, "neither served here"),
        ({"method": {"type": "dpo"}}, "'dpo' is not supported; supported is supervised"),
        ({"method": {"type": "reinforcement"}}, "'reinforcement' is not supported"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"hyperparameters": {"batch_size": "some"}}, "batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": -1.0}}, "learning_rate_multiplier"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"weft": {"lora": {"r": 0}}}, "rank is 0"),
        ({"weft": {"lora": {"r": 257}}}, "rank is 257"),
        ({"weft": {"lora": {"alpha": -1.0}}}, "alpha"),
        ({"weft": {"lora": {"dropout": 1.0}}}, "dropout"),
        ({"weft": {"lora": {"target_modules": ["w_proj"]}}}, "match no module"),
        ({"weft": {"lora": {"target_modules": ["q_proj", "w_proj"]}}}, "'w_proj' is unknown"),
        ({"weft": {"lora": {"target_modules": "((.+)+)+!"}}}, "takes too long to match"),
        ({"weft": {"lora": {"rank": 4}}}, "unknown parameter: 'weft.lora.rank'"),
        ({"weft": {"lora": {}, "ia3": {}}}, "give one adapter"),
        ({"weft": {"ia3": {"target_modules": ["mlp"]}}}, "match no module"),
        ({"weft": {"bottleneck": {"r": 0}}}, "rank is 0"),
        ({"weft": {"bottleneck": {"activation": "tanh"}}}, "activation is 'tanh'"),
        ({"weft": {"bottleneck": {"dropout": 0.1}}}, "'weft.bottleneck.dropout'"),
        ({"weft": {"optimizer": {"name": "lion"}}}, "one of adamw, sgd"),
        ({"weft": {"optimizer": {"lr": 0}}}, "learning rate is 0"),
        ({"weft": {"schedule": "stairs"}}, "one of constant, linear, cosine"),
        ({"weft": {"loss_normalization": "batch"}}, "one of token, sample"),
        ({"weft": {"max_grad_norm": 0}}, "max_grad_norm"),
        ({"weft": {"overlong_samples": "drop"}}, "one of refuse, truncate"),
        ({"weft": {"remat": "all"}}, "one of none, pruned, layer-input"),
        ({"weft": {"max_sample_tokens": 10**6}}, "context holds"),
        ({"weft": {"max_sample_tokens": 4}}, "line 1: it has 6 tokens; at most 4"),
        (
            {
                "hyperparameters": {"learning_rate_multiplier": 1.0},
                "weft": {"optimizer": {"lr": 1e-3}},
            },
            "both given",
        ),
        ({"nonsense": 1}, "unknown parameter: 'nonsense'"),
    ],
)
def test_bad_jobs_are_refused_at_creation(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    body = {"model": MODEL_NAME, "training_file": upload(client), **options}
    model, file = body.pop("model"), body.pop("training_file")
    before = len(list(client.fine_tuning.jobs.list()))
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        client.fine_tuning.jobs.create(model=model, training_file=file, extra_body=body)
    assert refused.value.status_code in (400, 404)
    assert len(list(client.fine_tuning.jobs.list())) == before
    assert client.files.delete(file).deleted


@pytest.mark.parametrize(
    "options",
    [
        {"model": "a\0b"},
        {"training_file": "a\0b"},
        {"validation_file": "a\0b"},
        {"suffix": "a\0b"},
        {"metadata": {"a\0b": "c"}},
        {"metadata": {"a": "b\0c"}},
        {"weft": {"lora": {"target_modules": ["q\0_proj"]}}},
    ],
    ids=str,
)
def test_a_job_with_a_character_that_postgresql_cannot_keep_is_refused(
    server: Server, client: openai.OpenAI, options: dict[str, Any]
) -> None:
    body = {"model": MODEL_NAME, "training_file": upload(client), **options}
    with server.http() as http:
        refused = http.post("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 400, refused.text
    assert next(iter(options)) in refused.json()["error"]["message"]


def test_names_and_urls_with_that_character_are_refused(server: Server) -> None:
    with server.http() as http:
        # As any HTTP client may send it; python's own escape it, so the bytes are written here.
        part = b'Content-Disposition: form-data; name="'
        purpose = [b"--x", part + b'purpose"', b"", b"fine-tune"]
        file = [b"--x", part + b'file"; filename="a\0b.jsonl"', b"", lines("x")]
        body = b"\r\n".join([*purpose, *file, b"--x--", b""])
        multipart = {"Content-Type": "multipart/form-data; boundary=x"}
        answers = [http.post("/v1/files", content=body, headers=multipart)]
        for path in (
            "/v1/files/a%00",
            "/v1/files/a%00/content",
            "/v1/files?purpose=a%00",
            "/v1/files?after=a%00",
            "/v1/fine_tuning/jobs/a%00",
            "/v1/fine_tuning/jobs/a%00/events",
            "/v1/models/ft:a%00",
        ):
            answers.append(http.get(path))
        answers.append(http.delete("/v1/models/ft:a%00"))
        answers.append(http.post("/v1/completions", json={"model": "ft:a\0", "prompt": "x"}))
    for answer in answers:
        assert answer.status_code == 400, (answer.url, answer.text)
        assert "error" in answer.json()


def test_a_learning_rate_that_is_no_number_is_refused(
    client: openai.OpenAI, server: Server
) -> None:
    body = '{"model": "%s", "training_file": "%s", "weft": {"optimizer": {"lr": NaN}}}'
    with server.http() as http:
        content = body % (MODEL_NAME, upload(client))
        refused = http.post("/v1/fine_tuning/jobs", content=content)
    assert refused.status_code == 400
    assert "lr" in refused.json()["error"]["message"]


def test_a_missing_file_is_refused_by_parameter(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="file-none") as refused:
        client.fine_tuning.jobs.create(model=MODEL_NAME, training_file="file-none")
    assert refused.value.param == "training_file"
    result = finished(client).result_files[0]
    with pytest.raises(openai.BadRequestError, match="uploaded for 'fine-tune-results'"):
        client.fine_tuning.jobs.create(model=MODEL_NAME, training_file=result)


def test_a_job_starts_from_an_earlier_result(client: openai.OpenAI) -> None:
    first = finished(client)
    assert first.fine_tuned_model is not None
    second = finished(client, model=first.fine_tuned_model)
    assert second.model == first.fine_tuned_model
    # The name says the base, not the chain.
    assert second.fine_tuned_model is not None
    assert second.fine_tuned_model.startswith(f"ft:{MODEL_NAME}:weft::")
    assert second.fine_tuned_model != first.fine_tuned_model


def test_a_job_keeps_the_shape_of_the_adapter_that_it_starts_from(client: openai.OpenAI) -> None:
    shape = {"r": 4, "alpha": 12.0, "dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}
    first = finished(client, extra_body={"weft": {"lora": shape}})
    name = first.fine_tuned_model
    assert name is not None
    again: Any = create(client, model=name)
    assert again.weft["lora"] == shape
    same = {"r": 4, "dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}
    again = create(client, model=name, extra_body={"weft": {"lora": same}})
    assert again.weft["lora"] == {**shape, **same}
    for weft, message in (
        ({"lora": {"r": 8}}, "weft.lora.r is 8, but the model that the job starts from has 4"),
        ({"lora": {"alpha": 8.0}}, "weft.lora.alpha is 8.0"),
        ({"lora": {"target_modules": "all-linear"}}, "weft.lora.target_modules"),
        ({"ia3": {}}, "weft.ia3 is given, but the model .* has weft.lora"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            create(client, model=name, extra_body={"weft": weft})
    scales: Any = finished(client, extra_body={"weft": {"ia3": {}}})
    again = create(client, model=scales.fine_tuned_model)
    assert again.weft["ia3"] == scales.weft["ia3"]


def test_a_model_is_deleted(client: openai.OpenAI) -> None:
    name = finished(client).fine_tuned_model
    assert name is not None
    assert client.models.delete(name).deleted
    for look in (
        lambda: client.models.retrieve(name),
        lambda: client.models.delete(name),
        lambda: client.completions.create(model=name, prompt="x"),
        lambda: create(client, model=name),
    ):
        with pytest.raises(openai.NotFoundError):
            look()
    with pytest.raises(openai.BadRequestError, match="cannot be deleted"):
        client.models.delete(MODEL_NAME)


def test_a_loss_that_is_not_finite_fails_the_job_alone(client: openai.OpenAI) -> None:
    job = wait(client, create(client, "good", f"bad {chr(NAN)}").id)
    assert job.status == "failed"
    assert job.error is not None
    assert "loss is nan in step 0, sample" in job.error.message
    assert job.fine_tuned_model is None
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert events[0].level == "error"
    assert finished(client).status == "succeeded"


def test_a_full_disk_fails_the_job_alone(client: openai.OpenAI) -> None:
    job = wait(client, create(client, f"full {chr(FULL_DISK)}").id)
    assert job.status == "failed"
    assert job.error is not None
    assert "No space left" in job.error.message
    assert finished(client).status == "succeeded"


def test_a_job_pauses_and_resumes_and_is_cancelled(slow_server: Server) -> None:
    client = slow_server.openai()
    job = create(client, hyperparameters={"n_epochs": 100, "batch_size": 1})
    file = job.training_file
    running = wait(client, job.id, lambda j: j.weft["step"] >= 2)  # type: ignore[attr-defined]
    assert running.status == "running"
    assert running.trained_tokens is None
    assert running.estimated_finish is not None
    assert running.estimated_finish > time.time()
    paused = client.fine_tuning.jobs.pause(job.id)
    assert paused.status == "paused"
    time.sleep(0.2)
    step = client.fine_tuning.jobs.retrieve(job.id).weft["step"]  # type: ignore[attr-defined]
    time.sleep(0.3)
    held = client.fine_tuning.jobs.retrieve(job.id)
    assert (held.status, held.weft["step"]) == ("paused", step)  # type: ignore[attr-defined]
    assert held.estimated_finish is None
    with pytest.raises(openai.ConflictError, match="is paused"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait(client, job.id, lambda j: j.weft["step"] > step)  # type: ignore[attr-defined]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    numbers = [checkpoint.step_number for checkpoint in checkpoints]
    assert numbers == sorted(numbers, reverse=True)
    assert checkpoints[-1].metrics.train_loss is not None
    assert f":ckpt-step-{numbers[0]}" in checkpoints[0].fine_tuned_model_checkpoint
    with pytest.raises(openai.ConflictError, match="in use by job"):
        client.files.delete(file)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted


def test_an_adapter_in_use_is_not_deleted(slow_server: Server) -> None:
    client = slow_server.openai()
    name = finished(client, "one", hyperparameters={"n_epochs": 1}).fine_tuned_model
    assert name is not None
    job = create(client, model=name, hyperparameters={"n_epochs": 100})
    with pytest.raises(openai.ConflictError, match=job.id):
        client.models.delete(name)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.models.delete(name).deleted


def test_unknown_jobs_and_queries_are_refused(client: openai.OpenAI, server: Server) -> None:
    for look in (
        client.fine_tuning.jobs.retrieve,
        client.fine_tuning.jobs.cancel,
        client.fine_tuning.jobs.pause,
        client.fine_tuning.jobs.resume,
        client.fine_tuning.jobs.list_events,
        client.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError, match="ftjob-none"):
            look("ftjob-none")
    with server.http() as http:
        for query in ("limit=0", "limit=x", "colour=red", "metadata[a]=b", "after=ftjob-none"):
            answer = http.get(f"/v1/fine_tuning/jobs?{query}")
            assert answer.status_code in (400, 404), query


def test_job_lists_have_cursors(client: openai.OpenAI) -> None:
    ids = [finished(client, "x").id for _ in range(3)]
    found = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert found[:3] == ids[::-1]
    assert len(found) == len(set(found))


# ---- tenants ----


def test_another_tenants_things_do_not_exist(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"key-a": {"tenant": "a", "weight": 2}, "key-b": {"tenant": "b"}}')
    server = start_server(key_file=str(keys))
    mine, other = server.openai("key-a"), server.openai("key-b")
    job = finished(mine)
    name = job.fine_tuned_model
    assert name is not None
    assert job.organization_id == "org-a"
    file = job.training_file
    for look in (
        lambda: other.files.retrieve(file),
        lambda: other.files.content(file),
        lambda: other.files.delete(file),
        lambda: other.fine_tuning.jobs.retrieve(job.id),
        lambda: other.fine_tuning.jobs.cancel(job.id),
        lambda: other.fine_tuning.jobs.list_events(job.id),
        lambda: other.fine_tuning.jobs.checkpoints.list(job.id),
        lambda: other.models.retrieve(name),
        lambda: other.models.delete(name),
        lambda: other.completions.create(model=name, prompt="x"),
        lambda: create(other, model=name),
        lambda: other.completions.create(model=f"{name}:ckpt-step-6", prompt="x"),
        lambda: other.models.delete(f"{name}:ckpt-step-6"),
    ):
        with pytest.raises(openai.NotFoundError):
            look()
    mine.completions.create(model=f"{name}:ckpt-step-6", prompt="x", max_tokens=1)
    with pytest.raises(openai.NotFoundError):  # Also once it is loaded.
        other.completions.create(model=f"{name}:ckpt-step-6", prompt="x")
    assert list(other.fine_tuning.jobs.list()) == []
    assert file not in [found.id for found in other.files.list()]
    assert name not in [model.id for model in other.models.list()]
    with pytest.raises(openai.BadRequestError, match=file):
        other.fine_tuning.jobs.create(model=MODEL_NAME, training_file=file)
    assert mine.completions.create(model=name, prompt="x").model == name


# ---- restarts ----


def test_files_jobs_and_models_survive_a_restart(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    first = start_server(data_dir=str(tmp_path / "data"))
    job = finished(first.openai(), suffix="kept")
    first.terminate()
    assert first.process.wait(STOP_TIMEOUT_S) == 0
    client = start_server(data_dir=str(tmp_path / "data")).openai()
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    name = job.fine_tuned_model
    assert name is not None
    answer = client.completions.create(model=name, prompt="x", max_tokens=1, temperature=0)
    assert answer.choices[0].text == greedy_text("x", 1).upper()
    assert finished(client, model=name).status == "succeeded"
    assert client.files.content(job.result_files[0]).read().startswith(b"step,train_loss")


def test_a_paused_job_is_paused_after_a_restart(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    first = start_server(data_dir=str(tmp_path / "data"), builder="build_slow")
    client = first.openai()
    job = create(client, hyperparameters={"n_epochs": 3})
    wait(client, job.id, lambda j: j.weft["step"] >= 1)  # type: ignore[attr-defined]
    client.fine_tuning.jobs.pause(job.id)
    first.process.kill()
    first.process.wait(STOP_TIMEOUT_S)
    client = start_server(data_dir=str(tmp_path / "data")).openai()
    time.sleep(0.3)
    held = client.fine_tuning.jobs.retrieve(job.id)
    assert held.status == "paused"
    assert held.weft["step"] >= 1  # type: ignore[attr-defined]
    client.fine_tuning.jobs.resume(job.id)
    assert wait(client, job.id).status == "succeeded"


def test_without_a_data_directory_nothing_is_left(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = start_server()
    finished(server.openai())
    server.terminate()
    assert server.process.wait(STOP_TIMEOUT_S) == 0
    assert not list(tmp_path.iterdir())


def test_names_with_slashes_and_colons_work_in_urls(client: openai.OpenAI, server: Server) -> None:
    name = finished(client, suffix="a.b-c_d").fine_tuned_model
    assert name is not None
    assert "/" in name
    with server.http() as http:
        for path in (name, name.replace(":", "%3A").replace("/", "%2F")):
            assert http.get(f"/v1/models/{path}").json()["id"] == name
        quoted = httpx.URL(server.url).join(f"/v1/models/{name}")
        assert http.delete(quoted).json()["deleted"] is True
