"""OpenAI's objects for files, fine-tuning jobs, their events and checkpoints, as plain JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from weft.engine.finetune import JobStatus
from weft.serve.finetune_bodies import JobSettings
from weft.serve.records import (
    Page,
    StoredCheckpoint,
    StoredEvent,
    StoredFile,
    StoredJob,
)

METRIC_COLUMNS = (
    "step",
    "train_loss",
    "valid_loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens",
    "elapsed_s",
)
"""Of the step metrics: in events, in checkpoints and in the result file."""
_CHECKPOINT_MARK = ":ckpt-step-"


def model_name(job: StoredJob) -> str:
    """The name that a job's result will have."""
    return f"ft:{job.base_model}:weft:{job.suffix}:{job.id.removeprefix('ftjob-')}"


def checkpoint_name(job: StoredJob, step: int) -> str:
    """The name under which a checkpoint is served."""
    return f"{model_name(job)}{_CHECKPOINT_MARK}{step}"


def split_checkpoint_name(name: str) -> tuple[str, int] | None:
    """Job and step of what may be a checkpoint's name; None where it cannot be one.

    Whether there is such a checkpoint, and of that name, is for the caller to find out.
    """
    result, found, step = name.rpartition(_CHECKPOINT_MARK)
    is_number = step.isascii() and step.isdigit() and len(step) < 19
    if not (result.startswith("ft:") and found and is_number):
        return None
    return f"ftjob-{result.rpartition(':')[2]}", int(step)


def file_object(file: StoredFile) -> dict[str, Any]:
    """`file`."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def job_object(job: StoredJob, *, estimated_finish: int | None = None) -> dict[str, Any]:
    """`fine_tuning.job`; `weft` holds what OpenAI's object has no field for."""
    settings = JobSettings.from_json(job.resolved)
    hyperparameters = settings.hyperparameters()
    error = None
    if job.status is JobStatus.FAILED:
        error = {"code": job.error_code, "message": job.error_message, "param": None}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": f"org-{job.tenant or 'weft'}",
        "status": job.status.value,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [job.result_file] if job.result_file else [],
        "trained_tokens": job.trained_tokens if job.status.is_final else None,
        "estimated_finish": estimated_finish,
        "seed": job.seed,
        "error": error,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "user_provided_suffix": job.suffix or None,
        "integrations": [],
        "metadata": job.metadata,
        "weft": {
            **settings.weft(),
            "step": job.step,
            "num_steps": job.num_steps,
            "trained_tokens": job.trained_tokens,
        },
    }


def event_object(event: StoredEvent) -> dict[str, Any]:
    """`fine_tuning.job.event`."""
    return {
        "id": f"ftevent-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def checkpoint_object(checkpoint: StoredCheckpoint, job: StoredJob) -> dict[str, Any]:
    """`fine_tuning.job.checkpoint`."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint_name(job, checkpoint.step),
        "fine_tuning_job_id": job.id,
        "step_number": checkpoint.step,
        "metrics": {
            key: checkpoint.metrics[key]
            for key in ("step", "train_loss", "valid_loss")
            if checkpoint.metrics.get(key) is not None
        },
    }


def page_object(page: Page, make: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """`list`."""
    data = [make(item) for item in page.items]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }


def metrics_csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """The result file: one line a step."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(METRIC_COLUMNS)
    writer.writerows([row.get(name) for name in METRIC_COLUMNS] for row in rows)
    return out.getvalue().encode()
