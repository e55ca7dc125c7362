"""Rows of the store's tables from and to plain data, and the statements of its transactions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from weft.engine.finetune import FINAL_STATUSES, JobStatus
from weft.serve import database as db
from weft.serve.records import (
    InUseError,
    Purpose,
    StoredAdapter,
    StoredCheckpoint,
    StoredEvent,
    StoredFile,
    StoredJob,
)


def now() -> int:
    """Whole seconds since 1970, as the API tells times."""
    return int(time.time())


def new_file(tenant: str, filename: str, purpose: Purpose, data: bytes) -> StoredFile:
    """The record of an upload under a fresh id; `number` orders the uploads of one second."""
    return StoredFile(
        id=f"file-{uuid.uuid4().hex}",
        tenant=tenant,
        filename=filename,
        purpose=purpose,
        num_bytes=len(data),
        created_at=now(),
        number=time.time_ns(),
    )


def fields_of(value: Any) -> dict[str, Any]:
    """A record's columns by name, as an insert takes them; for dataclasses with slots."""
    return {name: getattr(value, name) for name in value.__slots__}


def update_job(connection: Connection, job_id: str, values: Mapping[str, Any]) -> None:
    """Set some columns of a job's row; nothing happens where there is no such job."""
    connection.execute(db.jobs.update().where(db.jobs.c.id == job_id).values(**values))


def add_event(
    connection: Connection,
    job_id: str,
    message: str,
    level: str,
    type: str,
    step: int | None,
    data: Mapping[str, Any] | None,
) -> None:
    """Append an event to a job's list, at this second; `data` is a copy, or nothing."""
    connection.execute(
        db.events.insert().values(
            job_id=job_id,
            created_at=now(),
            level=level,
            type=type,
            message=message,
            step=step,
            data=None if data is None else dict(data),
        )
    )


def drop_checkpoints(connection: Connection, job_id: str, steps: list[int]) -> None:
    """Delete the rows of a job's checkpoints after these steps; their files are the caller's."""
    connection.execute(
        db.checkpoints.delete().where(
            db.checkpoints.c.job_id == job_id, db.checkpoints.c.step.in_(steps)
        )
    )


def check_unused(connection: Connection, model: str) -> None:
    """Raise InUseError if a job that is not finished starts from an adapter or a checkpoint."""
    is_user = sa.and_(db.jobs.c.status.not_in(FINAL_STATUSES), db.jobs.c.model == model)
    user = connection.execute(sa.select(db.jobs.c.id).where(is_user)).scalar()
    if user is not None:
        raise InUseError(
            f"model {model} is in use by job {user}, which starts from it; cancel the job, or wait "
            "for its end"
        )


def checkpoint_id(job_id: str, ending: str) -> str:
    """The id of a job's checkpoint, from the job's: `ftckpt-<the job's own part><ending>`."""
    return f"ftckpt-{job_id.removeprefix('ftjob-')}{ending}"


def add_checkpoint(
    connection: Connection, job_id: str, step: int, metrics: Mapping[str, Any]
) -> None:
    """Write the row of a job's checkpoint after a step, over one that the step left before."""
    # A step that is done again after a restart may be there already.
    drop_checkpoints(connection, job_id, [step])
    connection.execute(
        db.checkpoints.insert().values(
            id=checkpoint_id(job_id, f"-{step}"),
            job_id=job_id,
            step=step,
            created_at=now(),
            metrics=dict(metrics),
        )
    )


def as_file(row: Row[Any]) -> StoredFile:
    """A row of the table of files."""
    return StoredFile(**row._mapping)


def as_job(row: Row[Any]) -> StoredJob:
    """A row of the table of jobs, its status as the enumeration."""
    fields = dict(row._mapping)
    return StoredJob(**{**fields, "status": JobStatus(fields["status"])})


def as_event(row: Row[Any]) -> StoredEvent:
    """A row of the table of events."""
    return StoredEvent(**row._mapping)


def as_checkpoint(row: Row[Any]) -> StoredCheckpoint:
    """A row of the table of checkpoints."""
    return StoredCheckpoint(**row._mapping)


def as_adapter(row: Row[Any]) -> StoredAdapter:
    """A row of the table of adapters."""
    return StoredAdapter(**row._mapping)
