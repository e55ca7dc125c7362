"""The API process's end of an engine process: starts it, talks to it, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from weft.base import errors
from weft.base.errors import ConfigError, EngineDeadError, InvalidRequestError, WeftError
from weft.engine.batch import AdapterRef
from weft.engine.finetune import FinetuneEvent, FinetuneJobSpec
from weft.engine.request import EngineStats, Request, SequenceUpdate
from weft.serve.engine_config import EngineConfig, EngineInfo
from weft.serve.engine_process import FROM_ENGINE_SOCKET, TO_ENGINE_SOCKET, open_socket
from weft.serve.messages import (
    AddJob,
    Answer,
    Cancel,
    Checked,
    CheckIntegrity,
    Configure,
    ControlJob,
    Failed,
    FinetuneGauges,
    FinishChoice,
    FromEngine,
    JobAction,
    LoadAdapter,
    Progress,
    Ready,
    Rejected,
    Shutdown,
    Submit,
    ToEngine,
    UnloadAdapter,
    decode_from_engine,
    encode,
)

_MAX_SOCKET_PATH = 100
"""A Unix socket's path holds about 107 bytes."""
_SHUTDOWN_TIMEOUT_S = 10.0
_OPENMP_SPIN_COUNT = "1000"

logger = logging.getLogger("weft.server")


class LiveRequest:
    """A request that was submitted and has not ended."""

    __slots__ = ("mailbox", "request", "unfinished")

    def __init__(self, request: Request, mailbox: Mailbox) -> None:
        self.request = request
        self.mailbox = mailbox
        self.unfinished = set(range(request.sampling.n))
        """Choices that have not ended."""


class UpdateObserver(Protocol):
    """Who wants to see every request's life, for metrics."""

    def started(self, live: LiveRequest) -> None:
        """A request goes to the engine."""
        ...

    def updated(self, live: LiveRequest, update: SequenceUpdate, now_s: float) -> None:
        """The engine sent news of it."""
        ...

    def stopped(self, live: LiveRequest, choice: int) -> None:
        """A stop string has ended a choice."""
        ...

    def ended(self, live: LiveRequest, now_s: float) -> None:
        """Nothing more will come; choices still in `unfinished` were cancelled or failed."""
        ...


