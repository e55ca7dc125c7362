"""Settings of a training run, and the optimizers and schedules that they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from weft.base.errors import ConfigError
from weft.engine.config import check_whole
from weft.engine.finetune import ScheduleName, lr_factor
from weft.runtime.stage_executor import LossScope, OptimizerFactory

SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
"""Makes the learning-rate scheduler of a rank's optimizer; stepped once an optimizer step."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class OptimizerName(StrEnum):
    """Optimizers by name; Python callers may pass any per-parameter optimizer of torch."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a plan is trained.

    Raises:
        ConfigError: a number is out of its range.
    """

    num_steps: int
    """Optimizer steps in all, those before a resume included."""
    run_dir: Path
    seed: int = 0
    """Of initial weights, order of samples and dropout."""
    optimizer: OptimizerName = OptimizerName.ADAMW
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: ScheduleName = ScheduleName.CONSTANT
    num_warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    """Batches of the plan that make one optimizer step."""
    autocast: str | None = None
    """bfloat16 or float16; parameters stay float32."""
    loss_scope: LossScope = LossScope.SAMPLE
    shuffles: bool = True
    checkpoint_every: int = 0
    """Optimizer steps between checkpoints; 0 writes one at the end."""
    keep_checkpoints: int = 2
    validate_every: int = 0
    """Optimizer steps between passes over the validation data; 0 means at the end."""
    record: bool = False
    """Keep a timeline of the last steps (`weft.runtime.measured.MAX_STEPS`)."""
    own_modules: bool = True
    """Call the model's own submodules where they lie whole in a stage (hooks, torch.compile)."""
    device: str = "cpu"
    timeout_s: float = 600.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, kind in (
            ("optimizer", OptimizerName),
            ("schedule", ScheduleName),
            ("loss_scope", LossScope),
        ):
            given = getattr(self, name)
            if given not in list(kind):
                known = ", ".join(kind)
                raise ConfigError(f"{name} is {given!r}; it must be one of {known}")
            # A notebook writes "sgd"; everything below sees the member.
            object.__setattr__(self, name, kind(given))
        for name, lowest in (
            ("num_steps", 1),
            ("num_warmup_steps", 0),
            ("accumulate", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 0),
            ("validate_every", 0),
        ):
            check_whole(name, getattr(self, name), lowest)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"the learning rate is {self.lr}; it must be a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}; it must be in [0, 1)")
        if self.momentum and self.optimizer is not OptimizerName.SGD:
            raise ConfigError(
                f"momentum is {self.momentum}, which optimizer {self.optimizer.value} has no use "
                "for; choose optimizer sgd, or leave it out"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}; it must be positive, or unset")
        _check_device(self.device)
        if self.autocast is not None and self.autocast not in _DTYPES:
            raise ConfigError(
                f"autocast is {self.autocast!r}; it must be one of {', '.join(_DTYPES)}, or unset"
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s is {self.timeout_s}; it must be positive")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """torch's dtype of `autocast`."""
        return None if self.autocast is None else _DTYPES[self.autocast]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the run directory."""
        return {**asdict(self), "run_dir": str(self.run_dir)}


def _check_device(name: str) -> None:
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {name!r}, but this machine shows torch no CUDA device; use cpu, or a "
            "build of torch with CUDA and a driver"
        )


def optimizer_factory(config: TrainConfig) -> OptimizerFactory:
    """The named optimizer over a rank's trainable parameters."""

    def make(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        values = list(parameters.values())
        if config.optimizer is OptimizerName.SGD:
            return torch.optim.SGD(
                values, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
        kind = torch.optim.Adam if config.optimizer is OptimizerName.ADAM else torch.optim.AdamW
        return kind(values, lr=config.lr, weight_decay=config.weight_decay)

    return make


def scheduler_factory(config: TrainConfig) -> SchedulerFactory:
    """The named schedule; transformers' definitions."""

    def factor(step: int) -> float:
        return lr_factor(
            config.schedule,
            step,
            num_warmup_steps=config.num_warmup_steps,
            num_steps=config.num_steps,
        )

    return lambda optimizer: LambdaLR(optimizer, factor)
