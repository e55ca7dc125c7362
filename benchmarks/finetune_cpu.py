"""Finetuning alone on this CPU: tokens per second and peak memory, ours and PEFT's in turns.

A random Llama of 110 M parameters, LoRA of rank 16 on all linears, AdamW, every token a label. Each
side runs in a fresh process per round: it loads, takes one warm-up step, then as many steps as are
timed. Memory is the peak resident set above that of the loaded model, which one token's forward
pass has touched; our KV pages and native code count as ours. Under a bfloat16 base PEFT is measured
twice, with adapters in float32 (its default, autocast) and in bfloat16.

    python benchmarks/finetune_cpu.py --rounds 3 --json finetune_cpu.json
    python benchmarks/finetune_cpu.py --shapes 4x512 --dtypes float32 --remats pruned --rounds 1
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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bench_models import RAND110, open_model
from rows import Row, compare, describe_machine, print_rows, write_json

RANK = 16
ALPHA = 32.0
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

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return self.batch * self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What one run measured."""

    tokens_per_s: float
    peak_bytes: int
    """Above the loaded model."""
    losses: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "weft-bench")
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048"], metavar="NxLEN")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--remats", nargs="+", default=["pruned", "layer-input"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(asdict(run(Setting(**json.loads(options.run))))))
        return
    model = open_model("rand110", options.cache, None)
    rows: list[Row] = []
    raw: dict[str, list[dict[str, object]]] = {}
    for shape in options.shapes:
        batch, length = map(int, shape.split("x"))
        for dtype in options.dtypes:
            sides = [("weft", remat) for remat in options.remats]
            sides += [(peer, "none") for peer in PEERS[dtype]]
            found: dict[tuple[str, str], list[Figures]] = {side: [] for side in sides}
            for turn in range(options.rounds):
                for side, remat in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                    setting = Setting(
                        side=side,
                        model=str(model.path),
                        batch=batch,
                        length=length,
                        dtype=dtype,
                        remat=remat,
                        num_steps=options.steps,
                        threads=options.threads,
                    )
                    found[side, remat].append(run_apart(setting))
            rows += compare_sides(f"{shape} {dtype}", dtype, found)
            raw |= {
                f"{shape} {dtype} {side} {remat}": [asdict(figures) for figures in runs]
                for (side, remat), runs in found.items()
            }
    machine = describe_machine()
    print_rows(rows, title=f"finetuning on {machine['processor']}, commit {machine['commit']}")
    if options.json:
        write_json(options.json, rows, machine, raw=raw)


def compare_sides(what: str, dtype: str, found: dict[tuple[str, str], list[Figures]]) -> list[Row]:
    """Speed and memory of each of our settings against each of PEFT's."""
    rows: list[Row] = []
    for (side, remat), ours in found.items():
        if side != "weft":
            continue
        for (peer, _), theirs in found.items():
            if peer == "weft":
                continue
            rows.append(
                compare(
                    f"{what} {remat} against {peer}",
                    "tokens/s",
                    [figures.tokens_per_s for figures in ours],
                    [figures.tokens_per_s for figures in theirs],
                    target=SPEED_TARGETS[dtype] if remat == "pruned" else None,
                )
            )
            rows.append(
                compare(
                    f"{what} {remat} against {peer}: peak memory above weights",
                    "MB",
                    [figures.peak_bytes / 1e6 for figures in ours],
                    [figures.peak_bytes / 1e6 for figures in theirs],
                    lower_is_better=True,
                    target=MEMORY_TARGETS.get(remat),
                )
            )
    return rows


def run_apart(setting: Setting) -> Figures:
    """One run in its own process."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", json.dumps(asdict(setting))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(setting.threads)},
    )
    if done.returncode:
        raise RuntimeError(f"{setting.side} failed:\n{done.stderr[-4000:]}")
    fields = json.loads(done.stdout.splitlines()[-1])
    figures = Figures(**{**fields, "losses": tuple(fields["losses"])})
    print(
        f"{setting.side:14} {setting.remat:12} {setting.batch}x{setting.length} {setting.dtype}: "
        f"{figures.tokens_per_s:8.1f} tokens/s, {figures.peak_bytes / 1e6:8.1f} MB, "
        f"losses {', '.join(f'{loss:.4f}' for loss in figures.losses)}",
        file=sys.stderr,
    )
    return figures


def run(setting: Setting) -> Figures:
    """Train in this process."""
    tokens = np.random.default_rng(0).integers(
        0, RAND110["vocab_size"], (setting.batch, setting.length)
    )
    return run_ours(setting, tokens) if setting.side == "weft" else run_peft(setting, tokens)


def run_ours(setting: Setting, tokens: np.ndarray) -> Figures:
    """The production policy in `finetune-only` over the production executor."""
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
            max_finetune_samples=1,
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
    before = reset_peak()
    labels = np.ones(setting.length, np.float32)
    policy.add_job(
        FinetuneJobSpec(
            id="job",
            adapter=AdapterSpec(rank=RANK, alpha=ALPHA),
            samples=tuple(
                TrainingSample(token_ids=row.astype(np.int32), label_weights=labels)
                for row in tokens
            ),
            num_epochs=setting.num_steps + 1,
            batch_size=setting.batch,
            optimizer=OptimizerSpec(lr=2e-4),
            shuffles=False,
            remat=Remat(setting.remat),
        )
    )
    losses: list[float] = []
    starts: list[float] = []
    while loop.has_work:
        loop.step()
        for event in policy.take_finetune_events():
            if isinstance(event, StepMetrics):
                losses.append(event.loss)
                starts.append(time.perf_counter())
    elapsed_s = starts[-1] - starts[0]
    return Figures(
        tokens_per_s=setting.num_tokens * setting.num_steps / elapsed_s,
        peak_bytes=peak_bytes() - before,
        losses=tuple(losses),
    )


def run_peft(setting: Setting, tokens: np.ndarray) -> Figures:
    """A plain training loop with transformers and PEFT."""
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
    before = reset_peak()
    losses: list[float] = []
    starts: list[float] = []
    for _ in range(setting.num_steps + 1):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        starts.append(time.perf_counter())
    elapsed_s = starts[-1] - starts[0]
    return Figures(
        tokens_per_s=setting.num_tokens * setting.num_steps / elapsed_s,
        peak_bytes=peak_bytes() - before,
        losses=tuple(losses),
    )


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