class Mailbox:
    """The updates of one caller's requests, in order."""

    def __init__(self, *, only_when_finished: bool) -> None:
        self.live: dict[str, LiveRequest] = {}
        self._only_when_finished = only_when_finished
        self._updates: list[SequenceUpdate] = []
        self._error: WeftError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[SequenceUpdate]:
        """Wait for news and take all of it; with `only_when_finished` all there will ever be.

        Raises:
            InvalidRequestError: the engine refused a request.
            EngineDeadError: the engine is gone.
        """
        while not self._is_ready():
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            # A copy: the original would hold this frame, which holds the mailbox, which holds it.
            raise copy.copy(self._error)
        updates, self._updates = self._updates, []
        return updates

    def put(self, update: SequenceUpdate) -> None:
        """Called by the client."""
        self._updates.append(update)
        self._wake()

    def fail(self, error: WeftError) -> None:
        """Whoever waits, or comes to wait, gets the error."""
        self._error = error
        self._wake()

    def end(self, request_id: str) -> None:
        """Called by the client: one request will send nothing more."""
        del self.live[request_id]
        self._wake()

    def _is_ready(self) -> bool:
        if self._error is not None or not self.live:
            return True
        return bool(self._updates) and not self._only_when_finished

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
        self._live: dict[str, LiveRequest] = {}
        self._checks: list[asyncio.Future[Checked]] = []
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._num_calls = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closing = False
        self._failure: str | None = None
        self._info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        """The engine's latest word on itself; None before its first iteration."""
        self.finetune_gauges: FinetuneGauges | None = None
        """Likewise of finetuning."""
        self.observer: UpdateObserver | None = None
        self.on_finetune_events: Callable[[list[FinetuneEvent]], None] | None = None
        """Called in the event loop with news of jobs, in order."""
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
            env=_engine_environment(os.environ),
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
    def directory(self) -> Path:
        """Private to the user, and gone with the engine, even where its owner is killed."""
        return self._directory

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    @property
    def num_live_choices(self) -> int:
        """Choices that were submitted and have not ended."""
        return sum(len(live.unfinished) for live in self._live.values())

    @property
    def num_live(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._live)

    def attach(self) -> None:
        """Begin to receive in the running event loop."""
        self._async_inbox = zmq.asyncio.Socket.from_socket(self._inbox)
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._receive(self._async_inbox)))
        threading.Thread(
            target=self._watch_process, args=(loop,), name="engine-watch", daemon=True
        ).start()

    def submit(self, requests: Iterable[Request], *, only_when_finished: bool = False) -> Mailbox:
        """Send requests to the engine; their updates come to one mailbox.

        Raises:
            EngineDeadError: the engine is gone.
        """
        if self.death is not None:
            raise copy.copy(self.death)
        mailbox = Mailbox(only_when_finished=only_when_finished)
        for request in requests:
            live = LiveRequest(request, mailbox)
            self._live[request.id] = mailbox.live[request.id] = live
            if self.observer is not None:
                self.observer.started(live)
            self._send(Submit(request=request))
        return mailbox

    def finish(self, request_id: str, choice: int) -> None:
        """End one choice whose stop string was seen."""
        live = self._live.get(request_id)
        if live is not None and choice in live.unfinished:
            self._send(FinishChoice(request_id=request_id, choice=choice))
            live.unfinished.discard(choice)
            if self.observer is not None:
                self.observer.stopped(live, choice)
            if not live.unfinished:
                self._end(live)

    def cancel(self, mailbox: Mailbox) -> None:
        """End what nobody waits for any more; does nothing to requests that have ended."""
        for live in list(mailbox.live.values()):
            self._send(Cancel(request_id=live.request.id))
            self._end(live)

    async def add_job(self, spec: FinetuneJobSpec, *, is_paused: bool = False) -> None:
        """Start a finetuning job, or have it stand by; its news come to `on_finetune_events`.

        Raises:
            WeftError: the engine refuses it: it does not fit, or not the model.
            EngineDeadError: the engine is gone.
        """
        await self._call(lambda call_id: AddJob.of(call_id, spec, is_paused=is_paused))

    async def control_job(self, job_id: str, action: JobAction) -> None:
        """Cancel, pause or resume a job.

        Raises:
            WeftError: there is no such job, or it is in no state for that.
            EngineDeadError: the engine is gone.
        """
        await self._call(lambda call_id: ControlJob(call_id=call_id, job_id=job_id, action=action))

    async def load_adapter(self, ref: AdapterRef, path: str) -> None:
        """Let the engine read an adapter directory and serve it as a version.

        Raises:
            WeftError: the engine refuses it: it is malformed, or of another base.
            EngineDeadError: the engine is gone.
        """
        await self._call(lambda call_id: LoadAdapter(call_id=call_id, ref=ref, path=path))

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Let the engine drop a version once no request uses it.

        Raises:
            EngineDeadError: the engine is gone.
        """
        await self._call(lambda call_id: UnloadAdapter(call_id=call_id, ref=ref))

    async def _call(self, message: Callable[[int], ToEngine]) -> None:
        if self.death is not None:
            raise copy.copy(self.death)
        self._num_calls += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls[self._num_calls] = answer
        self._send(message(self._num_calls))
        await answer

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
        if self._process.poll() is None:
            self._send(Shutdown())
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SHUTDOWN_TIMEOUT_S)
        self._release()

    def kill(self, reason: WeftError) -> None:
        """End the engine process now, whatever it is doing; who waits for an answer hears why."""
        if self._is_closing:
            return
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        self._fail_all(reason)
        self._release()

    # ---- the wire ----

    def _send(self, message: ToEngine) -> None:
        if self._is_closing:
            return  # The socket is closed, or about to be; the engine ends with all its requests.
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
            case Progress(updates=updates, rejected=rejected, stats=stats, news=news):
                self.stats = stats
                self.finetune_gauges = message.finetune
                now_s = time.monotonic()
                for update in updates:
                    self._deliver(update, now_s)
                for refusal in rejected:
                    self._refuse(refusal)
                if news and self.on_finetune_events is not None:
                    self.on_finetune_events([item.event for item in news])
            case Answer(call_id=call_id, error=error, message=text):
                answer = self._calls.pop(call_id, None)
                if answer is not None and not answer.done():
                    if error:
                        answer.set_exception(_as_error(Failed(error=error, message=text)))
                    else:
                        answer.set_result(None)
            case Checked():
                if self._checks:
                    self._checks.pop(0).set_result(message)
            case Failed(error=error, message=text):
                self._failure = f"{error}: {text}"
            case Ready():
                pass

    def _deliver(self, update: SequenceUpdate, now_s: float) -> None:
        live = self._live.get(update.request_id)
        if live is None or update.choice not in live.unfinished:
            return  # Cancelled, or a stop string has ended it.
        if self.observer is not None:
            self.observer.updated(live, update, now_s)
        live.mailbox.put(update)
        if update.finish_reason is not None:
            live.unfinished.discard(update.choice)
            if not live.unfinished:
                self._end(live)

    def _refuse(self, refusal: Rejected) -> None:
        live = self._live.get(refusal.request_id)
        if live is not None:
            live.mailbox.fail(InvalidRequestError(refusal.message, refusal.param, refusal.code))
            self.cancel(live.mailbox)

    def _end(self, live: LiveRequest) -> None:
        del self._live[live.request.id]
        if self.observer is not None:
            self.observer.ended(live, time.monotonic())
        live.mailbox.end(live.request.id)

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
        if self.stats is not None:  # Nothing runs any more; what was counted was counted.
            self.stats = dataclasses.replace(
                self.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0
            )
        logger.error("%s", self.death)
        self._fail_all(self.death)
        if self.on_death is not None:
            self.on_death()

    def _fail_all(self, error: WeftError) -> None:
        for live in list(self._live.values()):
            live.mailbox.fail(error)
            self._end(live)
        calls, self._calls = self._calls, {}
        for answer in (*self._checks, *calls.values()):
            if not answer.done():
                answer.set_exception(copy.copy(error))

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


def _engine_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Let waiting OpenMP threads sleep after about 40 microseconds instead of 12 milliseconds.

    The engine shares its cores with the API process. Whenever that runs on one of them, the threads
    on the others would burn theirs at the next barrier: on 2 busy cores 20 times the step time was
    seen. What the user has set stays.
    """
    environment = dict(own)
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(own):
        environment["GOMP_SPINCOUNT"] = _OPENMP_SPIN_COUNT
    return environment


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
