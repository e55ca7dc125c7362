"""Runs of sleeping stages: a graph over its chain, predictions, and a slow link."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist

from train_bench.pool import executor, timed
from train_bench.sleepers import LOOPBACK, WIDTH, SleepCase, delayed
from weft.runtime.stage_executor import TorchStageExecutor
from weft.sim.stage_executor import simulate

_SEED = 5


def runtime_of(case: SleepCase, delay_s: float = 0.0) -> tuple[TorchStageExecutor, float]:
    """This rank's executor, and the simulated step time."""
    link = delayed(LOOPBACK, delay_s)
    module, capture, plan = case.build(link)
    x = torch.randn(case.batch_size, WIDTH, generator=torch.Generator().manual_seed(_SEED))
    runtime = executor(module, capture, plan, [((x,), ())], delay_s=delay_s)
    return runtime, simulate(plan).step_time_s


def _step_s(runtime: TorchStageExecutor, step: int) -> float:
    return timed(lambda: list(runtime.steps(1, first_step=step)))


def graph_and_chain(num_rounds: int, case: dict[str, Any]) -> Any:
    """Step seconds of the stage graph and of its partition as a chain, in turns."""
    runs = []
    for sequential in (False, True):
        runtime, predicted_s = runtime_of(SleepCase(**case, sequential=sequential))
        runs.append((runtime, predicted_s))
    found: list[list[float]] = []
    for index in range(num_rounds + 1):
        row = [
            timed(lambda r=runtime, i=index: list(r.steps(1, first_step=i))) for runtime, _ in runs
        ]
        found.append(row)
    return {"rounds": found[1:], "predicted_s": [predicted for _, predicted in runs]}


def predictions(cases: list[dict[str, Any]], num_steps: int, delay_s: float = 0.0) -> Any:
    """For each case the simulated step time, and the medians of two runs."""
    found = []
    for case in cases:
        runtime, predicted_s = runtime_of(SleepCase(**case), delay_s)
        _step_s(runtime, 0)
        medians = [
            statistics.median(_step_s(runtime, index) for index in range(1, num_steps + 1))
            for _ in range(2)
        ]
        found.append({"predicted_s": predicted_s, "measured_s": medians})
        dist.barrier()
    return found
