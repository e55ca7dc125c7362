"""What a gloo rank runs: train its part of a plan, return what it holds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from runtime.train_plans import Case, chain_cut, plan_of_cut, random_parts, zoo_case
from weft.plan.train_plan import TrainPlan
from weft.runtime.batch_source import TensorSource
from weft.runtime.dist_transport import DistWorld
from weft.runtime.executor_config import ExecutorConfig
from weft.runtime.stage_executor import TorchStageExecutor

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chain": ("gpt", {}),
    "tied": ("gpt", {"tied": True}),
    "recompute": ("llama", {"recompute": (True, False, True, False)}),
    "data-parallel": ("dlrm", {"parts": 2, "dp": 2}),
    "other-micro-batches": ("candle-uno", {"parts": 2, "dp": (1, 3), "micro_batch": (2, 6)}),
    "branches": ("mmt", {"seed": 1}),
    "groups": ("unet", {"k": 2, "micro_batch": 1}),
}
"""Model, and how it is cut over four ranks."""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """A rule that does not forgive a wrong factor."""
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return torch.optim.SGD(list(values), lr=0.05, momentum=0.9, weight_decay=0.01)


def planned(name: str) -> tuple[Case, TrainPlan]:
    """The case's model, data and plan: equal in every process."""
    model, how = CASES[name]
    how = dict(how)
    batch_size = 12 if name == "other-micro-batches" else 8
    options = {"tied": how.pop("tied")} if "tied" in how else {}
    case = zoo_case(model, batch_size=batch_size, **options)
    graph = case.capture.graph
    if "seed" not in how:
        return case, plan_of_cut(graph, chain_cut(graph, how.pop("parts", 4), **how), batch_size)
    for seed in range(how["seed"], 100):
        parts = random_parts(graph, 4, random.Random(seed))
        cut = replace(chain_cut(graph, len(parts)), parts=parts)
        plan = plan_of_cut(graph, cut, batch_size)
        # Four stages that are no chain: some stage feeds two, or reads from two.
        if len(parts) == 4 and len(plan.edges) > 3:
            return case, plan
    raise AssertionError("no seed cuts the model into four stages with a branch")


def train(name: str, clip_norm: float | None = None) -> Any:
    """Three steps; returns losses, norms and this rank's parameters by name."""
    case, plan = planned(name)
    executor = TorchStageExecutor(
        plan=plan,
        capture=case.capture,
        module=case.model.module,
        world=DistWorld(timeout_s=60),
        source=TensorSource(case.capture, lambda step: case.batches[step]),
        optimizer=sgd,
        config=ExecutorConfig(clip_norm=clip_norm),
    )
    results = list(executor.steps(3))
    (rank,) = executor.ranks
    dist.barrier()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "parameters": {name: p.detach().numpy() for name, p in rank.parameters.items()},
        "in_flight": dict(rank.peak_in_flight),
    }
