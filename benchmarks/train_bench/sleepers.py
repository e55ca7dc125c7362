"""Models whose stages sleep, so that two cores stand for many devices, and plans of any model.

Shapes: B batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from weft.cluster.cluster import Cluster, Link, Node
from weft.cluster.device import SAME_DEVICE, DeviceType
from weft.cluster.device_types import cpu_device_type
from weft.cost.communication import Communication
from weft.cost.model import CostModel, OpCost, Parallel
from weft.cost.training import TrainingSpec
from weft.graph.capture import Capture, trace
from weft.graph.graph import Graph, Op
from weft.plan.assemble import StageChoice, assemble
from weft.plan.cost_table import CostTable
from weft.plan.train_plan import TrainPlan

WIDTH = 8
LOOPBACK = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4)
TRAINING = TrainingSpec(name="sgd-fp32", state_bytes_per_param=8.0)


@torch.library.custom_op("weft_bench::sleep", mutates_args=())
def sleep(x: Tensor, forward_s: float, backward_s: float) -> Tensor:
    """The input after a nap; its gradient takes one too."""
    time.sleep(forward_s)
    return x * 1.0


@sleep.register_fake
def _(x: Tensor, forward_s: float, backward_s: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: object, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
    ctx.backward_s = inputs[2]  # type: ignore[attr-defined]


def _backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
    return sleep(gradient, ctx.backward_s, 0.0), None, None  # type: ignore[attr-defined]


sleep.register_autograd(_backward, setup_context=_keep)


class Sleeper(nn.Module):
    """A tiny product, then a nap."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        return sleep(self.linear(x), self.forward_s, self.backward_s)


class Branches(nn.Module):
    """Chains of sleepers beside each other, joined by a sum; one chain is a chain."""

    def __init__(self, naps: Sequence[Sequence[tuple[float, float]]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(Sleeper(*nap) for nap in chain) for chain in naps
        )

    def forward(self, x: Tensor) -> Tensor:
        ends: list[Tensor] = []
        for branch in self.branches:
            y = x
            for sleeper in cast(nn.ModuleList, branch):
                y = sleeper(y)
            ends.append(y)
        return torch.stack(ends).sum(0)


@dataclass(frozen=True, kw_only=True)
class SleepCase:
    """Branches of naps, each nap (forward, backward) a stage on a rank of its own.

    With `sequential` the stages run as one chain: edges of 0 bytes order branch after branch.
    """

    naps: tuple[tuple[tuple[float, float], ...], ...]
    num_micro_batches: int = 8
    micro_batch: int = 2
    sequential: bool = False

    @property
    def num_ranks(self) -> int:
        return sum(map(len, self.naps))

    @property
    def batch_size(self) -> int:
        return self.num_micro_batches * self.micro_batch

    def build(self, link: Link = LOOPBACK) -> tuple[nn.Module, Capture, TrainPlan]:
        """Module, capture and plan."""
        torch.manual_seed(0)
        module = Branches(self.naps)
        capture = trace(
            module, (torch.zeros(2, WIDTH),), loss=lambda y: (y**2).mean(), name="sleepers"
        )
        stages = [
            f"branches.{b}.{i}" for b, chain in enumerate(self.naps) for i in range(len(chain))
        ]
        parts: dict[str, list[int]] = {name: [] for name in stages}
        seconds: dict[str, tuple[float, float]] = {}
        for position, op in enumerate(capture.graph.ops):
            path = op.id.rpartition(":")[0].removesuffix(".linear")
            parts[path if path in parts else stages[-1]].append(position)
            if op.kind == "sleep":
                _, b, i = path.split(".")
                seconds[op.id] = self.naps[int(b)][int(i)]
        plan = plan_of(
            capture.graph,
            list(parts.values()),
            SleepCost(seconds=seconds),
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            link=link,
            sequential=self.sequential,
        )
        return module, capture, plan


@dataclass(frozen=True, kw_only=True)
class SleepCost(Communication):
    """A nap takes what it says, everything else nothing."""

    seconds: Mapping[str, tuple[float, float]]

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
    ) -> OpCost:
        forward_s, backward_s = self.seconds.get(op.id, (0.0, 0.0))
        return OpCost(forward_s=forward_s, backward_s=backward_s)

    def reserved_bytes(self, op: Op, local_samples: int) -> int:
        return 0


def local_devices(num_devices: int, link: Link = LOOPBACK) -> Cluster:
    """This machine as so many devices."""
    node = Node(
        name="local",
        device_type=cpu_device_type(1, 2**32),
        num_devices=num_devices,
        intra=link if num_devices > 1 else SAME_DEVICE,
    )
    return Cluster(name=f"local-{num_devices}", nodes=(node,), inter=SAME_DEVICE)


def plan_of(
    graph: Graph,
    parts: Sequence[Sequence[int]],
    cost: CostModel,
    *,
    batch_size: int,
    micro_batch: int,
    link: Link = LOOPBACK,
    sequential: bool = False,
    training: TrainingSpec = TRAINING,
    schedule: str = "1f1b",
    recompute: bool = False,
) -> TrainPlan:
    """A plan of these parts (positions of operators), one device each."""
    table = CostTable(
        graph, local_devices(len(parts), link), cost, training=training, batch_size=batch_size
    )
    choices = [
        StageChoice(ops=tuple(part), micro_batch=micro_batch, recompute=recompute) for part in parts
    ]
    return assemble(table, choices, method="benchmark", sequential=sequential, schedule=schedule)


def delayed(link: Link, delay_s: float) -> Link:
    """The link with more latency."""
    return replace(link, latency_s=link.latency_s + delay_s)
