"""What finetuning leaves behind, by name: finished adapters, and checkpoints of jobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from weft.base.errors import AdapterLoadError, InvalidRequestError
from weft.serve.finetune_objects import checkpoint_name, split_checkpoint_name
from weft.serve.records import NotFoundError, StoredCheckpoint, StoredJob
from weft.serve.served_models import ServedModels
from weft.serve.store import Store

logger = logging.getLogger("weft.server")


class FinetunedModels:
    """Finds, serves and deletes them. `run` does work on the store, in the store's thread."""

    def __init__(
        self, store: Store, models: ServedModels, *, run: Callable[..., Awaitable[Any]]
    ) -> None:
        self._store = store
        self._models = models
        self._run = run
        self._loading = asyncio.Lock()

    async def serve_checkpoint(self, tenant: str, name: str) -> None:
        """Load a checkpoint that is asked for by its name, unless it is here.

        Any other name, and that of another tenant's checkpoint, is left to whoever resolves names.
        """
        if split_checkpoint_name(name) is None or self._models.find(name, tenant) is not None:
            return
        async with self._loading:
            if self._models.find(name, tenant) is not None:
                return  # Another request was quicker.
            try:
                found = await self._checkpoint(tenant, name)
                path = str(self._store.checkpoint_path(found.job_id, found.step))
                await self._models.add(name, path, id=name, tenant=tenant)
                await self._checkpoint(tenant, name)  # Newer ones may have driven it out meanwhile.
            except NotFoundError:
                await self._models.remove(name, tenant)
            except AdapterLoadError as error:
                logger.warning("checkpoint %s is not served: %s", name, error)

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a finished adapter or a checkpoint; running requests keep it to their end."""
        if split_checkpoint_name(name) is None:
            await self._run(self._store.delete_adapter, tenant, name)
        else:
            found = await self._checkpoint(tenant, name)
            await self._run(
                self._store.delete_checkpoint, tenant, found.job_id, found.step, name=name
            )
        await self._models.remove(name, tenant)

    async def checkpoints_gone(self, job_id: str, steps: Iterable[int]) -> None:
        """Serve checkpoints no more that the store has dropped."""
        for step in steps:
            job = await self._run(self._store.job, None, job_id)
            await self._models.remove(checkpoint_name(job, step), job.tenant)

    async def path(self, tenant: str | None, name: str) -> str:
        """Where a finished adapter's weights lie, or those of an ended job's checkpoint.

        Raises:
            NotFoundError: it is not this tenant's.
            InvalidRequestError: the checkpoint's job has not ended, and may drop it at any step.
        """
        if split_checkpoint_name(name) is None:
            adapter = await self._run(self._store.adapter, tenant, name)
            return str(self._store.adapter_path(adapter))
        found = await self._checkpoint(tenant, name)
        if not (await self._run(self._store.job, tenant, found.job_id)).status.is_final:
            raise InvalidRequestError(
                f"model {name!r} is a checkpoint of a job that has not ended and may drop it; "
                "start from it once the job has ended",
                "model",
                "wrong_state",
            )
        return str(self._store.checkpoint_path(found.job_id, found.step))

    async def origin(self, tenant: str | None, name: str) -> StoredJob:
        """The job that a finished adapter or a checkpoint is of; raises as `path`."""
        found = split_checkpoint_name(name)
        if found is None:
            job_id = (await self._run(self._store.adapter, tenant, name)).job_id
        else:
            job_id, _ = found
        return await self._run(self._store.job, tenant, job_id)

    async def _checkpoint(self, tenant: str | None, name: str) -> StoredCheckpoint:
        """The checkpoint of a name; NotFoundError where there is none for the tenant."""
        job_id, step = split_checkpoint_name(name) or ("", 0)
        found = await self._run(self._store.checkpoint, tenant, job_id, step)
        if checkpoint_name(await self._run(self._store.job, tenant, job_id), step) != name:
            raise NotFoundError("model", name)
        return found
