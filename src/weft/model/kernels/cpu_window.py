"""The native attention of a window of queries over gathered keys and values, as calls on tensors.

Shape legend: s query rows, c tokens held, n tokens of the sample, D head_dim, Hq query heads, Hkv
key-value heads.
"""

from __future__ import annotations

import functools
from itertools import accumulate

import torch
from torch import Tensor

from weft.model.kernels.cpu_linear import storage_of
from weft.model.kernels.cpu_panel_ir import max_tile_rows, panel_width
from weft.model.kernels.cpu_team import Call, address, float_bits, native_kernels
from weft.model.kernels.cpu_window_ir import WINDOW_ARGS, WindowSpec
from weft.model.kernels.held_tokens import HeldTokens

_NO_WINDOW = 1 << 40
_MAX_TILES = 2
_BLOCK_FLOATS = 60_000
"""Rows of a block by tokens: their scores, probabilities and gradients stay in the second-level
cache."""
_MAX_HEAD_DIM = 256


def token_multiple(dtype: torch.dtype, device: torch.device, head_dim: int) -> int | None:
    """What numbers of tokens held must be a multiple of; None where the kernels do not run."""
    native = native_kernels() if device.type == "cpu" and storage_of(dtype) is not None else None
    if native is None or head_dim > _MAX_HEAD_DIM or head_dim % panel_width(native.isa):
        return None
    return panel_width(native.isa)


def can_run(query: Tensor, held: HeldTokens) -> bool:
    """Whether the kernels take a window: query [s, Hq, D] with keys and values of its dtype."""
    multiple = token_multiple(query.dtype, query.device, query.shape[2])
    keys, native = held.keys, native_kernels()
    return (
        multiple is not None
        and native is not None
        and keys.dtype is query.dtype
        and keys.shape[1] % multiple == 0
        and keys.is_contiguous()
        and held.values.is_contiguous()
        and query.stride(2) == 1
        and query.stride(1) == query.shape[2]
        # A head is one thread's.
        and keys.shape[0] >= native.team.num_threads
    )


def window_forward(query: Tensor, held: HeldTokens, out: Tensor) -> None:
    """query [s, Hq, D], turned, to out [s, Hq * D] contiguous; `can_run` has been asked."""
    _submit(query, held, out, None, None, None)


def window_backward(
    d_out: Tensor, query: Tensor, held: HeldTokens, d_keys: Tensor, d_values: Tensor
) -> Tensor:
    """The gradient [s, Hq, D] of `query`, float32; d_out [s, Hq * D]. `can_run` has been asked.

    `d_keys` and `d_values` [Hkv, c or fewer, D] float32, their rows neighbours, are added to.
    """
    out = query.new_empty(query.shape, dtype=torch.float32)
    _submit(query, held, out, d_out, d_keys, d_values)
    return out


def _submit(
    query: Tensor,
    held: HeldTokens,
    out: Tensor,
    d_out: Tensor | None,
    d_keys: Tensor | None,
    d_values: Tensor | None,
) -> None:
    native = native_kernels()
    storage = storage_of(query.dtype)
    assert native is not None
    assert storage is not None
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_held, _ = held.keys.shape
    use_dot = query.dtype is torch.bfloat16 and native.isa.has_bf16_dot
    spec = WindowSpec(
        storage=storage, head_dim=head_dim, use_dot=use_dot, is_backward=d_out is not None
    )
    height = max_tile_rows(native.isa)
    tiles = min(_MAX_TILES, -(-num_rows // height), max(1, _BLOCK_FLOATS // (num_held * height)))
    starts, size = _room_starts(spec, num_held, tiles * height)
    num_threads = native.team.num_threads
    scratch = native.team.scratch("window", size * num_threads)
    words = (
        query.data_ptr(),
        query.stride(0),
        address(d_out),
        0 if d_out is None else d_out.stride(0),
        held.keys.data_ptr(),
        held.values.data_ptr(),
        num_held,
        out.data_ptr(),
        address(d_keys),
        address(d_values),
        0 if d_keys is None else d_keys.stride(0),
        num_rows,
        num_kv_heads,
        num_heads // num_kv_heads,
        held.begin - held.first,
        _NO_WINDOW if held.window is None else held.window,
        tiles,
        scratch.data_ptr(),
        size,
        float_bits(head_dim**-0.5),
    )
    native.team.submit(
        Call(
            kernel=native.address(spec),
            words=words + starts,
            rows_word=WINDOW_ARGS.index("num_rows"),
            keep=(query, d_out, held.keys, held.values, out, d_keys, d_values, scratch),
        )
    )


@functools.lru_cache(maxsize=256)
def _room_starts(spec: WindowSpec, num_held: int, num_rows: int) -> tuple[tuple[int, ...], int]:
    """Where each room begins in a thread's scratch, and the size of all; whole cache lines."""
    sizes = [-(-size // 16) * 16 for size in spec.rooms(num_held, num_rows).values()]
    ends = tuple(accumulate(sizes))
    return (0, *ends[:-1]), ends[-1]
