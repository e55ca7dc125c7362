"""How a plan is run, as far as the plan does not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from weft.base.errors import ConfigError


class LossScope(StrEnum):
    """Which samples a loss relates to each other."""

    SAMPLE = "sample"
    """None: the loss is a sum over samples."""
    MICRO_BATCH = "micro_batch"
    """Those of a micro-batch, as one rank sees it (contrastive losses within groups)."""
    GLOBAL = "global"
    """All of the batch."""


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """How to run a plan.

    `accumulate` batches make one optimizer step. `autocast` is the dtype of autocast regions around
    every stage, in which tensors between stages then travel; parameters and sums of gradients keep
    theirs. `receive_ahead` is for how many actions receives are posted before they are needed.
    `record` keeps the times of the last steps' actions. With `own_modules` a stage calls the user's
    submodules that lie whole in it, so that forward hooks fire and torch.compile is obeyed; else,
    and under schedules that split the backward, it runs from the exported graph alone.
    `parallelize(stage_module, mesh)` may shard a stage over its data-parallel ranks (FSDP2) and
    returns the module to call; `mesh` has one axis, or is None for a stage on one rank and over
    loopback; stages then run from the exported graph.
    """

    loss_scope: LossScope = LossScope.SAMPLE
    accumulate: int = 1
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    seed: int = 0
    bucket_bytes: int = 25 * 2**20
    receive_ahead: int = 2
    device: str = "cpu"
    record: bool = False
    own_modules: bool = True
    parallelize: Callable[[nn.Module, DeviceMesh | None], Any] | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError(f"accumulate is {self.accumulate}; it must be at least 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}; it must be positive, or None")
        if self.receive_ahead < 1:
            raise ConfigError(f"receive_ahead is {self.receive_ahead}; it must be at least 1")
