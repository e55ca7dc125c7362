"""Files, jobs, events, checkpoints and adapters, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from serve.postgres import find_binaries, running_postgres
from weft.base.errors import ConfigError
from weft.engine.finetune import JobStatus
from weft.serve.records import (
    InUseError,
    NotFoundError,
    Purpose,
    StorageError,
    StoredAdapter,
    StoredJob,
)
from weft.serve.store import KEPT_CHECKPOINTS, Store

OpenStore = Callable[[], Store]
_BINARIES = find_binaries()
_names = itertools.count()


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    if _BINARIES is None:
        pytest.skip("no initdb on this machine: PostgreSQL is not tested")
    with running_postgres(_BINARIES) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the same store again and again, as restarts do."""
    url: str | None = None
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_url")
        name = f"weft{next(_names)}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        url = server.replace("/postgres?", f"/{name}?")
    with contextlib.ExitStack() as stack:

        def opened() -> Store:
            stack.close()  # The server before is gone.
            store = Store(tmp_path / "data", url)
            stack.callback(store.close)
            return store

        yield opened


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()


def _job(store: Store, name: str = "ftjob-1", **values: Any) -> StoredJob:
    file = store.add_file("t", filename="a.jsonl", purpose=Purpose.FINE_TUNE, data=b"x")
    job = StoredJob(
        **{
            "id": name,
            "number": next(_names),
            "tenant": "t",
            "tenant_weight": 1.0,
            "model": "base",
            "base_model": "base",
            "suffix": "",
            "status": JobStatus.RUNNING,
            "training_file": file.id,
            "validation_file": None,
            "seed": 2**63 - 1,
            "resolved": {"lora": {"r": 8}},
            "metadata": {"a": "b"},
            "created_at": 1,
            "num_steps": 10,
            **values,
        }
    )
    store.add_job(job, "created")
    return job


def _save(store: Store, job_id: str, step: int) -> Path:
    """What an executor does: write beside, then rename."""
    path = store.checkpoint_path(job_id, step)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.mkdir()
    for name in ("adapter_config.json", "state.safetensors"):
        (partial / name).write_text("x")
    partial.rename(path)
    return path


def test_files_survive_a_restart(open_store: OpenStore) -> None:
    store = open_store()
    file = store.add_file("t", filename="a.jsonl", purpose=Purpose.FINE_TUNE, data=b"some")
    again = open_store()
    assert again.file("t", file.id) == file
    assert file.num_bytes == 4
    assert again.read_file("t", file.id) == b"some"
    again.delete_file("t", file.id)
    with pytest.raises(NotFoundError, match=file.id):
        store.file("t", file.id)
    assert not list((store.directory / "files").iterdir())


def test_another_tenants_things_do_not_exist(store: Store) -> None:
    job = _job(store)
    for look in (
        lambda: store.file("other", job.training_file),
        lambda: store.read_file("other", job.training_file),
        lambda: store.delete_file("other", job.training_file),
        lambda: store.job("other", job.id),
        lambda: store.files("other", after=job.training_file),
    ):
        with pytest.raises(NotFoundError):
            look()
    assert store.files("other").items == []
    assert store.jobs("other").items == []
    assert store.job("t", job.id) == job


def test_lists_have_pages(store: Store) -> None:
    ids = [_job(store, f"ftjob-{i}").id for i in range(5)]
    page = store.jobs("t", limit=2)
    assert [job.id for job in page.items] == [ids[4], ids[3]]
    assert page.has_more
    page = store.jobs("t", limit=3, after=ids[3])
    assert [job.id for job in page.items] == [ids[2], ids[1], ids[0]]
    assert not page.has_more
    files = [file.id for file in store.files("t", is_ascending=True).items]
    assert [file.id for file in store.files("t").items] == files[::-1]
    assert [f.id for f in store.files("t", is_ascending=True, after=files[3]).items] == files[4:]
    assert store.files("t", purpose="fine-tune-results").items == []


def test_events_are_newest_first_with_a_cursor(store: Store) -> None:
    job = _job(store)
    for step in range(1, 6):
        store.add_event(
            job.id, f"Step {step}", type="metrics", step=step, data={"step": step, "tokens": 10}
        )
    first = store.events(job.id, limit=2)
    assert [event.step for event in first.items] == [5, 4]
    assert first.has_more
    cursor = f"ftevent-{first.items[-1].number}"
    assert [e.step for e in store.events(job.id, after=cursor).items] == [3, 2, 1, None]
    with pytest.raises(NotFoundError):
        store.events(job.id, after="nonsense")


