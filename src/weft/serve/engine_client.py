"""The API process's end of an engine process: starts it, talks to it, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from weft.base import errors
from weft.base.errors import ConfigError, EngineDeadError, InvalidRequestError, WeftError
from weft.engine.request import EngineStats, Request, SequenceUpdate
from weft.serve.engine_config import EngineConfig, EngineInfo
from weft.serve.engine_process import FROM_ENGINE_SOCKET, TO_ENGINE_SOCKET, open_socket
from weft.serve.messages import (
    Cancel,
    Checked,
    CheckIntegrity,
    Configure,
    Failed,
    FinishChoice,
    FromEngine,
    Progress,
    Ready,
    Rejected,
    Shutdown,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)

_MAX_SOCKET_PATH = 100
"""A Unix socket's path holds about 107 bytes."""
_SHUTDOWN_TIMEOUT_S = 10.0

logger = logging.getLogger("weft.server")


class UpdateObserver(Protocol):
    """Who wants to see every request's life, for metrics."""

    def started(self, stream: UpdateStream) -> None:
        """A request goes to the engine."""
        ...

    def updated(self, stream: UpdateStream, update: SequenceUpdate, now_s: float) -> None:
        """The engine sent news of it."""
        ...

    def ended(self, stream: UpdateStream, now_s: float) -> None:
        """Nothing more will come."""
        ...


class UpdateStream:
    """The updates of one request, in order."""

    def __init__(self, request: Request, *, only_when_finished: bool) -> None:
        self.request = request
        self.unfinished = set(range(request.sampling.n))
        """Choices that have not ended."""
        self._only_when_finished = only_when_finished
        self._updates: list[SequenceUpdate] = []
        self._error: WeftError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[SequenceUpdate]:
        """Wait for news and take all of it; with `only_when_finished` all there will ever be.

        Raises:
            InvalidRequestError: the engine refused the request.
            EngineDeadError: the engine is gone.
        """
        while not self._is_ready():
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        updates, self._updates = self._updates, []
        return updates

    def put(self, update: SequenceUpdate) -> None:
        """Called by the client."""
        self._updates.append(update)
        if update.finish_reason is not None:
            self.unfinished.discard(update.choice)
        self._wake()

    def fail(self, error: WeftError) -> None:
        """Called by the client: whoever waits gets the error."""
        self._error = error
        self._wake()

    def _is_ready(self) -> bool:
        if self._error is not None:
            return True
        if self._only_when_finished:
            return not self.unfinished
        return bool(self._updates)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and self._is_ready():
            self._waiter.set_result(None)


