"""The service between HTTP and engine, where the disk or the database takes no more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.base.errors import ConfigError
from weft.engine.batch import AdapterRef
from weft.engine.finetune import (
    FinetuneEvent,
    FinetuneJobSpec,
    JobChanged,
    JobStatus,
    StepMetrics,
)
from weft.model.tokenizer import Tokenizer
from weft.serve import retries
from weft.serve.api_keys import Tenant
from weft.serve.finetune_bodies import JobBody
from weft.serve.finetune_service import FinetuneService, FinetuneServiceConfig
from weft.serve.messages import JobAction
from weft.serve.records import Purpose, StorageError, StoredFile, StoredJob
from weft.serve.served_models import ServedModels
from weft.serve.store import Store

FULL = "No space left on device"
TENANT = Tenant(name="t")


class Engine:
    """Takes jobs, and says what a test lets it say."""

    def __init__(self) -> None:
        self.on_finetune_events: Callable[[list[FinetuneEvent]], None] | None = None
        self.actions: list[JobAction] = []
        self.jobs: set[str] = set()
        self.paused: set[str] = set()

    async def add_job(self, spec: FinetuneJobSpec, *, is_paused: bool = False) -> None:
        self.jobs.add(spec.id)
        if is_paused:
            self.paused.add(spec.id)

    async def control_job(self, job_id: str, action: JobAction) -> None:
        self.actions.append(action)
        if job_id not in self.jobs:
            raise ConfigError(f"job {job_id!r} is not here")
        self.jobs.discard(job_id)
        self.say(JobChanged(job_id=job_id, status=JobStatus.CANCELLED))

    async def load_adapter(self, ref: AdapterRef, path: str) -> None: ...

    async def unload_adapter(self, ref: AdapterRef) -> None: ...

    def say(self, *events: FinetuneEvent) -> None:
        assert self.on_finetune_events is not None
        self.on_finetune_events(list(events))


def step(job_id: str, number: int) -> StepMetrics:
    return StepMetrics(
        job_id=job_id,
        step=number,
        num_steps=9,
        epoch=1.0,
        loss=1.0,
        lr=0.1,
        grad_norm=1.0,
        num_tokens=3,
        elapsed_s=0.1,
    )


@pytest.mark.parametrize("lasts", [True, False], ids=["for good", "for a moment"])
def test_what_cannot_be_kept_fails_its_job_alone(
    lasts: bool, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> list[StoredJob]:
        engine = Engine()
        store = Store(tmp_path / "data")
        models = ServedModels(("base",), engine)
        service = FinetuneService(
            store,
            engine,
            Tokenizer.from_directory(model_dir),
            FinetuneServiceConfig(base_names=("base",), max_model_len=64),
            models,
        )
        await service.start()
        file = await service.run(
            store.add_file, "t", filename="a", purpose=Purpose.FINE_TUNE, data=b'{"text": "abc"}'
        )
        body = JobBody(model="base", training_file=file.id)
        bad, good = [await service.create(TENANT, body) for _ in range(2)]
        add_step, finish_job = store.add_step, store.finish_job
        is_full = True

        def refuse(work: Callable[..., Any]) -> Callable[..., Any]:
            def refused(job: Any, *args: Any, **kwargs: Any) -> Any:
                if is_full and bad.id in (job, getattr(job, "id", None)):
                    raise StorageError(FULL)
                return work(job, *args, **kwargs)

            return refused

        monkeypatch.setattr(store, "add_step", refuse(add_step))
        monkeypatch.setattr(store, "finish_job", refuse(finish_job))
        if not lasts:
            monkeypatch.setattr(store, "finish_job", finish_job)
        engine.say(step(bad.id, 1), step(good.id, 1))
        while (await service.job("t", bad.id)).status is not JobStatus.FAILED:
            await asyncio.sleep(0.01)
        engine.say(step(good.id, 2))
        while (await service.job("t", good.id)).step < 2:
            await asyncio.sleep(0.01)
        assert engine.actions[0] is JobAction.CANCEL
        assert engine.jobs == {good.id}
        found = [await service.job("t", job.id) for job in (bad, good)]
        await service.close()
        return found

    bad, good = asyncio.run(run())
    assert bad.status is JobStatus.FAILED
    assert bad.error_code == "storage_full"
    assert FULL in (bad.error_message or "")
    assert bad.finished_at is not None
    assert (bad.result_file is None) is lasts
    assert good.status is JobStatus.QUEUED
    assert good.step == 2


async def started_service(
    store: Store, engine: Engine, model_dir: Path
) -> tuple[FinetuneService, StoredFile]:
    """A service, and a training file of one line in its store."""
    service = FinetuneService(
        store,
        engine,
        Tokenizer.from_directory(model_dir),
        FinetuneServiceConfig(base_names=("base",), max_model_len=64),
        ServedModels(("base",), engine),
    )
    await service.start()
    file = await service.run(
        store.add_file, "t", filename="a", purpose=Purpose.FINE_TUNE, data=b'{"text": "abc"}'
    )
    return service, file


def test_a_failure_is_kept_once_the_disk_has_room(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing at all can be written for a while, not even that the job has failed."""
    monkeypatch.setattr(retries, "RETRY_S", 0.01)

    async def run() -> StoredJob:
        engine, store = Engine(), Store(tmp_path / "data")
        service, file = await started_service(store, engine, model_dir)
        job = await service.create(TENANT, JobBody(model="base", training_file=file.id))
        num_refused, is_full = 0, True

        def refuse(work: Callable[..., Any]) -> Callable[..., Any]:
            def refused(*args: Any, **kwargs: Any) -> Any:
                nonlocal num_refused
                if not is_full:
                    return work(*args, **kwargs)
                num_refused += 1
                raise StorageError(FULL)

            return refused

        for name in ("add_step", "finish_job", "update_job"):
            monkeypatch.setattr(store, name, refuse(getattr(store, name)))
        engine.say(step(job.id, 1))
        while num_refused < 6:
            await asyncio.sleep(0.01)
        assert (await service.job("t", job.id)).status is JobStatus.QUEUED
        is_full = False
        while (found := await service.job("t", job.id)).status is not JobStatus.FAILED:
            await asyncio.sleep(0.01)
        await service.close()
        return found

    found = asyncio.run(run())
    assert found.error_code == "storage_full"
    assert FULL in (found.error_message or "")


