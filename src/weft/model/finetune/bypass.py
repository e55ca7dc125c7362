"""A trained bypass network: forward for what is computed again, and backward.

Shape legend: s tokens of a window, K in_features, N out_features, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.graph.adapter_spec import BypassTarget
from weft.model.finetune.primitives import activation, activation_backward
from weft.model.kernels import cpu_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBypass:
    """Weights of one bypass in the model's dtype, and where their gradients are summed, wide.

    LoRA has `A` [r, K] and `B` [N, r]; (IA)³ `l` [K or N]; a bottleneck `down` [r, N],
    `down_bias` [r], `up` [N, r] and `up_bias` [N].
    """

    target: BypassTarget
    weights: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    activation: str = "relu"

    @property
    def is_lora(self) -> bool:
        """Whether it is a product beside a linear."""
        return "A" in self.weights


def add_product(grad: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """grad += scale * leftᵀ right: the gradient of a weight from its window's rows."""
    if left.shape[1] <= right.shape[1]:
        grad.add_(cpu_linear.sum_over_rows(left, right), alpha=scale)
    else:
        grad.add_(cpu_linear.sum_over_rows(right, left).t(), alpha=scale)


def lora_inner(bypass: TrainedBypass, x: Tensor) -> Tensor:
    """What a LoRA's B is applied to, x Aᵀ: [s, r]."""
    return cpu_linear.linear(x, bypass.weights["A"])


def lora_backward(
    bypass: TrainedBypass,
    dy: Tensor,
    low_rank: Tensor,
    x: Tensor,
    dx: Tensor | None,
    dropout_scale: Tensor | None,
) -> None:
    """Sum the gradients of A and B; add the bypass's share to `dx` [s, K], if there is one.

    `dy` [s, N]; `low_rank` [s, r] is what B was applied to; `x` [s, K] the linear's input.
    """
    scale = bypass.target.scale
    a, b = bypass.weights["A"], bypass.weights["B"]
    add_product(bypass.grads["B"], dy, low_rank, scale)
    d_low_rank = cpu_linear.linear(dy, b.t().contiguous()).mul_(scale)
    if dropout_scale is None:
        add_product(bypass.grads["A"], d_low_rank, x)
        if dx is not None:
            dx.addmm_(d_low_rank, a)
        return
    add_product(bypass.grads["A"], d_low_rank, x * dropout_scale)
    if dx is not None:
        dx.addcmul_(d_low_rank @ a, dropout_scale)


def scale_backward(bypass: TrainedBypass, dy: Tensor, source: Tensor) -> Tensor:
    """(IA)³: sum the gradient of `l`; returns the gradient of `source` [s, F]."""
    grad = bypass.grads["l"]
    grad += torch.linalg.vecdot(dy.to(grad.dtype), source.to(grad.dtype), dim=0)
    return dy * bypass.weights["l"]


def bottleneck_inner(bypass: TrainedBypass, source: Tensor) -> Tensor:
    """The rank-wide tensor before the activation, [s, r]."""
    return torch.addmm(bypass.weights["down_bias"], source, bypass.weights["down"].t())


def bottleneck_active(bypass: TrainedBypass, inner: Tensor) -> Tensor:
    """The rank-wide tensor behind the activation, [s, r]."""
    return activation(bypass.activation, inner)


def bottleneck_output(bypass: TrainedBypass, source: Tensor, active: Tensor) -> Tensor:
    """The sub-layer's output with the bottleneck added, [s, N]."""
    return torch.addmm(bypass.weights["up_bias"], active, bypass.weights["up"].t()) + source


def bottleneck_backward(
    bypass: TrainedBypass, dy: Tensor, source: Tensor, inner: Tensor, active: Tensor
) -> Tensor:
    """Sum the four gradients; returns that of `source`, the sub-layer's output, [s, N]."""
    grads, weights = bypass.grads, bypass.weights
    add_product(grads["up"], dy, active)
    grads["up_bias"].add_(dy.sum(0, dtype=grads["up_bias"].dtype))
    d_inner = activation_backward(bypass.activation, dy @ weights["up"], inner)
    add_product(grads["down"], d_inner, source)
    grads["down_bias"].add_(d_inner.sum(0, dtype=grads["down_bias"].dtype))
    return torch.addmm(dy, d_inner, weights["down"])
