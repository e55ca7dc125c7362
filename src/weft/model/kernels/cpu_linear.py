"""The linear layer on the CPU: which path a product takes, and the calls into the kernels.

Shape legend: M rows, K in_features, N out_features. W is the plain row-major [N, K] tensor: torch
and the native kernels read the same storage, so nothing is packed and nothing is held twice.
"""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.model.kernels.cpu_gemm import GEMM_ARGS, MAX_ROW_BLOCK, Epilogue, GemmSpec
from weft.model.kernels.cpu_ir import Isa, Storage
from weft.model.kernels.cpu_panel import panel_calls, panel_spec, sum_multiple, sum_spec
from weft.model.kernels.cpu_panel_ir import (
    CHUNK,
    MIN_GRAD_ROWS,
    MIN_PANEL_ROWS,
    panel_width,
)
from weft.model.kernels.cpu_rows_ir import SILU_MUL_ARGS, SiluMulSpec
from weft.model.kernels.cpu_team import Call, NativeKernels, native_kernels

_STORAGES = {
    torch.float32: Storage.FLOAT32,
    torch.bfloat16: Storage.BFLOAT16,
    torch.float16: Storage.FLOAT16,
}
# Above this many rows weights stay in the cache between row blocks, and fetching ahead only costs.
_MAX_FETCH_ROWS = 128
_ROW_BLOCK_BYTES = 400_000
_LONG_GRAD = 2048
_ROWS_WORD = GEMM_ARGS.index("m")


def storage_of(dtype: torch.dtype) -> Storage | None:
    """The kernels' name of a dtype, or None where they do not know it (float64, integers)."""
    return _STORAGES.get(dtype)


@functools.cache
def max_native_rows(storage: Storage) -> int:
    """The most rows for which the native kernel beats torch's own product on this processor.

    A fixed rule by instruction set: torch's bfloat16 product wins from eight rows where it has AMX,
    from 16 where neither has a dot product; its float32 product wins on long inputs where MKL is at
    home (measured before the panels of `cpu_panel` were there).
    """
    isa = Isa.detect()
    if storage is Storage.FLOAT32:
        return 1 << 40 if llvm.get_host_cpu_name().startswith("znver") else 192
    if storage is Storage.FLOAT16:
        # Without instructions of its own, torch's float16 product is several times slower.
        features = llvm.get_host_cpu_features()
        return 64 if features.get("avx512fp16") or features.get("amx-fp16") else 1 << 40
    if isa.has_amx_bf16:
        return 7
    return 1 << 40 if isa.has_bf16_dot else 16


def _spec(native: NativeKernels, storage: Storage, epilogue: Epilogue, m: int, k: int) -> GemmSpec:
    use_dot = storage is Storage.BFLOAT16 and native.isa.has_bf16_dot and k % 32 == 0
    return GemmSpec(storage=storage, epilogue=epilogue, use_dot=use_dot, fetch=m <= _MAX_FETCH_ROWS)


def can_run_native(x: Tensor, weight: Tensor, epilogue: Epilogue) -> bool:
    """Whether the native kernel takes x [M, K] @ weight [N, K]ᵀ, and is the faster path for it."""
    return x.stride(1) == 1 and _takes(x, weight, epilogue)


def _takes(x: Tensor, weight: Tensor, epilogue: Epilogue) -> bool:
    """`can_run_native` whatever the strides of x."""
    storage = storage_of(weight.dtype)
    if storage is None or x.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    num_rows, k = x.shape
    num_outputs = weight.shape[0] // 2 if epilogue is Epilogue.SILU_MUL else weight.shape[0]
    return (
        0 < num_rows <= max_native_rows(storage)
        and k % 16 == 0
        and num_outputs >= 8
        and weight.is_contiguous()
        and native_kernels() is not None
    )


def gemm_words(
    x: Tensor, weight: Tensor, y: Tensor, extra: Tensor | None, epilogue: Epilogue
) -> tuple[int, ...]:
    """The kernel's argument words for one product."""
    num_rows, k = x.shape
    num_outputs = weight.shape[0] // 2 if epilogue is Epilogue.SILU_MUL else weight.shape[0]
    fitting = _ROW_BLOCK_BYTES // (k * x.element_size()) // 6 * 6
    return (
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        0 if extra is None else extra.data_ptr(),
        num_rows,
        num_outputs,
        k,
        max(6, min(MAX_ROW_BLOCK, fitting)),
    )


