"""Files, finetuning jobs, their events and checkpoints, and adapters: kept across restarts.

What is large lies on disk under the data directory; what is said of it lies in the database. A
file or directory gets its final name before the row that names it commits, and loses its row before
it is deleted, so whatever has no row is left over from a crash: `sweep` removes it. Everything
belongs to a tenant, and for another tenant it does not exist.

Layout: `files/ID`, `jobs/JOB/step-N` (checkpoints), `adapters/JOB`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import DatabaseError

from weft.base.durable import write_file
from weft.base.errors import InvalidRequestError, WeftError
from weft.serve import database as db

KEPT_CHECKPOINTS = 3
"""Of a job, the latest; older ones are deleted as new ones come."""
_STEP_DIRECTORY = re.compile(r"step-(\d+)\Z")


class NotFoundError(InvalidRequestError):
    """Nothing of that id belongs to the tenant."""

    def __init__(self, what: str, id: str) -> None:
        super().__init__(f"no {what} with id {id!r}", "id", "not_found")


class InUseError(InvalidRequestError):
    """What is to be deleted is needed by something that is not finished."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "id", "in_use")


class StorageError(WeftError, OSError):
    """The disk or the database cannot take more, or is broken."""


class Purpose(StrEnum):
    """What a file is for."""

    FINE_TUNE = "fine-tune"
    RESULTS = "fine-tune-results"


class StoredStatus(StrEnum):
    """A job's status as the API names it."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing comes after it."""
        return self in _FINAL


