"""The native LoRA kernels of a training window against float64 torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weft.model.kernels import cpu_lora_window
from weft.model.kernels.cpu_lora_window import LoraGrads, LoraOutput
from weft.model.kernels.cpu_team import native_kernels

pytestmark = pytest.mark.skipif(
    native_kernels() is None, reason="this processor or platform has no native CPU kernels"
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
WIDE = 2e-6
"""Of sums that are left in float32."""
# Tokens, in_features, (rank, out_features) of the parts.
SHAPES = [
    (1, 16, [(1, 16)]),
    (7, 48, [(16, 40), (3, 24), (16, 24)]),
    (33, 130, [(8, 65), (24, 129)]),
    (64, 96, [(16, 192), (16, 192)]),
    (70, 257, [(256, 33)]),
    (129, 64, [(17, 64), (1, 7), (100, 200)]),
]


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Draw:
    """Tensors from one stream; their rows may be columns of a wider tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, gap: int = 0) -> Tensor:
        rows, width = shape
        room = torch.randn(rows, width + gap, generator=self._generator)
        return room.to(self._dtype if dtype is None else dtype)[:, gap:]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def drawn_grads(
    draw: Draw, num_tokens: int, k: int, sizes: list[tuple[int, int]]
) -> list[LoraGrads]:
    # Parts of one output lie side by side.
    dy = draw(num_tokens, sum(n for _, n in sizes), gap=5)
    return [
        LoraGrads(
            a=draw(r, k),
            b=draw(n, r),
            grad_a=draw(r, k, dtype=torch.float32),
            grad_b=draw(n, r, dtype=torch.float32),
            scale=0.5 + i,
            dy=columns,
            low_rank=draw(num_tokens, r, gap=i),
        )
        for i, ((r, n), columns) in enumerate(
            zip(sizes, dy.split([n for _, n in sizes], dim=1), strict=True)
        )
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wants_dx", [True, False])
def test_backward(
    dtype: torch.dtype,
    shape: tuple[int, int, list[tuple[int, int]]],
    wants_dx: bool,
    num_threads: int,
) -> None:
    draw = Draw(dtype)
    num_tokens, k, sizes = shape
    x, dx = draw(num_tokens, k, gap=3), draw(num_tokens, k)
    parts = drawn_grads(draw, num_tokens, k, sizes)
    # The last is to be computed again, and is of the same numbers but for a rounding.
    inner = x.double() @ parts[-1].a.double().t()
    kept = [part.low_rank for part in parts[:-1]]
    lows = [low.double() for low in (*kept, inner.to(dtype)) if low is not None]
    parts[-1] = replace(parts[-1], low_rank=None)
    wanted_dx = dx.double()
    wanted: list[tuple[Tensor, Tensor]] = []
    for part, low in zip(parts, lows, strict=True):
        d_low = part.scale * part.dy.double() @ part.b.double()
        grad_b = part.grad_b.double() + part.scale * part.dy.double().t() @ low
        wanted.append((part.grad_a.double() + d_low.t() @ x.double(), grad_b))
        wanted_dx += d_low @ part.a.double()
    assert cpu_lora_window.backward(parts, x, dx if wants_dx else None)
    for part, (grad_a, grad_b) in zip(parts, wanted, strict=True):
        assert error(part.grad_a, grad_a) <= WIDE
        assert error(part.grad_b, grad_b) <= (
            WIDE if part.low_rank is not None else TOLERANCE[dtype]
        )
    if wants_dx:
        assert error(dx, wanted_dx) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    dtype: torch.dtype, shape: tuple[int, int, list[tuple[int, int]]], num_threads: int
) -> None:
    draw = Draw(dtype)
    num_tokens, k, sizes = shape
    x = draw(num_tokens, k, gap=3)
    room = draw(num_tokens, sum(n for _, n in sizes) + 5)
    before = room.clone()
    outputs = room[:, 5:].split([n for _, n in sizes], dim=1)
    parts = [
        LoraOutput(a=draw(r, k), b=draw(n, r), scale=0.5 + i, low_rank=draw(num_tokens, r), out=out)
        for i, ((r, n), out) in enumerate(zip(sizes, outputs, strict=True))
    ]
    wanted: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        inner = x.double() @ part.a.double().t()
        wanted.append((inner, part.out.double() + part.scale * inner @ part.b.double().t()))
    taken = cpu_lora_window.forward(parts, x)
    assert taken or num_tokens > 64
    if not taken:
        assert torch.equal(room, before)
        return
    for part, (inner, out) in zip(parts, wanted, strict=True):
        assert part.low_rank is None or error(part.low_rank, inner) <= TOLERANCE[dtype]
        assert error(part.out, out) <= TOLERANCE[dtype]
    assert torch.equal(room[:, :5], before[:, :5])


def test_runs_agree_in_every_bit(num_threads: int) -> None:
    found: list[list[Tensor]] = []
    for _ in range(2):
        draw = Draw(torch.bfloat16)
        x, dx = draw(40, 96), draw(40, 96)
        parts = drawn_grads(draw, 40, 96, [(16, 160), (8, 32)])
        assert cpu_lora_window.backward(parts, x, dx)
        found.append([dx, *(grad for part in parts for grad in (part.grad_a, part.grad_b))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_tensors_are_left_to_torch() -> None:
    draw = Draw(torch.float64)
    x = draw(4, 32)
    parts = drawn_grads(draw, 4, 32, [(16, 32)])
    assert not cpu_lora_window.backward(parts, x, x)
    draw = Draw(torch.float32)
    x = draw(32, 4).t()
    parts = drawn_grads(draw, 4, 32, [(16, 32)])
    assert not cpu_lora_window.backward(parts, x, None)
