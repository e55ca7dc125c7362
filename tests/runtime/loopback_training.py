"""A plan's pipeline inside this process, over loopback, on the batches of a case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from runtime.train_plans import Case
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan
from weft.runtime.batch_source import TensorSource
from weft.runtime.executor_config import ExecutorConfig
from weft.runtime.loopback import LoopbackWorld
from weft.runtime.stage_executor import TorchStageExecutor


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With momentum: Adam forgives a wrong factor on the gradient, momentum does not."""
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return torch.optim.SGD(list(values), lr=0.05, momentum=0.9)


def loopback_executor(
    case: Case, plan: TrainPlan, *, optimizer: Any = sgd, schedule: str = "", **options: Any
) -> TorchStageExecutor:
    """`options` are of ExecutorConfig; `schedule` names a generator, the plan's own if empty."""
    return TorchStageExecutor(
        plan=plan,
        capture=case.capture,
        module=case.model.module,
        world=LoopbackWorld(len(plan.used_devices)),
        source=TensorSource(case.capture, lambda step: case.batches[step]),
        optimizer=optimizer,
        schedule=generate(plan, schedule) if schedule else None,
        config=ExecutorConfig(**options),
    )
