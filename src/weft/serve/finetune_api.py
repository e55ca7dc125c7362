"""The routes of OpenAI's files and fine-tuning APIs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from weft.base.errors import InvalidRequestError, UnsupportedError
from weft.serve.api_keys import tenant_of
from weft.serve.finetune_bodies import JobBody
from weft.serve.finetune_data import read_examples
from weft.serve.finetune_objects import (
    checkpoint_object,
    event_object,
    file_object,
    job_object,
    page_object,
)
from weft.serve.finetune_service import FinetuneService
from weft.serve.messages import JobAction
from weft.serve.records import Purpose, StoredJob
from weft.serve.responses import encode_json

MAX_PAGE = 10_000
_FILE_PAGE = 10_000
_JOB_PAGE = 20
_CHECKPOINT_PAGE = 10
_MAX_FILENAME_CHARS = 255
_FIELDS = ("file", "purpose")

_SCHEMAS: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/files"): {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file", "purpose"],
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"type": "string", "enum": ["fine-tune"]},
                        },
                        "additionalProperties": False,
                    }
                }
            },
        }
    },
    ("POST", "/v1/fine_tuning/jobs"): {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobBody"}}},
        }
    },
}
"""Bodies, for the server's own description of itself."""

ReadBody = Callable[[Request], Awaitable[JobBody]]


