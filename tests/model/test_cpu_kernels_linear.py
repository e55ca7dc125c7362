"""The native linear kernels against float64 products, on each vector width of the host."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from weft.base.errors import ConfigError
from weft.model.kernels import cpu_linear, cpu_team
from weft.model.kernels.cpu_gemm import Epilogue
from weft.model.kernels.cpu_panel_ir import MIN_PANEL_ROWS
from weft.model.kernels.cpu_team import NativeKernels, loaded_openmp, native_kernels
from weft.model.linear import CpuLinear, DenseLinear, LinearWeight, make_linear

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# K around the vector width and the stretch of the kernel; N that is no multiple of a group.
SHAPES = [(16, 8), (48, 20), (96, 37), (1040, 24), (2080, 40)]
ROWS = [1, 2, 5, 7, 13, 97]


@pytest.fixture
def native() -> NativeKernels:
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("this processor or platform cannot run the native CPU kernels")
    return kernels


@functools.cache
def _narrow_kernels(lanes: int) -> NativeKernels:
    full = native_kernels()
    assert full is not None
    isa = dataclasses.replace(full.isa, lanes=lanes, has_bf16_dot=False)
    return NativeKernels(full.team, isa)


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("lanes", [8, 16])
def test_every_epilogue_matches_float64(
    native: NativeKernels, dtype: torch.dtype, k: int, n: int, lanes: int
) -> None:
    if lanes > native.isa.lanes:
        pytest.skip("the host has no 512-bit vectors")
    if lanes < native.isa.lanes:
        native = _narrow_kernels(lanes)
    weight = _draw(n, k, dtype=dtype, seed=1) / k**0.5
    bias = _draw(n, dtype=dtype, seed=2)
    for m in ROWS:
        x, addend = _draw(m, k, dtype=dtype, seed=3), _draw(m, n, dtype=dtype, seed=4)
        exact = F.linear(x.double(), weight.double())
        gate, up = exact[:, : n // 2], exact[:, n // 2 : n // 2 * 2]
        expected = {
            Epilogue.NONE: (exact, None),
            Epilogue.BIAS: (exact + bias.double(), bias),
            Epilogue.ADD: (exact + addend.double(), addend),
        }
        if n >= 16 and n % 2 == 0:
            expected[Epilogue.SILU_MUL] = (F.silu(gate) * up, None)
        for epilogue, (reference, extra) in expected.items():
            y = torch.full_like(reference, float("nan"), dtype=dtype)
            cpu_linear.run_gemm(native, x, weight, y, extra=extra, epilogue=epilogue)
            error = (y.double() - reference).abs().max().item()
            assert error <= TOLERANCE[dtype] * max(1.0, reference.abs().max().item()), (m, epilogue)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(native: NativeKernels, dtype: torch.dtype) -> None:
    """In any bit within a path, and but for rounding across the two."""
    weight = _draw(56, 2080, dtype=dtype, seed=5)
    x = _draw(150, 2080, dtype=dtype, seed=6)
    together = torch.empty(150, 56, dtype=dtype)
    cpu_linear.run_gemm(native, x, weight, together)
    few = torch.empty(20, 56, dtype=dtype)
    cpu_linear.run_gemm(native, x[:20], weight, few)
    torch.testing.assert_close(few, together[:20], rtol=2e-2, atol=1e-3)
    for row, count in ((0, 1), (7, 3), (10, 10), (0, 32), (17, 33), (50, 100)):
        alone = torch.empty(count, 56, dtype=dtype)
        cpu_linear.run_gemm(native, x[row : row + count], weight, alone)
        others = few if count < MIN_PANEL_ROWS else together
        assert torch.equal(alone, others[row : row + count])


def test_one_and_two_threads_agree_bit_for_bit(native: NativeKernels) -> None:
    weight, x = (_draw(n, 64, dtype=torch.float32, seed=n) for n in (72, 5))
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = torch.empty(5, 72)
            cpu_linear.run_gemm(native, x, weight, y)
            results.append(y)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*results)


def test_a_list_of_ops_runs_in_order_and_again(native: NativeKernels) -> None:
    first, second = (_draw(64, 64, dtype=torch.float32, seed=s) / 8 for s in (1, 2))
    x, middle, y = torch.empty(3, 64), torch.empty(3, 64), torch.empty(3, 64)
    with native.team.recording() as ops:
        cpu_linear.run_gemm(native, x, first, middle)
        cpu_linear.run_gemm(native, middle, second, y)
    assert len(ops) == 2
    for seed in (7, 8):
        x.copy_(_draw(3, 64, dtype=torch.float32, seed=seed))
        ops.run()
        torch.testing.assert_close(y, x @ first.T @ second.T, rtol=1e-5, atol=1e-5)


def test_make_linear_chooses_by_device_and_dtype() -> None:
    assert isinstance(make_linear(torch.zeros(16, 16)), CpuLinear)
    assert type(make_linear(torch.zeros(16, 16), pack=False)) is DenseLinear
    assert type(make_linear(torch.zeros(16, 16, dtype=torch.float64))) is DenseLinear
    assert type(make_linear(torch.zeros(16, 16, device="meta"))) is DenseLinear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_protocol_agrees_with_torch(dtype: torch.dtype, with_bias: bool) -> None:
    weight = _draw(48, 32, dtype=dtype, seed=1)
    bias = _draw(48, dtype=dtype, seed=2) if with_bias else None
    x, dy = _draw(2, 3, 32, dtype=dtype, seed=3), _draw(2, 3, 48, dtype=dtype, seed=4)
    layer = make_linear(weight, bias)
    y = F.linear(x, weight, bias)
    assert isinstance(layer, LinearWeight)
    assert (layer.in_features, layer.out_features, layer.dtype) == (32, 48, dtype)
    assert layer.size_bytes == (48 * 32 + (48 if with_bias else 0)) * weight.element_size()
    torch.testing.assert_close(layer.forward(x), y)
    torch.testing.assert_close(layer.forward_add(x, dy), y + dy)
    gate, up = y.chunk(2, dim=-1)
    torch.testing.assert_close(layer.forward_silu_mul(x), F.silu(gate) * up)
    torch.testing.assert_close(layer.grad_input(dy), dy @ weight)
    assert torch.equal(layer.rows(torch.tensor([[3, 0]])), weight[[3, 0]][None])
    assert torch.equal(layer.dense(), weight)


def test_gradients_flow_through_the_torch_path() -> None:
    layer = make_linear(torch.ones(16, 16))
    x = torch.ones(2, 16, requires_grad=True)
    layer.forward(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 16), 16.0))


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(4), None),
        (torch.zeros(4, 4), torch.zeros(3)),
        (torch.zeros(4, 4), torch.zeros(4).double()),
    ],
)
def test_wrong_shapes_are_refused(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    with pytest.raises(ConfigError):
        make_linear(weight, bias)


def test_failure_to_start_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no code generator")

    native_kernels.cache_clear()
    monkeypatch.setattr(cpu_team, "Team", fail)
    try:
        layer = make_linear(torch.eye(16))
        x = torch.arange(32.0).view(2, 16)
        for _ in range(2):
            assert torch.equal(layer.forward(x), x)
        assert [r.message for r in caplog.records] == [
            "native CPU kernels are off (no code generator); plain torch runs instead"
        ]
    finally:
        native_kernels.cache_clear()


def test_without_torch_s_runtime_one_thread_runs_native_and_more_run_torch(
    monkeypatch: pytest.MonkeyPatch, native: NativeKernels
) -> None:
    monkeypatch.setattr(cpu_team, "_openmp_entry_points", dict)
    num_threads = torch.get_num_threads()
    weight, x = (_draw(n, 64, dtype=torch.float32, seed=n) for n in (24, 3))
    shared = torch.empty(3, 24)
    cpu_linear.run_gemm(native, x, weight, shared)
    try:
        torch.set_num_threads(2)
        native_kernels.cache_clear()
        assert native_kernels() is None
        torch.set_num_threads(1)
        native_kernels.cache_clear()
        alone = native_kernels()
        assert alone is not None
        y = torch.empty(3, 24)
        cpu_linear.run_gemm(alone, x, weight, y)
        assert torch.equal(y, shared)
    finally:
        torch.set_num_threads(num_threads)
        native_kernels.cache_clear()


def test_the_runtime_beside_torch_is_found_first() -> None:
    maps = (
        "7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f02-7f03 r--p 00000000 08:01 13 /env/site-packages/torch/lib/libgomp.so.1\n"
        "7f03-7f04 r-xp 00000000 08:01 13 /env/site-packages/torch/lib/libgomp.so.1\n"
        "7f05-7f06 rw-p 00000000 00:00 0 [heap]\n"
    )
    assert loaded_openmp(maps) == [
        "/env/site-packages/torch/lib/libgomp.so.1",
        "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
    ]


def test_the_team_is_torch_s_own(native: NativeKernels) -> None:
    """Running on the team must not add operating-system threads to those torch already has."""
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        big = torch.randn(512, 512)
        (big @ big).sum()
        torch.sin(big.repeat(8, 1))
        before = _count_threads()
        y = torch.empty(4, 512)
        cpu_linear.run_gemm(native, big[:4], big, y)
        assert _count_threads() == before
    finally:
        torch.set_num_threads(num_threads)


def _count_threads() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
