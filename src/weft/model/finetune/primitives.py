"""Backward of the operations between linears, in closed form.

Shape legend: T tokens, H heads, D head_dim, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.model.kernels import cpu_backward


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for a float64 model."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `x / rms(x) * weight` at x, over the last dimension; all of one shape [..., F].

    The result is of the wide dtype, for the caller to add to a residual and round once.
    """
    wide = wide_dtype(x.dtype)
    x = x.to(wide)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    dx = dy.to(wide) * weight.to(wide)
    share = (dx * x).mean(-1, keepdim=True).mul_(scale).mul_(scale)
    return dx.addcmul_(x, share, value=-1).mul_(scale)


def add_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> Tensor:
    """`rms_norm_backward` + residual, rounded once; all [T, F]."""
    found = cpu_backward.norm_backward(dy, x, weight, residual, eps)
    if found is not None:
        return found
    return rms_norm_backward(dy, x, weight, eps).add_(residual).to(dy.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, H, D]: pairs (i, i + D/2); cos and sin [T, D/2]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def turn_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of `turn` at x: the transposed matrix, also where cos and sin carry a factor."""
    return turn(dy, cos, -sin)


def turn_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`turn` of x [T, H, D] into out [T, H D], rounded to its dtype."""
    if not cpu_backward.turn_into(x, cos, sin, out, is_backward=False):
        out.unflatten(1, x.shape[1:]).copy_(turn(x, cos, sin))


def turn_backward_into(dy: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`turn_backward` of dy [T, H, D] into out [T, H D], rounded to its dtype."""
    if not cpu_backward.turn_into(dy, cos, sin, out, is_backward=True):
        out.unflatten(1, dy.shape[1:]).copy_(turn_backward(dy, cos, sin))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, F]."""
    found = cpu_backward.silu_mul(gate, up)
    return torch.nn.functional.silu(gate).mul_(up) if found is None else found


def silu_mul_backward(d_act: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    """Gradient of silu(gate) * up at both, side by side: [T, F] each to [T, 2F].

    `d_act` is used up. Without `up`, the left half (the gradient at gate) is not filled in.
    """
    found = None if up is None else cpu_backward.silu_mul_backward(d_act, gate, up)
    if found is not None:
        return found
    num_features = gate.shape[1]
    out = d_act.new_empty(d_act.shape[0], 2 * num_features)
    d_gate, d_up = out.split(num_features, dim=1)
    # Rows by the few, so that five passes over them read the cache and not the memory.
    rows = max(1, (1 << 16) // num_features)
    for part in range(0, d_act.shape[0], rows):
        span = slice(part, part + rows)
        d, g = d_act[span], gate[span]
        torch.mul(torch.nn.functional.silu(g), d, out=d_up[span])
        if up is not None:
            d *= up[span]
            torch.ops.aten.silu_backward.grad_input(d, g, grad_input=d_gate[span])
    return out


def activation(name: str, x: Tensor) -> Tensor:
    """A bottleneck's activation, by its name."""
    match name:
        case "relu":
            return x.clamp(min=0)
        case "gelu":
            return torch.nn.functional.gelu(x)
        case _:
            return torch.nn.functional.silu(x)


def activation_backward(name: str, dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of `activation` at its input x."""
    match name:
        case "relu":
            return dy * (x > 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(dy, x)
        case _:
            return torch.ops.aten.silu_backward(dy, x)
