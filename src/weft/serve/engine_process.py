"""The engine in a process of its own: one loop between two ZeroMQ sockets.

Started by `EngineClient` as `python -m weft.serve.engine_process DIRECTORY`; the directory holds
the two sockets and is private to the user. Standard input is a life line: it closes when the parent
is gone, however it went.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from weft.base.errors import ConfigError, IntegrityError, InvalidRequestError, WeftError
from weft.serve.engine_core import EngineCore
from weft.serve.messages import (
    AddJob,
    Answer,
    Cancel,
    Checked,
    CheckIntegrity,
    Configure,
    ControlJob,
    Failed,
    FinishChoice,
    FromEngine,
    JobAction,
    JobNews,
    LoadAdapter,
    Progress,
    Ready,
    Rejected,
    Shutdown,
    Submit,
    ToEngine,
    UnloadAdapter,
    decode_to_engine,
    encode,
)

TO_ENGINE_SOCKET = "to-engine"
FROM_ENGINE_SOCKET = "from-engine"
EXIT_FAILED = 1
_STATS_INTERVAL_S = 0.5
"""Gauges are sent at least this often while iterations bring no other news (long prefills)."""

logger = logging.getLogger("weft.engine")


class EngineServer:
    """Takes messages in, steps the core, sends one message an iteration."""

    def __init__(
        self, core: EngineCore, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._outbox = outbox
        self._rejected: list[Rejected] = []
        self._sent_at_s = 0.0
        self._is_told_to_stop = False

    def run(self) -> None:
        """Serve until told to stop. Sleeps in the kernel while there is nothing to do."""
        while not self._is_told_to_stop:
            heard = self._listen()
            updates = self._core.step() if self._core.has_work else []
            events = self._core.take_finetune_events()
            now_s = time.monotonic()
            if updates or events or heard or now_s - self._sent_at_s > _STATS_INTERVAL_S:
                rejected, self._rejected = self._rejected, []
                stats = self._core.stats()
                news = [JobNews.of(event) for event in events]
                self._send(
                    Progress(
                        updates=updates,
                        rejected=rejected,
                        stats=stats,
                        news=news,
                        finetune=self._core.finetune_gauges(),
                    )
                )
                self._sent_at_s = now_s

    def _listen(self) -> bool:
        """Handle all messages that are here; wait for one if there is no work. True if any came."""
        if not self._core.has_work:
            self._handle(decode_to_engine(self._inbox.recv()))
        elif not self._inbox.poll(0):
            return False
        while not self._is_told_to_stop and self._inbox.poll(0):
            self._handle(decode_to_engine(self._inbox.recv()))
        return True

    def _handle(self, message: ToEngine) -> None:
        core = self._core
        match message:
            case Submit(request=request):
                try:
                    self._core.add(request)
                except InvalidRequestError as error:
                    self._rejected.append(
                        Rejected(
                            request_id=request.id,
                            message=error.message,
                            param=error.param,
                            code=error.code,
                        )
                    )
            case Cancel(request_id=request_id):
                self._core.cancel(request_id)
            case FinishChoice(request_id=request_id, choice=choice):
                self._core.finish(request_id, choice)
            case CheckIntegrity():
                self._send(self._check())
            case AddJob():
                self._answer(message.call_id, lambda: self._add_job(message))
            case ControlJob():
                self._answer(
                    message.call_id, lambda: core.control_job(message.job_id, message.action)
                )
            case LoadAdapter():
                self._answer(message.call_id, lambda: core.load_adapter(message.ref, message.path))
            case UnloadAdapter():
                self._answer(message.call_id, lambda: core.unload_adapter(message.ref))
            case Shutdown():
                self._is_told_to_stop = True
            case Configure():
                raise ConfigError("an engine is configured once")

    def _add_job(self, message: AddJob) -> None:
        self._core.add_job(message.whole())
        if message.is_paused:  # Before any iteration could advance it.
            self._core.control_job(message.spec.id, JobAction.PAUSE)

    def _answer(self, call_id: int, work: Callable[[], None]) -> None:
        """Do what was asked of a job or an adapter; what is wrong with it its caller hears."""
        try:
            work()
        except WeftError as error:
            name, text = type(error).__name__, str(error)
            self._send(Answer(call_id=call_id, error=name, message=text))
        except Exception as error:
            # One tenant's job or file must not end the requests of all others.
            logger.exception("a job or an adapter could not be taken")
            text = f"{type(error).__name__}: {error}"
            self._send(Answer(call_id=call_id, error=WeftError.__name__, message=text))
        else:
            self._send(Answer(call_id=call_id))

    def _check(self) -> Checked:
        try:
            self._core.check_integrity()
        except IntegrityError as error:
            return Checked(problem=str(error), stats=self._core.stats())
        return Checked(problem="", stats=self._core.stats())

    def _send(self, message: FromEngine) -> None:
        self._outbox.send(encode(message))


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket without a bound: no message may be lost; the HTTP API limits how many there are."""
    socket = context.socket(kind)
    socket.set_hwm(0)
    return socket


def main(directory: str) -> int:
    """Build the engine that the first message describes and serve it; returns the exit code."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    _ignore_signals()
    threading.Thread(
        target=_die_with_parent, args=(directory,), name="life-line", daemon=True
    ).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    inbox = open_socket(context, zmq.PULL)
    inbox.bind(f"ipc://{Path(directory) / TO_ENGINE_SOCKET}")
    outbox = open_socket(context, zmq.PUSH)
    outbox.connect(f"ipc://{Path(directory) / FROM_ENGINE_SOCKET}")
    try:
        return _serve(inbox, outbox)
    finally:
        # The last word, often the reason of a failure, gets two seconds to leave.
        outbox.close(linger=2000)
        inbox.close(linger=0)
        context.term()


def _serve(inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> int:
    first = decode_to_engine(inbox.recv())
    if not isinstance(first, Configure):
        raise ConfigError(f"the first message was {type(first).__name__}, not Configure")
    core: EngineCore | None = None
    try:
        core = EngineCore(first.config)
        gc.collect()
        gc.freeze()  # What the model is made of never dies; later collections skip it.
        outbox.send(encode(Ready(info=core.info)))
        EngineServer(core, inbox, outbox).run()
    except Exception as error:
        if not isinstance(error, WeftError):
            logger.exception("the engine cannot go on")
        outbox.send(encode(Failed(error=type(error).__name__, message=str(error))))
        return EXIT_FAILED
    finally:
        if core is not None:
            core.close()
    return 0


def _ignore_signals() -> None:
    """The API process decides when to stop; Ctrl-C and service managers signal the whole group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent(directory: str) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(directory, ignore_errors=True)  # Its owner was killed and could not.
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    exit_code = main(sys.argv[1])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. Tearing down the interpreter only brings native libraries' complaints about
    # their own objects (nanobind's "leaked functions" with triton).
    os._exit(exit_code)
