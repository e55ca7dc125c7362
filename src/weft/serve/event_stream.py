"""Server-sent events, and noticing that the client hung up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.serve.generation import ClientGoneError
from weft.serve.http_errors import as_http_error, is_unexpected
from weft.serve.responses import DONE, event

logger = logging.getLogger("weft.server")


@contextlib.asynccontextmanager
async def hang_up_calls(receive: Receive, on_hang_up: Callable[[], None]) -> AsyncGenerator[None]:
    """While inside, call `on_hang_up` if the client disconnects. The body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_hang_up()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """Sends events as they come. An error in mid-stream is an event of its own, then the end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, cancel: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        try:
            async with hang_up_calls(receive, self._cancel):
                await self._write(send)
        finally:
            self._cancel()  # Whatever ended this, nothing may go on running for nobody.

    async def _write(self, send: Send) -> None:
        try:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (ClientGoneError, OSError):
            return
        except Exception as error:
            answer = as_http_error(error)
            if is_unexpected(answer):
                logger.error("a stream failed", exc_info=error)
            piece = event(answer.body())
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
