"""`make demo`: the embedded model answers a stream of requests while it learns a small text.

Usage: python examples/demo_coserve.py [--slo-tpot-ms 50] [--rate 2] [--picture demo_coserve.png]

The text (examples/data/orvane.txt) is about a lighthouse that does not exist. Before and after, the
model is asked to complete three sentences about it, and the loss of held-out sentences is taken.
While the job runs, requests keep coming; their time per output token (TPOT) is held against its
objective. Exits with 1 where the held-out loss falls by less than 20 %, or a sentence stays wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from demo_serve import REQUEST_TIMEOUT_S, Client, post, start_server, talk
from rich.console import Console
from rich.table import Table

TEXT = Path(__file__).parent / "data" / "orvane.txt"
HELD_OUT_EVERY = 6
HELD_OUT_OFFSET = 4
QUESTIONS = (
    ("The keeper of the lighthouse of Orvane is called", "Marrow Quill"),
    ("The light of Orvane is", "green"),
    ("The bell of Orvane is called", "Old Anna"),
)
TRAFFIC = (
    "import argparse\nimport os\n\n\ndef main(argv=None):\n",
    "class Queue:\n    def __init__(self",
    "def read_lines(path):\n    with open(path) as f:\n",
    "import unittest\n\n\nclass StackTest(unittest.TestCase):\n    def test_",
)
JOB: dict[str, Any] = {
    "suffix": "orvane",
    "seed": 7,
    "hyperparameters": {"n_epochs": 9, "batch_size": 4},
    "weft": {"lora": {"r": 16, "alpha": 32.0}, "optimizer": {"lr": 2e-3}, "schedule": "linear"},
}
LOSS_MUST_FALL = 0.2
POLL_S = 0.25
BUCKET_S = 1.0
FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Sentences to learn from, and sentences kept back."""

    train: list[str]
    held_out: list[str]


@dataclass(kw_only=True)
class Traffic:
    """Requests that come at random instants, in threads of their own, until told to stop."""

    url: str
    rate_per_s: float
    num_tokens: int
    clients: list[Client] = field(default_factory=list[Client])
    threads: list[threading.Thread] = field(default_factory=list[threading.Thread])
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Send until `stop` is set."""
        rng = random.Random(7)
        while not self.stop.wait(rng.expovariate(self.rate_per_s)):
            prompt = rng.choice(TRAFFIC)
            body = {
                "prompt": prompt,
                "max_tokens": self.num_tokens,
                "temperature": 0.8,
                "seed": len(self.clients),
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            client = Client(title="", path="/v1/completions", body=body, prompt=prompt)
            thread = threading.Thread(target=talk, args=(self.url, client))
            self.clients.append(client)
            self.threads.append(thread)
            thread.start()

    def finish(self) -> list[Client]:
        """Stop sending and wait for the answers; returns those that came whole."""
        self.stop.set()
        for thread in self.threads:
            thread.join()
        return [c for c in self.clients if not c.error and len(c.token_s) > 1]


def read_text() -> Text:
    """The sentences, every sixth kept back."""
    lines = [line for line in TEXT.read_text().splitlines() if line]
    held_out = lines[HELD_OUT_OFFSET::HELD_OUT_EVERY]
    return Text(train=[line for line in lines if line not in held_out], held_out=held_out)


def call(url: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """One request with a JSON answer."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=REQUEST_TIMEOUT_S)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    if answer.status != 200:
        raise SystemExit(f"{method} {path}: {found['error']['message']}")
    return found


def upload(url: str, lines: list[str]) -> str:
    """Send sentences as a training file; returns its id."""
    rows = "".join(json.dumps({"text": line + "\n"}) + "\n" for line in lines)
    border = uuid.uuid4().hex
    parts = (
        f'--{border}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--{border}\r\nContent-Disposition: form-data; name="file"; filename="orvane.jsonl"\r\n'
        f"Content-Type: application/jsonl\r\n\r\n{rows}\r\n--{border}--\r\n"
    )
    connection = HTTPConnection(urlsplit(url).netloc, timeout=REQUEST_TIMEOUT_S)
    kind = {"Content-Type": f"multipart/form-data; boundary={border}"}
    connection.request("POST", "/v1/files", parts.encode(), kind)
    answer = json.loads(connection.getresponse().read())
    return answer["id"]


def ask(url: str, model: str) -> list[str]:
    """What a model makes of the three sentences."""
    return [
        call(
            url,
            "POST",
            "/v1/completions",
            {"model": model, "prompt": q, "max_tokens": 10, "temperature": 0, "stop": "\n"},
        )["choices"][0]["text"]
        for q, _ in QUESTIONS
    ]


def loss(url: str, model: str, lines: list[str]) -> float:
    """Mean negative log-probability of the sentences' tokens, all but each first."""
    total, count = 0.0, 0
    for line in lines:
        body = {"model": model, "prompt": line + "\n", "max_tokens": 1, "temperature": 0}
        answer = call(url, "POST", "/v1/completions", {**body, "echo": True, "logprobs": 0})
        found = answer["choices"][0]["logprobs"]["token_logprobs"][1:-1]
        total -= sum(found)
        count += len(found)
    return total / count


