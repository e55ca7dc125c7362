"""Native row-wise backward kernels against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.model.kernels import cpu_backward
from weft.model.kernels.cpu_team import native_kernels

pytestmark = pytest.mark.skipif(
    native_kernels() is None, reason="this processor or platform has no native CPU kernels"
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


def error(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    wanted = wanted.detach()
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    dy, x, residual = (draw(7, 48, dtype=dtype, seed=seed) for seed in range(3))
    weight = draw(48, dtype=dtype, seed=3)
    (wide,) = exact(x)
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    normed.backward(dy.double())
    assert wide.grad is not None
    # A stride that is not the width, as of columns of a wider tensor.
    apart = torch.cat([dy, dy], dim=1)[:, 48:]
    found = cpu_backward.norm_backward(apart, x, weight, residual, 1e-5)
    assert error(found, wide.grad + residual.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    d_act = draw(5, 64, dtype=dtype, seed=1)
    gate_up = draw(5, 128, dtype=dtype, seed=2) * 4
    gate, up = gate_up.chunk(2, dim=1)
    wide = exact(gate, up)
    (F.silu(wide[0]) * wide[1]).backward(d_act.double())
    assert wide[0].grad is not None
    assert wide[1].grad is not None
    found = cpu_backward.silu_mul_backward(d_act, gate, up)
    assert error(found, torch.cat([wide[0].grad, wide[1].grad], 1)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("source", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 16, 12])
def test_turn(dtype: torch.dtype, source: torch.dtype, head_dim: int) -> None:
    angles = draw(9, head_dim // 2)
    # Unlike a rotation's, so that a transposed matrix is told from an inverse.
    cos, sin = (1.5 * f(angles).to(dtype) for f in (torch.cos, torch.sin))
    heads_first = draw(3, 9, head_dim, dtype=source, seed=1)
    x = heads_first.transpose(0, 1)
    (wide,) = exact(x)
    low, high = wide.chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    turned = torch.cat([low * c - high * s, high * c + low * s], -1)
    room = torch.zeros(9, 3 * head_dim + 5, dtype=dtype)
    out = room[:, : 3 * head_dim]
    assert cpu_backward.turn_into(x, cos, sin, out, is_backward=False)
    assert error(out, turned.flatten(1)) <= TOLERANCE[dtype]
    turned.backward(x.double())
    assert wide.grad is not None
    assert cpu_backward.turn_into(x, cos, sin, out, is_backward=True)
    assert error(out, wide.grad.flatten(1)) <= TOLERANCE[dtype]
    assert not room[:, 3 * head_dim :].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy(dtype: torch.dtype) -> None:
    logits = draw(6, 160, dtype=dtype, seed=1) * 5
    labels = torch.tensor([0, 159, 3, 17, 80, 81])
    (wide,) = exact(logits)
    wanted = F.cross_entropy(wide, labels, reduction="none")
    wanted.sum().backward()
    kept = logits.clone()
    losses = cpu_backward.cross_entropy(kept, labels, wants_gradient=False)
    assert error(losses, wanted) <= 1e-6
    assert torch.equal(kept, logits)
    losses = cpu_backward.cross_entropy(kept, labels, wants_gradient=True)
    assert error(losses, wanted) <= 1e-6
    assert error(kept, wide.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_shows(bad: float) -> None:
    logits = draw(2, 32, dtype=torch.float32)
    logits[1, 5] = bad
    losses = cpu_backward.cross_entropy(logits, torch.tensor([1, 1]), wants_gradient=True)
    assert losses is not None
    assert torch.isfinite(losses).tolist() == [True, False]


def test_other_tensors_are_left_to_torch() -> None:
    double = draw(2, 32)
    ragged = draw(2, 33, dtype=torch.float32)
    labels = torch.zeros(2, dtype=torch.int64)
    for logits in (double, ragged):
        assert cpu_backward.cross_entropy(logits, labels, wants_gradient=True) is None
    assert cpu_backward.norm_backward(double, double, double[0], double, 1e-5) is None
    assert cpu_backward.silu_mul_backward(ragged, ragged, ragged) is None
