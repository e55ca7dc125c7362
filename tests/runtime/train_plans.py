"""Plans of real models without a planner: convex cuts drawn at random, on any devices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from plan.plans import flat_cluster
from weft.cost.roofline import RooflineCost
from weft.cost.training import TrainingSpec
from weft.graph.capture import Capture
from weft.graph.graph import Graph
from weft.model.zoo.registry import ZooModel, load
from weft.plan.assemble import StageChoice, assemble
from weft.plan.cost_table import CostTable
from weft.plan.train_plan import TrainPlan
from zoo_sizes import SMALL

TRAINING = TrainingSpec(name="test", dtype="float64", state_bytes_per_param=16.0)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How to cut a graph: parts of its operators in topological order, and how each runs."""

    parts: tuple[tuple[int, ...], ...]
    micro_batch: tuple[int, ...]
    dp: tuple[int, ...]
    k: tuple[int, ...]
    recompute: tuple[bool, ...]


def chain_cut(
    graph: Graph,
    num_parts: int,
    *,
    micro_batch: int | Sequence[int] = 2,
    dp: int | Sequence[int] = 1,
    k: int | Sequence[int] = 1,
    recompute: bool | Sequence[bool] = False,
) -> Cut:
    """Equal runs of operators in topological order."""
    n = len(graph.ops)
    bounds = [round(i * n / num_parts) for i in range(num_parts + 1)]

    def each(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, Sequence) else (value,) * num_parts

    return Cut(
        parts=tuple(tuple(range(a, b)) for a, b in pairwise(bounds)),
        micro_batch=each(micro_batch),
        dp=each(dp),
        k=each(k),
        recompute=each(recompute),
    )


def plan_of_cut(
    graph: Graph,
    cut: Cut,
    batch_size: int,
    *,
    schedule: str = "1f1b",
    sequential: bool = False,
) -> TrainPlan:
    """The plan of these parts, each stage on devices of its own."""
    table = CostTable(
        graph,
        flat_cluster(sum(cut.dp)),
        RooflineCost(),
        training=TRAINING,
        batch_size=batch_size,
    )
    choices = [
        StageChoice(ops=ops, micro_batch=b, dp=dp, k=k, recompute=recompute)
        for ops, b, dp, k, recompute in zip(
            cut.parts, cut.micro_batch, cut.dp, cut.k, cut.recompute, strict=True
        )
    ]
    return assemble(table, choices, method="test", schedule=schedule, sequential=sequential)


def random_parts(graph: Graph, num_parts: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Convex parts that may lie beside each other: each cut takes a set closed under predecessors.

    Independent operators are spread at random, so the stage graph has branches, joins and skips.
    """
    position = {op.id: i for i, op in enumerate(graph.ops)}
    sources = {
        i: [position[p] for p in graph.predecessors[op.id]]
        for op, i in zip(graph.ops, range(len(graph.ops)), strict=True)
    }
    order = list(range(len(graph.ops)))
    level = {}
    for i in order:
        low = max((level[p] for p in sources[i]), default=0)
        # Levels never fall along an edge, so parts of equal level are convex together.
        rise = num_parts * 2 / max(1, len(order))
        level[i] = min(num_parts - 1, low + (rng.random() < rise))
    parts: dict[int, list[int]] = {}
    for i in order:
        parts.setdefault(level[i], []).append(i)
    return tuple(tuple(part) for _, part in sorted(parts.items()))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small float64 zoo model with data for some steps."""

    model: ZooModel
    capture: Capture
    batches: tuple[tuple[Any, tuple[Any, ...]], ...]


def zoo_case(
    name: str, *, batch_size: int = 8, num_steps: int = 3, seed: int = 0, **options: Any
) -> Case:
    """The zoo model `name` with random weights and batches."""
    torch.manual_seed(seed)
    model = load(name, device="cpu", **{**SMALL[name], **options})
    return case_of(model, batch_size=batch_size, num_steps=num_steps, seed=seed)


def case_of(model: ZooModel, *, batch_size: int, num_steps: int, seed: int = 0) -> Case:
    """This model in float64, with random batches like its example inputs."""
    module = model.module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.02)
    model = ZooModel(
        name=model.name,
        module=module,
        example_inputs=_map(model.example_inputs, _double),
        targets=_map(model.targets, _double),
        loss=model.loss,
        batch_axes=model.batch_axes,
    )

    def fill(x: Tensor) -> Tensor:
        shape = (batch_size, *x.shape[1:])
        if x.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=x.dtype)
        if int(x.max()) > 0:  # Ids whose pattern matters, such as image placeholders.
            rest = torch.randint(0, 20, shape, generator=generator)
            return torch.where(x[:1].expand(shape) > 0, x[:1].expand(shape), rest)
        return torch.randint(0, 20, shape, generator=generator)

    batches = tuple(
        (_map(model.example_inputs, fill), _map(model.targets, fill)) for _ in range(num_steps)
    )
    return Case(model=model, capture=model.trace(), batches=batches)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _map(tree: Any, function: Any) -> Any:
    if isinstance(tree, dict):
        return {key: function(value) for key, value in tree.items()}
    return tuple(function(value) for value in tree)
