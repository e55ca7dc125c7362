"""Finetuning alone on this CPU: tokens per second and peak memory, ours and PEFT's in turns.

A random Llama of 110 M parameters, LoRA of rank 16 on all linears, AdamW, every token a label. For
each shape and dtype the sides are loaded in processes of their own, take a warm-up step each, and
then one step each in turns, the order moving on from round to round. Memory is a process's peak
resident set above that of its loaded model, which one token's forward pass has touched; our KV
pages and native code count as ours. Under a bfloat16 base PEFT is measured twice, with adapters in
float32 (its default, autocast) and in bfloat16. About six minutes on two cores with two rounds.

    python benchmarks/finetune_cpu.py --json finetune_cpu.json
    python benchmarks/finetune_cpu.py --only "4x512 bfloat16 pruned" "1x2048 float32" --rounds 3
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from bench_models import RAND110, open_model
from rows import Row, compare, describe_machine, print_rows, write_json

RANK = 16
ALPHA = 32
SHAPES = ("4x512", "1x2048")
PEERS = {"float32": ("peft",), "bfloat16": ("peft", "peft-bfloat16")}
SPEED_TARGETS = {"float32": 1.15, "bfloat16": 2.0}
MEMORY_TARGETS = {"pruned": 1 / 0.35, "layer-input": 1 / 0.12}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One side's run."""

    side: str
    """`weft`, `peft`, or `peft-bfloat16`."""
    model: str
    batch: int
    length: int
    dtype: str
    remat: str
    num_steps: int
    threads: int
    samples_in_flight: int = 1
    counts_cpu_time: bool = False

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return self.batch * self.length

    @property
    def name(self) -> str:
        """As its figures are listed."""
        return f"{self.batch}x{self.length} {self.dtype} {self.side} {self.remat}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One of our settings against one of PEFT's: a row of speed and one of memory."""

    shape: str
    dtype: str
    remat: str
    peer: str

    @property
    def claim(self) -> str:
        """What `--only` looks at."""
        return f"{self.shape} {self.dtype} {self.remat} against {self.peer}"


