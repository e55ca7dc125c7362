"""What the store keeps, as plain data, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from weft.base.errors import InvalidRequestError, WeftError
from weft.engine.finetune import JobStatus


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
    status: JobStatus
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
