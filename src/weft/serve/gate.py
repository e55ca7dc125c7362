"""What every HTTP request passes first: its id, its key, its size."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.serve.api_keys import ApiKeys
from weft.serve.http_errors import HttpError

_OPEN_PATHS = frozenset(("/health", "/version", "/metrics"))
_UPLOAD_PATH = "/v1/files"
_MAX_REQUEST_ID_CHARS = 256
_TOO_LARGE = 413
_DRAIN_BYTES = 64 * 2**20
_DRAIN_S = 5.0


class Gate:
    """ASGI middleware: echoes X-Request-Id, checks the API key, bounds the body."""

    def __init__(
        self, app: ASGIApp, *, keys: ApiKeys, max_body_bytes: int, max_file_bytes: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._admit(scope, headers)
        except HttpError as error:
            if error.status == _TOO_LARGE and "expect" not in headers:
                await _drain(receive)
            await error.response()(scope, receive, send_with_id)
            return
        await self._app(scope, self._bounded(receive, scope["path"]), send_with_id)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] not in _OPEN_PATHS:
            tenant = self._keys.tenant(headers.get("authorization"))
            if tenant is None:
                raise HttpError(
                    status=401,
                    message="the API key is missing or wrong; send it as `Authorization: Bearer "
                    "KEY`",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            scope["state"]["tenant"] = tenant
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            # No name holds it, and PostgreSQL would not even look for one that does.
            raise HttpError(
                status=400, message="the URL holds the character U+0000 (%00); leave it out"
            )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most(scope["path"]):
            raise self._too_large(scope["path"])

    def _most(self, path: str) -> int:
        return self._max_file_bytes if path == _UPLOAD_PATH else self._max_body_bytes

    def _bounded(self, receive: Receive, path: str) -> Receive:
        """Counts what arrives, for bodies that do not announce their length."""
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._most(path):
                    if message.get("more_body", False):
                        await _drain(receive)
                    raise self._too_large(path)
            return message

        return bounded

    def _too_large(self, path: str) -> HttpError:
        option = "--max-file-bytes" if path == _UPLOAD_PATH else "--max-body-bytes"
        return HttpError(
            status=_TOO_LARGE,
            message=f"the body is larger than the {self._most(path)} bytes that this server "
            f"takes ({option})",
            code="body_too_large",
            headers={"Connection": "close"},
        )


async def _drain(receive: Receive) -> None:
    """Read what a client still sends, within bounds, and forget it.

    A socket that is closed with unread bytes is reset, and the answer is lost with it.
    """
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while num_bytes <= _DRAIN_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):  # The end, or the client is gone.
                    return


def _request_id(given: str | None) -> str:
    if given and len(given) <= _MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex
