"""Servers over the closed-form model, each in its own process, as users run them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.fake_engine import write_model_directory

TESTS = Path(__file__).parents[1]
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server process."""

    process: subprocess.Popen[str]
    url: str
    engine_pid: int

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=30)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def _environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1")


@contextlib.contextmanager
def running_server(**options: Any) -> Generator[Server]:
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "serve" / "fake_server.py"), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        if len(line) != 2:
            _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
            raise RuntimeError(f"the server did not start: {errors}")
        yield Server(process=process, url=line[0], engine_pid=int(line[1]))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=STOP_TIMEOUT_S)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One fast server for all tests that leave it as it was."""
    with running_server() as running:
        yield running


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Start servers of one's own, with options; all are gone after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(running_server(**options))


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.openai()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as opened:
        yield opened


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and a chat template."""
    return write_model_directory(tmp_path_factory.mktemp("fake") / "model")


@pytest.fixture
def engine_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes started by the test itself find the fake builder."""
    for name, value in (("PYTHONPATH", str(TESTS)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