_FINAL = (StoredStatus.SUCCEEDED, StoredStatus.FAILED, StoredStatus.CANCELLED)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file that was uploaded, or results that were written."""

    id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredJob:
    """A finetuning job: what was asked for and how far it is."""

    id: str
    number: int
    tenant: str
    tenant_weight: float
    model: str
    """As it was asked for: the base, or an earlier result to start from."""
    base_model: str
    suffix: str
    status: StoredStatus
    training_file: str
    validation_file: str | None
    seed: int
    resolved: dict[str, Any]
    """Every setting, none of them "auto"."""
    metadata: dict[str, str] | None
    created_at: int
    finished_at: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    fine_tuned_model: str | None = None
    result_file: str | None = None
    step: int = 0
    """Optimizer steps done."""
    num_steps: int = 0
    trained_tokens: int = 0
    epoch_tokens: int = 0
    """Tokens of all samples, once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvent:
    """One line of a job's history."""

    number: int
    job_id: str
    created_at: int
    level: str
    type: str
    message: str
    step: int | None
    data: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """A point from which a job can go on."""

    id: str
    job_id: str
    step: int
    created_at: int
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAdapter:
    """A finished adapter."""

    name: str
    tenant: str
    base_model: str
    job_id: str
    version: int
    directory: str
    """Relative to the data directory."""
    created_at: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Part of a list, and whether more follows."""

    items: Sequence[Any]
    has_more: bool


class Store:
    """All methods block; call them from one thread at a time.

    Raises:
        ConfigError: the database cannot be used.
    """

    def __init__(self, directory: Path, database_url: str | None = None) -> None:
        self.directory = directory.resolve()
        for name in ("files", "jobs", "adapters"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self._database = db.Database(database_url or f"sqlite:///{self.directory / 'weft.db'}")
        self._engine = self._database.engine

    def close(self) -> None:
        """Disconnect."""
        self._database.close()

    # ---- files ----

    def add_file(self, tenant: str, *, filename: str, purpose: Purpose, data: bytes) -> StoredFile:
        """Keep a file; it is on disk in full before its row is."""
        file = _new_file(tenant, filename, purpose, data)
        with self._writing() as connection:
            write_file(self.file_path(file.id), data)
            connection.execute(db.files.insert().values(**_fields(file)))
        return file

    def file(self, tenant: str, file_id: str) -> StoredFile:
        """One file; NotFoundError where it is not this tenant's."""
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(db.files).where(db.files.c.id == file_id, db.files.c.tenant == tenant)
            ).one_or_none()
        if row is None:
            raise NotFoundError("file", file_id)
        return _file(row)

    def files(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        is_ascending: bool = False,
    ) -> Page:
        """Files, newest first unless ascending."""
        query = sa.select(db.files).where(db.files.c.tenant == tenant)
        if purpose is not None:
            query = query.where(db.files.c.purpose == purpose)
        cursor = None if after is None else self.file(tenant, after).number
        return self._page(query, db.files.c.number, cursor, limit, is_ascending, _file)

    def file_path(self, file_id: str) -> Path:
        """Where a file's content lies."""
        return self.directory / "files" / file_id

    def read_file(self, tenant: str, file_id: str) -> bytes:
        """A file's content."""
        self.file(tenant, file_id)
        return self.file_path(file_id).read_bytes()

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file, then delete it.

        Raises:
            InUseError: a job that is not finished needs it.
        """
        self.file(tenant, file_id)
        with self._writing() as connection:
            user = connection.execute(
                sa.select(db.jobs.c.id).where(
                    db.jobs.c.status.not_in(_FINAL),
                    sa.or_(
                        db.jobs.c.training_file == file_id, db.jobs.c.validation_file == file_id
                    ),
                )
            ).scalar()
            if user is not None:
                raise InUseError(
                    f"file {file_id} is in use by job {user}; cancel the job, or wait for its end"
                )
            connection.execute(db.files.delete().where(db.files.c.id == file_id))
        self.file_path(file_id).unlink(missing_ok=True)

    # ---- jobs ----

    def add_job(self, job: StoredJob, message: str) -> None:
        """Keep a new job and the first line of its history."""
        with self._writing() as connection:
            connection.execute(db.jobs.insert().values(**_fields(job)))
            _add_event(connection, job.id, message, "info", "message", None, None)

    def job(self, tenant: str | None, job_id: str) -> StoredJob:
        """One job; None for the tenant means whoever's it is."""
        query = sa.select(db.jobs).where(db.jobs.c.id == job_id)
        if tenant is not None:
            query = query.where(db.jobs.c.tenant == tenant)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("fine-tuning job", job_id)
        return _job(row)

    def jobs(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page:
        """Jobs, newest first."""
        query = sa.select(db.jobs).where(db.jobs.c.tenant == tenant)
        cursor = None if after is None else self.job(tenant, after).number
        return self._page(query, db.jobs.c.number, cursor, limit, False, _job)

    def unfinished_jobs(self) -> list[StoredJob]:
        """What a restarted server goes on with, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(db.jobs).where(db.jobs.c.status.not_in(_FINAL)).order_by(db.jobs.c.number)
            ).all()
        return [_job(row) for row in rows]

    def update_job(self, job_id: str, **values: Any) -> None:
        """Change columns of a job."""
        with self._writing() as connection:
            _update_job(connection, job_id, values)

    def remove_job(self, job_id: str) -> None:
        """Forget a job that the engine would not take."""
        with self._writing() as connection:
            connection.execute(db.events.delete().where(db.events.c.job_id == job_id))
            connection.execute(db.jobs.delete().where(db.jobs.c.id == job_id))
        shutil.rmtree(self.job_directory(job_id), ignore_errors=True)

    def job_directory(self, job_id: str) -> Path:
        """Where a job's checkpoints lie."""
        return self.directory / "jobs" / job_id

    # ---- events ----

    def add_event(
        self,
        job_id: str,
        message: str,
        *,
        level: str = "info",
        type: str = "message",
        step: int | None = None,
        data: Mapping[str, Any] | None = None,
        job_values: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a line to a job's history and, in the same transaction, change the job."""
        with self._writing() as connection:
            _add_event(connection, job_id, message, level, type, step, data)
            if job_values:
                _update_job(connection, job_id, job_values)

    def add_step(
        self,
        job_id: str,
        message: str,
        *,
        step: int,
        num_steps: int,
        num_tokens: int,
        data: Mapping[str, Any],
    ) -> None:
        """An optimizer step is done: its line in the history, and the job's progress."""
        values = {
            "step": step,
            "num_steps": num_steps,
            "trained_tokens": db.jobs.c.trained_tokens + num_tokens,
        }
        self.add_event(job_id, message, type="metrics", step=step, data=data, job_values=values)

    def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> Page:
        """A job's history, newest first; `after` is an event's id."""
        query = sa.select(db.events).where(db.events.c.job_id == job_id)
        number = (after or "").removeprefix("ftevent-")
        if after is not None and not (number.isascii() and number.isdigit()):
            raise NotFoundError("event", after)
        cursor = None if after is None else int(number)
        return self._page(query, db.events.c.number, cursor, limit, False, _event)

    def step_metrics(self, job_id: str) -> list[dict[str, Any]]:
        """The metrics of every step that was reported, in order."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(db.events.c.data)
                .where(db.events.c.job_id == job_id, db.events.c.type == "metrics")
                .order_by(db.events.c.step, db.events.c.number)
            ).scalars()
            return [dict(row) for row in rows]

    def rewind(self, job_id: str, step: int) -> None:
        """Forget what was reported after a step: it will be done, and reported, again."""
        with self._writing() as connection:
            connection.execute(
                db.events.delete().where(
                    db.events.c.job_id == job_id,
                    db.events.c.type == "metrics",
                    db.events.c.step > step,
                )
            )
            tokens = connection.execute(
                sa.select(db.events.c.data).where(
                    db.events.c.job_id == job_id, db.events.c.type == "metrics"
                )
            ).scalars()
            _update_job(
                connection,
                job_id,
                {"step": step, "trained_tokens": sum(int(data["tokens"]) for data in tokens)},
            )

    # ---- checkpoints ----

    def add_checkpoint(self, job_id: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep a checkpoint whose directory is in place, and drop those that are too old."""
        with self._writing() as connection:
            _add_checkpoint(connection, job_id, step, metrics)
            steps = connection.execute(
                sa.select(db.checkpoints.c.step)
                .where(db.checkpoints.c.job_id == job_id)
                .order_by(db.checkpoints.c.step.desc())
            ).scalars()
            old = list(steps)[KEPT_CHECKPOINTS:]
            connection.execute(
                db.checkpoints.delete().where(
                    db.checkpoints.c.job_id == job_id, db.checkpoints.c.step.in_(old)
                )
            )
        for number in old:
            shutil.rmtree(self.checkpoint_path(job_id, number), ignore_errors=True)

    def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page:
        """A job's checkpoints, newest first."""
        query = sa.select(db.checkpoints).where(db.checkpoints.c.job_id == job_id)
        cursor: int | None = None
        if after is not None:  # It may be gone by now; what follows it is clear all the same.
            prefix, _, number = after.rpartition("-")
            if prefix != _checkpoint_id(job_id, "") or not (number.isascii() and number.isdigit()):
                raise NotFoundError("checkpoint", after)
            cursor = int(number)
        return self._page(query, db.checkpoints.c.step, cursor, limit, False, _checkpoint)

    def checkpoint_path(self, job_id: str, step: int) -> Path:
        """The directory of a checkpoint."""
        return self.job_directory(job_id) / f"step-{step}"

    def latest_checkpoint(self, job_id: str) -> int | None:
        """The step from which a job goes on after a restart; None: from the start.

        A directory without a row is whole all the same, since it was renamed in: the crash came
        between the two. Its row is made up for.
        """
        found = {
            int(match.group(1))
            for path in self.job_directory(job_id).glob("step-*")
            if (match := _STEP_DIRECTORY.match(path.name)) and path.is_dir()
        }
        with self._writing() as connection:
            known = set(
                connection.execute(
                    sa.select(db.checkpoints.c.step).where(db.checkpoints.c.job_id == job_id)
                ).scalars()
            )
            latest = max(found, default=None)
            if latest is not None and latest > max(known, default=-1):
                _add_checkpoint(connection, job_id, latest, {"step": latest})
            connection.execute(
                db.checkpoints.delete().where(
                    db.checkpoints.c.job_id == job_id, db.checkpoints.c.step.not_in(found)
                )
            )
        return latest

    # ---- adapters ----

    def finish_job(
        self,
        job: StoredJob,
        status: StoredStatus,
        message: str,
        *,
        results: bytes,
        error_code: str | None = None,
        adapter: StoredAdapter | None = None,
        trained_tokens: int | None = None,
    ) -> StoredFile:
        """A job has ended: status, results, the end of its history and its adapter, at once."""
        file = _new_file(job.tenant, f"{job.id}-step-metrics.csv", Purpose.RESULTS, results)
        is_failure = status is StoredStatus.FAILED
        values: dict[str, Any] = {
            "status": status,
            "finished_at": _now(),
            "result_file": file.id,
            "error_code": error_code,
            "error_message": message if is_failure else None,
            "fine_tuned_model": None if adapter is None else adapter.name,
        }
        if trained_tokens is not None:
            values["trained_tokens"] = trained_tokens
        with self._writing() as connection:
            write_file(self.file_path(file.id), results)
            connection.execute(db.files.insert().values(**_fields(file)))
            if adapter is not None:
                connection.execute(db.adapters.insert().values(**_fields(adapter)))
            level = "error" if is_failure else "info"
            _add_event(connection, job.id, message, level, "message", None, None)
            _update_job(connection, job.id, values)
            connection.execute(db.checkpoints.delete().where(db.checkpoints.c.job_id == job.id))
        shutil.rmtree(self.job_directory(job.id), ignore_errors=True)
        return file

    def take_adapter(self, job_id: str, source: Path) -> str:
        """Move a finished adapter to its place; returns that, relative to the data directory."""
        target = self.directory / "adapters" / job_id
        with self._storing():
            shutil.rmtree(target, ignore_errors=True)  # Of a crash before the row.
            source.rename(target)
        return str(target.relative_to(self.directory))

    def adapter(self, tenant: str | None, name: str) -> StoredAdapter:
        """One adapter; NotFoundError where it is not this tenant's."""
        query = sa.select(db.adapters).where(db.adapters.c.name == name)
        if tenant is not None:
            query = query.where(db.adapters.c.tenant == tenant)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("model", name)
        return _adapter(row)

    def adapters(self) -> list[StoredAdapter]:
        """All adapters of all tenants, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(db.adapters).order_by(db.adapters.c.created_at, db.adapters.c.name)
            ).all()
        return [_adapter(row) for row in rows]

    def adapter_path(self, adapter: StoredAdapter) -> Path:
        """Where an adapter's files lie."""
        return self.directory / adapter.directory

    def delete_adapter(self, tenant: str, name: str) -> None:
        """Forget an adapter, then delete its files.

        Raises:
            InUseError: a job that is not finished starts from it.
        """
        adapter = self.adapter(tenant, name)
        with self._writing() as connection:
            user = connection.execute(
                sa.select(db.jobs.c.id).where(
                    db.jobs.c.status.not_in(_FINAL), db.jobs.c.model == name
                )
            ).scalar()
            if user is not None:
                raise InUseError(
                    f"model {name} is in use by job {user}, which starts from it; cancel the job, "
                    "or wait for its end"
                )
            connection.execute(db.adapters.delete().where(db.adapters.c.name == name))
        shutil.rmtree(self.adapter_path(adapter), ignore_errors=True)

    # ---- after a crash ----

    def sweep(self) -> list[str]:
        """Delete whatever has no row; returns what was deleted, relative to the data directory."""
        with self._engine.connect() as connection:
            file_ids = set(connection.execute(sa.select(db.files.c.id)).scalars())
            running = set(
                connection.execute(
                    sa.select(db.jobs.c.id).where(db.jobs.c.status.not_in(_FINAL))
                ).scalars()
            )
            kept = set(connection.execute(sa.select(db.adapters.c.directory)).scalars())
        found: list[Path] = []
        found.extend(p for p in (self.directory / "files").iterdir() if p.name not in file_ids)
        for path in (self.directory / "jobs").iterdir():
            if path.name not in running:
                found.append(path)
            elif path.is_dir():
                # What was being written has another name until it is whole.
                found.extend(p for p in path.iterdir() if not _STEP_DIRECTORY.match(p.name))
        for path in (self.directory / "adapters").iterdir():
            if str(path.relative_to(self.directory)) not in kept:
                found.append(path)
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return sorted(str(path.relative_to(self.directory)) for path in found)

    # ---- pieces ----

    @contextlib.contextmanager
    def _storing(self) -> Generator[None]:
        try:
            yield
        except (OSError, DatabaseError) as error:
            if isinstance(error, WeftError):
                raise
            reason = getattr(error, "strerror", None) or getattr(error, "orig", None) or error
            raise StorageError(
                f"{self.directory} or its database cannot be written: {reason}"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Generator[Connection]:
        with self._storing(), self._engine.begin() as connection:
            yield connection

    def _page(
        self,
        query: sa.Select[Any],
        order: sa.ColumnElement[Any],
        cursor: int | None,
        limit: int,
        is_ascending: bool,
        make: Any,
    ) -> Page:
        if cursor is not None:
            query = query.where(order > cursor if is_ascending else order < cursor)
        query = query.order_by(order.asc() if is_ascending else order.desc()).limit(limit + 1)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return Page(items=[make(row) for row in rows[:limit]], has_more=len(rows) > limit)


def _now() -> int:
    return int(time.time())


def _new_file(tenant: str, filename: str, purpose: Purpose, data: bytes) -> StoredFile:
    return StoredFile(
        id=f"file-{uuid.uuid4().hex}",
        tenant=tenant,
        filename=filename,
        purpose=purpose,
        num_bytes=len(data),
        created_at=_now(),
        number=time.time_ns(),
    )


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _update_job(connection: Connection, job_id: str, values: Mapping[str, Any]) -> None:
    connection.execute(db.jobs.update().where(db.jobs.c.id == job_id).values(**values))


def _add_event(
    connection: Connection,
    job_id: str,
    message: str,
    level: str,
    type: str,
    step: int | None,
    data: Mapping[str, Any] | None,
) -> None:
    connection.execute(
        db.events.insert().values(
            job_id=job_id,
            created_at=_now(),
            level=level,
            type=type,
            message=message,
            step=step,
            data=None if data is None else dict(data),
        )
    )


def _checkpoint_id(job_id: str, ending: str) -> str:
    return f"ftckpt-{job_id.removeprefix('ftjob-')}{ending}"


def _add_checkpoint(
    connection: Connection, job_id: str, step: int, metrics: Mapping[str, Any]
) -> None:
    # A step that is done again after a restart may be there already.
    connection.execute(
        db.checkpoints.delete().where(
            db.checkpoints.c.job_id == job_id, db.checkpoints.c.step == step
        )
    )
    connection.execute(
        db.checkpoints.insert().values(
            id=_checkpoint_id(job_id, f"-{step}"),
            job_id=job_id,
            step=step,
            created_at=_now(),
            metrics=dict(metrics),
        )
    )


def _file(row: Row[Any]) -> StoredFile:
    return StoredFile(**row._mapping)


def _job(row: Row[Any]) -> StoredJob:
    fields = dict(row._mapping)
    return StoredJob(**{**fields, "status": StoredStatus(fields["status"])})


def _event(row: Row[Any]) -> StoredEvent:
    return StoredEvent(**row._mapping)


def _checkpoint(row: Row[Any]) -> StoredCheckpoint:
    return StoredCheckpoint(**row._mapping)


def _adapter(row: Row[Any]) -> StoredAdapter:
    return StoredAdapter(**row._mapping)
