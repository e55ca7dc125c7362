"""`weft serve` as a user starts it, and a steady stream of requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import openai
import psutil

from serve.conftest import Server

START_TIMEOUT_S = 120.0


def start_weft_serve(model: Path, data: Path, *flags: str) -> subprocess.Popen[str]:
    """Start it; it is not ready yet."""
    command = [sys.executable, "-m", "weft", "serve", str(model), "--port", "0"]
    command += ["--data-dir", str(data), "--dtype", "float32", "--num-threads", "1"]
    command += ["--kv-cache-memory-bytes", str(2**22), "--served-model-name", "tiny", *flags]
    return subprocess.Popen(
        command,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_until_ready(process: subprocess.Popen[str], data: Path) -> Server:
    """The server, once it takes requests."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline_s, "it does not start"
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((data / "server.json").read_text())
            if state["pid"] == process.pid:  # Else it is of one that was killed.
                break
        time.sleep(0.02)
    (engine,) = psutil.Process(process.pid).children()
    return Server(process=process, url=state["url"], engine_pid=engine.pid)


@contextlib.contextmanager
def running_weft_serve(model: Path, data: Path, *flags: str) -> Generator[Server]:
    """A server that is ready; killed at the end, if it still runs."""
    process = start_weft_serve(model, data, *flags)
    try:
        yield wait_until_ready(process, data)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Load:
    """Requests one after another, whatever becomes of them."""

    def __init__(self, server: Server) -> None:
        self.num_answered = 0
        self._client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=5
        )
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            try:
                prompt = f"{number} " + "x" * (number * 7 % 50)
                self._client.completions.create(model="tiny", prompt=prompt, max_tokens=8)
            except openai.OpenAIError:
                time.sleep(0.05)
            else:
                self.num_answered += 1

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
