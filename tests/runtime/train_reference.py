"""One process, plain torch: what a pipeline must compute. Shares nothing with the runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, tuple[Any, ...]]
"""(inputs: tuple or mapping, targets) of one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a reference run ended with."""

    module: nn.Module
    losses: tuple[float, ...]
    norms: tuple[float, ...]


def call(module: nn.Module, inputs: Any) -> Any:
    """Positional or keyword arguments, as the inputs are."""
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def train_plain(
    module: nn.Module,
    loss: Callable[..., Any],
    batches: Sequence[Batch],
    make_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    *,
    clip_norm: float | None = None,
    groups: Sequence[slice] = (slice(None),),
) -> Trained:
    """Train a copy of `module`, one optimizer step a batch.

    With several `groups` the loss is evaluated within each, and averaged by their samples.
    """
    module = copy.deepcopy(module).train()
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainable)
    losses: list[float] = []
    norms: list[float] = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        total, weight = _loss(module, loss, inputs, targets, groups)
        value = total / weight
        value.backward()
        norms.append(_clip(trainable, clip_norm))
        optimizer.step()
        losses.append(float(value.detach()))
    return Trained(module=module, losses=tuple(losses), norms=tuple(norms))


def _loss(
    module: nn.Module,
    loss: Callable[..., Any],
    inputs: Any,
    targets: tuple[Any, ...],
    groups: Sequence[slice],
) -> tuple[Tensor, Tensor | float]:
    totals: list[Tensor] = []
    weights: list[Any] = []
    for group in groups:
        part = (
            {k: v[group] for k, v in inputs.items()}
            if isinstance(inputs, dict)
            else tuple(v[group] for v in inputs)
        )
        found = loss(call(module, part), *(t[group] for t in targets))
        if isinstance(found, dict):
            found = sum(found.values())
        if isinstance(found, tuple):
            totals.append(found[0])
            weights.append(found[1])
        else:
            size = len(next(iter(part.values())) if isinstance(part, dict) else part[0])
            totals.append(torch.as_tensor(found) * size)
            weights.append(size)
    return torch.stack(totals).sum(), sum(weights)


def _clip(parameters: Sequence[Tensor], limit: float | None) -> float:
    if limit is None:
        return 0.0
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), limit))
