"""What the serving policy costs by itself, and whether a long-lived engine slows down.

Policy: the production `ContinuousBatching` over an executor that answers at once; the median of
schedule() + apply() with 256 running sequences, in steady decoding and with requests that come and
go. Engine: the time of a decode step after 20 and after 2,000 finished requests, over the answering
executor (the policy's own share) and, unless `--policy-only`, over the real engine on the embedded
model.

    python benchmarks/policy_overhead.py --json policy_overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_models import open_model
from rows import Row, compare, describe_machine, print_rows, write_json

from weft.base.clock import WallClock
from weft.engine.batch import Batch, CacheGroup, ExecutorInfo, StepResult
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams

NUM_RUNNING = 256
PROMPT_LEN = 256
LIMIT_S = 1e-3
FEW_FINISHED, MANY_FINISHED = 20, 2000


class AnsweringExecutor:
    """Answers every batch at once with token 5 in each sampled row."""

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        self.max_in_flight = 2
        self._batches: deque[Batch] = deque()

    def submit(self, batch: Batch) -> None:
        self._batches.append(batch)

    def collect(self) -> StepResult:
        batch = self._batches.popleft()
        size = len(batch.sample_rows)
        return StepResult(
            batch_id=batch.batch_id,
            tokens=np.full((size, 1), 5, np.int32),
            num_tokens=np.ones(size, np.int32),
        )

    def close(self) -> None:
        self._batches.clear()


@dataclass(kw_only=True, slots=True)
class PolicyRun:
    """A policy with an endless supply of requests, one batch in flight ahead as on a device."""

    policy: ContinuousBatching
    executor: AnsweringExecutor
    new_tokens: Callable[[int], int]
    """Answer length of the n-th request."""
    num_added: int = 0
    num_running_goal: int = NUM_RUNNING

    def top_up(self) -> None:
        """Replace what has finished, outside the timed span: arrivals are not the iteration."""
        stats = self.policy.stats()
        for _ in range(self.num_running_goal - stats.num_running - stats.num_waiting):
            rng = np.random.default_rng(self.num_added)
            self.policy.add(
                Request(
                    id=str(self.num_added),
                    prompt_token_ids=tuple(rng.integers(3, 32000, PROMPT_LEN).tolist()),
                    sampling=SamplingParams(
                        temperature=0.0,
                        max_tokens=self.new_tokens(self.num_added),
                        ignore_eos=True,
                    ),
                )
            )
            self.num_added += 1

    def step_s(self) -> float:
        """Seconds of one schedule() and one apply()."""
        self.top_up()
        started_s = time.perf_counter()
        batch = self.policy.schedule()
        scheduled_s = time.perf_counter() - started_s
        if batch is not None:
            self.executor.submit(batch)
        if self.policy.num_in_flight < 2 and batch is not None:
            return scheduled_s
        result = self.executor.collect()
        started_s = time.perf_counter()
        self.policy.apply(result)
        return scheduled_s + time.perf_counter() - started_s


def make_run(new_tokens: Callable[[int], int], *, max_new_tokens: int) -> PolicyRun:
    """256 slots and pages enough for all of them, prefix caching on as by default."""
    max_len = PROMPT_LEN + max_new_tokens
    info = ExecutorInfo(
        num_pages=2 * NUM_RUNNING * (max_len // 16 + 1),
        page_bytes=1,
        groups=(CacheGroup(layers=tuple(range(12)), page_tokens=16),),
        num_layers=12,
        vocab_size=32000,
        max_num_seqs=NUM_RUNNING,
    )
    config = PolicyConfig(max_model_len=max_len, max_num_batched_tokens=2048, eos_token_ids=(1,))
    policy = ContinuousBatching(config, info, WallClock())
    return PolicyRun(policy=policy, executor=AnsweringExecutor(info), new_tokens=new_tokens)


def steady_s(num_steps: int) -> list[float]:
    """Steps of 256 decodes, nothing else, after all prompts are in."""
    run = make_run(lambda _: num_steps + 200, max_new_tokens=num_steps + 200)
    while run.policy.stats().num_generated_tokens < NUM_RUNNING * 20:
        run.step_s()
    return [run.step_s() for _ in range(num_steps)]


def churning_s(num_steps: int) -> list[float]:
    """Steps in which requests of 32 to 96 tokens finish and others take their place."""
    run = make_run(lambda index: 32 + index * 37 % 65, max_new_tokens=96)
    while run.policy.stats().num_finished < NUM_RUNNING:
        run.step_s()
    return [run.step_s() for _ in range(num_steps)]


def aging_s(num_finished: int, num_steps: int) -> list[float]:
    """Decode steps of 256 long requests once `num_finished` short ones have come and gone."""
    run = make_run(
        lambda index: 2 if index < num_finished else num_steps + 400,
        max_new_tokens=num_steps + 400,
    )
    while run.policy.stats().num_finished < num_finished:
        run.step_s()
    while run.policy.stats().num_generated_tokens < 2 * num_finished + NUM_RUNNING * 20:
        run.step_s()
    return [run.step_s() for _ in range(num_steps)]


def policy_rows(num_rounds: int, num_steps: int) -> list[Row]:
    """The policy's median against 1 ms, and young against old."""
    rows: list[Row] = []
    for name, measure in (("steady decoding", steady_s), ("requests come and go", churning_s)):
        medians_s = [statistics.median(measure(num_steps)) for _ in range(num_rounds)]
        rows.append(
            compare(
                f"schedule() + apply(), {NUM_RUNNING} running, {name}: median against 1 ms",
                "s",
                medians_s,
                [LIMIT_S] * num_rounds,
                lower_is_better=True,
                target=1.0,
            )
        )
    young: list[float] = []
    old: list[float] = []
    for _ in range(num_rounds):
        young.append(statistics.median(aging_s(FEW_FINISHED, num_steps)))
        old.append(statistics.median(aging_s(MANY_FINISHED, num_steps)))
    rows.append(_age_row("policy step", old, young))
    return rows