def run_gemm(
    native: NativeKernels,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    extra: Tensor | None = None,
    epilogue: Epilogue = Epilogue.NONE,
) -> None:
    """Submit y = epilogue(x Wᵀ).

    x [M, K], weight [N, K] (SILU_MUL: [2N, K], gates before ups), y [M, N]; `extra` is the bias [N]
    or the addend [M, N] with y's row stride. The caller has asked `can_run_native`.
    """
    num_rows = x.shape[0]
    storage = _STORAGES[weight.dtype]
    wide = panel_spec(native, storage, epilogue, weight.shape[1], is_grad=False)
    can_panel = num_rows >= MIN_PANEL_ROWS and y.shape[1] >= wide.outputs_per_panel(native.isa)
    calls: list[Call] = []
    # A recording must serve any smaller number of rows as well, by the same path as if run at once.
    if not can_panel or native.team.is_recording:
        spec = _spec(native, storage, epilogue, num_rows, weight.shape[1])
        calls.append(
            Call(
                kernel=native.address(spec),
                words=gemm_words(x, weight, y, extra, epilogue),
                rows_word=_ROWS_WORD,
                keep=(x, weight, y, extra),
                only_for=range(MIN_PANEL_ROWS) if can_panel else None,
            )
        )
    if can_panel:
        only_for = range(MIN_PANEL_ROWS, num_rows + 1)
        calls += panel_calls(native, wide, x, weight, y, extra, only_for)
    native.team.submit(*calls)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] to [..., N] by the faster of the native kernel and torch."""
    epilogue = Epilogue.NONE if bias is None else Epilogue.BIAS
    rows = x.reshape(-1, x.shape[-1])
    native = native_kernels() if can_run_native(rows, weight, epilogue) else None
    if native is None:
        return F.linear(x, weight, bias)
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    run_gemm(native, rows, weight, y, extra=bias, epilogue=epilogue)
    return y.view(*x.shape[:-1], -1)


def linear_add(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    """x Wᵀ + addend: the end of an attention or feed-forward block.

    x [..., K], addend [..., N].
    """
    rows = x.reshape(-1, x.shape[-1])
    native = native_kernels() if can_run_native(rows, weight, Epilogue.ADD) else None
    if native is None or not addend.is_contiguous() or addend.dtype != x.dtype:
        return F.linear(x, weight) + addend
    y = torch.empty_like(addend)
    run_gemm(
        native,
        rows,
        weight,
        y.view(rows.shape[0], -1),
        extra=addend,
        epilogue=Epilogue.ADD,
    )
    return y


def linear_silu_mul(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(x Gᵀ) · (x Uᵀ) for gate_up = [G; U] of shape [2N, K]: x [..., K] to [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    native = native_kernels() if can_run_native(rows, gate_up, Epilogue.SILU_MUL) else None
    if native is None:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up
    y = rows.new_empty(rows.shape[0], gate_up.shape[0] // 2)
    run_gemm(native, rows, gate_up, y, epilogue=Epilogue.SILU_MUL)
    return y.view(*x.shape[:-1], -1)


def silu_mul(outputs: Tensor, gate_up: Tensor) -> Tensor:
    """silu(g) · u for outputs [M, 2N] = [g, u] of a weight gate_up [2N, K]: [M, N].

    By the path that `linear_silu_mul` takes for so many rows, with its very bits.
    """
    num_rows, size = outputs.shape[0], outputs.shape[1] // 2
    input_like = outputs[:, :1].expand(num_rows, gate_up.shape[1])
    native = native_kernels() if _takes(input_like, gate_up, Epilogue.SILU_MUL) else None
    if native is None or size < native.isa.lanes or outputs.stride(1) != 1:
        gate, up = outputs.chunk(2, dim=-1)
        return F.silu(gate) * up
    out = outputs.new_empty(num_rows, size)
    spec = SiluMulSpec(storage=_STORAGES[gate_up.dtype])
    words = (outputs.data_ptr(), outputs.stride(0), out.data_ptr(), num_rows, size)
    kernel, rows_word = native.address(spec), SILU_MUL_ARGS.index("num_rows")
    native.team.submit(Call(kernel=kernel, words=words, rows_word=rows_word, keep=(outputs, out)))
    return out


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W, summed in float32: dy [..., N], weight [N, K] to [..., K]."""
    rows = dy.reshape(-1, dy.shape[-1])
    native = native_kernels() if _can_run_native_grad(rows, weight) else None
    if native is None:
        return dy @ weight
    dx = rows.new_empty(rows.shape[0], weight.shape[1])
    storage = _STORAGES[weight.dtype]
    spec = panel_spec(native, storage, Epilogue.NONE, weight.shape[0], is_grad=True)
    native.team.submit(*panel_calls(native, spec, rows, weight, dx))
    return dx.view(*dy.shape[:-1], -1)


def sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right: what rows left [T, r] and right [T, N] add up to, summed in float32: [r, N].

    The gradient of a weight; the result is float32, or float64 for float64.
    """
    wide = torch.float64 if left.dtype is torch.float64 else torch.float32
    storage = storage_of(left.dtype)
    native = native_kernels() if left.device.type == "cpu" and storage is not None else None
    is_wide_enough = native is not None and right.shape[1] >= panel_width(native.isa)
    if native is None or storage is None or not is_wide_enough or right.stride(1) != 1:
        return (left.t() @ right).to(wide)
    spec = sum_spec(native, storage)
    whole = left.shape[0] // sum_multiple(spec) * sum_multiple(spec)
    rest = slice(whole, left.shape[0])
    if not whole:
        return (left.t() @ right).to(wide)
    found = left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)
    turned = left[:whole].t().contiguous()
    native.team.submit(*panel_calls(native, spec, turned, right[:whole], found))
    if whole < left.shape[0]:
        found += (left[rest].t() @ right[rest]).to(wide)
    return found


def _fewest_grad_rows(storage: Storage, weight: Tensor) -> int:
    """From how many rows on the native kernel beats torch's own product.

    Few rows of float32, and of bfloat16 against a weight of few outputs, are torch's.
    """
    if storage is Storage.FLOAT32:
        return MIN_PANEL_ROWS
    is_long = storage is Storage.FLOAT16 or weight.shape[0] >= _LONG_GRAD
    return MIN_GRAD_ROWS if is_long else MIN_PANEL_ROWS


def _can_run_native_grad(dy: Tensor, weight: Tensor) -> bool:
    """Whether the native kernel takes dy [M, N] @ weight [N, K], and is the faster path for it."""
    storage = storage_of(weight.dtype)
    if storage is None or dy.device.type != "cpu" or dy.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and (dy.requires_grad or weight.requires_grad):
        return False
    native = native_kernels()
    return (
        native is not None
        and _fewest_grad_rows(storage, weight) <= dy.shape[0] <= max_native_rows(storage)
        and dy.shape[1] % CHUNK == 0
        and dy.stride(1) == 1
        and weight.shape[1] >= panel_width(native.isa)
        and weight.is_contiguous()
    )