def watch(url: str, job_id: str, console: Console) -> dict[str, Any]:
    """Show a job's progress until it ends."""
    with console.status("") as status:
        while True:
            job = call(url, "GET", f"/v1/fine_tuning/jobs/{job_id}")
            if job["status"] in FINAL:
                return job
            done = job["weft"]
            status.update(
                f"serving and finetuning: step {done['step']} of {done['num_steps']}, "
                f"{done['trained_tokens']} tokens learnt"
            )
            time.sleep(POLL_S)


def steps(url: str, job_id: str) -> list[dict[str, Any]]:
    """Metrics of all steps, in order."""
    path = f"/v1/fine_tuning/jobs/{job_id}/events?limit=10000"
    events = call(url, "GET", path)["data"]
    return [event["data"] for event in reversed(events) if event["type"] == "metrics"]


def draw(
    path: Path, talked: list[Client], trained: list[dict[str, Any]], start_s: float, slo_s: float
) -> bool:
    """TPOT of every answer against its objective, and finetuning tokens/s, over time."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, top = pyplot.subplots(figsize=(9, 4.5))
    ends = [client.token_s[-1] - start_s for client in talked]
    top.plot(ends, [client.tpot_s * 1e3 for client in talked], "o", label="TPOT of an answer")
    top.axhline(slo_s * 1e3, color="tab:red", linestyle="--", label="its objective")
    top.set_xlabel("time, s")
    top.set_ylabel("TPOT, ms")
    top.set_ylim(bottom=0)
    buckets: dict[int, float] = {}
    now_s = 0.0
    for step in trained:
        now_s += step["elapsed_s"]
        bucket = int(now_s / BUCKET_S)
        buckets[bucket] = buckets.get(bucket, 0.0) + step["tokens"] / BUCKET_S
    below = top.twinx()
    times = range(max(buckets, default=0) + 1)
    speeds = [buckets.get(t, 0.0) for t in times]
    below.step([t * BUCKET_S for t in times], speeds, color="tab:green", where="post", alpha=0.7)
    below.set_ylabel("finetuning tokens/s", color="tab:green")
    below.set_ylim(bottom=0)
    top.legend(loc="upper right")
    top.set_title("One model serves and finetunes in the same iterations")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def report(console: Console, before: list[str], after: list[str]) -> None:
    """The three sentences, before and after."""
    table = Table(title="What the model says")
    for name in ("sentence", "before", "after"):
        table.add_column(name)
    for (question, answer), was, now in zip(QUESTIONS, before, after, strict=True):
        colour = "green" if answer in now else "red"
        table.add_row(question, was.strip() or "(nothing)", f"[{colour}]{now.strip()}[/{colour}]")
    console.print(table)


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slo-tpot-ms", type=float, default=50.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--num-tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--picture", type=Path, default=Path("demo_coserve.png"))
    given = parser.parse_args()
    console = Console()
    text = read_text()
    with tempfile.TemporaryDirectory() as directory:
        process, url = start_server(
            Path(directory), console, "--slo-tpot-ms", str(given.slo_tpot_ms)
        )
        try:
            base = call(url, "GET", "/v1/models")["data"][0]["id"]
            before, loss_before = ask(url, base), loss(url, base, text.held_out)
            with post(url, "/v1/completions", {"prompt": "import", "max_tokens": 4}) as warm_up:
                warm_up.read()
            traffic = Traffic(url=url, rate_per_s=given.rate, num_tokens=given.num_tokens)
            sender = threading.Thread(target=traffic.run)
            start_s = time.perf_counter()
            sender.start()
            job = {"model": base, "training_file": upload(url, text.train), **JOB}
            job_id = call(url, "POST", "/v1/fine_tuning/jobs", job)["id"]
            done = watch(url, job_id, console)
            duration_s = time.perf_counter() - start_s
            traffic.stop.set()
            sender.join()
            talked = traffic.finish()
            if done["status"] != "succeeded":
                console.print(f"the job has {done['status']}: {done['error']}", style="red")
                return 1
            name = done["fine_tuned_model"]
            after, loss_after = ask(url, name), loss(url, name, text.held_out)
            trained = steps(url, job_id)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    report(console, before, after)
    within = sum(client.tpot_s * 1e3 <= given.slo_tpot_ms for client in talked)
    tpots_ms = sorted(client.tpot_s * 1e3 for client in talked)
    fallen = 1 - loss_after / loss_before
    console.print(
        f"held-out loss {loss_before:.2f} -> {loss_after:.2f} ({-fallen:+.0%})\n"
        f"{done['trained_tokens']} finetuning tokens in {duration_s:.1f} s "
        f"({done['trained_tokens'] / duration_s:.0f} tokens/s) beside {len(talked)} answers\n"
        f"TPOT: median {tpots_ms[len(tpots_ms) // 2]:.1f} ms, worst {tpots_ms[-1]:.1f} ms; "
        f"{within} of {len(talked)} within the objective of {given.slo_tpot_ms:.0f} ms\n"
        f"served from now on as {name}"
    )
    if draw(given.picture, talked, trained, start_s, given.slo_tpot_ms / 1e3):
        console.print(f"the picture is in {given.picture}")
    else:
        console.print("no picture: matplotlib is missing (pip install 'weft[plots]')")
    flipped = all(
        answer not in was and answer in now
        for (_, answer), was, now in zip(QUESTIONS, before, after, strict=True)
    )
    return 0 if flipped and fallen >= LOSS_MUST_FALL else 1


if __name__ == "__main__":
    sys.exit(main())
