"""The native row-wise kernels of the backward pass as functions; None where they do not run.

Shape legend: T rows, F features, V vocabulary, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.model.kernels.cpu_backward_ir import (
    LOSS_ARGS,
    NORM_BACKWARD_ARGS,
    SILU_BACKWARD_ARGS,
    TURN_ARGS,
    LossSpec,
    NormBackwardSpec,
    SiluBackwardSpec,
    TurnSpec,
)
from weft.model.kernels.cpu_ir import Storage
from weft.model.kernels.cpu_linear import storage_of
from weft.model.kernels.cpu_rows_ir import SILU_MUL_ARGS, SiluMulSpec
from weft.model.kernels.cpu_team import Call, KernelSpec, NativeKernels, float_bits, native_kernels


def _native_for(*tensors: Tensor) -> tuple[NativeKernels, Storage] | None:
    """Kernels for tensors of one dtype whose last dimension is contiguous and whole vectors."""
    native, first = native_kernels(), tensors[0]
    storage = storage_of(first.dtype) if first.device.type == "cpu" else None
    if native is None or storage is None:
        return None
    for x in tensors:
        is_whole = x.stride(-1) == 1 and x.shape[-1] % native.isa.lanes == 0
        if x.dtype is not first.dtype or not is_whole or x.shape[0] == 0:
            return None
    return native, storage


def _run(
    native: NativeKernels,
    spec: KernelSpec,
    names: tuple[str, ...],
    words: tuple[int, ...],
    *keep: Tensor,
) -> None:
    rows_word = names.index("num_rows")
    native.team.submit(
        Call(kernel=native.address(spec), words=words, rows_word=rows_word, keep=keep)
    )


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> Tensor | None:
    """residual + the gradient of `x / rms(x) * weight` at x; all [T, F], weight [F]."""
    found = _native_for(dy, x, weight, residual)
    if found is None or dy.dim() != 2:
        return None
    native, storage = found
    out = dy.new_empty(dy.shape)
    words = (
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        residual.data_ptr(),
        residual.stride(0),
        out.data_ptr(),
        dy.shape[0],
        dy.shape[1],
        float_bits(eps),
    )
    spec = NormBackwardSpec(storage=storage)
    _run(native, spec, NORM_BACKWARD_ARGS, words, dy, x, weight, residual, out)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """silu(gate) * up, [T, F] each."""
    found = _native_for(gate, up)
    # The kernel of the forward pass takes both side by side.
    is_beside = (up.data_ptr() - gate.data_ptr()) == gate.shape[1] * gate.element_size()
    if found is None or not is_beside or gate.stride(0) != up.stride(0):
        return None
    native, storage = found
    out = gate.new_empty(gate.shape)
    words = (gate.data_ptr(), gate.stride(0), out.data_ptr(), *gate.shape)
    _run(native, SiluMulSpec(storage=storage), SILU_MUL_ARGS, words, gate, up, out)
    return out


def silu_mul_backward(d_act: Tensor, gate: Tensor, up: Tensor) -> Tensor | None:
    """The gradients of silu(gate) * up at both, side by side: [T, F] each to [T, 2F]."""
    found = _native_for(d_act, gate, up)
    if found is None:
        return None
    native, storage = found
    out = d_act.new_empty(d_act.shape[0], 2 * d_act.shape[1])
    words = (
        d_act.data_ptr(),
        d_act.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        out.data_ptr(),
        *d_act.shape,
    )
    spec = SiluBackwardSpec(storage=storage)
    _run(native, spec, SILU_BACKWARD_ARGS, words, d_act, gate, up, out)
    return out


def turn_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, is_backward: bool) -> bool:
    """Turn x [T, H, D] by cos and sin [T, D/2] into out [T, H D]; False where it is not done."""
    native = native_kernels() if out.device.type == "cpu" else None
    source, turns = storage_of(x.dtype), storage_of(out.dtype)
    head_dim = x.shape[2]
    if native is None or source is None or turns is None or head_dim % 2 or x.shape[0] == 0:
        return False
    is_laid_out = x.stride(2) == cos.stride(1) == sin.stride(1) == out.stride(1) == 1
    if not is_laid_out or cos.stride(0) != sin.stride(0):
        return False
    if cos.dtype is not out.dtype or sin.dtype is not out.dtype:
        return False
    words = (
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        out.data_ptr(),
        out.stride(0),
        x.shape[0],
        x.shape[1],
    )
    spec = TurnSpec(source=source, turns=turns, head_dim=head_dim, is_backward=is_backward)
    _run(native, spec, TURN_ARGS, words, x, cos, sin, out)
    return True


def cross_entropy(logits: Tensor, labels: Tensor, *, wants_gradient: bool) -> Tensor | None:
    """Losses [T] in float32 of logits [T, V] and labels [T] int64.

    With `wants_gradient` the logits are overwritten: probabilities, less 1 at the label.
    """
    found = _native_for(logits)
    if found is None or logits.dim() != 2:
        return None
    native, storage = found
    num_rows, size = logits.shape
    losses, sums = torch.empty(2, num_rows, dtype=torch.float32)
    labels = labels.contiguous()
    scratch = native.team.scratch("cross entropy", size * native.team.num_threads)
    words = (
        logits.data_ptr(),
        logits.stride(0),
        labels.data_ptr(),
        losses.data_ptr(),
        sums.data_ptr(),
        num_rows,
        size,
        int(wants_gradient),
        scratch.data_ptr(),
    )
    spec = LossSpec(storage=storage)
    _run(native, spec, LOSS_ARGS, words, logits, labels, losses, sums, scratch)
    return losses + sums.log()
