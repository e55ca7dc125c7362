"""Native products of many rows, forward and gradient, against float64 products."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.narrow_kernels import kernels
from weft.model.kernels import cpu_linear, cpu_panel
from weft.model.kernels.cpu_gemm import Epilogue
from weft.model.kernels.cpu_ir import Storage
from weft.model.kernels.cpu_panel import even_cuts, panel_calls, panel_spec
from weft.model.kernels.cpu_panel_ir import MIN_GRAD_ROWS, MIN_PANEL_ROWS, tile_heights
from weft.model.kernels.cpu_record import record
from weft.model.kernels.cpu_team import NativeKernels, native_kernels
from weft.model.linear import make_linear

pytestmark = pytest.mark.skipif(
    native_kernels() is None, reason="this processor or platform has no native CPU kernels"
)

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(
    native: NativeKernels,
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue = Epilogue.NONE,
    extra: Tensor | None = None,
    *,
    is_grad: bool = False,
) -> Tensor:
    storage = cpu_linear.storage_of(x.dtype)
    assert storage is not None
    spec = panel_spec(native, storage, epilogue, x.shape[1], is_grad=is_grad)
    num_outputs = weight.shape[1] if is_grad else weight.shape[0]
    if epilogue is Epilogue.SILU_MUL:
        num_outputs //= 2
    y = torch.full((x.shape[0], num_outputs), float("nan"), dtype=x.dtype)
    native.team.submit(*panel_calls(native, spec, x, weight, y, extra))
    return y


def assert_near(y: Tensor, exact: Tensor) -> None:
    error = (y.double() - exact).abs().max().item()
    assert error <= TOLERANCE[y.dtype] * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("lanes", "has_dot"), [(8, False), (16, False), (16, True)])
def test_a_product_matches_float64(dtype: torch.dtype, lanes: int, has_dot: bool) -> None:
    if has_dot and dtype is not torch.bfloat16:
        pytest.skip("the instruction is for bfloat16")
    native = kernels(lanes, has_dot)
    # N that ends inside a panel, an odd number of chunks, and every height of a tile.
    for m, n, k in ((32, 96, 64), (39, 45, 80), (43, 32, 16), (85, 72, 672)):
        x, weight = draw(m, k, dtype=dtype, seed=1), draw(n, k, dtype=dtype, seed=2) / k**0.5
        assert_near(product(native, x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_epilogue_matches_float64_whatever_the_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = native_kernels()
    assert full is not None
    m, n, k = 70, 80, 448
    x, weight = draw(m, k, dtype=dtype, seed=1), draw(n, k, dtype=dtype, seed=2) / k**0.5
    bias, addend = draw(n, dtype=dtype, seed=3), draw(m, n, dtype=dtype, seed=4)
    exact = x.double() @ weight.double().T
    gate, up = exact.chunk(2, dim=1)
    expected = {
        Epilogue.BIAS: (exact + bias.double(), bias),
        Epilogue.ADD: (exact + addend.double(), addend),
        Epilogue.SILU_MUL: (F.silu(gate) * up, None),
    }
    for epilogue, (reference, extra) in expected.items():
        whole = product(full, x, weight, epilogue, extra)
        assert_near(whole, reference)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_panel, "_MAX_BLOCK_ROWS", 36)
            patch.setattr(cpu_panel, "_BLOCK", 256 * 96)
            cut = product(full, x, weight, epilogue, extra)
            spec = panel_spec(full, Storage(str(dtype)[6:]), epilogue, k, is_grad=False)
            assert len(panel_calls(full, spec, x, weight, cut, extra)) >= 8
        assert torch.equal(cut, whole), epilogue


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("lanes", "has_dot"), [(8, False), (16, False), (16, True)])
def test_a_gradient_matches_float64(dtype: torch.dtype, lanes: int, has_dot: bool) -> None:
    if has_dot and dtype is not torch.bfloat16:
        pytest.skip("the instruction is for bfloat16")
    native = kernels(lanes, has_dot)
    for m, n, k in ((MIN_GRAD_ROWS, 96, 64), (32, 64, 96), (37, 80, 45), (64, 1568, 40)):
        dy, weight = draw(m, n, dtype=dtype, seed=1), draw(n, k, dtype=dtype, seed=2) / n**0.5
        assert_near(product(native, dy, weight, is_grad=True), dy.double() @ weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_gives_the_gradient_of_its_input(dtype: torch.dtype) -> None:
    weight = draw(160, 64, dtype=dtype, seed=1) / 8
    layer = make_linear(weight)
    # Few rows, many, a sequence dimension, and rows that lie apart.
    wide = draw(50, 200, dtype=dtype, seed=2)
    for dy in (wide[:3, :160], wide[:, :160], wide[:48, :160].unflatten(0, (2, 24))):
        dx = layer.grad_input(dy)
        assert dx.dtype is dtype
        assert dx.shape == (*dy.shape[:-1], 64)
        assert_near(dx, dy.double() @ weight.double())


def test_a_gradient_of_odd_size_is_torch_s() -> None:
    weight = draw(75, 64, dtype=torch.float32, seed=1)
    dy = draw(40, 75, dtype=torch.float32, seed=2)
    assert torch.equal(make_linear(weight).grad_input(dy), dy @ weight)


def test_a_bfloat16_gradient_is_summed_in_float32() -> None:
    """4,096 ones in bfloat16 alone would stop growing at 256."""
    layer = make_linear(torch.ones(4096, 32, dtype=torch.bfloat16))
    dx = layer.grad_input(torch.ones(40, 4096, dtype=torch.bfloat16))
    assert torch.equal(dx, torch.full((40, 32), 4096.0, dtype=torch.bfloat16))


def test_threads_agree_bit_for_bit_where_panels_are_fewer() -> None:
    full = native_kernels()
    assert full is not None
    x, weight = (
        draw(100, 64, dtype=torch.float32, seed=1),
        draw(96, 64, dtype=torch.float32, seed=2),
    )
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(product(full, x, weight))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_replay_takes_the_path_of_its_number_of_rows(dtype: torch.dtype) -> None:
    most = MIN_PANEL_ROWS + 31
    first = make_linear(draw(96, 64, dtype=dtype, seed=1) / 8)
    second = make_linear(draw(2080, 96, dtype=dtype, seed=2) / 8)
    third = make_linear(draw(32, 2080, dtype=dtype, seed=3) / 8)
    x = draw(most, 64, dtype=dtype, seed=4)
    replay = record(lambda: third.forward(second.forward(first.forward(x))))
    assert replay.num_calls > 6
    for count in (most, 1, MIN_PANEL_ROWS - 1, MIN_PANEL_ROWS, MIN_PANEL_ROWS + 1, most):
        with torch.inference_mode():
            expected = third.forward(second.forward(first.forward(x[:count])))
        assert torch.equal(replay.run(count), expected), count


def test_a_replay_on_more_threads_than_recorded_is_the_same() -> None:
    layer = make_linear(draw(512, 64, dtype=torch.float32, seed=1))
    x = draw(64, 64, dtype=torch.float32, seed=2)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        replay = record(lambda: layer.forward(x))
        expected = replay.run().clone()
        torch.set_num_threads(2)
        assert torch.equal(replay.run(), expected)
    finally:
        torch.set_num_threads(num_threads)
    assert_near(expected, x.double() @ layer.dense().double().T)


@pytest.mark.parametrize("fewest_rows", [MIN_GRAD_ROWS, MIN_PANEL_ROWS])
@pytest.mark.parametrize("lanes", [8, 16])
def test_a_tile_s_height_is_always_one_that_has_code(lanes: int, fewest_rows: int) -> None:
    full = native_kernels()
    assert full is not None
    heights = tile_heights(dataclasses.replace(full.isa, lanes=lanes), fewest_rows)
    for rows in range(fewest_rows, 600):
        tiles = -(-rows // heights[-1])
        bounds = [rows * tile // tiles for tile in range(tiles + 1)]
        assert {b - a for a, b in pairwise(bounds)} <= set(heights)


def test_cuts_are_even_and_within_their_limit() -> None:
    assert even_cuts(100, 512) == [(0, 100)]
    assert even_cuts(1025, 512) == [(0, 341), (341, 683), (683, 1025)]
    for total in range(16, 4000, 16):
        cuts = even_cuts(total, 384, 16)
        assert (cuts[0][0], cuts[-1][1]) == (0, total)
        assert all(a[1] == b[0] for a, b in pairwise(cuts))
        sizes = {end - begin for begin, end in cuts}
        assert max(sizes) <= min(384, min(sizes) + 16)
        assert all(size % 16 == 0 for size in sizes)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [5, 32, 71, 1600])
@pytest.mark.parametrize("rank", [1, 8, 16, 37])
def test_sums_over_tokens(rank: int, num_tokens: int, dtype: torch.dtype) -> None:
    """The gradient of a weight: any number of rows and tokens, columns of a wider tensor."""
    left = draw(num_tokens, rank, dtype=dtype, seed=1)
    right = draw(num_tokens, 150, dtype=dtype, seed=2)[:, 50:]
    found = cpu_linear.sum_over_rows(left, right)
    wanted = left.double().t() @ right.double()
    assert found.dtype is torch.float32
    # Only what is left over of tokens may be rounded to the narrow dtype.
    tolerance = TOLERANCE[dtype] if num_tokens % 32 else TOLERANCE[torch.float32]
    assert float((found - wanted).norm() / wanted.norm()) <= tolerance
