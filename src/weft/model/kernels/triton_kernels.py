"""The kernels for CUDA: `Kernels` from Triton programs that read the arena in place.

Shape legend: T tokens, D head_dim, Hq query heads, Hkv key-value heads, n rows of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.base.errors import UnsupportedError
from weft.model.forward_step import ForwardStep, GroupStep, KvLayer, RopeRows
from weft.model.kernels import triton_ops
from weft.model.kernels.interface import AttentionShape, HeadNorms
from weft.model.linear import DenseLinear, LinearWeight

_BLOCK_TOKENS = 64
"""Prompt tokens that one program of the chunk kernel holds."""
_MAX_SPLITS = 32
_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


class TritonLinear(DenseLinear):
    """`DenseLinear` with the activation between gate and up in one program."""

    __slots__ = ()

    def forward_add(self, x: Tensor, addend: Tensor) -> Tensor:
        if self._bias is not None:
            return super().forward_add(x, addend)
        return torch.addmm(addend, x, self._weight.t())

    def forward_silu_mul(self, x: Tensor) -> Tensor:
        return self.silu_mul(self.forward(x))

    def silu_mul(self, outputs: Tensor) -> Tensor:
        return triton_ops.silu_mul(outputs)


class TritonKernels:
    """`Kernels` on CUDA (or in Triton's interpreter, for tests).

    `num_programs` is how many programs the device runs at once; it decides into how many splits
    the contexts of few rows are cut.

    Raises:
        UnsupportedError: a dtype other than float32, bfloat16 and float16.
    """

    def __init__(self, shape: AttentionShape, *, dtype: torch.dtype, num_programs: int) -> None:
        if dtype not in _SUPPORTED:
            raise UnsupportedError(
                f"the Triton kernels do not compute in {dtype}; they do in "
                f"{', '.join(str(d) for d in _SUPPORTED)}: use TorchKernels"
            )
        self._shape = shape
        self._scale = shape.head_dim**-0.5
        self._num_programs = num_programs

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> LinearWeight:
        return TritonLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return triton_ops.rms_norm(x, weight, eps)

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rope: RopeRows,
        kv: KvLayer,
        step: ForwardStep,
        group: GroupStep,
    ) -> Tensor:
        shape = self._shape
        queries = triton_ops.turn_and_store(
            qkv,
            query_norm=norms.query if norms else None,
            key_norm=norms.key if norms else None,
            eps=shape.norm_eps,
            rope=rope,
            kv=kv,
            group=group,
            num_heads=shape.num_heads,
        )
        out = torch.empty_like(queries)
        if step.num_decodes:
            triton_ops.decode_attention(
                queries[: step.num_decodes],
                kv,
                page_tables=group.page_tables,
                prefix_lens=step.prefix_lens,
                page_tokens=group.page_tokens,
                window=group.window,
                scale=self._scale,
                num_splits=self._num_splits(step.num_decodes),
                out=out,
            )
        if step.chunks:
            triton_ops.chunk_attention(
                queries,
                kv,
                blocks=_chunk_blocks(step, group),
                page_tables=group.page_tables,
                prefix_lens=step.prefix_lens,
                page_tokens=group.page_tokens,
                window=group.window,
                scale=self._scale,
                block_tokens=_BLOCK_TOKENS,
                out=out,
            )
        return out.flatten(1)

    def _num_splits(self, num_rows: int) -> int:
        """Enough programs to fill the device twice; a function of the row count alone, so that a
        captured graph is right for every length."""
        wanted = 2 * self._num_programs // (num_rows * self._shape.num_kv_heads)
        return max(1, min(_MAX_SPLITS, wanted))


def _chunk_blocks(step: ForwardStep, group: GroupStep) -> Tensor:
    """[.., 3] int32 (row, first token, end token): the chunks cut for the programs."""
    blocks = group.scratch.get("chunk_blocks")
    if blocks is None:
        rows = [
            (chunk.row, begin, min(begin + _BLOCK_TOKENS, chunk.end))
            for chunk in step.chunks
            for begin in range(chunk.begin, chunk.end, _BLOCK_TOKENS)
        ]
        host = torch.tensor(rows, dtype=torch.int32)
        device = step.prefix_lens.device
        if device.type == "cuda":
            host = host.pin_memory()
        blocks = group.scratch["chunk_blocks"] = host.to(device, non_blocking=True)
    return blocks
