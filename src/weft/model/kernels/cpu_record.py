"""Records what a function submits to the native kernels, to run it again in a single launch.

The CPU's counterpart of a CUDA graph: the decoder's own code runs once on fixed buffers, its kernel
calls are kept instead of run, and a replay costs one parallel region for all of them. A torch
operator inside would be missing from the replay, so all but views and allocations are refused;
gathering rows by index (embeddings, RoPE tables) becomes a native call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weft.model.kernels.cpu_rows_ir import GatherSpec
from weft.model.kernels.cpu_team import (
    Call,
    KernelsUnavailableError,
    NativeKernels,
    OpList,
    native_kernels,
)

_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
    }
)


class CpuReplay:
    """A recorded function of fixed buffers."""

    def __init__(self, ops: OpList, output: Tensor) -> None:
        self._ops = ops
        self._output = output

    @property
    def num_calls(self) -> int:
        """Kernels in one replay."""
        return len(self._ops)

    def run(self, num_rows: int | None = None) -> Tensor:
        """Run it on what the buffers hold now; the output is overwritten by the next run.

        `num_rows`: only the first so many of the rows recorded; the output is cut to them.
        """
        if num_rows is None:
            num_rows = self._output.shape[0]
        self._ops.set_num_rows(num_rows)
        self._ops.run()
        return self._output[:num_rows]


def record(forward: Callable[[], Tensor]) -> CpuReplay:
    """Run `forward` once without effect and return its replay.

    All of its work must be by rows: output row i from row i of the fixed buffers.

    Raises:
        KernelsUnavailableError: native kernels are off, or `forward` needs a torch operator.
    """
    native = native_kernels()
    if native is None:
        raise KernelsUnavailableError("native CPU kernels are off; nothing can be recorded")
    with torch.inference_mode(), native.team.recording() as ops, _OnlyNative(native):
        output = forward()
    return CpuReplay(ops, output)


class _OnlyNative(TorchDispatchMode):
    """Lets views and allocations pass, turns row gathers into calls, refuses the rest."""

    def __init__(self, native: NativeKernels) -> None:
        super().__init__()
        self._native = native

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.is_view or func in _ALLOCATIONS:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default:
            return self._gather(args[0], args[1], func)
        if func is torch.ops.aten.index.Tensor and len(args[1]) == 1:
            return self._gather(args[0], args[1][0], func)
        raise KernelsUnavailableError(f"{func} has no native kernel and cannot be recorded")

    def _gather(self, table: Tensor, ids: Tensor, func: Any) -> Tensor:
        if table.dim() != 2 or ids.dim() != 1 or ids.dtype is not torch.int64:
            raise KernelsUnavailableError(f"{func} gathers no plain rows and cannot be recorded")
        if table.stride(1) != 1 or not ids.is_contiguous():
            raise KernelsUnavailableError(f"{func} reads strided rows and cannot be recorded")
        out = table.new_empty(ids.shape[0], table.shape[1])
        size = table.element_size()
        words = (
            table.data_ptr(),
            table.stride(0) * size,
            ids.data_ptr(),
            out.data_ptr(),
            ids.shape[0],
            table.shape[1] * size,
        )
        spec = GatherSpec()
        kernel = self._native.address(spec)
        keep = (table, ids, out)
        self._native.team.submit(Call(kernel=kernel, words=words, rows_word=4, keep=keep))
        return out
