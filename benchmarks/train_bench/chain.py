"""A chain GPT under our runtime and under torch.distributed.pipelining's 1F1B, in turns."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from train_bench.pool import executor, timed
from train_bench.sleepers import plan_of
from weft.cost.roofline import RooflineCost
from weft.graph.graph import Graph
from weft.model.zoo.gpt import GPT
from weft.model.zoo.layers import token_cross_entropy
from weft.model.zoo.registry import load

_SEED = 3


class _Part(nn.Module):
    """Layers [begin, end) of a GPT, with its embeddings if first and its head if last."""

    def __init__(self, model: GPT, begin: int, end: int) -> None:
        super().__init__()
        self.is_first, self.is_last = begin == 0, end == len(model.layers)
        self.layers = model.layers[begin:end]
        if self.is_first:
            self.tokens, self.positions = model.tokens, model.positions
        if self.is_last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            x = self.tokens(x) + self.positions
        x = self.layers(x)
        return self.head(self.norm(x)) if self.is_last else x


def compare(num_pairs: int, num_micro_batches: int, micro_batch: int, **sizes: int) -> Any:
    """Seconds of a step of ours and of torch's, in alternating pairs; and how far losses differ."""
    num_stages, rank = dist.get_world_size(), dist.get_rank()
    borders = [round(i * sizes["num_layers"] / num_stages) for i in range(num_stages + 1)]
    batch_size = num_micro_batches * micro_batch
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(sizes["vocab"], (batch_size, sizes["seq"] + 1), generator=generator)
    ours, our_losses = _ours(borders, ids, micro_batch, sizes)
    theirs, their_losses = _theirs(borders, ids, num_micro_batches, rank, sizes)
    for run in (ours, theirs, ours, theirs):
        timed(run)
    pairs = []
    for index in range(num_pairs):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        found = {id(run): timed(run) for run in order}
        pairs.append((found[id(ours)], found[id(theirs)]))
    gap = torch.tensor([0.0])
    if rank == num_stages - 1:
        gap[0] = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
    dist.all_reduce(gap)
    return {"pairs": pairs, "loss_gap": float(gap)}


def _model(sizes: dict[str, int]) -> Any:
    torch.manual_seed(_SEED)
    return load("gpt", device="cpu", **sizes)


def _ours(
    borders: list[int], ids: Tensor, micro_batch: int, sizes: dict[str, int]
) -> tuple[Any, list[float]]:
    model = _model(sizes)
    capture = model.trace()
    plan = plan_of(
        capture.graph,
        parts_of(capture.graph, borders),
        RooflineCost(),
        batch_size=len(ids),
        micro_batch=micro_batch,
    )
    batch = ((ids[:, :-1].contiguous(),), (ids[:, 1:].contiguous(),))
    runtime = executor(model.module, capture, plan, [batch])
    losses: list[float] = []
    step = iter(range(10**9))

    def run() -> None:
        for result in runtime.steps(1, first_step=next(step)):
            losses.append(result.loss)

    return run, losses


def parts_of(graph: Graph, borders: list[int]) -> list[list[int]]:
    """Operators of each stage: whole layers, what precedes the first, what follows the last."""
    stage_of_layer = {
        layer: stage
        for stage, (begin, end) in enumerate(pairwise(borders))
        for layer in range(begin, end)
    }
    parts: list[list[int]] = [[] for _ in borders[1:]]
    for position, op in enumerate(graph.ops):
        if op.id.startswith("layers."):
            stage = stage_of_layer[int(op.id.split(".")[1].split(":")[0])]
        else:
            stage = 0 if op.id.startswith(("tokens", ".:0")) else len(parts) - 1
        parts[stage].append(position)
    return parts


def _theirs(
    borders: list[int], ids: Tensor, num_micro_batches: int, rank: int, sizes: dict[str, int]
) -> tuple[Any, list[float]]:
    part = _Part(_model(sizes).module, borders[rank], borders[rank + 1])
    stage = PipelineStage(part, rank, len(borders) - 1, torch.device("cpu"))
    schedule = Schedule1F1B(stage, num_micro_batches, loss_fn=token_cross_entropy)
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-3)
    inputs, wanted = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    losses: list[float] = []

    def run() -> None:
        optimizer.zero_grad()
        held: list[Tensor] = []
        if part.is_last:
            arguments = (inputs,) if part.is_first else ()
            schedule.step(*arguments, target=wanted, losses=held, return_outputs=False)
            losses.append(float(torch.stack([loss.detach() for loss in held]).mean()))
        elif part.is_first:
            schedule.step(inputs, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        optimizer.step()

    return run, losses


def overhead(counts: list[int], num_rounds: int) -> Any:
    """Step seconds of a GPT with next to no work, by number of micro-batches: (ours, torch's)."""
    sizes = {"num_layers": 2, "hidden": 8, "num_heads": 1, "vocab": 8, "seq": 2}
    rank = dist.get_rank()
    runs = {}
    for count in counts:
        ids = torch.zeros(2 * count, sizes["seq"] + 1, dtype=torch.long)
        runs[count] = (
            _ours([0, 1, 2], ids, 2, sizes)[0],
            _theirs([0, 1, 2], ids, count, rank, sizes)[0],
        )
    for pair in runs.values():
        for run in pair:
            timed(run)
    started_s = time.perf_counter()
    found: dict[str, list[list[float]]] = {str(count): [] for count in counts}
    for index in range(num_rounds):
        # All counts of a round within moments, so that a slow spell bends no slope.
        for count, pair in runs.items():
            order = (0, 1) if index % 2 else (1, 0)
            seconds = {side: timed(pair[side]) for side in order}
            found[str(count)].append([seconds[0], seconds[1]])
    return {"rounds": found, "seconds": time.perf_counter() - started_s}
