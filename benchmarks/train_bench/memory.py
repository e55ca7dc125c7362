"""Peak bytes of tensors on each rank, from the allocator's events, beside the plan's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from train_bench.chain import parts_of
from train_bench.pool import executor
from train_bench.sleepers import plan_of
from weft.cost.roofline import RooflineCost
from weft.cost.training import ADAM_FP32
from weft.graph.capture import Capture
from weft.model.zoo.registry import ZooModel, load
from weft.plan.train_plan import TrainPlan
from weft.sim.stage_executor import simulate


def peaks(cases: list[dict[str, Any]]) -> Any:
    """For each case, by rank, the simulated and the measured peak of two steps with Adam."""
    found = []
    rank = dist.get_rank()
    for case in cases:
        torch.manual_seed(0)
        sizes = case["sizes"]
        model = load("gpt", device="cpu", **sizes)
        capture = model.trace()
        num_ranks = dist.get_world_size()
        borders = [round(i * sizes["num_layers"] / num_ranks) for i in range(num_ranks + 1)]
        plan = plan_of(
            capture.graph,
            parts_of(capture.graph, borders),
            RooflineCost(),
            batch_size=case["batch_size"],
            micro_batch=case["micro_batch"],
            training=ADAM_FP32,
            schedule=case["schedule"],
            recompute=case["recompute"],
        )
        ids = torch.randint(sizes["vocab"], (case["batch_size"], sizes["seq"]))

        measured = peak_bytes(partial(_train, model, capture, plan, ids))
        curve = simulate(plan).memory
        predicted = int(curve.used_bytes[curve.device == plan.used_devices[rank]].max())
        rows: list[Any] = [None] * num_ranks
        dist.all_gather_object(rows, (predicted, measured))
        found.append(rows)
    return found


def _train(model: ZooModel, capture: Capture, plan: TrainPlan, ids: Tensor) -> Any:
    runtime = executor(
        model.module,
        capture,
        plan,
        [((ids,), (ids,))],
        optimizer=lambda held: torch.optim.Adam(list(held.values()), lr=1e-4),
    )
    return runtime, list(runtime.steps(2))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `run` held at once, temporaries of operators included."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    del kept
    results: Any = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return peak
