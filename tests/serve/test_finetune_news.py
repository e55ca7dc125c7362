"""What the service makes of an engine's news, whenever they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.fake_finetune import loss_of
from weft.base.errors import ConfigError
from weft.engine.finetune import (
    FinetuneEvent,
    FinetuneJobSpec,
    JobChanged,
    JobStatus,
    StepMetrics,
)
from weft.model.tokenizer import Tokenizer
from weft.serve.api_keys import ANYONE
from weft.serve.finetune_bodies import JobBody
from weft.serve.finetune_service import FinetuneService, FinetuneServiceConfig
from weft.serve.messages import JobAction
from weft.serve.records import Purpose, StoredJob
from weft.serve.served_models import ServedModels
from weft.serve.store import Store


class HandEngine:
    """An engine whose news the test sends by hand."""

    def __init__(self) -> None:
        self.on_finetune_events: Callable[[list[FinetuneEvent]], None] | None = None

    async def add_job(self, spec: FinetuneJobSpec, *, is_paused: bool = False) -> None:
        self.changes(spec.id, JobStatus.RUNNING)

    async def control_job(self, job_id: str, action: JobAction) -> None:
        """Every job has just ended here; the news of it come later."""
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, self.changes, job_id, JobStatus.CANCELLED)
        raise ConfigError(f"job {job_id!r} is not here; it has ended")

    def says(self, event: FinetuneEvent) -> None:
        assert self.on_finetune_events is not None
        self.on_finetune_events([event])

    def changes(self, job_id: str, status: JobStatus) -> None:
        self.says(JobChanged(job_id=job_id, status=status))


def with_job(model_dir: Path, tmp_path: Path, work: Callable[..., Any]) -> None:
    """Do `work(service, engine, job)` on a service with one job of four steps."""

    async def run() -> None:
        engine, store = HandEngine(), Store(tmp_path / "data")
        loader: Any = None
        models = ServedModels(("base",), loader)
        config = FinetuneServiceConfig(base_names=("base",), max_model_len=64)
        tokenizer = Tokenizer.from_directory(model_dir)
        service = FinetuneService(store, engine, tokenizer, config, models)
        await service.start()
        data = b'{"text": "a"}\n' * 4
        purpose = Purpose.FINE_TUNE
        file = store.add_file("", filename="a.jsonl", purpose=purpose, data=data)
        body: Any = {"n_epochs": 1, "batch_size": 1}
        job = await service.create(
            ANYONE, JobBody(model="base", training_file=file.id, hyperparameters=body)
        )
        try:
            await work(service, engine, job)
        finally:
            await service.close()

    asyncio.run(run())


def step(job: StoredJob, number: int, elapsed_s: float) -> StepMetrics:
    return StepMetrics(
        job_id=job.id,
        step=number,
        num_steps=4,
        epoch=number / 4,
        loss=loss_of(number),
        lr=1e-3,
        grad_norm=1.0,
        num_tokens=2,
        elapsed_s=elapsed_s,
    )


async def seen(service: FinetuneService, job: StoredJob, **wanted: Any) -> StoredJob:
    """The job once what is wanted of it has been kept."""
    async with asyncio.timeout(10):
        while True:
            found = await service.job("", job.id)
            if all(getattr(found, name) == value for name, value in wanted.items()):
                return found
            await asyncio.sleep(0.001)


def test_a_job_that_ends_while_it_is_told_to_is_no_mistake(model_dir: Path, tmp_path: Path) -> None:
    async def work(service: FinetuneService, engine: HandEngine, job: StoredJob) -> None:
        await seen(service, job, status=JobStatus.RUNNING)
        ended = await service.control("", job.id, JobAction.CANCEL)
        assert ended.status is JobStatus.CANCELLED

    with_job(model_dir, tmp_path, work)


def test_a_pause_is_no_part_of_the_time_that_a_step_takes(model_dir: Path, tmp_path: Path) -> None:
    async def work(service: FinetuneService, engine: HandEngine, job: StoredJob) -> None:
        engine.says(step(job, 1, elapsed_s=100.0))
        found = await seen(service, job, step=1, status=JobStatus.RUNNING)
        first = service.estimated_finish(found)
        assert first is not None
        engine.changes(job.id, JobStatus.PAUSED)
        found = await seen(service, job, status=JobStatus.PAUSED)
        assert service.estimated_finish(found) is None
        engine.changes(job.id, JobStatus.RUNNING)
        found = await seen(service, job, status=JobStatus.RUNNING)
        assert service.estimated_finish(found) is None
        engine.says(step(job, 2, elapsed_s=1e6))
        found = await seen(service, job, step=2)
        assert service.estimated_finish(found) is None
        engine.says(step(job, 3, elapsed_s=100.0))
        found = await seen(service, job, step=3)
        last = service.estimated_finish(found)
        assert last is not None
        assert last < first
        engine.changes(job.id, JobStatus.CANCELLED)
        await seen(service, job, status=JobStatus.CANCELLED)

    with_job(model_dir, tmp_path, work)
