"""The iteration: schedule, submit, collect, apply. Serving and simulation both run this."""

from __future__ import annotations

from typing import Protocol

from weft.engine.batch import Batch, StepResult
from weft.engine.executor import BatchExecutor
from weft.engine.request import SequenceUpdate


class BatchPolicy(Protocol):
    """What the loop needs of a policy."""

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished, or any batch not applied."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Batches scheduled and not applied."""
        ...

    def schedule(self) -> Batch | None:
        """The next batch, or None if there is none now."""
        ...

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """Take the result of the oldest batch in flight."""
        ...

    def abandon(self) -> None:
        """Forget the batches in flight, which will have no result."""
        ...


class EngineLoop:
    """Drives one policy over one executor."""

    def __init__(self, policy: BatchPolicy, executor: BatchExecutor) -> None:
        self.policy = policy
        self.executor = executor

    @property
    def has_work(self) -> bool:
        """Whether another `step` can do anything."""
        return self.policy.has_work

    def step(self) -> list[SequenceUpdate]:
        """Fill the executor with batches up to its depth, then collect and apply the oldest one.

        If the executor raises, the batches in flight are forgotten on both sides and their
        sequences will start again, so that the engine can go on without what made it fail.
        """
        try:
            result = self._run()
        except BaseException:
            self.executor.abandon()
            self.policy.abandon()
            raise
        return [] if result is None else self.policy.apply(result)

    def _run(self) -> StepResult | None:
        while self.policy.num_in_flight < self.executor.max_in_flight:
            batch = self.policy.schedule()
            if batch is None:
                break
            self.executor.submit(batch)
        return self.executor.collect() if self.policy.num_in_flight else None

    def drain(self) -> list[SequenceUpdate]:
        """Step until no work is left; returns all updates in order."""
        updates: list[SequenceUpdate] = []
        while self.has_work:
            updates.extend(self.step())
        return updates
