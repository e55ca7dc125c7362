"""What one call of a stage is about: the samples, the step, and what is left for later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class WeightHalf:
    """Gradients of weights that a split backward leaves for its second half.

    While `is_open`, the backward of linear layers computes input gradients alone and leaves the
    rest here. Source: Zero Bubble Pipeline Parallelism (arXiv 2401.10241) §2.
    """

    is_open: bool = False
    calls: list[Callable[[], None]] = field(default_factory=list)

    def run(self) -> None:
        """Compute what was left."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The share of a micro-batch that a stage runs on.

    Samples [first_sample, first_sample + num_samples) count within the step's batch. Dropout draws
    from (seed, step, sample); without `training` nothing is dropped.
    """

    seed: int
    step: int
    first_sample: int
    num_samples: int
    training: bool = True
    weight_half: WeightHalf | None = None


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add to what a parameter's gradient is so far, as a backward of autograd does."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        half: WeightHalf,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.half = weight, bias, half  # type: ignore[attr-defined]
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, value = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, bias, half = ctx.weight, ctx.bias, ctx.half  # type: ignore[attr-defined]
        dx = gradient @ value if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]

        def weight_gradients() -> tuple[Tensor | None, Tensor | None]:
            dy_NO = gradient.flatten(0, -2)
            dw = dy_NO.t() @ x.flatten(0, -2) if weight.requires_grad else None
            db = dy_NO.sum(0) if bias is not None and bias.requires_grad else None
            return dw, db

        if not half.is_open:
            return dx, *weight_gradients(), None

        def later() -> None:
            dw, db = weight_gradients()
            for parameter, made in ((weight, dw), (bias, db)):
                if made is not None:
                    accumulate(parameter, made)

        half.calls.append(later)
        return dx, None, None, None


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, call: MicroBatch) -> Tensor:
    """A linear layer whose weight gradient can wait for the second half of a backward."""
    half = call.weight_half
    # A weight made by an operator is no leaf: its gradient must flow on at once.
    if half is None or not torch.is_grad_enabled() or not weight.is_leaf or x.dim() < 2:
        return torch.nn.functional.linear(x, weight, bias)
    return _SplitLinear.apply(x, weight, bias, half)  # type: ignore[no-any-return]
