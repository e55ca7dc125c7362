"""Finetuning jobs on behalf of tenants: between the HTTP API, the store and the engine.

The engine's news are written down in the order in which they come, by one thread, so that what a
caller is shown has been kept. After a restart every job that had not ended goes on from its latest
checkpoint; the order of samples follows from the job's seed, so nothing else needs to be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from weft.base.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    OutOfMemoryError,
    WeftError,
)
from weft.engine.batch import AdapterRef
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneEvent,
    FinetuneJobSpec,
    JobChanged,
    JobStatus,
    StepMetrics,
    TrainingSample,
)
from weft.model.tokenizer import Tokenizer
from weft.serve.api_keys import Tenant
from weft.serve.finetune_bodies import JobBody, JobSettings, resolve_settings
from weft.serve.finetune_data import Example, OverlongSamples, encode_examples, read_examples
from weft.serve.finetune_objects import metrics_csv, model_name
from weft.serve.finetuned_models import FinetunedModels
from weft.serve.messages import JobAction
from weft.serve.pattern_check import check_patterns
from weft.serve.records import (
    NotFoundError,
    Page,
    StorageError,
    StoredAdapter,
    StoredJob,
)
from weft.serve.retries import Retries
from weft.serve.served_models import ServedModels
from weft.serve.store import Store

FINAL_DIRECTORY = "final"
"""Beside a job's checkpoints: the adapter alone, once the job is done."""
_ANSWER_TIMEOUT_S = 30.0

logger = logging.getLogger("weft.server")
T = TypeVar("T")