def test_a_rewound_job_forgets_later_steps(store: Store) -> None:
    job = _job(store)
    for step in range(1, 6):
        data = {"step": step, "tokens": 10 * step}
        store.add_event(job.id, "", type="metrics", step=step, data=data, job_values={"step": step})
    store.rewind(job.id, 3)
    found = store.job("t", job.id)
    assert (found.step, found.trained_tokens) == (3, 60)
    assert [row["step"] for row in store.step_metrics(job.id)] == [1, 2, 3]


def test_a_checkpoint_gets_the_numbers_that_come_after_it(store: Store) -> None:
    job = _job(store)
    for step in (1, 2):
        _save(store, job.id, step)
        store.add_checkpoint(job.id, step, {"step": step})
    data = {"step": 2, "train_loss": 1.5, "valid_loss": 2.5, "tokens": 3}
    store.add_step(job.id, "Step 2", step=2, num_steps=10, num_tokens=3, data=data)
    found = {item.step: item.metrics for item in store.checkpoints(job.id).items}
    assert found == {1: {"step": 1}, 2: data}
    assert store.job("t", job.id).trained_tokens == 3
    assert [event.step for event in store.events(job.id).items] == [2, None]


def test_old_checkpoints_go(store: Store) -> None:
    job = _job(store)
    for step in range(1, 7):
        _save(store, job.id, step)
        gone = store.add_checkpoint(job.id, step, {"step": step})
        assert gone == ([step - KEPT_CHECKPOINTS] if step > KEPT_CHECKPOINTS else [])
    found = [checkpoint.step for checkpoint in store.checkpoints(job.id).items]
    assert found == [6, 5, 4][:KEPT_CHECKPOINTS]
    assert store.checkpoint("t", job.id, 6).metrics == {"step": 6}
    for tenant, step in (("t", 3), ("other", 6)):
        with pytest.raises(NotFoundError):
            store.checkpoint(tenant, job.id, step)
    assert {p.name for p in store.job_directory(job.id).iterdir()} == {f"step-{s}" for s in found}
    assert store.latest_checkpoint(job.id) == 6
    cursor = store.checkpoints(job.id, limit=1).items[0].id
    assert [c.step for c in store.checkpoints(job.id, after=cursor).items] == [5, 4]


def test_a_crash_between_rename_and_commit_loses_nothing(open_store: OpenStore) -> None:
    store = open_store()
    job = _job(store)
    _save(store, job.id, 1)
    store.add_checkpoint(job.id, 1, {"step": 1})
    _save(store, job.id, 2)  # The crash comes here.
    partial = store.job_directory(job.id) / "step-3.partial"
    partial.mkdir()
    again = open_store()
    assert again.sweep() == [f"jobs/{job.id}/step-3.partial"]
    assert again.latest_checkpoint(job.id) == 2
    assert [c.step for c in again.checkpoints(job.id).items] == [2, 1]


def test_a_checkpoint_whose_directory_is_gone_is_not_resumed(store: Store) -> None:
    job = _job(store)
    store.add_checkpoint(job.id, 1, {"step": 1})
    assert store.latest_checkpoint(job.id) is None
    assert store.checkpoints(job.id).items == []


def test_orphans_are_swept(open_store: OpenStore) -> None:
    store = open_store()
    job = _job(store)
    done = _job(store, "ftjob-2", status=JobStatus.SUCCEEDED)
    _save(store, job.id, 1)
    _save(store, done.id, 1)
    _save(store, "ftjob-unknown", 1)
    (store.directory / "files" / "file-none").write_text("x")
    (store.directory / "files" / "file-half.partial").write_text("x")
    (store.directory / "adapters" / "ftjob-9").mkdir()
    assert open_store().sweep() == [
        "adapters/ftjob-9",
        "files/file-half.partial",
        "files/file-none",
        "jobs/ftjob-2",
        "jobs/ftjob-unknown",
    ]
    assert store.read_file("t", job.training_file) == b"x"
    assert store.checkpoint_path(job.id, 1).is_dir()


def _adapter(store: Store, job: StoredJob) -> StoredAdapter:
    final = store.job_directory(job.id) / "final"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text("{}")
    adapter = StoredAdapter(
        name=f"ft:org/base:weft::{job.id}",
        tenant="t",
        base_model="org/base",
        job_id=job.id,
        version=1,
        directory=store.take_adapter(job.id, final),
        created_at=1,
    )
    store.finish_job(job, JobStatus.SUCCEEDED, "done", results=b"step\n", adapter=adapter)
    return adapter