class EngineClient:
    """One engine process. `start` blocks until it is ready; the rest belongs to one event loop."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        directory: Path,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self._process = process
        self._directory = directory
        self._context = context
        # Who sends connects: a connecting socket queues what is sent before its peer is there.
        self._outbox = open_socket(context, zmq.PUSH)
        self._outbox.connect(f"ipc://{directory / TO_ENGINE_SOCKET}")
        self._inbox = open_socket(context, zmq.PULL)
        self._inbox.bind(f"ipc://{directory / FROM_ENGINE_SOCKET}")
        self._async_inbox: zmq.asyncio.Socket | None = None
        self._streams: dict[str, UpdateStream] = {}
        self._checks: list[asyncio.Future[Checked]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closing = False
        self._failure: str | None = None
        self._info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        """The engine's latest word on itself; None before its first iteration."""
        self.observer: UpdateObserver | None = None
        self.on_death: Callable[[], None] | None = None
        """Called once, in the event loop, when the engine dies uninvited."""
        self.death: EngineDeadError | None = None

    @classmethod
    def start(cls, config: EngineConfig) -> EngineClient:
        """Spawn the process and wait until its model is loaded.

        Raises:
            WeftError: whatever the engine raised while it was built, with its message.
            EngineDeadError: it ended without a word.
        """
        directory = Path(tempfile.mkdtemp(prefix="weft-"))
        if len(str(directory / FROM_ENGINE_SOCKET)) > _MAX_SOCKET_PATH:
            shutil.rmtree(directory, ignore_errors=True)
            raise ConfigError(
                f"the temporary directory {directory.parent} has too long a path for a Unix "
                "socket: set TMPDIR to a shorter one"
            )
        process = subprocess.Popen(
            [sys.executable, "-m", "weft.serve.engine_process", str(directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        client = cls(process, directory, zmq.Context())
        try:
            client._send(Configure(config=config))
            client._info = client._wait_until_ready()
        except BaseException:
            client._release()
            raise
        return client

    @property
    def info(self) -> EngineInfo:
        """The engine's resolved settings."""
        if self._info is None:
            raise EngineDeadError("the engine is not ready")
        return self._info

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    @property
    def num_live_choices(self) -> int:
        """Choices that were submitted and have not ended."""
        return sum(len(stream.unfinished) for stream in self._streams.values())

    @property
    def num_live(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._streams)

    def attach(self) -> None:
        """Begin to receive in the running event loop."""
        self._async_inbox = zmq.asyncio.Socket.from_socket(self._inbox)
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._receive(self._async_inbox)))
        threading.Thread(
            target=self._watch_process, args=(loop,), name="engine-watch", daemon=True
        ).start()

    def submit(self, request: Request, *, only_when_finished: bool = False) -> UpdateStream:
        """Send a request to the engine.

        Raises:
            EngineDeadError: the engine is gone.
        """
        if self.death is not None:
            raise self.death
        stream = UpdateStream(request, only_when_finished=only_when_finished)
        self._streams[request.id] = stream
        if self.observer is not None:
            self.observer.started(stream)
        self._send(Submit(request=request))
        return stream

    def finish(self, stream: UpdateStream, choice: int) -> None:
        """End one choice whose stop string was seen."""
        if stream.request.id in self._streams:
            self._send(FinishChoice(request_id=stream.request.id, choice=choice))
            stream.unfinished.discard(choice)
            if not stream.unfinished:
                self._end(stream)

    def cancel(self, stream: UpdateStream) -> None:
        """End a request that nobody waits for any more; does nothing if it has ended."""
        if stream.request.id in self._streams:
            self._send(Cancel(request_id=stream.request.id))
            self._end(stream)

    async def check_integrity(self) -> EngineStats:
        """Let the engine verify its pages and sequences.

        Raises:
            IntegrityError: an invariant is broken.
            EngineDeadError: the engine is gone.
        """
        if self.death is not None:
            raise self.death
        answer: asyncio.Future[Checked] = asyncio.get_running_loop().create_future()
        self._checks.append(answer)
        self._send(CheckIntegrity())
        checked = await answer
        if checked.problem:
            raise errors.IntegrityError(checked.problem)
        return checked.stats

    def close(self) -> None:
        """End the engine process and release everything; idempotent."""
        if self._is_closing:
            return
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        if self._process.poll() is None:
            self._send(Shutdown())
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SHUTDOWN_TIMEOUT_S)
        self._release()

    def kill(self) -> None:
        """End the engine process now, whatever it is doing."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        self._release()

    # ---- the wire ----

    def _send(self, message: ToEngine) -> None:
        self._outbox.send(encode(message), zmq.NOBLOCK)

    def _wait_until_ready(self) -> EngineInfo:
        while True:
            if self._inbox.poll(100):
                message = decode_from_engine(self._inbox.recv())
                if isinstance(message, Ready):
                    return message.info
                if isinstance(message, Failed):
                    raise _as_error(message)
                raise EngineDeadError(f"the engine's first word was {type(message).__name__}")
            if self._process.poll() is not None and not self._inbox.poll(100):
                raise EngineDeadError(
                    f"the engine process ended {_describe_exit(self._process.returncode)} before "
                    "it was ready; see its messages above"
                )

    async def _receive(self, inbox: zmq.asyncio.Socket) -> None:
        while True:
            try:
                self._dispatch(decode_from_engine(await inbox.recv()))
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("a message of the engine could not be handled")

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Progress(updates=updates, rejected=rejected, stats=stats):
                self.stats = stats
                now_s = time.monotonic()
                for update in updates:
                    self._deliver(update, now_s)
                for refusal in rejected:
                    self._refuse(refusal)
            case Checked():
                if self._checks:
                    self._checks.pop(0).set_result(message)
            case Failed(error=error, message=text):
                self._failure = f"{error}: {text}"
            case Ready():
                pass

    def _deliver(self, update: SequenceUpdate, now_s: float) -> None:
        stream = self._streams.get(update.request_id)
        if stream is None:
            return  # Cancelled, or its last choice ended by a stop string.
        if self.observer is not None:
            self.observer.updated(stream, update, now_s)
        stream.put(update)
        if not stream.unfinished:
            self._end(stream)

    def _refuse(self, refusal: Rejected) -> None:
        stream = self._streams.get(refusal.request_id)
        if stream is not None:
            self._end(stream)
            stream.fail(InvalidRequestError(refusal.message, refusal.param, refusal.code))

    def _end(self, stream: UpdateStream) -> None:
        del self._streams[stream.request.id]
        if self.observer is not None:
            self.observer.ended(stream, time.monotonic())

    # ---- its end ----

    def _watch_process(self, loop: asyncio.AbstractEventLoop) -> None:
        self._process.wait()
        # A loop that is closed has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._on_exit)

    def _on_exit(self) -> None:
        if self._is_closing or self.death is not None:
            return
        for task in self._tasks:
            task.cancel()
        while self._inbox.poll(20):
            self._dispatch(decode_from_engine(self._inbox.recv()))
        reason = self._failure or f"it ended {_describe_exit(self._process.returncode)}"
        self.death = EngineDeadError(f"the engine process is gone: {reason}")
        logger.error("%s", self.death)
        for stream in list(self._streams.values()):
            self._end(stream)
            stream.fail(self.death)
        for answer in self._checks:
            if not answer.done():
                answer.set_exception(self.death)
        if self.on_death is not None:
            self.on_death()

    def _release(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._outbox.close(linger=0)
        self._inbox.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


def _as_error(failed: Failed) -> WeftError:
    """The error that the engine process raised, as the same class."""
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, WeftError):
        return kind(failed.message)
    return EngineDeadError(f"the engine could not start: {failed.error}: {failed.message}")


def _describe_exit(code: int) -> str:
    if code < 0:
        hint = " (often the machine's memory ran out)" if code == -9 else ""
        return f"by signal {-code}{hint}"
    return f"with exit code {code}"
