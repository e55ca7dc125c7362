"""Random stage graphs of tiny operators: none hangs, all compute what one process computes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.loopback_training import loopback_executor
from runtime.train_plans import Cut, case_of, plan_of_cut
from runtime.train_reference import train_plain
from weft.model.zoo.registry import ZooModel
from weft.plan.train_plan import TrainPlan

BATCH = 12
NUM_MODELS, PLANS_PER_MODEL = 12, 26


class RandomDag(nn.Module):
    """Small layers, each of which reads some earlier ones; several inputs; one may be frozen."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.num_inputs = rng.randint(1, 3)
        self.reads: list[list[int]] = []
        for i in range(rng.randint(3, 8)):
            known = self.num_inputs + i
            self.reads.append(sorted(rng.sample(range(known), min(known, rng.randint(1, 3)))))
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in self.reads)
        if rng.random() < 0.4:
            self.layers[0].requires_grad_(False)
        if rng.random() < 0.3:
            self.layers[-1].weight = self.layers[len(self.layers) // 2].weight  # type: ignore[assignment]

    def forward(self, *inputs: Tensor) -> Tensor:
        values = list(inputs)
        for layer, reads in zip(self.layers, self.reads, strict=True):
            total = values[reads[0]]
            for other in reads[1:]:
                total = total + values[other]
            values.append(torch.tanh(layer(total)))
        unread = [
            value
            for i, value in enumerate(values[self.num_inputs :])
            if all(self.num_inputs + i not in reads for reads in self.reads)
        ]
        return torch.stack(unread).sum(0)


@dataclass(frozen=True)
class Drawn:
    plan: TrainPlan
    schedule: str


def draw_plan(graph: object, rng: random.Random) -> Drawn:
    """A random partition into convex stages, with random degrees, sizes and schedule."""
    ops = graph.ops  # type: ignore[attr-defined]
    position = {op.id: i for i, op in enumerate(ops)}
    stage_of: dict[int, int] = {}
    num_stages = 0
    # A stage's operators are those of one level; levels never fall along an edge, and operators
    # of one level are split at random where that keeps the stage graph without cycles.
    level: dict[int, int] = {}
    for i, op in enumerate(ops):
        sources = [position[p] for p in graph.predecessors[op.id]]  # type: ignore[attr-defined]
        low = max((level[p] for p in sources), default=0)
        level[i] = low + (rng.random() < 0.25)
    for value in sorted(set(level.values())):
        members = [i for i in level if level[i] == value]
        connected: list[set[int]] = []
        for i in members:
            near = {position[p] for p in graph.predecessors[ops[i].id]} & set(members)  # type: ignore[attr-defined]
            joined = [group for group in connected if group & near]
            connected = [group for group in connected if not group & near]
            connected.append({i}.union(*joined))
        for group in connected:
            for i in group:
                stage_of[i] = num_stages
            num_stages += 1
    parts = tuple(tuple(i for i in range(len(ops)) if stage_of[i] == s) for s in range(num_stages))
    sizes = tuple(rng.choice((2, 2, 4, 6)) for _ in parts)
    cut = Cut(
        parts=parts,
        micro_batch=sizes,
        dp=tuple(rng.choice((1, 1, 2)) for _ in parts),
        k=tuple(rng.choice((1, 1, 2)) if size < 6 else 1 for size in sizes),
        recompute=tuple(rng.random() < 0.2 for _ in parts),
    )
    return Drawn(
        plan=plan_of_cut(graph, cut, BATCH),  # type: ignore[arg-type]
        schedule=rng.choice(("1f1b", "kfkb", "gpipe", "zero-bubble")),
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(NUM_MODELS))
def test_random_plans_neither_hang_nor_differ(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    module = RandomDag(rng)
    case = case_of(
        ZooModel(
            name="dag",
            module=module,
            example_inputs=tuple(torch.zeros(2, 3) for _ in range(module.num_inputs)),
            targets=(torch.zeros(2, 3),),
            loss=functional.mse_loss,
        ),
        batch_size=BATCH,
        num_steps=1,
        seed=seed,
    )

    def sgd(held: object) -> torch.optim.Optimizer:
        values = held.values() if isinstance(held, dict) else held
        return torch.optim.SGD(list(values), lr=0.1)  # type: ignore[call-overload]

    assert case.model.loss is not None
    wanted = dict(
        train_plain(case.model.module, case.model.loss, case.batches, sgd).module.named_parameters()
    )
    num_run = 0
    for _ in range(PLANS_PER_MODEL):
        drawn = draw_plan(case.capture.graph, rng)
        executor = loopback_executor(case, drawn.plan, optimizer=sgd, schedule=drawn.schedule)
        list(executor.steps(1))
        for rank in executor.ranks:
            for name, p in rank.parameters.items():
                assert torch.allclose(p, wanted[name], rtol=0, atol=1e-9), (name, drawn.schedule)
        num_run += 1
    assert num_run == PLANS_PER_MODEL
