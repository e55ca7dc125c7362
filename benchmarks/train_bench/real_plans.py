"""Two-rank plans of small GPTs: predicted from a profile made while both ranks compute."""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
import torch.distributed as dist

from train_bench.pool import executor, timed
from train_bench.sleep_runs import local_link
from train_bench.sleepers import plan_of
from weft.cost.profiled import BlockProfile, ProfiledCost
from weft.graph.coarsen import coarsen
from weft.model.zoo.registry import load
from weft.plan.expand import at_operators
from weft.runtime.profiler import ProfilerConfig, profile_blocks
from weft.sim.stage_executor import simulate

MAX_BLOCKS = 16


def predictions(cases: list[dict[str, Any]], num_steps: int) -> Any:
    """For each case the simulated step time and the medians of two runs."""
    found = []
    link = local_link()
    for case in cases:
        torch.manual_seed(0)
        sizes = case["sizes"]
        model = load("gpt", device="cpu", **sizes)
        capture = model.trace()
        dist.barrier()
        # Both ranks measure at once, so each has what a rank of the run has.
        config = ProfilerConfig(
            batch_sizes=(case["micro_batch"],), max_blocks=MAX_BLOCKS, num_repeats=9
        )
        profile = _of_first(profile_blocks(capture, config, device_name="cpu").profile)
        blocks = coarsen(capture.graph, MAX_BLOCKS)
        cut = max(1, min(len(blocks.ops) - 1, round(case["cut"] * len(blocks.ops))))
        planned = plan_of(
            blocks,
            [list(range(cut)), list(range(cut, len(blocks.ops)))],
            ProfiledCost(profile=profile),
            batch_size=case["batch_size"],
            micro_batch=case["micro_batch"],
            link=link,
        )
        plan = at_operators(planned, capture.graph, MAX_BLOCKS)
        ids = torch.randint(sizes["vocab"], (case["batch_size"], sizes["seq"]))
        runtime = executor(model.module, capture, plan, [((ids,), (ids,))])
        timed(lambda r=runtime: list(r.steps(2)))
        medians = [
            statistics.median(
                timed(lambda r=runtime, i=index: list(r.steps(1, first_step=i)))
                for index in range(num_steps)
            )
            for _ in range(2)
        ]
        found.append({"predicted_s": simulate(plan).step_time_s, "measured_s": medians})
    return found


def _of_first(profile: BlockProfile) -> BlockProfile:
    """Rank 0's profile on every rank: plans must be equal."""
    held: list[Any] = [profile.to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held)
    json.loads(held[0])
    return BlockProfile.from_json(held[0])
