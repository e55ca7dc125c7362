"""A small two-branch model with data, importable by name, for the trainer's tests and its verb."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.train_plans import chain_cut, plan_of_cut
from weft.graph.capture import Capture
from weft.model.zoo.registry import ZooModel
from weft.plan.train_plan import TrainPlan
from weft.train.data import TrainData

NUM_SAMPLES = 24


class TwoBranches(nn.Module):
    """Two towers of different widths that meet; dropout in one of them."""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))
        self.right = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(width + 4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat((self.left(a), self.right(b)), dim=1))


def squared(output: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
    """Sum and weight."""
    return ((output - wanted) ** 2).sum(), wanted.shape[0]


def model(width: int = 8, dropout: float = 0.1, double: bool = False) -> ZooModel:
    """What `--module train.small:model` names."""
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(0)
    module = TwoBranches(width, dropout).to(dtype)
    return ZooModel(
        name="two-branches",
        module=module,
        example_inputs=(torch.zeros(2, 4, dtype=dtype), torch.zeros(2, 6, dtype=dtype)),
        targets=(torch.zeros(2, 3, dtype=dtype),),
        loss=squared,
    )


class Slow(np.ndarray):
    """A column that takes its time, so that a run lasts long enough to be disturbed."""

    delay_s = 0.0

    def take(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(self.delay_s)
        return np.asarray(self).take(*args, **kwargs)


def data(num_samples: int = NUM_SAMPLES, poison: int = -1, slow_s: float = 0.0) -> TrainData:
    """What `--data train.small:data` names; sample `poison` is NaN, reading takes `slow_s`."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(num_samples, 4, generator=generator)
    b = torch.randn(num_samples, 6, generator=generator)
    wanted = torch.stack((a.sum(1), b.sum(1), a[:, 0] * b[:, 0]), dim=1)
    if poison >= 0:
        a[poison] = float("nan")
    held = TrainData(inputs=(a[:8], b[:8]), targets=(wanted[:8],))
    if slow_s:
        slow = a.numpy().view(Slow)
        slow.delay_s = slow_s
        return TrainData(inputs=(slow, b), targets=(wanted,), validation=held)
    return TrainData(inputs=(a, b), targets=(wanted,), validation=held)


def chain_plan(
    capture: Capture, num_stages: int, *, batch_size: int = 8, schedule: str = "1f1b", dp: int = 1
) -> TrainPlan:
    """The model cut into equal runs of operators."""
    cut = chain_cut(capture.graph, num_stages, dp=dp)
    return plan_of_cut(capture.graph, cut, batch_size, schedule=schedule)
