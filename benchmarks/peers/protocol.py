"""The worker's side of a measurement: JSON lines on stdin and stdout. Standard library only.

A worker's module defines one class with `load` and `generate` and hands it to `serve`. What a
library prints goes to stderr, since stdout carries the protocol. Only `generate` is timed, from
lists of token ids to lists of token ids; the pipe and JSON are outside the timed span.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

PR_SET_PDEATHSIG = 1


class Engine(Protocol):
    """One engine, loaded once and then asked to continue prompts."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        """Load `spec["model"]` at `spec["dtype"]`; returns versions and settings worth printing."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Continue each prompt greedily by its own number of tokens, ignoring EOS."""
        ...


def serve(engine: Engine) -> None:
    """Answer requests until stdin closes; a failed request is answered, not fatal."""
    _die_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        _reply(replies, _answer(engine, json.loads(line)))


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    try:
        started_s = time.perf_counter()
        if request["op"] == "load":
            notes = engine.load(request["spec"])
            return {"ok": True, "wall_s": time.perf_counter() - started_s, "notes": notes}
        if request["op"] == "generate":
            tokens = engine.generate(request["prompts"], request["num_new_tokens"])
            wall_s = time.perf_counter() - started_s
            return {"ok": True, "wall_s": wall_s, "tokens": tokens}
        result = getattr(engine, request["op"])(**request.get("arguments", {}))
        return {"ok": True, "wall_s": time.perf_counter() - started_s, "result": result}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


def _reply(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def _die_with_parent() -> None:
    """Ask Linux to end this process with its parent, so that a killed run leaves nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