class FinetuneEngine(Protocol):
    """What the service needs of an engine client."""

    on_finetune_events: Callable[[list[FinetuneEvent]], None] | None

    async def add_job(self, spec: FinetuneJobSpec, *, is_paused: bool = False) -> None:
        """Start a job, or have it stand by."""
        ...

    async def control_job(self, job_id: str, action: JobAction) -> None:
        """Cancel, pause or resume a job."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneServiceConfig:
    """How jobs are run."""

    base_names: tuple[str, ...]
    """Names of the model that jobs may start from; the first is in the results' names."""
    max_model_len: int
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; None: as few as cost little."""


class FinetuneService:
    """All jobs of a server. Belongs to one event loop; the store to one thread."""

    def __init__(
        self,
        store: Store,
        engine: FinetuneEngine,
        tokenizer: Tokenizer,
        config: FinetuneServiceConfig,
        models: ServedModels,
    ) -> None:
        self._store = store
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._models = models
        self._results = FinetunedModels(store, models, run=self.run)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._events: asyncio.Queue[FinetuneEvent] = asyncio.Queue()
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._latest: dict[str, StepMetrics] = {}
        self._finish_at: dict[str, float] = {}
        self._was_paused: set[str] = set()
        """Jobs whose next step will have taken as long as their pause."""
        self._task: asyncio.Task[None] | None = None
        self._retries = Retries(self.run)
        self._begun: set[asyncio.Task[None]] = set()
        """Work that goes on to its end without its caller."""

    # ---- life ----

    async def start(self) -> None:
        """Sweep what a crash left, serve the adapters that there are, go on with the jobs."""
        for path in await self.run(self._store.sweep):
            logger.warning("removed %s: a crash left it unfinished", path)
        for adapter in await self.run(self._store.adapters):
            path = str(self._store.adapter_path(adapter))
            try:
                await self._models.add(adapter.name, path, id=adapter.job_id, tenant=adapter.tenant)
            except WeftError as error:
                logger.warning("adapter %s is not served: %s", adapter.name, error)
        self._engine.on_finetune_events = self._hear
        self._task = asyncio.get_running_loop().create_task(self._write_events())
        for job in await self.run(self._store.unfinished_jobs):
            await self._go_on(job)

    async def close(self) -> None:
        """Write down what has been heard, then stop listening. Jobs go on after a restart."""
        await asyncio.gather(*self._begun, return_exceptions=True)
        self._engine.on_finetune_events = None
        if self._task is not None:
            await asyncio.wait_for(self._events.join(), _ANSWER_TIMEOUT_S)
            self._task.cancel()
        self._retries.close()
        self._thread.shutdown()
        self._store.close()

    async def run(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Do work on the store, in its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: work(*args, **kwargs))

    @property
    def store(self) -> Store:
        """To be used within `run` only."""
        return self._store

    @property
    def latest_steps(self) -> Mapping[str, StepMetrics]:
        """The latest step of every job that has not ended, for metrics."""
        return self._latest

    # ---- what callers ask for ----

    async def create(self, tenant: Tenant, body: JobBody) -> StoredJob:
        """Check everything, start a job and keep it.

        Raises:
            InvalidRequestError: a setting or a line of a file is refused; the message says which.
            OutOfMemoryError: the job does not fit; the message says what would do.
        """
        initial = await self._initial_adapter(tenant.name, body.model)
        earlier = None
        if initial is not None:
            origin = await self._results.origin(tenant.name, body.model)
            earlier = JobSettings.from_json(origin.resolved)
        training = await self._read(tenant.name, body.training_file, "training_file")
        validation = None
        if body.validation_file is not None:
            validation = await self._read(tenant.name, body.validation_file, "validation_file")
        examples = await asyncio.to_thread(_examples, training, validation)
        settings = resolve_settings(
            body,
            num_samples=len(examples.training),
            max_model_len=self._config.max_model_len,
            earlier=earlier,
        )
        await check_patterns(settings.adapter())
        samples, checked = await asyncio.to_thread(self._encode, settings, examples)
        job = StoredJob(
            id=f"ftjob-{uuid.uuid4().hex[:24]}",
            number=time.time_ns(),
            tenant=tenant.name,
            tenant_weight=tenant.weight,
            model=body.model,
            base_model=self._config.base_names[0],
            suffix=body.suffix or "",
            status=JobStatus.QUEUED,
            training_file=body.training_file,
            validation_file=body.validation_file,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            resolved=settings.to_json(),
            metadata=body.metadata,
            created_at=int(time.time()),
            num_steps=settings.n_epochs * -(-len(samples) // settings.batch_size),
            epoch_tokens=sum(sample.num_tokens for sample in samples),
        )
        await self._to_its_end(self._begin(job, samples, checked, initial=initial))
        return await self.job(tenant.name, job.id)

    async def job(self, tenant: str, job_id: str) -> StoredJob:
        """One job; NotFoundError where it is not this tenant's."""
        return await self.run(self._store.job, tenant, job_id)

    async def control(self, tenant: str, job_id: str, action: JobAction) -> StoredJob:
        """Cancel, pause or resume a job; returns it as it is then.

        Raises:
            InvalidRequestError: it is in no state for that.
        """
        job = await self.job(tenant, job_id)
        wanted = {
            JobAction.CANCEL: (JobStatus.CANCELLED,),
            JobAction.PAUSE: (JobStatus.PAUSED,),
            JobAction.RESUME: (JobStatus.QUEUED, JobStatus.RUNNING),
        }[action]
        allowed = {
            JobAction.CANCEL: (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED),
            JobAction.PAUSE: (JobStatus.QUEUED, JobStatus.RUNNING),
            JobAction.RESUME: (JobStatus.PAUSED,),
        }[action]
        if job.status not in allowed:
            raise InvalidRequestError(
                f"job {job_id} is {job.status}; {action} needs one that is {' or '.join(allowed)}",
                "id",
                "wrong_state",
            )
        # A ConfigError: it has ended just now, and the news of that are on their way to the store.
        with contextlib.suppress(ConfigError):
            await self._engine.control_job(job_id, action)
        deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
        while True:
            changed = self._change_of(job_id)
            job = await self.job(tenant, job_id)
            if job.status in wanted or job.status.is_final:
                return job
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                await changed

    async def serve_checkpoint(self, tenant: str, name: str) -> None:
        """Load a checkpoint that is asked for by its name; other names are ignored."""
        await self._results.serve_checkpoint(tenant, name)

    async def delete_adapter(self, tenant: str, name: str) -> None:
        """Delete a finished adapter or a checkpoint; running requests keep it to their end."""
        await self._to_its_end(self._results.delete(tenant, name))

    async def checkpoints(self, tenant: str, job_id: str, **page: Any) -> tuple[StoredJob, Page]:
        """A job and its checkpoints."""
        job = await self.job(tenant, job_id)
        return job, await self.run(self._store.checkpoints, job_id, **page)

    def estimated_finish(self, job: StoredJob) -> int | None:
        """When a running job will have ended, at its present speed; Unix seconds."""
        finish_at = self._finish_at.get(job.id)
        is_running = job.status is JobStatus.RUNNING
        return int(finish_at) if is_running and finish_at is not None else None

    # ---- starting jobs ----

    async def _initial_adapter(self, tenant: str | None, name: str) -> str | None:
        if name in self._config.base_names:
            return None
        try:
            return await self._results.path(tenant, name)
        except NotFoundError:
            raise InvalidRequestError(
                f"model {name!r} is neither served here ({', '.join(self._config.base_names)}) nor "
                "one of your fine-tuned models",
                "model",
                "model_not_found",
            ) from None

    async def _read(self, tenant: str, file_id: str, param: str) -> bytes:
        try:
            file = await self.run(self._store.file, tenant, file_id)
        except NotFoundError as error:
            raise InvalidRequestError(error.message, param, "file_not_found") from None
        if file.purpose != "fine-tune":
            raise InvalidRequestError(
                f"file {file_id} was uploaded for {file.purpose!r}; the purpose must be fine-tune",
                param,
            )
        return await self.run(self._store.read_file, tenant, file_id)

    def _encode(
        self, settings: JobSettings, examples: _Examples
    ) -> tuple[tuple[TrainingSample, ...], tuple[TrainingSample, ...]]:
        overlong = OverlongSamples(settings.overlong_samples)
        training, validation = (
            _naming(
                param,
                partial(
                    encode_examples,
                    lines,
                    self._tokenizer,
                    max_tokens=settings.max_sample_tokens,
                    overlong=overlong,
                    what=what,
                ),
            )
            for (what, param), lines in zip(
                _FILES, (examples.training, examples.validation), strict=True
            )
        )
        return training, validation

    async def _begin(
        self,
        job: StoredJob,
        samples: tuple[TrainingSample, ...],
        validation: tuple[TrainingSample, ...],
        *,
        initial: str | None,
    ) -> None:
        """Keep a new job and start it; where the engine refuses it, nothing is kept."""
        # The row first: the engine's news of a job that is not kept would be lost.
        await self.run(self._store.add_job, job, f"Created fine-tuning job: {job.id}")
        try:
            await self._submit(job, samples, validation, initial=initial, resume_step=None)
        except BaseException:
            await self.run(self._store.remove_job, job.id)
            raise

    async def _to_its_end(self, work: Coroutine[None, None, None]) -> None:
        """Do work whose half would be worse than nothing, whether or not its caller hangs up."""
        task = asyncio.get_running_loop().create_task(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # Nobody waits for it any more; what becomes of it is not to be reported as lost.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _submit(
        self,
        job: StoredJob,
        samples: tuple[TrainingSample, ...],
        validation: tuple[TrainingSample, ...],
        *,
        initial: str | None,
        resume_step: int | None,
    ) -> None:
        directory = self._store.job_directory(job.id)
        resumed = None
        if resume_step is not None:
            resumed = str(self._store.checkpoint_path(job.id, resume_step))
        spec = JobSettings.from_json(job.resolved).spec(
            job.id,
            samples=samples,
            validation=validation,
            seed=job.seed,
            tenant=job.tenant,
            tenant_weight=job.tenant_weight,
            checkpoint_every=self._config.checkpoint_every,
            checkpoint_dir=str(directory),
            resume_from=resumed,
            initial_adapter=initial,
        )
        await self.run(directory.mkdir, parents=True, exist_ok=True)
        try:
            await self._engine.add_job(spec, is_paused=job.status is JobStatus.PAUSED)
        except ConfigError as error:
            raise InvalidRequestError(str(error), "weft") from None
        except OutOfMemoryError as error:
            raise InvalidRequestError(str(error), None, "out_of_memory") from None

    async def _go_on(self, job: StoredJob) -> None:
        """Start a job again that a restart has interrupted."""
        step = await self.run(self._store.latest_checkpoint, job.id)
        try:
            await self.run(self._store.rewind, job.id, step or 0)
            # The base may be called otherwise by now: by another path to it, say.
            is_of_base = not job.model.startswith("ft:")
            initial = None if is_of_base else await self._initial_adapter(None, job.model)
            training = await self.run(self._store.read_file, job.tenant, job.training_file)
            validation = None
            if job.validation_file is not None:
                validation = await self.run(self._store.read_file, job.tenant, job.validation_file)
            settings = JobSettings.from_json(job.resolved)
            examples = await asyncio.to_thread(_examples, training, validation)
            samples, checked = await asyncio.to_thread(self._encode, settings, examples)
            await self._submit(job, samples, checked, initial=initial, resume_step=step)
        except EngineDeadError:
            raise
        except (WeftError, OSError) as error:
            logger.warning("job %s cannot go on: %s", job.id, error)
            await self._end(job, JobStatus.FAILED, str(error), code="cannot_resume")
            return
        text = f"Resumed after a restart at step {step or 0} of {job.num_steps}"
        await self.run(self._store.add_event, job.id, text)
        logger.warning("job %s goes on at step %d of %d", job.id, step or 0, job.num_steps)

    # ---- the engine's news ----

    def _hear(self, events: list[FinetuneEvent]) -> None:
        for event in events:
            self._events.put_nowait(event)

    async def _write_events(self) -> None:
        while True:
            event = await self._events.get()
            try:
                await self._write(event)
            except NotFoundError:
                pass  # A job that was refused after all; nobody knows it.
            except StorageError as error:
                await self._fail_unkept(event.job_id, error)
            except Exception:
                logger.exception("news of job %s could not be kept", event.job_id)
            finally:
                self._events.task_done()

    async def _write(self, event: FinetuneEvent) -> None:
        match event:
            case StepMetrics():
                self._estimate(event)
                await self.run(self._keep_metrics, event)
            case CheckpointSaved() if event.path.endswith(f"step-{event.num_steps}"):
                await self._keep_checkpoint(event)
            case CheckpointSaved():
                pass  # The final adapter: kept with the job's end.
            case JobChanged():
                await self._change(event)
                for waiter in self._waiters.pop(event.job_id, []):
                    if not waiter.done():
                        waiter.set_result(None)

    async def _keep_checkpoint(self, event: CheckpointSaved) -> None:
        metrics = self._metrics_at(event.job_id, event.num_steps)
        gone = await self.run(self._store.add_checkpoint, event.job_id, event.num_steps, metrics)
        await self._results.checkpoints_gone(event.job_id, gone)

    def _keep_metrics(self, event: StepMetrics) -> None:
        loss = f"{event.loss:.4f}"
        if event.validation_loss is not None:
            loss += f", validation loss={event.validation_loss:.4f}"
        self._store.add_step(
            event.job_id,
            f"Step {event.step}/{event.num_steps}: training loss={loss}",
            step=event.step,
            num_steps=event.num_steps,
            num_tokens=event.num_tokens,
            data=_metrics(event),
        )

    async def _change(self, event: JobChanged) -> None:
        status = event.status
        job = await self.run(self._store.job, None, event.job_id)
        if job.status.is_final:
            # It was given up while nothing could be written; its history ends now that this can.
            text = job.error_message or f"Fine-tuning job {job.status}"
            await self._end(job, job.status, text, code=job.error_code)
        elif status is JobStatus.SUCCEEDED:
            await self._succeed(job, event)
        elif status.is_final:
            code = "job_failed" if status is JobStatus.FAILED else None
            text = event.message or f"Fine-tuning job {status}"
            await self._end(job, status, text, code=code)
        elif job.status is not status and not job.status.is_final:
            if status is JobStatus.PAUSED:
                self._finish_at.pop(job.id, None)
                self._was_paused.add(job.id)
            text = {
                JobStatus.QUEUED: "Fine-tuning job queued",
                JobStatus.RUNNING: "Fine-tuning job started",
                JobStatus.PAUSED: "Fine-tuning job paused",
            }[event.status]
            await self.run(self._store.add_event, job.id, text, job_values={"status": status.value})

    async def _succeed(self, job: StoredJob, event: JobChanged) -> None:
        source = self._store.job_directory(job.id) / FINAL_DIRECTORY
        directory = await self.run(self._store.take_adapter, job.id, source)
        adapter = StoredAdapter(
            name=model_name(job),
            tenant=job.tenant,
            base_model=job.base_model,
            job_id=job.id,
            version=max(1, event.adapter_version),
            directory=directory,
            created_at=int(time.time()),
        )
        ref = AdapterRef(id=event.adapter_id, version=event.adapter_version)
        await self._models.add(
            adapter.name,
            str(self._store.adapter_path(adapter)),
            id=job.id,
            tenant=job.tenant,
            published=ref if event.adapter_id else None,
        )
        await self._end(
            job,
            JobStatus.SUCCEEDED,
            f"New fine-tuned model created: {adapter.name}",
            adapter=adapter,
        )

    async def _end(
        self,
        job: StoredJob,
        status: JobStatus,
        message: str,
        *,
        code: str | None = None,
        adapter: StoredAdapter | None = None,
    ) -> None:
        self._latest.pop(job.id, None)
        self._finish_at.pop(job.id, None)
        self._was_paused.discard(job.id)
        trained_tokens = None
        if adapter is not None:  # A crash may have taken the reports of some steps, not the steps.
            trained_tokens = JobSettings.from_json(job.resolved).n_epochs * job.epoch_tokens

        def end() -> None:
            self._store.finish_job(
                job,
                status,
                message,
                results=metrics_csv(self._store.step_metrics(job.id)),
                error_code=code,
                adapter=adapter,
                trained_tokens=trained_tokens,
            )

        await self.run(end)

    async def _fail_unkept(self, job_id: str, error: StorageError) -> None:
        """The disk or the database is full: this job ends, the server and its requests do not."""
        logger.error("job %s ends: %s", job_id, error)
        self._latest.pop(job_id, None)
        self._finish_at.pop(job_id, None)
        try:
            await self._engine.control_job(job_id, JobAction.CANCEL)
        except WeftError as problem:
            logger.warning("job %s: %s", job_id, problem)
        fail = partial(
            self._store.update_job,
            job_id,
            status=JobStatus.FAILED,
            error_code="storage_full",
            error_message=str(error),
            finished_at=int(time.time()),
        )
        try:
            await self.run(fail)
        except StorageError as again:
            logger.error("job %s: its failure could not be kept either: %s", job_id, again)
            # Else it would seem to run for ever, though the engine has ended it.
            self._retries.add(job_id, fail)

    def _estimate(self, event: StepMetrics) -> None:
        self._latest[event.job_id] = event
        left = max(0, event.num_steps - event.step)
        if event.job_id in self._was_paused:
            self._was_paused.discard(event.job_id)
            return
        self._finish_at[event.job_id] = time.time() + left * event.elapsed_s

    def _metrics_at(self, job_id: str, step: int) -> dict[str, Any]:
        latest = self._latest.get(job_id)
        return _metrics(latest) if latest is not None and latest.step == step else {"step": step}

    def _change_of(self, job_id: str) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(job_id, []).append(waiter)
        return waiter


@dataclass(frozen=True, kw_only=True, slots=True)
class _Examples:
    """What the lines of a job's files hold."""

    training: list[Example]
    validation: list[Example]


_FILES = (("the training file", "training_file"), ("the validation file", "validation_file"))


def _examples(training: bytes, validation: bytes | None) -> _Examples:
    training_lines, validation_lines = (
        [] if data is None else _naming(param, partial(read_examples, data, what=what))
        for (what, param), data in zip(_FILES, (training, validation), strict=True)
    )
    return _Examples(training=training_lines, validation=validation_lines)


def _naming(param: str, work: Callable[[], T]) -> T:
    """Say in which of a job's two files the mistake is."""
    try:
        return work()
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, param, error.code) from None


def _metrics(event: StepMetrics) -> dict[str, Any]:
    """A step's numbers under the names that events, checkpoints and results share."""
    return {
        "step": event.step,
        "total_steps": event.num_steps,
        "train_loss": event.loss,
        "valid_loss": event.validation_loss,
        "learning_rate": event.lr,
        "grad_norm": event.grad_norm,
        "epoch": event.epoch,
        "tokens": event.num_tokens,
        "elapsed_s": event.elapsed_s,
    }
