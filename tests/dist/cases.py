"""What a gloo rank runs: train its part of a plan, return what it holds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from pairwise import Row
from runtime import plan_matrix as matrix
from runtime.matrix_models import MODELS, loss_scope, named_case
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


AXES: dict[str, tuple[Any, ...]] = {
    "model": tuple(name for name in MODELS if name not in ("llama", "unet")),
    "degrees": ((1, 1, 1, 1), (1, 1, 2), (2, 2), (1, 3), (4,)),
    "sizes": ("equal", "mixed"),
    "cut": ("chain", "graph"),
    "schedule": ("1f1b", "gpipe", "kfkb", "zero-bubble"),
    "recompute": (False, True),
    "clip_norm": (None, 0.01),
    "accumulate": (1, 2),
    "own_modules": (True, False),
}
"""Options of which every two meet in some case. The larger models wait for `make test-long`."""
LARGER = {**AXES, "model": ("llama", "unet")}
BATCH = 12


def is_valid(row: Row) -> bool:
    """Micro-batches group by two only where their number allows it; one stage has one size."""
    if len(row["degrees"]) == 1 and (row["cut"], row["sizes"]) != ("chain", "equal"):
        return False
    return row["schedule"] != "kfkb" or (row["sizes"] == "equal" and row["degrees"] != (4,))


def sizes_of(row: Row) -> tuple[int, ...]:
    """Micro-batch sizes that the degrees divide, and that divide the batch."""
    base = max(2, *row["degrees"]) if len(row["degrees"]) > 1 else row["degrees"][0]
    larger = {2: 4, 3: 6}
    return tuple(
        larger[base] if row["sizes"] == "mixed" and i % 2 else base
        for i in range(len(row["degrees"]))
    )


def case_of_row(row: Row) -> Case:
    """The row's model with the data of its optimizer steps."""
    return named_case(row["model"], BATCH * row["accumulate"])


def plan_of_row(row: Row) -> TrainPlan:
    """The same plan in every process."""
    graph, degrees, sizes = case_of_row(row).capture.graph, row["degrees"], sizes_of(row)
    # Groups of two fit four and six micro-batches.
    k = 2 if row["schedule"] == "kfkb" else 1
    cut = chain_cut(
        graph, len(degrees), micro_batch=sizes, dp=degrees, k=k, recompute=row["recompute"]
    )
    if row["cut"] == "graph":
        cut = replace(cut, parts=_parts(graph, len(degrees), row))
    return plan_of_cut(graph, cut, BATCH, schedule=row["schedule"])


def _parts(graph: Any, num_parts: int, row: Row) -> tuple[tuple[int, ...], ...]:
    for seed in range(1000):
        parts = random_parts(graph, num_parts, random.Random(f"{row['model']}{seed}"))
        if len(parts) == num_parts:
            return parts
    raise AssertionError(f"no seed cuts {row['model']} into {num_parts} stages")


def train_row(row: Row) -> Any:
    """Three optimizer steps of a row; returns losses, norms and this rank's parameters."""
    return train_plan(case_of_row(row), plan_of_row(row), row["model"], options_of(row))


def options_of(row: Row) -> dict[str, Any]:
    """The row's executor options."""
    return {name: row[name] for name in ("clip_norm", "accumulate", "own_modules")}


def train_plan(case: Case, plan: TrainPlan, model: str, options: Mapping[str, Any]) -> Any:
    """Three optimizer steps of a plan on this rank."""
    executor = TorchStageExecutor(
        plan=plan,
        capture=case.capture,
        module=case.model.module,
        world=DistWorld(timeout_s=60),
        source=TensorSource(case.capture, lambda step: case.batches[step]),
        optimizer=sgd,
        config=ExecutorConfig(loss_scope=loss_scope(model), **options),
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


def train_planned(row: Row) -> Any:
    """Three steps by the plan that the row's planner makes."""
    case = named_case(row["model"], matrix.BATCH)
    return train_plan(case, matrix.planned(row), row["model"], {})


def train(name: str, clip_norm: float | None = None) -> Any:
    """Three steps of a named case; returns losses, norms and this rank's parameters by name."""
    case, plan = planned(name)
    return train_plan(case, plan, CASES[name][0], {"clip_norm": clip_norm})