@dataclass(kw_only=True, slots=True)
class Figures:
    """What one process measured."""

    tokens_per_s: list[float] = field(default_factory=list[float])
    """One a round."""
    peak_bytes: int = 0
    """Above the loaded model."""
    losses: list[float] = field(default_factory=list[float])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "weft-bench")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxLEN")
    parser.add_argument("--dtypes", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--remats", nargs="+", default=list(MEMORY_TARGETS))
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows with a text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples-in-flight", type=int, default=1, help="ours, at once")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds instead of elapsed ones, for orientation beside other work: one thread",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run:
        serve(Setting(**json.loads(options.run)))
        return
    pairs = [
        pair
        for shape in options.shapes
        for dtype in options.dtypes
        for remat in options.remats
        for peer in PEERS[dtype]
        for pair in [Pair(shape=shape, dtype=dtype, remat=remat, peer=peer)]
        if any(text in pair.claim for text in options.only)
    ]
    if not pairs:
        parser.error(f"no row holds any of {options.only}")
    model = open_model("rand110", options.cache, None)
    rows: list[Row] = []
    raw: dict[str, dict[str, object]] = {}
    for shape, dtype in dict.fromkeys((pair.shape, pair.dtype) for pair in pairs):
        group = [pair for pair in pairs if (pair.shape, pair.dtype) == (shape, dtype)]
        batch, length = map(int, shape.split("x"))
        sides = dict.fromkeys([("weft", pair.remat) for pair in group])
        sides |= dict.fromkeys([(pair.peer, "none") for pair in group])
        settings = {
            side: Setting(
                side=side[0],
                model=str(model.path),
                batch=batch,
                length=length,
                dtype=dtype,
                remat=side[1],
                num_steps=options.rounds + 1,
                threads=options.threads,
                samples_in_flight=options.samples_in_flight,
                counts_cpu_time=options.cpu_time,
            )
            for side in sides
        }
        found = measure(settings, options.rounds)
        rows += [row for pair in group for row in compare_sides(pair, found)]
        raw |= {settings[side].name: asdict(figures) for side, figures in found.items()}
    machine = describe_machine()
    print_rows(rows, title=f"finetuning on {machine['processor']}, commit {machine['commit']}")
    if options.json:
        write_json(options.json, rows, machine, raw=raw)


def compare_sides(pair: Pair, found: dict[tuple[str, str], Figures]) -> list[Row]:
    """Speed and memory."""
    ours, theirs = found["weft", pair.remat], found[pair.peer, "none"]
    return [
        compare(
            pair.claim,
            "tokens/s",
            ours.tokens_per_s,
            theirs.tokens_per_s,
            target=SPEED_TARGETS[pair.dtype] if pair.remat == "pruned" else None,
        ),
        compare(
            f"{pair.claim}: peak memory above weights",
            "MB",
            [ours.peak_bytes / 1e6],
            [theirs.peak_bytes / 1e6],
            lower_is_better=True,
            target=MEMORY_TARGETS.get(pair.remat),
        ),
    ]


def measure(
    settings: dict[tuple[str, str], Setting], rounds: int
) -> dict[tuple[str, str], Figures]:
    """One process a side; a warm-up step each, then a step each in turns."""
    found = {side: Figures() for side in settings}
    sides = list(settings)
    with start_all(list(settings.values())) as workers:
        by_side = dict(zip(sides, workers, strict=True))
        for turn in range(rounds + 1):
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                reply = by_side[side].step()
                figures = found[side]
                figures.peak_bytes = max(figures.peak_bytes, int(reply["peak_bytes"]))
                figures.losses.append(reply["loss"])
                if turn:
                    figures.tokens_per_s.append(settings[side].num_tokens / reply["elapsed_s"])
    for side, figures in found.items():
        speeds = ", ".join(f"{speed:.1f}" for speed in figures.tokens_per_s)
        losses = ", ".join(f"{loss:.4f}" for loss in figures.losses)
        print(
            f"{settings[side].name}: {speeds} tokens/s, {figures.peak_bytes / 1e6:.1f} MB, "
            f"losses {losses}",
            file=sys.stderr,
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A process that holds one side, and takes a step when told to."""

    setting: Setting
    process: subprocess.Popen[str]

    def step(self) -> dict[str, float]:
        """One optimizer step: seconds, loss, and the peak memory so far."""
        stdin, stdout = self._pipes()
        try:
            stdin.write("step\n")
            stdin.flush()
        except BrokenPipeError:
            self.fail()
        return json.loads(self.line(stdout))

    def wait_ready(self) -> None:
        """Until the model is loaded."""
        self.line(self._pipes()[1])

    def line(self, stdout: IO[str]) -> str:
        """What it says next; libraries may print beside it."""
        for line in stdout:
            if line.startswith(_MARK):
                return line[len(_MARK) :]
        self.fail()
        raise AssertionError

    def fail(self) -> None:
        """Report that the process is gone."""
        raise RuntimeError(f"{self.setting.name} ended with status {self.process.wait()}")

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout


_MARK = "@figures "


@contextmanager
def start_all(settings: Sequence[Setting]) -> Iterator[list[Worker]]:
    """Processes that have loaded their models; they end with the context."""
    workers: list[Worker] = []
    try:
        for setting in settings:
            process = subprocess.Popen(
                [sys.executable, __file__, "--run", json.dumps(asdict(setting))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "TRANSFORMERS_VERBOSITY": "error",
                    "PYTHONWARNINGS": "ignore",
                    "OMP_NUM_THREADS": str(setting.threads),
                },
            )
            workers.append(Worker(setting=setting, process=process))
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def serve(setting: Setting) -> None:
    """Load in this process, then take a step for each line that comes."""
    start = start_ours if setting.side == "weft" else start_peft
    step = start(setting, draw_tokens(setting))
    before = reset_peak()
    say({})
    clock = time.process_time if setting.counts_cpu_time else time.perf_counter
    for _ in sys.stdin:
        start_s = clock()
        loss = step()
        elapsed_s = clock() - start_s
        say({"elapsed_s": elapsed_s, "loss": loss, "peak_bytes": peak_bytes() - before})


def say(figures: dict[str, float]) -> None:
    print(_MARK + json.dumps(figures), flush=True)


def draw_tokens(setting: Setting) -> np.ndarray:
    """The samples: the same for all sides."""
    shape = (setting.batch, setting.length)
    return np.random.default_rng(0).integers(0, RAND110["vocab_size"], shape)


def start_ours(setting: Setting, tokens: np.ndarray) -> Callable[[], float]:
    """The production policy in `finetune-only` over the production executor; takes one step."""
    from weft.base.clock import WallClock
    from weft.engine.config import PolicyConfig
    from weft.engine.coserve import CoServing
    from weft.engine.finetune import FinetuneJobSpec, OptimizerSpec, StepMetrics, TrainingSample
    from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
    from weft.engine.loop import EngineLoop
    from weft.engine.request import Request
    from weft.engine.sampling import SamplingParams
    from weft.graph.adapter_spec import AdapterSpec
    from weft.graph.pruning import Remat
    from weft.runtime.build import ExecutorConfig, build_executor

    built = build_executor(
        ExecutorConfig(
            model=setting.model,
            dtype=setting.dtype,
            num_threads=setting.threads,
            max_num_seqs=1,
            max_model_len=setting.length,
            kv_cache_memory_bytes=512 << 20,
            max_finetune_samples=setting.samples_in_flight,
        )
    )
    policy = CoServing(
        PolicyConfig(max_model_len=setting.length, max_num_batched_tokens=512),
        built.executor.info,
        WallClock(),
        finetune=FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY),
    )
    loop = EngineLoop(policy, built.executor)
    policy.add(Request(id="touch", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1)))
    loop.drain()
    labels = np.ones(setting.length, np.float32)
    job = FinetuneJobSpec(
        id="job",
        adapter=AdapterSpec(rank=RANK, alpha=float(ALPHA)),
        samples=tuple(
            TrainingSample(token_ids=row.astype(np.int32), label_weights=labels) for row in tokens
        ),
        num_epochs=setting.num_steps,
        batch_size=setting.batch,
        optimizer=OptimizerSpec(lr=2e-4),
        shuffles=False,
        remat=Remat(setting.remat),
    )
    jobs = [job]

    def step() -> float:
        if jobs:
            policy.add_job(jobs.pop())
        while True:
            loop.step()
            for event in policy.take_finetune_events():
                if isinstance(event, StepMetrics):
                    return event.loss

    return step


def start_peft(setting: Setting, tokens: np.ndarray) -> Callable[[], float]:
    """A plain training loop with transformers and PEFT; takes one step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setting.threads)
    base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype))
    model = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=setting.side == "peft",
    )
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0
    )
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        model(input_ids=ids[:1, :1], use_cache=False)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def reset_peak() -> int:
    """Resident bytes now, what loading left behind given back; the peak starts here."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Most resident bytes since `reset_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
