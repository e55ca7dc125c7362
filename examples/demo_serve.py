"""`make demo`: start the server on the embedded model, let several clients talk to it at once.

Usage: python examples/demo_serve.py [--num-tokens N]

Prints a table of TTFT (time to first token), TPOT (time per output token) and tokens/s, then the
command that keeps such a server running.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

START_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 120.0
PREVIEW_LINES = 6
REFRESH_PER_S = 8


@dataclass(kw_only=True)
class Client:
    """One client's request and what it has heard so far."""

    title: str
    path: str
    body: dict[str, Any]
    prompt: str
    """Shown before the answer."""
    text: str = ""
    num_tokens: int = 0
    start_s: float = 0.0
    token_s: list[float] = field(default_factory=list[float])
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Request to first token."""
        return self.token_s[0] - self.start_s

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens after the first."""
        return (self.token_s[-1] - self.token_s[0]) / max(1, self.num_tokens - 1)

    def panel(self) -> Panel:
        """The end of prompt and answer."""
        shown = Text().append(self.prompt, style="dim").append(self.error or self.text)
        lines = shown.split("\n", allow_blank=True)[-PREVIEW_LINES:]
        body = Text("\n").join(lines)
        body.no_wrap = True
        body.overflow = "ellipsis"
        return Panel(body, title=self.title, title_align="left", height=PREVIEW_LINES + 2)


def clients(num_tokens: int) -> list[Client]:
    """Completions and conversations, greedy and drawn, short and long prompts."""
    common: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    prompts = (
        ("import argparse\nimport os\n\n\ndef main(argv=None):\n", 0.0),
        ('class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self', 0.6),
        ("def read_lines(path):\n    with open(path) as f:\n", 0.7),
        ("import unittest\n\n\nclass QueueTest(unittest.TestCase):\n\n    def test_", 0.8),
    )
    found = [
        Client(
            title=f"POST /v1/completions · temperature {temperature}",
            path="/v1/completions",
            prompt=prompt,
            body={
                "prompt": prompt,
                "max_tokens": num_tokens,
                "temperature": temperature,
                "seed": 7,
                **common,
            },
        )
        for prompt, temperature in prompts
    ]
    questions = ("def fibonacci(n):\n", "try:\n    import json\nexcept ImportError")
    found.extend(
        Client(
            title="POST /v1/chat/completions · temperature 0.5",
            path="/v1/chat/completions",
            prompt=question,
            body={
                "messages": [{"role": "user", "content": question}],
                "max_completion_tokens": num_tokens,
                "temperature": 0.5,
                "seed": 7,
                **common,
            },
        )
        for question in questions
    )
    return found


def talk(url: str, client: Client) -> None:
    """Stream one answer, noting when each piece came."""
    client.start_s = time.perf_counter()
    with post(url, client.path, client.body) as response:
        if response.status != 200:
            client.error = response.read().decode()
            return
        for line in response:
            if line.startswith(b"data: {"):
                hear(client, json.loads(line.removeprefix(b"data: ")))


def post(url: str, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    """Send a body; the response is read as it comes."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=REQUEST_TIMEOUT_S)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def hear(client: Client, event: dict[str, Any]) -> None:
    """Take one server-sent event."""
    if "error" in event:
        client.error = event["error"]["message"]
        return
    if event.get("usage"):
        client.num_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        piece = choice.get("text") or choice.get("delta", {}).get("content")
        if piece:
            client.text += piece
            client.token_s.append(time.perf_counter())


def show(url: str, talking: list[Client], console: Console) -> float:
    """Let all clients talk at once and draw them; returns the seconds that it took."""

    def frame() -> Table:
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        for left, right in zip(talking[::2], talking[1::2], strict=True):
            grid.add_row(left.panel(), right.panel())
        return grid

    with post(url, "/v1/completions", {"prompt": "import", "max_tokens": 4}) as warm_up:
        warm_up.read()
    threads = [threading.Thread(target=talk, args=(url, client)) for client in talking]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    if console.is_terminal:
        with Live(frame(), console=console, auto_refresh=False) as live:
            while any(thread.is_alive() for thread in threads):
                time.sleep(1 / REFRESH_PER_S)
                live.update(frame(), refresh=True)
    for thread in threads:
        thread.join()
    duration_s = max(client.token_s[-1] for client in talking if client.token_s) - start_s
    if not console.is_terminal:
        console.print(frame())
    return duration_s


def results(talked: list[Client], duration_s: float) -> Table:
    """One row a client, and all together."""
    table = Table(title=f"{len(talked)} clients at once")
    for name in ("client", "tokens", "TTFT, ms", "TPOT, ms", "tokens/s"):
        table.add_column(name, justify="left" if name == "client" else "right")
    for client in talked:
        table.add_row(
            client.title.removeprefix("POST "),
            str(client.num_tokens),
            f"{client.ttft_s * 1e3:.0f}",
            f"{client.tpot_s * 1e3:.1f}",
            f"{client.num_tokens / (client.token_s[-1] - client.start_s):.0f}",
        )
    total = sum(client.num_tokens for client in talked)
    table.add_section()
    table.add_row("all", str(total), "", "", f"{total / duration_s:.0f}")
    return table


def start_server(
    data_dir: Path, console: Console, *options: str
) -> tuple[subprocess.Popen[str], str]:
    """Start `weft serve` on a free port; returns the process and its URL."""
    command = [sys.executable, "-m", "weft", "serve", "--port", "0", "--data-dir", str(data_dir)]
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    state = data_dir / "server.json"
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with console.status("starting weft serve on the embedded model"):
        while not state.exists():
            if process.poll() is not None:
                raise SystemExit(process.communicate()[1])
            if time.monotonic() > deadline_s:
                process.kill()
                raise SystemExit(f"the server did not start within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
    return process, json.loads(state.read_text())["url"]


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-tokens", type=int, default=480, help="tokens of each answer")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        process, url = start_server(Path(directory), console)
        try:
            console.print(f"weft serves its embedded model at {url}/v1 (OpenAI's API)")
            console.print("it completes Python; it does not converse\n", style="dim")
            talking = clients(arguments.num_tokens)
            duration_s = show(url, talking, console)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    failed = [client.error for client in talking if client.error]
    if failed:
        console.print(f"an answer failed: {failed[0]}", style="red")
        return 1
    console.print(results(talking, duration_s))
    weft = Path(sys.executable).with_name("weft")
    shown = os.path.relpath(weft) if weft.exists() else "python -m weft"
    console.print("\nTo keep a server running and talk to it with any OpenAI client:\n")
    console.print(f"  {shown} serve --port 8000", style="bold")
    console.print(
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
        """-d '{"prompt": "import os\\n", "max_tokens": 32}'""",
        style="bold",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
