"""Runs of sleeping stages: a graph over its chain, predictions, and a slow link."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from train_bench.pool import executor, timed
from train_bench.sleepers import WIDTH, SleepCase, delayed
from weft.cluster.device import Link
from weft.plan.train_plan import TrainPlan
from weft.runtime.micro_batch import MicroBatch
from weft.runtime.stage_executor import TorchStageExecutor
from weft.sim.stage_executor import simulate

_SEED = 5


def runtime_of(
    case: SleepCase, link: Link, delay_s: float = 0.0
) -> tuple[TorchStageExecutor, float]:
    """This rank's executor, and the simulated step time of the plan with measured stages."""
    module, capture, plan = case.build(delayed(link, delay_s))
    x = torch.randn(case.batch_size, WIDTH, generator=torch.Generator().manual_seed(_SEED))
    runtime = executor(module, capture, plan, [((x,), ())], delay_s=delay_s)
    return runtime, simulate(_profiled(plan, runtime)).step_time_s


def _profiled(plan: TrainPlan, runtime: TorchStageExecutor, num_repeats: int = 5) -> TrainPlan:
    """The plan with each stage's seconds as its rank measures them while all others do, too."""
    (rank,) = runtime.ranks
    (stage,) = rank.stages
    run = rank.loop.stages[stage]
    count = run.shape.share
    call = MicroBatch(seed=0, step=0, first_sample=0, num_samples=count)
    found: list[tuple[float, float]] = []
    for _ in range(num_repeats + 1):
        inputs = [torch.randn(count, WIDTH) for _ in range(run.program.num_inputs)]
        for position in run.grad_inputs:
            inputs[position].requires_grad_()
        dist.barrier()
        started_s = time.perf_counter()
        values = run.module(call, inputs)
        forward_s = time.perf_counter() - started_s
        ends = [
            value for value in values if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        dist.barrier()
        started_s = time.perf_counter()
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        found.append((forward_s, time.perf_counter() - started_s))
    for p in rank.parameters.values():
        p.grad = None
    medians = [statistics.median(column) for column in zip(*found[1:], strict=True)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (stage, *medians))
    seconds = {one: (forward_s, backward_s) for one, forward_s, backward_s in everyone}
    stages = tuple(
        replace(
            s,
            forward_s={**s.forward_s, s.micro_batch: seconds[s.index][0]},
            backward_s={**s.backward_s, s.micro_batch: seconds[s.index][1]},
        )
        for s in plan.stages
    )
    return plan.replace(stages=stages)


def local_link(num_rounds: int = 30) -> Link:
    """Latency and bandwidth between neighbouring ranks, all pairs busy at once."""
    rank, peer = dist.get_rank(), dist.get_rank() ^ 1
    times: dict[int, list[float]] = {16: [], 2**20: []}
    for num_bytes, found in times.items():
        tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        dist.barrier()
        if peer >= dist.get_world_size():
            continue
        for _ in range(num_rounds):
            started_s = time.perf_counter()
            for sends in (rank < peer, rank > peer):
                if sends:
                    dist.send(tensor, peer)
                else:
                    dist.recv(tensor, peer)
            found.append((time.perf_counter() - started_s) / 2)
    held: list[Any] = [None]
    if rank == 0:
        small_s, large_s = (statistics.median(found) for found in times.values())
        held = [(small_s, 2**20 / max(large_s - small_s, 1e-5))]
    dist.broadcast_object_list(held)
    ((latency_s, bandwidth),) = held
    return Link(bandwidth_bytes_per_s=bandwidth, latency_s=latency_s)


def _step_s(runtime: TorchStageExecutor, step: int) -> float:
    return timed(lambda: list(runtime.steps(1, first_step=step)))


def graph_and_chain(num_rounds: int, case: dict[str, Any]) -> Any:
    """Step seconds of the stage graph and of its partition as a chain, in turns."""
    link = local_link()
    runs = [
        runtime_of(SleepCase(**case, sequential=sequential), link) for sequential in (False, True)
    ]
    found: list[list[float]] = []
    for index in range(num_rounds + 1):
        order = (0, 1) if index % 2 else (1, 0)
        row = {which: _step_s(runs[which][0], index) for which in order}
        found.append([row[0], row[1]])
    return {"rounds": found[1:], "predicted_s": [predicted for _, predicted in runs]}


def predictions(cases: list[dict[str, Any]], num_steps: int, delay_s: float = 0.0) -> Any:
    """For each case the simulated step time, and the medians of two runs."""
    found = []
    link = local_link()
    for case in cases:
        runtime, predicted_s = runtime_of(SleepCase(**case), link, delay_s)
        _step_s(runtime, 0)
        medians = [
            statistics.median(_step_s(runtime, index) for index in range(1, num_steps + 1))
            for _ in range(2)
        ]
        found.append({"predicted_s": predicted_s, "measured_s": medians})
        dist.barrier()
    return found