def engine_rows(num_rounds: int, embedded: Path | None, cache: Path) -> list[Row]:
    """Decode step of the real engine, batch 8: a young engine and an old one, in turns."""
    from weft import LLM

    path = open_model("embedded", cache, embedded).path
    fresh = itertools.count()

    def generate(llm: LLM, batch: int, num_new: int) -> float:
        prompts = [
            {"prompt_token_ids": np.random.default_rng(next(fresh)).integers(3, 2000, 64).tolist()}
            for _ in range(batch)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        started_s = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - started_s

    def step_s(llm: LLM) -> float:
        return (generate(llm, 8, 129) - generate(llm, 8, 1)) / 128

    with contextlib.ExitStack() as stack:
        young, old = (
            stack.enter_context(
                LLM(str(path), dtype="float32", device="cpu", max_num_seqs=32, seed=0)
            )
            for _ in range(2)
        )
        generate(young, FEW_FINISHED, 2)
        for _ in range(MANY_FINISHED // 100):
            generate(old, 100, 2)
        step_s(young)
        pairs = [(step_s(old), step_s(young)) for _ in range(num_rounds)]
    return [
        _age_row(
            "engine decode step, batch 8, embedded model",
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
        )
    ]


def _age_row(what: str, old: list[float], young: list[float]) -> Row:
    """Equal within the noise of the sitting: a tenth is the tolerance printed as the target."""
    return compare(
        f"{what}: after {MANY_FINISHED:,} finished requests vs after {FEW_FINISHED}",
        "s",
        old,
        young,
        lower_is_better=True,
        target=0.9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--policy-only", action="store_true")
    parser.add_argument("--embedded-model", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".bench"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10} {value}")
    # As the engine's process does: its long-lived objects are not scanned again and again.
    gc.freeze()
    rows = policy_rows(options.rounds, options.steps)
    if not options.policy_only:
        rows += engine_rows(options.rounds, options.embedded_model, options.cache)
    print_rows(rows, title="Policy overhead")
    if options.json:
        write_json(options.json, rows, machine)


if __name__ == "__main__":
    main()
