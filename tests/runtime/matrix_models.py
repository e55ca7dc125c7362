"""Every zoo model, small and in float64, and the variants that training must get right."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.test_stage_numerics import sgd
from runtime.train_plans import Case, case_of, zoo_case
from runtime.train_reference import Trained, train_plain
from weft.model.zoo.registry import ZooModel, load
from weft.plan.train_plan import TrainPlan
from weft.runtime.executor_config import LossScope
from zoo_sizes import SMALL

MODELS: tuple[str, ...] = (
    *("mmt", "case-study", "dlrm", "candle-uno", "unet", "gpt", "llama", "clip"),
    *("gpt-tied", "frozen-branch", "dropout"),
)
"""Names that `named_case` takes."""


class Dropped(nn.Module):
    """Two towers with dropout of elements and of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 8))
        self.right = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8))
        self.head = nn.Linear(16, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        right = functional.dropout2d(self.right(b).view(-1, 4, 2, 1), 0.4).flatten(1)
        return self.head(functional.dropout(torch.cat((self.left(a), right), 1).tanh(), 0.2))


def dropped() -> ZooModel:
    """Dropout in one tower, beside it and after it."""
    return ZooModel(
        name="dropped",
        module=Dropped(),
        example_inputs=(torch.zeros(2, 6), torch.zeros(2, 5)),
        targets=(torch.zeros(2, 2),),
        loss=functional.mse_loss,
    )


def frozen_branch() -> ZooModel:
    """CANDLE-Uno with its first branch frozen."""
    model = load("candle-uno", device="cpu", **SMALL["candle-uno"])
    branches = next(part for part in model.module.children() if isinstance(part, nn.ModuleList))
    branches[0].requires_grad_(False)
    return model


@cache
def named_case(name: str, batch_size: int) -> Case:
    """A model with data for three steps; captured once for all of its plans."""
    torch.manual_seed(0)
    if name in ("dropout", "frozen-branch"):
        model = dropped() if name == "dropout" else frozen_branch()
        return case_of(model, batch_size=batch_size, num_steps=3)
    options = {"tied": True} if name == "gpt-tied" else {}
    return zoo_case(name.removesuffix("-tied"), batch_size=batch_size, **options)


def loss_scope(name: str) -> LossScope:
    """CLIP's loss relates the samples of a micro-batch, as one rank sees it."""
    return LossScope.MICRO_BATCH if name == "clip" else LossScope.SAMPLE


def loss_group(name: str, plan: TrainPlan, batch_size: int) -> int:
    """Samples within which the loss is evaluated."""
    if name != "clip":
        return batch_size
    last = plan.stages[plan.topological_order[-1]]
    return last.micro_batch // last.dp


@cache
def reference(name: str, batch_size: int, group: int, clip_norm: float | None = None) -> Trained:
    """One process in plain torch, the loss within groups of so many samples."""
    case = named_case(name, batch_size)
    assert case.model.loss is not None
    groups = [slice(i, i + group) for i in range(0, batch_size, group)]
    return train_plain(
        case.model.module, case.model.loss, case.batches, sgd, groups=groups, clip_norm=clip_norm
    )
