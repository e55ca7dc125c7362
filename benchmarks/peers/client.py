"""The parent's side: start workers, load them, and let exactly one of them run at a time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent


class WorkerError(RuntimeError):
    """A worker died, ran out of time, or answered with an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One timed call: the tokens of each prompt and the worker's own wall time."""

    wall_s: float
    tokens: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


class Worker:
    """One engine in its own process group, stopped by SIGSTOP whenever it is not asked.

    Stopping matters: thread pools spin for a while after their work, and two engines that spin on
    the same few cores measure each other. A library's own child processes are stopped too.
    """

    def __init__(
        self, *, module: str, interpreter: str, environment: Mapping[str, str], log: Path
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [interpreter, str(WORKERS / f"{module}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._buffer = b""

    def load(self, spec: Mapping[str, Any], *, timeout_s: float = 600.0) -> dict[str, str]:
        """Load a model; the worker is stopped afterwards."""
        return self.ask({"op": "load", "spec": dict(spec)}, timeout_s=timeout_s)["notes"]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_new_tokens: Sequence[int],
        *,
        timeout_s: float = 600.0,
    ) -> Generation:
        """Continue the prompts; every row must come back with its full number of tokens."""
        request = {
            "op": "generate",
            "prompts": [list(prompt) for prompt in prompts],
            "num_new_tokens": list(num_new_tokens),
        }
        answer = self.ask(request, timeout_s=timeout_s)
        lengths = [len(row) for row in answer["tokens"]]
        if lengths != list(num_new_tokens):
            raise WorkerError(f"asked for {list(num_new_tokens)} tokens a row, got {lengths}")
        return Generation(wall_s=answer["wall_s"], tokens=answer["tokens"])

    @property
    def session(self) -> int:
        """The session that holds the worker and its children."""
        return self._process.pid

    def call(self, op: str, **arguments: Any) -> Any:
        """Any other method of the worker's class."""
        return self.ask({"op": op, "arguments": arguments}, timeout_s=120.0)["result"]

    def ask(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Wake the worker, send one request, wait for its answer, stop it again.

        Raises:
            WorkerError: it died, exceeded `timeout_s`, or answered with an error.
        """
        self._signal(signal.SIGCONT)
        stdin = self._process.stdin
        if stdin is None or self._process.poll() is not None:
            raise WorkerError(f"the worker is gone; see {self.log}")
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            answer = json.loads(self._read_line(timeout_s))
        except BrokenPipeError as error:
            raise WorkerError(f"the worker is gone; see {self.log}") from error
        finally:
            self._signal(signal.SIGSTOP)
        if not answer["ok"]:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the whole process group."""
        self._signal(signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read_line(self, timeout_s: float) -> bytes:
        stdout = self._process.stdout
        if stdout is None:
            raise WorkerError("the worker has no stdout")
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise WorkerError(f"no answer within {timeout_s:.0f} s; see {self.log}")
                piece = os.read(stdout.fileno(), 1 << 20)
                if not piece:
                    raise WorkerError(f"the worker died; see {self.log}")
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
