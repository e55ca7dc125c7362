"""Beginning and end: hang-ups, deaths, signals, ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from serve.conftest import STOP_TIMEOUT_S, TESTS, Server
from serve.fake_engine import greedy_text
from serve.fake_server import MODEL_NAME

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 100, "temperature": 0, "stream": True}
"""Two seconds of the slow model."""


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def _gauge(http: httpx.Client, name: str) -> float:
    for line in http.get("/metrics").text.splitlines():
        if line.startswith(f"weft:{name}{{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no weft:{name}")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_cancelled(
    start_server: Callable[..., Server], stream: bool
) -> None:
    server = start_server(builder="build_slow")
    with server.http() as http:
        if stream:
            with http.stream("POST", COMPLETIONS, json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                assert _gauge(http, "num_requests_running") == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(COMPLETIONS, json={**LONG, "stream": False}, timeout=0.3)
        _wait_until(lambda: _gauge(http, "num_requests_running") == 0, "still running")
        assert _gauge(http, "kv_cache_usage_perc") == 0
        assert _gauge(http, "generation_tokens_total") < 100
        assert 'finished_reason="abort",model_name="fake/model"} 1.0' in http.get("/metrics").text


def test_the_engines_death_is_heard_by_all(start_server: Callable[..., Server]) -> None:
    server = start_server(builder="build_slow")
    client = server.openai()
    stream = client.completions.create(model=MODEL_NAME, prompt="x", max_tokens=200, stream=True)
    next(iter(stream))
    with server.http() as http, http.stream("POST", COMPLETIONS, json=LONG) as raw:
        lines = raw.iter_lines()
        next(lines)
        os.kill(server.engine_pid, signal.SIGKILL)
        killed_s = time.monotonic()
        events = [line[6:] for line in lines if line]
        assert json.loads(events[-2])["error"]["code"] == "engine_dead"
        assert events[-1] == "[DONE]"
        with pytest.raises(openai.APIError, match="engine process is gone"):
            list(stream)
        for path in (COMPLETIONS, "/v1/chat/completions"):
            refused = http.post(path, json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_dead"
        for path in ("/health", "/v1/models", f"/v1/models/{MODEL_NAME}"):
            assert http.get(path).status_code == 503
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 503
        assert http.post("/detokenize", json={"tokens": [1]}).status_code == 503
        assert _gauge(http, "num_requests_running") == 0
        assert _gauge(http, "kv_cache_usage_perc") == 0
    assert server.process.wait(STOP_TIMEOUT_S) == 1
    assert time.monotonic() - killed_s < 5


def test_a_whole_answer_is_503_when_the_engine_crashes(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with server.http() as http:
        answer = http.post(COMPLETIONS, json={"prompt": "crash\x01"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
    assert server.process.wait(STOP_TIMEOUT_S) == 1


def test_the_first_signal_drains(start_server: Callable[..., Server]) -> None:
    server = start_server(builder="build_slow")
    with server.http() as http, http.stream("POST", COMPLETIONS, json=LONG) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.terminate()
        _wait_until(lambda: http.get("/health").status_code == 503, "not draining")
        refused = http.post(COMPLETIONS, json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == greedy_text("x", 100)
    assert server.process.wait(STOP_TIMEOUT_S) == 0
    assert not psutil.pid_exists(server.engine_pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops(
    start_server: Callable[..., Server], number: signal.Signals
) -> None:
    server = start_server(builder="build_slow")
    with server.http() as http, http.stream("POST", COMPLETIONS, json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(number)
        _wait_until(lambda: http.get("/health").status_code == 503, "not draining")
        server.process.send_signal(number)
        events = [line[6:] for line in lines if line]
        assert json.loads(events[-2])["error"]["code"] == "draining"
        assert events[-1] == "[DONE]"
        assert server.process.wait(STOP_TIMEOUT_S) == 128 + number
    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()
    assert not psutil.pid_exists(server.engine_pid)


def test_a_killed_server_leaves_nothing_behind(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = start_server()
    assert list(tmp_path.glob("weft-*"))
    server.process.kill()
    _wait_until(lambda: not psutil.pid_exists(server.engine_pid), "the engine is an orphan")
    assert not list(tmp_path.glob("weft-*"))


def test_a_signal_while_the_model_loads_ends_both(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, str(TESTS / "serve" / "fake_server.py")),
            json.dumps({"builder": "build_never"}),
        ],
        env=dict(os.environ, PYTHONPATH=str(TESTS), FAKE_LOADING=str(tmp_path / "pid")),
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = tmp_path / "pid"
    _wait_until(lambda: pid.exists() and bool(pid.read_text()), "the engine does not start")
    process.terminate()
    _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert not psutil.pid_exists(int(pid.read_text()))


def test_the_engine_ignores_signals_to_the_whole_group(start_server: Callable[..., Server]) -> None:
    server = start_server()
    os.kill(server.engine_pid, signal.SIGINT)
    os.kill(server.engine_pid, signal.SIGTERM)
    answer = server.openai().completions.create(model=MODEL_NAME, prompt="x", temperature=0)
    assert answer.choices[0].text == greedy_text("x", 16)


def test_a_port_in_use_is_refused_before_the_model_loads(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    options = json.dumps({"port": port, "builder": "build_failing"})
    done = _run_fake_server(options)
    assert done.returncode == 2
    assert f"port {port} cannot be used" in done.stderr
    assert "--port" in done.stderr
    assert "ModelLoadError" not in done.stderr


def test_a_model_that_cannot_be_loaded_ends_with_one_line() -> None:
    done = _run_fake_server(json.dumps({"builder": "build_failing"}))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ModelLoadError:")
    assert line.endswith("model.safetensors is missing")


def test_the_trace_shows_every_iteration(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    server = start_server(trace_path=str(path))
    server.openai().completions.create(model=MODEL_NAME, prompt="x" * 100, max_tokens=10)
    server.terminate()
    assert server.process.wait(STOP_TIMEOUT_S) == 0
    events = json.loads(path.read_text())["traceEvents"]
    segments = [event for event in events if event.get("cat") == "segments"]
    # 100 prompt tokens in chunks of 64 and 36, whose last samples; then nine decodes.
    assert [e["args"]["tokens"] for e in segments[:2]] == [64, 36]
    assert [e["args"]["tokens"] for e in segments[2:]] == [1] * 9
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {names[e["tid"]] for e in segments} == {"prefill", "decode"}


def _run_fake_server(options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TESTS / "serve" / "fake_server.py"), options],
        env=dict(os.environ, PYTHONPATH=str(TESTS)),
        capture_output=True,
        text=True,
        timeout=STOP_TIMEOUT_S,
    )
