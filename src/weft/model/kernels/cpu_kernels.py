"""The decoder's kernels on the CPU: native code where it can run, the torch twin elsewhere.

Shape legend: T tokens, D head_dim, Hq query heads, Hkv key-value heads, B tokens of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.model.forward_step import ChunkRow, ForwardStep, GroupStep, KvLayer, RopeRows
from weft.model.kernels.cpu_attention import attention_calls, norm_call, rope_call
from weft.model.kernels.cpu_attention_ir import AttentionSpec
from weft.model.kernels.cpu_ir import Storage
from weft.model.kernels.cpu_linear import storage_of
from weft.model.kernels.cpu_team import NativeKernels, native_kernels
from weft.model.kernels.cpu_window import token_multiple, window_forward
from weft.model.kernels.held_tokens import TokenGather
from weft.model.kernels.interface import AttentionShape, HeadNorms
from weft.model.kernels.torch_kernels import TorchKernels
from weft.model.linear import LinearWeight, make_linear

_MIN_WINDOW_ROWS = 32


class CpuKernels:
    """`Kernels` for float32, bfloat16 and float16 on the CPU.

    What the native code does not cover (float64, head sizes that are no multiple of the vector
    width, a processor without AVX2, tensors that need gradients) runs on `TorchKernels`.
    """

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._twin = TorchKernels(shape)
        self._native = native_kernels()
        self._specs: dict[Storage, AttentionSpec] = {}
        if self._native is not None and shape.head_dim % self._native.isa.lanes == 0:
            group = shape.num_heads // shape.num_kv_heads
            for storage in Storage:
                self._specs[storage] = AttentionSpec(
                    storage=storage, head_dim=shape.head_dim, group=group, fetch=False
                )

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> LinearWeight:
        return make_linear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        native, storage = self._native_for(x)
        size = x.shape[-1]
        if native is None or storage is None or size % native.isa.lanes or x.dtype != weight.dtype:
            return self._twin.rms_norm(x, weight, eps)
        rows = x.reshape(-1, size)
        out = rows.new_empty(rows.shape)
        native.team.submit(norm_call(native, storage, rows, weight, out, eps))
        return out.view(x.shape)

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rope: RopeRows,
        kv: KvLayer,
        step: ForwardStep,
        group: GroupStep,
    ) -> Tensor:
        native, storage = self._native_for(qkv)
        spec = None if storage is None else self._specs.get(storage)
        if native is None or spec is None or not self._fits(native, qkv, rope, kv, group):
            return self._twin.attention(qkv, norms, rope, kv, step, group)
        shape = self._shape
        out = qkv.new_empty(qkv.shape[0], shape.query_size)
        windows = [chunk for chunk in step.chunks if self._is_window(chunk, qkv)]
        chunks = [chunk for chunk in step.chunks if chunk not in windows]
        native.team.submit(
            rope_call(native, spec.storage, shape, qkv, norms, rope, kv, group),
            *attention_calls(native, spec, shape, qkv, out, kv, step, group, chunks),
        )
        for chunk in windows:
            rows = slice(chunk.begin, chunk.end)
            query = qkv[rows, : shape.query_size].unflatten(1, (shape.num_heads, shape.head_dim))
            self._attend_window(chunk, query, out[rows], kv, group)
        return out

    def _is_window(self, chunk: ChunkRow, qkv: Tensor) -> bool:
        """Whether a chunk is long enough for keys and values to be worth turning."""
        native = self._native
        return (
            chunk.is_training
            and chunk.end - chunk.begin >= _MIN_WINDOW_ROWS
            and native is not None
            and self._shape.num_kv_heads >= native.team.num_threads
            and token_multiple(qkv.dtype, qkv.device, self._shape.head_dim) is not None
        )

    def _attend_window(
        self, chunk: ChunkRow, query: Tensor, out: Tensor, kv: KvLayer, group: GroupStep
    ) -> None:
        key = f"gather {chunk.row}"
        gather: TokenGather | None = group.scratch.get(key)
        if gather is None:
            gather = group.scratch[key] = TokenGather(
                kv,
                group.page_tables[chunk.row],
                page_tokens=group.page_tokens,
                begin=chunk.first_prefix - 1,
                end=chunk.context,
                window=group.window,
                multiple=token_multiple(query.dtype, query.device, self._shape.head_dim) or 1,
            )
        window_forward(query, gather.of(kv), out)

    def _native_for(self, x: Tensor) -> tuple[NativeKernels | None, Storage | None]:
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return None, None
        return self._native, storage_of(x.dtype)

    def _fits(
        self, native: NativeKernels, qkv: Tensor, rope: RopeRows, kv: KvLayer, group: GroupStep
    ) -> bool:
        page = (group.page_tokens * self._shape.head_dim, self._shape.head_dim, 1)
        return (
            group.page_tokens % native.isa.lanes == 0
            and kv.keys.stride()[1:] == page
            and kv.values.stride() == kv.keys.stride()
            and kv.keys.dtype == kv.values.dtype == rope.cos.dtype == qkv.dtype
            and rope.cos.stride() == rope.sin.stride()
            and rope.cos.stride(1) == qkv.stride(1) == 1
        )
