"""`weft serve` as a user types it."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from weft.cli import serve
from weft.model.embedded import EMBEDDED_MODEL_NAME

FLAGS = {
    "--host",
    "--port",
    "--served-model-name",
    "--api-key",
    "--api-keys",
    "--max-waiting",
    "--allow-unknown-params",
    "--data-dir",
    "--access-log",
    "--dtype",
    "--device",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--kv-cache-memory-bytes",
    "--enable-prefix-caching",
    "--seed",
    "--num-threads",
    "--tensor-parallel-size",
    "--trace",
    "--database-url",
    "--policy",
    "--slo-tpot-ms",
    "--slo-ttft-ms",
    "--max-iteration-ms",
    "--finetune-min-share",
    "--memory-budget",
    "--checkpoint-every",
    "--record-windows",
    "--step-times",
    "--max-file-bytes",
    "--max-body-bytes",
    "--max-prompts",
    "--max-prompt-tokens",
    "--max-choices",
    "--max-logprobs",
    "--max-stop",
    "--lora-modules",
    "--adapter-root",
}
"""The whole surface: a new flag is a decision, not an accident."""
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "serve.md"
TIMEOUT_S = 60.0


def _weft_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weft", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=dict(os.environ, OMP_NUM_THREADS="1", NO_COLOR="1", COLUMNS="200"),
    )


def test_the_flags_are_these_and_the_guide_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--help"]) == 0
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert {flag for flag in shown if not flag.startswith("--no-")} == FLAGS
    names = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve.serve).parameters}
    assert names - {"--model"} == FLAGS
    guide = GUIDE.read_text()
    assert [flag for flag in sorted(FLAGS) if f"`{flag}" not in guide] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is 2"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--max-logprobs", "21"], "max_logprobs is 21"),
        (["--port", "70000"], "port is 70000"),
        (["--max-waiting", "-1"], "max_waiting is -1"),
        (["--checkpoint-every", "0"], "checkpoint_every is 0"),
        (["--slo-tpot-ms", "0"], "tpot_s is 0"),
        (["--finetune-min-share", "1"], "min_share is 1"),
        (["--database-url", "mysql://a/b", "--data-dir", "."], "not supported"),
        (["--api-keys", "/nowhere/keys"], "cannot be read"),
        (["--host", "256.256.256.256"], "cannot be resolved"),
    ],
)
def test_settings_out_of_range_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.base.errors import WeftError

    monkeypatch.chdir(tmp_path)  # A data directory of "." is made before its database is refused.
    with pytest.raises(WeftError, match=re.escape(message)):
        serve.main(arguments)


def test_an_unknown_flag_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--temperature", "1"]) == 2
    assert "--temperature" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such-model"], "no-such-model"),
        (["--kv-cache-memory-bytes", "100000"], "would do"),
        (["--trace", "/nowhere/trace.json"], "/nowhere/trace.json"),
    ],
)
def test_what_only_the_engine_sees_is_one_line_too(arguments: list[str], message: str) -> None:
    done = _weft_serve(*arguments, "--port", "0")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("weft serve: ")
    assert message in line


def test_a_half_written_checkpoint_is_named(tmp_path: Path) -> None:
    from weft.model.embedded import embedded_model_path

    for source in embedded_model_path().iterdir():
        if source.suffix == ".safetensors":
            (tmp_path / source.name).write_bytes(source.read_bytes()[:100_000])
        else:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    done = _weft_serve(str(tmp_path), "--port", "0")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, int]]:
    """The embedded model behind `weft serve`, found by its server.json."""
    data_dir = tmp_path_factory.mktemp("data")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "weft", "serve", "--port", "0", "--data-dir", str(data_dir)),
            *("--dtype", "float32", "--max-num-seqs", "8", "--num-threads", "1"),
        ],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stderr=subprocess.PIPE,
        text=True,
    )
    state = data_dir / "server.json"
    deadline_s = time.monotonic() + TIMEOUT_S
    while not state.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s, "the server does not start"
        time.sleep(0.05)
    try:
        yield json.loads(state.read_text())["url"], data_dir, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert EMBEDDED_MODEL_NAME in errors
    assert not state.exists()


def test_the_embedded_model_answers(embedded: tuple[str, Path, int]) -> None:
    client = openai.OpenAI(base_url=f"{embedded[0]}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    assert model.id == EMBEDDED_MODEL_NAME
    answer = client.completions.create(
        model=model.id, prompt="\n\nif __name__ ==", max_tokens=12, temperature=0, stop="\n"
    )
    assert "__main__" in answer.choices[0].text
    stream = client.completions.create(
        model=model.id,
        prompt="\n\nif __name__ ==",
        max_tokens=12,
        temperature=0,
        stop="\n",
        stream=True,
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    chat = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": "import os\nimport "}],
        max_completion_tokens=8,
        seed=1,
        n=2,
    )
    assert len(chat.choices) == 2
    assert all(choice.message.content for choice in chat.choices)


def test_a_data_directory_belongs_to_one_server(embedded: tuple[str, Path, int]) -> None:
    done = _weft_serve("--port", "0", "--data-dir", str(embedded[1]))
    assert done.returncode == 2
    assert "another server holds" in done.stderr
    assert (embedded[1] / "server.json").exists()


def test_a_port_in_use_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _weft_serve("--port", str(port))
    assert done.returncode == 2
    assert f"port {port} cannot be used" in done.stderr
