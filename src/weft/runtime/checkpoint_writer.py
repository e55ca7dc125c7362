"""Checkpoints on their way to the disk while iterations go on.

Flushing to a disk takes longer than many an iteration may, and would hold up every request in it.
One thread writes what it is given, in order. What it writes must not change meanwhile: a job waits
for its writes before it changes its weights, so nothing is copied, and a crash at any instant loses
no more steps than lie between two checkpoints.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from safetensors import SafetensorError

from weft.base.errors import WeftError
from weft.engine.finetune import CheckpointSaved, SaveCheckpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What became of one write."""

    save: SaveCheckpoint
    elapsed_s: float
    problem: str = ""
    """Why there is no checkpoint; empty where there is one, under its final name."""

    @property
    def told(self) -> CheckpointSaved:
        """As the job's owner hears of it."""
        save = self.save
        return CheckpointSaved(
            job_id=save.job_id, path=save.path, num_steps=save.num_steps, elapsed_s=self.elapsed_s
        )


class CheckpointWriter:
    """Belongs to one thread, which asks now and then what is done; errors are results."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[SaveCheckpoint, Future[Written]]] = deque()

    def submit(self, save: SaveCheckpoint, write: Callable[[], None]) -> None:
        """Write behind all that was submitted before."""
        if self._thread is None:  # Most executors never write.
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="weft-checkpoint")
        self._pending.append((save, self._thread.submit(_written, save, write)))

    def take_done(self) -> list[Written]:
        """What is done by now, in order; never waits."""
        found: list[Written] = []
        while self._pending and self._pending[0][1].done():
            found.append(self._pending.popleft()[1].result())
        return found

    def wait(self, job_id: str | None = None) -> list[Written]:
        """As `take_done`, once the writes of a job are done, or all of them."""
        found: list[Written] = []
        while any(job_id in (None, save.job_id) for save, _ in self._pending):
            found.append(self._pending.popleft()[1].result())
        return found + self.take_done()

    def close(self) -> None:
        """Let what was submitted reach the disk; idempotent."""
        if self._thread is not None:
            self._thread.shutdown()


def _written(save: SaveCheckpoint, write: Callable[[], None]) -> Written:
    start_s = time.perf_counter()
    problem = ""
    try:
        write()
    except (OSError, RuntimeError, SafetensorError, WeftError) as error:
        # A SafetensorError is how safetensors says that the disk is full.
        problem = str(error) or type(error).__name__
    return Written(save=save, elapsed_s=time.perf_counter() - start_s, problem=problem)
