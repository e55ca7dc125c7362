"""Files, finetuning jobs, their events and checkpoints, and adapters: kept across restarts.

What is large lies on disk under the data directory; what is said of it lies in the database. A
file or directory gets its final name before the row that names it commits, and loses its row before
it is deleted, so whatever has no row is left over from a crash: `sweep` removes it. Everything
belongs to a tenant, and for another tenant it does not exist.

Layout: `files/ID`, `jobs/JOB/step-N` (checkpoints), `adapters/JOB`. A checkpoint is an adapter
directory; what its job needs besides to go on is in files named `state.*`, and goes with the job's
end.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError

from weft.base.durable import write_file
from weft.base.errors import WeftError
from weft.engine.finetune import FINAL_STATUSES, JobStatus
from weft.serve import database as db
from weft.serve import rows
from weft.serve.records import (
    InUseError,
    NotFoundError,
    Page,
    Purpose,
    StorageError,
    StoredAdapter,
    StoredCheckpoint,
    StoredFile,
    StoredJob,
)

KEPT_CHECKPOINTS = 3
"""Of a job, the latest; older ones are deleted as new ones come."""
_ONLY_TO_GO_ON = "state.*"
_STEP_DIRECTORY = re.compile(r"step-(\d+)\Z")


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
        file = rows.new_file(tenant, filename, purpose, data)
        with self._writing() as connection:
            write_file(self.file_path(file.id), data)
            connection.execute(db.files.insert().values(**rows.fields_of(file)))
        return file

    def file(self, tenant: str, file_id: str) -> StoredFile:
        """One file; NotFoundError where it is not this tenant's."""
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(db.files).where(db.files.c.id == file_id, db.files.c.tenant == tenant)
            ).one_or_none()
        if row is None:
            raise NotFoundError("file", file_id)
        return rows.as_file(row)

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
        return self._page(query, db.files.c.number, cursor, limit, is_ascending, rows.as_file)

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
                    db.jobs.c.status.not_in(FINAL_STATUSES),
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
        """Keep a new job and the first line of its history.

        Raises:
            NotFoundError: a file of it was deleted since it was read.
        """
        needed = {job.training_file} | ({job.validation_file} if job.validation_file else set())
        with self._writing() as connection:
            is_needed = sa.and_(db.files.c.id.in_(needed), db.files.c.tenant == job.tenant)
            found = connection.execute(sa.select(db.files.c.id).where(is_needed)).scalars()
            if missing := sorted(needed - set(found)):
                raise NotFoundError("file", missing[0])
            connection.execute(db.jobs.insert().values(**rows.fields_of(job)))
            rows.add_event(connection, job.id, message, "info", "message", None, None)

    def job(self, tenant: str | None, job_id: str) -> StoredJob:
        """One job; None for the tenant means whoever's it is."""
        query = sa.select(db.jobs).where(db.jobs.c.id == job_id)
        if tenant is not None:
            query = query.where(db.jobs.c.tenant == tenant)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("fine-tuning job", job_id)
        return rows.as_job(row)

    def jobs(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page:
        """Jobs, newest first."""
        query = sa.select(db.jobs).where(db.jobs.c.tenant == tenant)
        cursor = None if after is None else self.job(tenant, after).number
        return self._page(query, db.jobs.c.number, cursor, limit, False, rows.as_job)

    def unfinished_jobs(self) -> list[StoredJob]:
        """What a restarted server goes on with, oldest first."""
        with self._engine.connect() as connection:
            found = connection.execute(
                sa.select(db.jobs)
                .where(db.jobs.c.status.not_in(FINAL_STATUSES))
                .order_by(db.jobs.c.number)
            ).all()
        return [rows.as_job(row) for row in found]

    def update_job(self, job_id: str, **values: Any) -> None:
        """Change columns of a job."""
        with self._writing() as connection:
            rows.update_job(connection, job_id, values)

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
            rows.add_event(connection, job_id, message, level, type, step, data)
            if job_values:
                rows.update_job(connection, job_id, job_values)

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
        with self._writing() as connection:
            rows.add_event(connection, job_id, message, "info", "metrics", step, data)
            rows.update_job(connection, job_id, values)
            # A checkpoint that is followed by validation is here before its step's numbers.
            is_its = sa.and_(db.checkpoints.c.job_id == job_id, db.checkpoints.c.step == step)
            connection.execute(db.checkpoints.update().where(is_its).values(metrics=dict(data)))

    def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> Page:
        """A job's history, newest first; `after` is an event's id."""
        query = sa.select(db.events).where(db.events.c.job_id == job_id)
        number = (after or "").removeprefix("ftevent-")
        if after is not None and not _is_number(number):
            raise NotFoundError("event", after)
        cursor = None if after is None else int(number)
        return self._page(query, db.events.c.number, cursor, limit, False, rows.as_event)

    def step_metrics(self, job_id: str) -> list[dict[str, Any]]:
        """The metrics of every step that was reported, in order."""
        with self._engine.connect() as connection:
            found = connection.execute(
                sa.select(db.events.c.data)
                .where(db.events.c.job_id == job_id, db.events.c.type == "metrics")
                .order_by(db.events.c.step, db.events.c.number)
            ).scalars()
            return [dict(row) for row in found]

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
            rows.update_job(
                connection,
                job_id,
                {"step": step, "trained_tokens": sum(int(data["tokens"]) for data in tokens)},
            )

    # ---- checkpoints ----

    def add_checkpoint(self, job_id: str, step: int, metrics: Mapping[str, Any]) -> list[int]:
        """Keep a checkpoint whose directory is in place, and drop those that are too old.

        Returns the steps of those that were dropped.
        """
        with self._writing() as connection:
            rows.add_checkpoint(connection, job_id, step, metrics)
            steps = connection.execute(
                sa.select(db.checkpoints.c.step)
                .where(db.checkpoints.c.job_id == job_id)
                .order_by(db.checkpoints.c.step.desc())
            ).scalars()
            old = list(steps)[KEPT_CHECKPOINTS:]
            rows.drop_checkpoints(connection, job_id, old)
        for number in old:
            shutil.rmtree(self.checkpoint_path(job_id, number), ignore_errors=True)
        return old

    def checkpoint(self, tenant: str | None, job_id: str, step: int) -> StoredCheckpoint:
        """One checkpoint; NotFoundError where it is not this tenant's, or is gone."""
        self.job(tenant, job_id)
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(db.checkpoints).where(
                    db.checkpoints.c.job_id == job_id, db.checkpoints.c.step == step
                )
            ).one_or_none()
        if row is None:
            raise NotFoundError("checkpoint", rows.checkpoint_id(job_id, f"-{step}"))
        return rows.as_checkpoint(row)

    def delete_checkpoint(self, tenant: str, job_id: str, step: int, *, name: str) -> None:
        """Forget a checkpoint of a job that has ended, then delete it.

        `name` is what a job that starts from it calls it.

        Raises:
            InUseError: its job may still go on from it, or another one starts from it.
        """
        self.checkpoint(tenant, job_id, step)
        if not self.job(tenant, job_id).status.is_final:
            raise InUseError(
                f"checkpoint {name} is in use by job {job_id}, which may go on from it; cancel the "
                "job, or wait for its end"
            )
        with self._writing() as connection:
            rows.check_unused(connection, name)
            rows.drop_checkpoints(connection, job_id, [step])
        shutil.rmtree(self.checkpoint_path(job_id, step), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.job_directory(job_id).rmdir()  # If this was the last one.

    def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page:
        """A job's checkpoints, newest first."""
        query = sa.select(db.checkpoints).where(db.checkpoints.c.job_id == job_id)
        cursor: int | None = None
        if after is not None:  # It may be gone by now; what follows it is clear all the same.
            prefix, _, number = after.rpartition("-")
            if prefix != rows.checkpoint_id(job_id, "") or not _is_number(number):
                raise NotFoundError("checkpoint", after)
            cursor = int(number)
        return self._page(query, db.checkpoints.c.step, cursor, limit, False, rows.as_checkpoint)

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
                rows.add_checkpoint(connection, job_id, latest, {"step": latest})
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
        status: JobStatus,
        message: str,
        *,
        results: bytes,
        error_code: str | None = None,
        adapter: StoredAdapter | None = None,
        trained_tokens: int | None = None,
    ) -> StoredFile:
        """A job has ended: status, results, the end of its history and its adapter, at once."""
        file = rows.new_file(job.tenant, f"{job.id}-step-metrics.csv", Purpose.RESULTS, results)
        is_failure = status is JobStatus.FAILED
        values: dict[str, Any] = {
            "status": status,
            "finished_at": rows.now(),
            "result_file": file.id,
            "error_code": error_code,
            "error_message": message if is_failure else None,
            "fine_tuned_model": None if adapter is None else adapter.name,
        }
        if trained_tokens is not None:
            values["trained_tokens"] = trained_tokens
        with self._writing() as connection:
            write_file(self.file_path(file.id), results)
            connection.execute(db.files.insert().values(**rows.fields_of(file)))
            if adapter is not None:
                connection.execute(db.adapters.insert().values(**rows.fields_of(adapter)))
            level = "error" if is_failure else "info"
            rows.add_event(connection, job.id, message, level, "message", None, None)
            rows.update_job(connection, job.id, values)
        for path in self._unneeded(job.id, is_final=True):
            _delete(path)
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
        return rows.as_adapter(row)

    def adapters(self) -> list[StoredAdapter]:
        """All adapters of all tenants, oldest first."""
        with self._engine.connect() as connection:
            found = connection.execute(
                sa.select(db.adapters).order_by(db.adapters.c.created_at, db.adapters.c.name)
            ).all()
        return [rows.as_adapter(row) for row in found]

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
            rows.check_unused(connection, name)
            connection.execute(db.adapters.delete().where(db.adapters.c.name == name))
        shutil.rmtree(self.adapter_path(adapter), ignore_errors=True)

    # ---- after a crash ----

    def sweep(self) -> list[str]:
        """Delete whatever has no row; returns what was deleted, relative to the data directory."""
        with self._engine.connect() as connection:
            file_ids = set(connection.execute(sa.select(db.files.c.id)).scalars())
            is_final = db.jobs.c.status.in_(FINAL_STATUSES)
            running = set(connection.execute(sa.select(db.jobs.c.id).where(~is_final)).scalars())
            ended = set(connection.execute(sa.select(db.jobs.c.id).where(is_final)).scalars())
            kept = set(connection.execute(sa.select(db.adapters.c.directory)).scalars())
        found: list[Path] = []
        found.extend(p for p in (self.directory / "files").iterdir() if p.name not in file_ids)
        for path in (self.directory / "jobs").iterdir():
            if path.name in running or path.name in ended:
                found.extend(self._unneeded(path.name, is_final=path.name in ended))
            else:
                found.append(path)
        for path in (self.directory / "adapters").iterdir():
            if str(path.relative_to(self.directory)) not in kept:
                found.append(path)
        for path in found:
            _delete(path)
        return sorted(str(path.relative_to(self.directory)) for path in found)

    def _unneeded(self, job_id: str, *, is_final: bool) -> list[Path]:
        """What a job's directory holds besides checkpoints; all of it, if it has none left.

        A job that has ended goes on no more: of its checkpoints the weights are kept, where a row
        names them.
        """
        directory = self.job_directory(job_id)
        inside = list(directory.iterdir()) if directory.is_dir() else []
        steps = {p: int(m.group(1)) for p in inside if (m := _STEP_DIRECTORY.match(p.name))}
        if not is_final:  # What was being written has another name until it is whole.
            return [path for path in inside if path not in steps]
        with self._engine.connect() as connection:
            query = sa.select(db.checkpoints.c.step).where(db.checkpoints.c.job_id == job_id)
            known = set(connection.execute(query).scalars())
        kept = [path for path in inside if steps.get(path) in known]
        if not kept:
            return [directory] if directory.exists() else []
        training = [file for path in kept for file in path.glob(_ONLY_TO_GO_ON)]
        return [path for path in inside if path not in kept] + training

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
            found = connection.execute(query).all()
        return Page(items=[make(row) for row in found[:limit]], has_more=len(found) > limit)


def _is_number(text: str) -> bool:
    """Whether it is a whole number that the database's integers can hold."""
    return text.isascii() and text.isdigit() and len(text) < 19


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
