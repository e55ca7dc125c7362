"""The seam between deciding and doing: one protocol, implemented in `runtime` and in `sim`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from weft.engine.batch import AdapterRef, Batch, ExecutorInfo, StepResult


class BatchExecutor(Protocol):
    """Runs batches in the order of their submission; several may be in flight."""

    @property
    def info(self) -> ExecutorInfo:
        """Pages, groups and slots that a policy may hand out."""
        ...

    @property
    def max_in_flight(self) -> int:
        """Batches that may be submitted before the oldest is collected; at least 1."""
        ...

    def submit(self, batch: Batch) -> None:
        """Start a batch; returns before its result is known.

        Raises:
            UnsupportedError: the batch holds a segment kind that this executor lacks.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest batch that was submitted and not collected."""
        ...

    def abandon(self) -> None:
        """Forget the batches in flight, after a failure or an interrupt.

        Slots that they started may be started again; what they wrote counts for nothing.
        """
        ...

    def close(self) -> None:
        """Give back memory and threads; idempotent."""
        ...


@runtime_checkable
class AdapterHost(Protocol):
    """An executor whose batches may name adapters."""

    def load_adapter(self, ref: AdapterRef, path: str) -> None:
        """Read an adapter directory as a version.

        Raises:
            WeftError: it is malformed, of another base, or there already.
        """
        ...

    def unload_adapter(self, ref: AdapterRef) -> None:
        """Forget a version that no batch will name any more; unknown ones are ignored."""
        ...

    def has_adapter(self, ref: AdapterRef) -> bool:
        """Whether batches may name a version."""
        ...


@runtime_checkable
class CheckpointHost(Protocol):
    """An executor that writes checkpoints while later batches run."""

    def settle_job(self, job_id: str) -> None:
        """Wait until nothing of a job is being written."""
        ...
