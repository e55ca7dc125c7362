"""What could not be written because the disk was full, tried again until it can be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from weft.serve.records import StorageError

RETRY_S = 1.0
"""Between attempts."""


class Retries:
    """One piece of work a key. `run` does work on the store, in the store's thread."""

    def __init__(self, run: Callable[..., Awaitable[Any]]) -> None:
        self._run = run
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, key: str, work: Callable[[], None]) -> None:
        """Do it as soon as there is room; what waits under this key already stays."""
        if key not in self._tasks:
            self._tasks[key] = asyncio.get_running_loop().create_task(self._try(key, work))

    def close(self) -> None:
        """Give up what still waits."""
        for task in self._tasks.values():
            task.cancel()

    async def _try(self, key: str, work: Callable[[], None]) -> None:
        while key in self._tasks:
            await asyncio.sleep(RETRY_S)
            with contextlib.suppress(StorageError):
                await self._run(work)
                del self._tasks[key]