class FinetuneApi:
    """Handlers over a `FinetuneService`; `read_job` reads and checks the body of a job."""

    def __init__(
        self, service: FinetuneService, *, read_job: ReadBody, check_open: Callable[[], None]
    ) -> None:
        self._service = service
        self._read_job = read_job
        self._check_open = check_open

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        job = "/v1/fine_tuning/jobs/{job_id}"
        control = self._control
        for method, path, handler in (
            ("POST", "/v1/files", self._upload),
            ("GET", "/v1/files", self._list_files),
            ("GET", "/v1/files/{file_id}", self._file),
            ("DELETE", "/v1/files/{file_id}", self._delete_file),
            ("GET", "/v1/files/{file_id}/content", self._content),
            ("POST", "/v1/fine_tuning/jobs", self._create),
            ("GET", "/v1/fine_tuning/jobs", self._list_jobs),
            ("GET", job, self._job),
            ("POST", f"{job}/cancel", control(JobAction.CANCEL)),
            ("POST", f"{job}/pause", control(JobAction.PAUSE)),
            ("POST", f"{job}/resume", control(JobAction.RESUME)),
            ("GET", f"{job}/events", self._events),
            ("GET", f"{job}/checkpoints", self._checkpoints),
        ):
            app.add_api_route(
                path,
                handler,
                methods=[method],
                response_class=Response,
                openapi_extra=_SCHEMAS.get((method, path)),
            )

    # ---- files ----

    async def _upload(self, request: Request) -> Response:
        self._check_open()
        try:
            form = await request.form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise InvalidRequestError(f"the upload is malformed: {error.detail}", "file") from None
        unknown = [name for name in form if name not in _FIELDS]
        if unknown:
            raise InvalidRequestError(
                f"unknown field {unknown[0][:80]!r}; there are {', '.join(_FIELDS)}",
                unknown[0][:80],
                "unknown_parameter",
            )
        file, purpose = form.get("file"), form.get("purpose")
        if purpose != Purpose.FINE_TUNE.value:
            raise InvalidRequestError(
                f"purpose is {str(purpose)[:80]!r}; the purpose must be fine-tune", "purpose"
            )
        if not isinstance(file, UploadFile):
            raise InvalidRequestError("file is missing; send one as multipart/form-data", "file")
        filename = (file.filename or "upload.jsonl")[:_MAX_FILENAME_CHARS]
        if "\0" in filename:
            raise InvalidRequestError(
                "the file's name holds the character U+0000; leave it out", "file"
            )
        data = await file.read()
        # Beside the event loop, so that other requests' streams flow on.
        await asyncio.to_thread(read_examples, data, what="the file")
        service = self._service
        stored = await service.run(
            service.store.add_file,
            tenant_of(request).name,
            filename=filename,
            purpose=Purpose.FINE_TUNE,
            data=data,
        )
        return _json(file_object(stored))

    async def _list_files(self, request: Request) -> Response:
        self._check_open()
        query = _query(request, "after", "limit", "order", "purpose")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError(f"order is {order[:20]!r}; it must be asc or desc", "order")
        page = await self._service.run(
            self._service.store.files,
            tenant_of(request).name,
            purpose=query.get("purpose"),
            after=query.get("after"),
            limit=_limit(query, _FILE_PAGE),
            is_ascending=order == "asc",
        )
        return _json(page_object(page, file_object))

    async def _file(self, request: Request, file_id: str) -> Response:
        self._check_open()
        store = self._service.store
        file = await self._service.run(store.file, tenant_of(request).name, file_id)
        return _json(file_object(file))

    async def _content(self, request: Request, file_id: str) -> Response:
        self._check_open()
        store = self._service.store
        file = await self._service.run(store.file, tenant_of(request).name, file_id)
        return FileResponse(
            store.file_path(file.id), media_type="application/octet-stream", filename=file.filename
        )

    async def _delete_file(self, request: Request, file_id: str) -> Response:
        self._check_open()
        store = self._service.store
        await self._service.run(store.delete_file, tenant_of(request).name, file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    # ---- jobs ----

    async def _create(self, request: Request) -> Response:
        self._check_open()
        body = await self._read_job(request)
        return self._answer(await self._service.create(tenant_of(request), body))

    async def _list_jobs(self, request: Request) -> Response:
        self._check_open()
        query = _query(request, "after", "limit")
        page = await self._service.run(
            self._service.store.jobs,
            tenant_of(request).name,
            after=query.get("after"),
            limit=_limit(query, _JOB_PAGE),
        )
        return _json(page_object(page, self._object))

    async def _job(self, request: Request, job_id: str) -> Response:
        self._check_open()
        return self._answer(await self._service.job(tenant_of(request).name, job_id))

    def _control(self, action: JobAction) -> Callable[[Request, str], Awaitable[Response]]:
        async def handle(request: Request, job_id: str) -> Response:
            self._check_open()
            tenant = tenant_of(request).name
            return self._answer(await self._service.control(tenant, job_id, action))

        handle.__name__ = f"{action}_job"
        return handle

    async def _events(self, request: Request, job_id: str) -> Response:
        self._check_open()
        query = _query(request, "after", "limit")
        await self._service.job(tenant_of(request).name, job_id)
        page = await self._service.run(
            self._service.store.events,
            job_id,
            after=query.get("after"),
            limit=_limit(query, _JOB_PAGE),
        )
        return _json(page_object(page, event_object))

    async def _checkpoints(self, request: Request, job_id: str) -> Response:
        self._check_open()
        query = _query(request, "after", "limit")
        job, page = await self._service.checkpoints(
            tenant_of(request).name,
            job_id,
            after=query.get("after"),
            limit=_limit(query, _CHECKPOINT_PAGE),
        )
        return _json(page_object(page, lambda item: checkpoint_object(item, job)))

    # ---- pieces ----

    def _object(self, job: StoredJob) -> dict[str, Any]:
        return job_object(job, estimated_finish=self._service.estimated_finish(job))

    def _answer(self, job: StoredJob) -> Response:
        return _json(self._object(job))


def _query(request: Request, *known: str) -> dict[str, str]:
    for name in request.query_params:
        if name.startswith("metadata"):
            raise UnsupportedError("filtering by metadata is not supported; leave it out")
        if name not in known:
            raise InvalidRequestError(
                f"unknown query parameter {name[:80]!r}; there are {', '.join(known)}",
                name[:80],
                "unknown_parameter",
            )
    return dict(request.query_params)


def _limit(query: dict[str, str], default: int) -> int:
    given = query.get("limit")
    if given is None:
        return default
    is_number = given.isascii() and given.isdigit() and len(given) < 10
    if not (is_number and 1 <= int(given) <= MAX_PAGE):
        raise InvalidRequestError(
            f"limit is {given[:20]!r}; it must be a whole number in [1, {MAX_PAGE}]", "limit"
        )
    return int(given)


def _json(value: object) -> Response:
    return Response(encode_json(value), media_type="application/json")
