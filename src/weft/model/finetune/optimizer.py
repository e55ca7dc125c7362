"""Optimizers of adapters: torch's update rules on one flat tensor.

AdamW: Loshchilov and Hutter, ICLR 2019, in the order of operations of torch.optim.AdamW, so that
results agree to the last bit. SGD with momentum as torch.optim.SGD, weight decay coupled.

Shape legend: P all trained numbers of a job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from weft.engine.finetune import OptimizerName, OptimizerSpec

_CLIP_EPS = 1e-6
"""torch.nn.utils.clip_grad_norm_'s."""


class Optimizer(Protocol):
    """Turns gradients into new weights; its state is tensors by name."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors [P] that a checkpoint must hold."""
        ...

    def update(self, weights: Tensor, grads: Tensor, *, lr: float, num_done: int) -> None:
        """Change `weights` [P] in place; `num_done` steps came before this one."""
        ...


class AdamW:
    """Adam with decoupled weight decay."""

    def __init__(self, spec: OptimizerSpec, like: Tensor) -> None:
        self._spec = spec
        self._mean = torch.zeros_like(like)
        self._square = torch.zeros_like(like)

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {"exp_avg": self._mean, "exp_avg_sq": self._square}

    def update(self, weights: Tensor, grads: Tensor, *, lr: float, num_done: int) -> None:
        beta1, beta2 = self._spec.betas
        if self._spec.weight_decay:
            weights.mul_(1 - lr * self._spec.weight_decay)
        self._mean.lerp_(grads, 1 - beta1)
        self._square.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        step = num_done + 1
        step_size = lr / (1 - beta1**step)
        root = self._square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(self._spec.eps)
        weights.addcdiv_(self._mean, root, value=-step_size)


class Sgd:
    """Gradient descent, with momentum where the spec has it."""

    def __init__(self, spec: OptimizerSpec, like: Tensor) -> None:
        self._spec = spec
        self._momentum = torch.zeros_like(like) if spec.momentum else None

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    def update(self, weights: Tensor, grads: Tensor, *, lr: float, num_done: int) -> None:
        if self._spec.weight_decay:
            grads = grads.add(weights, alpha=self._spec.weight_decay)
        if self._momentum is not None:
            # torch starts from the first gradient itself: the same as from zero.
            grads = self._momentum.mul_(self._spec.momentum).add_(grads)
        weights.add_(grads, alpha=-lr)


def make_optimizer(spec: OptimizerSpec, like: Tensor) -> Optimizer:
    """The optimizer that a spec names, its state zero."""
    return AdamW(spec, like) if spec.name is OptimizerName.ADAMW else Sgd(spec, like)


def clip_(grads: Tensor, max_norm: float | None) -> float:
    """Scale `grads` [P] down to `max_norm`, if it is more; returns the norm before."""
    norm = float(torch.linalg.vector_norm(grads))
    if max_norm is not None and math.isfinite(norm):
        share = max_norm / (norm + _CLIP_EPS)
        if share < 1:
            grads.mul_(share)
    return norm