def test_an_adapter_is_there_with_the_end_of_its_job(open_store: OpenStore) -> None:
    store = open_store()
    job = _job(store)
    adapter = _adapter(store, job)
    again = open_store()
    assert again.adapters() == [adapter]
    done = again.job("t", job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert done.fine_tuned_model == adapter.name
    assert again.read_file("t", done.result_file or "") == b"step\n"
    assert again.events(job.id).items[0].message == "done"
    assert (again.adapter_path(adapter) / "adapter_config.json").is_file()
    assert again.sweep() == []
    with pytest.raises(NotFoundError):
        again.delete_adapter("other", adapter.name)
    again.delete_adapter("t", adapter.name)
    assert not again.adapter_path(adapter).exists()


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.SUCCEEDED])
def test_checkpoints_outlive_their_job_without_its_training_state(
    open_store: OpenStore, status: JobStatus
) -> None:
    store = open_store()
    job = _job(store)
    for step in (1, 2):
        _save(store, job.id, step)
        store.add_checkpoint(job.id, step, {"step": step})
    _save(store, job.id, 3)  # The job ends before its row is made.
    store.finish_job(job, status, "done", results=b"step\n")
    directory = store.job_directory(job.id)
    assert sorted(path.name for path in directory.iterdir()) == ["step-1", "step-2"]
    (directory / "step-1" / "state.safetensors").write_text("a crash came before this went")
    again = open_store()
    assert again.sweep() == [f"jobs/{job.id}/step-1/state.safetensors"]
    assert again.sweep() == []
    for step in (1, 2):
        path = again.checkpoint_path(job.id, step)
        assert [file.name for file in path.iterdir()] == ["adapter_config.json"]
    user = _job(again, "ftjob-2", model="name")
    with pytest.raises(InUseError, match="ftjob-2"):
        again.delete_checkpoint("t", job.id, 1, name="name")
    again.update_job(user.id, status=JobStatus.CANCELLED)
    with pytest.raises(NotFoundError):
        again.delete_checkpoint("other", job.id, 1, name="name")
    again.delete_checkpoint("t", job.id, 1, name="name")
    assert [c.step for c in again.checkpoints(job.id).items] == [2]
    again.delete_checkpoint("t", job.id, 2, name="other")
    assert not directory.exists()


def test_a_checkpoint_that_its_job_may_need_is_not_deleted(store: Store) -> None:
    job = _job(store)
    _save(store, job.id, 1)
    store.add_checkpoint(job.id, 1, {"step": 1})
    with pytest.raises(InUseError, match=job.id):
        store.delete_checkpoint("t", job.id, 1, name="name")
    assert store.latest_checkpoint(job.id) == 1


def test_what_a_job_needs_is_not_deleted(store: Store) -> None:
    adapter = _adapter(store, _job(store))
    user = _job(store, "ftjob-2", model=adapter.name)
    with pytest.raises(InUseError, match="ftjob-2"):
        store.delete_adapter("t", adapter.name)
    with pytest.raises(InUseError, match="ftjob-2"):
        store.delete_file("t", user.training_file)
    store.update_job(user.id, status=JobStatus.CANCELLED)
    store.delete_adapter("t", adapter.name)
    store.delete_file("t", user.training_file)


def test_a_job_whose_file_was_deleted_meanwhile_is_not_kept(store: Store) -> None:
    other = store.add_file("u", filename="a.jsonl", purpose=Purpose.FINE_TUNE, data=b"x")
    for name, values in (
        ("ftjob-2", {"training_file": "file-gone"}),
        ("ftjob-3", {"validation_file": "file-gone"}),
        ("ftjob-4", {"validation_file": other.id}),
    ):
        with pytest.raises(NotFoundError, match="no file with id"):
            _job(store, name, **values)
    assert store.jobs("t").items == []


def test_a_full_disk_is_an_error_with_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        store.add_file("t", filename="a", purpose=Purpose.FINE_TUNE, data=b"x")
    assert store.files("t").items == []
    assert not list((store.directory / "files").iterdir())


def test_two_servers_do_not_share_a_postgres_database(tmp_path: Path, postgres_url: str) -> None:
    first = Store(tmp_path / "a", postgres_url)
    with pytest.raises(ConfigError, match="another server"):
        Store(tmp_path / "b", postgres_url)
    first.close()
    Store(tmp_path / "b", postgres_url).close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://x/y", "not supported"),
        ("nonsense", "not one"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot be used"),
    ],
)
def test_unusable_databases_are_refused(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Store(tmp_path, url)
    assert "secret" not in str(error.value)


def test_tables_of_another_version_are_refused(tmp_path: Path) -> None:
    import sqlite3

    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "weft.db") as connection:
        connection.execute("UPDATE weft_settings SET value = '99'")
    with pytest.raises(ConfigError, match="version 99"):
        Store(tmp_path)


def test_a_cursor_beyond_the_databases_integers_is_unknown(store: Store) -> None:
    job = _job(store)
    for after in ("ftevent-" + "9" * 30, "ftevent--1", "ftevent-"):
        with pytest.raises(NotFoundError):
            store.events(job.id, after=after)
    with pytest.raises(NotFoundError):
        store.checkpoints(job.id, after=f"ftckpt-{job.id.removeprefix('ftjob-')}-{'9' * 30}")
