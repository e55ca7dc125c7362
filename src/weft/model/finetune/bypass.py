"""A trained bypass network: forward for what is computed again, and backward.

Shape legend: s tokens of a window, K in_features, N out_features, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.graph.adapter_spec import BypassTarget
from weft.model.finetune.primitives import activation, activation_backward
from weft.model.kernels import cpu_linear, cpu_lora_window
from weft.model.kernels.cpu_lora_window import LoraGrads


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


def lora_inner(bypass: TrainedBypass, x: Tensor, dropout_scale: Tensor | None) -> Tensor:
    """What a LoRA's B is applied to, x Aᵀ: [s, r]; the scale [s, K] is of x."""
    source = x if dropout_scale is None else x * dropout_scale
    return cpu_linear.linear(source, bypass.weights["A"])


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraWindow:
    """One LoRA and its rows of a backward window."""

    bypass: TrainedBypass
    dy: Tensor
    """[s, N], the gradient of the linear's output."""
    low_rank: Tensor | None
    """[s, r], what B was applied to; None: to be computed again."""
    dropout_scale: Tensor | None
    """[s, K], what the LoRA's input was multiplied with."""


def loras_backward(loras: Sequence[LoraWindow], x: Tensor, dx: Tensor | None) -> None:
    """Sum the gradients of A and B of LoRAs beside linears that share the input `x` [s, K].

    Their share is added to `dx` [s, K], if there is one.
    """
    if all(lora.dropout_scale is None for lora in loras) and _native_backward(loras, x, dx):
        return
    for lora in loras:
        _lora_backward(lora, x, dx)


def _native_backward(loras: Sequence[LoraWindow], x: Tensor, dx: Tensor | None) -> bool:
    parts = [
        LoraGrads(
            a=lora.bypass.weights["A"],
            b=lora.bypass.weights["B"],
            grad_a=lora.bypass.grads["A"],
            grad_b=lora.bypass.grads["B"],
            scale=lora.bypass.target.scale,
            dy=lora.dy,
            low_rank=lora.low_rank,
        )
        for lora in loras
    ]
    return cpu_lora_window.backward(parts, x, dx)


def _lora_backward(lora: LoraWindow, x: Tensor, dx: Tensor | None) -> None:
    bypass, dy, dropout_scale = lora.bypass, lora.dy, lora.dropout_scale
    scale = bypass.target.scale
    a, b = bypass.weights["A"], bypass.weights["B"]
    low_rank = lora.low_rank
    if low_rank is None:
        low_rank = lora_inner(bypass, x, dropout_scale)
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