@pytest.mark.parametrize("status", [JobStatus.RUNNING, JobStatus.PAUSED])
def test_a_restart_goes_on_under_another_name_of_the_base(
    status: JobStatus, model_dir: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        job_id = ""
        for name in ("./base", "/path/to/base/"):
            engine, store = Engine(), Store(tmp_path / "data")
            service = FinetuneService(
                store,
                engine,
                Tokenizer.from_directory(model_dir),
                FinetuneServiceConfig(base_names=(name,), max_model_len=64),
                ServedModels((name,), engine),
            )
            await service.start()
            if name == "./base":
                data = b'{"text": "abc"}'
                file = await service.run(
                    store.add_file, "t", filename="a", purpose=Purpose.FINE_TUNE, data=data
                )
                job = await service.create(TENANT, JobBody(model=name, training_file=file.id))
                job_id = job.id
                await service.run(store.update_job, job_id, status=status)
            else:
                assert engine.jobs == {job_id}
                # One that stands still does so from its first iteration on.
                assert engine.paused == ({job_id} if status is JobStatus.PAUSED else set())
                assert not engine.actions
                assert (await service.job("t", job_id)).status is status
            await service.close()

    asyncio.run(run())


class SlowEngine(Engine):
    """Takes jobs when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def add_job(self, spec: FinetuneJobSpec, *, is_paused: bool = False) -> None:
        self.is_asked.set()
        await self.may_answer.wait()
        await super().add_job(spec)


@pytest.mark.parametrize("instant", ["while the row is written", "while the engine is asked"])
def test_a_caller_that_hangs_up_leaves_a_whole_job(
    instant: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        engine = SlowEngine()
        store = Store(tmp_path / "data")
        service, file = await started_service(store, engine, model_dir)
        is_writing, may_write = asyncio.Event(), threading.Event()
        loop, add_job = asyncio.get_running_loop(), store.add_job

        def slow_add_job(job: StoredJob, message: str) -> None:
            loop.call_soon_threadsafe(is_writing.set)
            assert may_write.wait(20)
            add_job(job, message)

        monkeypatch.setattr(store, "add_job", slow_add_job)
        call = loop.create_task(
            service.create(TENANT, JobBody(model="base", training_file=file.id))
        )
        await is_writing.wait()
        if instant == "while the engine is asked":
            may_write.set()
            await engine.is_asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        may_write.set()
        engine.may_answer.set()
        await service.close()
        again = Store(tmp_path / "data")
        kept = [job.id for job in again.unfinished_jobs()]
        again.close()
        assert len(kept) == 1
        assert set(kept) == engine.jobs

    asyncio.run(run())
