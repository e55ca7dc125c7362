"""Emits y = x Wᵀ for row-major W: dot products over K in vector registers, no packed copy of W.

Shape legend: M rows of x, K in_features, N out_features.

Both x and W are contiguous along K, so a block of a few rows of x against a group of rows of W
keeps all its accumulators in registers and reads each vector of W once for the whole block.
Horizontal sums come at the end of a stretch of K, as a tree of shuffles that turns eight
accumulators into eight neighbouring outputs. Every output is the same chain of operations whatever
M and the blocking, so a row's result does not depend, in any bit, on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from weft.model.kernels.cpu_ir import BF16, F32, I64, Builder, Storage, Val


class Epilogue(StrEnum):
    """What happens to an output before it is stored.

    ADD and SILU_MUL take the output as NONE would store it, so that a product fused with its
    epilogue has the bits of the product and the epilogue apart.
    """

    NONE = "none"
    BIAS = "bias"
    ADD = "add"
    SILU_MUL = "silu_mul"


@dataclass(frozen=True, kw_only=True)
class GemmSpec:
    """One variant of the kernel; `fetch` asks for weights ahead, which pays while M is small."""

    storage: Storage
    epilogue: Epilogue
    use_dot: bool
    fetch: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        flags = ("_dot" if self.use_dot else "") + ("_fetch" if self.fetch else "")
        return f"gemm_{self.storage}_{self.epilogue}{flags}"

    @property
    def outputs_per_group(self) -> int:
        """The fewest outputs per row that the kernel can make."""
        return GROUP // 2 if self.epilogue is Epilogue.SILU_MUL else GROUP

    @property
    def variants(self) -> tuple[GemmSpec, ...]:
        """With and without fetching ahead: decodes want one, prompts the other."""
        return tuple(replace(self, fetch=fetch) for fetch in (False, True))

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_gemm(self, k, args, thread, num_threads)


GROUP = 8  # rows of W that are summed together
MAX_ROW_BLOCK = 96  # rows of x that stay in the second-level cache while W streams by
# Up to this many rows of x a bfloat16 product waits for W. Its rows one by one are a single stream,
# which the processor fetches ahead better than eight short ones.
_MAX_STREAM_ROWS = 3
_STRETCH_BYTES = 4096  # of each row of W: a group's stretch and the rows of x fit the first level
GEMM_ARGS = ("x", "ldx", "w", "y", "ldy", "extra", "m", "n", "k", "row_block")


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """The kernel's arguments, loaded, and its scratch [MAX_ROW_BLOCK, GROUP] of float32."""

    x: Val
    ldx: Val
    w: Val
    y: Val
    ldy: Val
    extra: Val
    num_rows: Val
    num_outputs: Val
    k_size: Val
    row_block: Val
    scratch: Val


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Where in the product a register block lies."""

    output: Val
    row_base: Val
    row: Val
    k_start: Val
    k_stop: Val


def emit_gemm(spec: GemmSpec, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
    """The body of one variant; its int64 arguments are `GEMM_ARGS`, leading dimensions in elements.

    `extra` is the bias [N] or the addend [M, N] (row stride ldy). For SILU_MUL, W is [2N, K], the
    gates' rows before the ups'.
    """
    p = _load_operands(k, args)
    width = spec.outputs_per_group
    num_groups = (p.num_outputs + (width - 1)) // width
    first = num_groups * thread // num_threads
    last = num_groups * (thread + 1) // num_threads
    stretch = _STRETCH_BYTES // spec.storage.num_bytes
    with k.range(0, p.num_rows, p.row_block) as row:
        stop = k.minimum(row + p.row_block, p.num_rows)
        with k.range(first, last) as group:
            # The last group is pulled back to end at N; what overlaps is made twice, alike.
            output = k.minimum(group * width, p.num_outputs - width)
            with k.range(0, p.k_size, stretch) as k_start:
                k_stop = k.minimum(k_start + stretch, p.k_size)
                _emit_rows(k, spec, p, output, row, stop, k_start, k_stop)


def _load_operands(k: Builder, args: Val) -> _Operands:
    words = [k.at(args, i, I64) for i in range(len(GEMM_ARGS))]
    x, ldx, w, y, ldy, extra, num_rows, num_outputs, k_size, row_block = words
    return _Operands(
        x=k.pointer(x),
        ldx=ldx,
        w=k.pointer(w),
        y=k.pointer(y),
        ldy=ldy,
        extra=k.pointer(extra),
        num_rows=num_rows,
        num_outputs=num_outputs,
        k_size=k_size,
        row_block=row_block,
        scratch=k.scratch(F32, MAX_ROW_BLOCK * GROUP),
    )


def _emit_rows(
    k: Builder,
    spec: GemmSpec,
    p: _Operands,
    output: Val,
    row: Val,
    stop: Val,
    k_start: Val,
    k_stop: Val,
) -> None:
    """All rows of one block against one group, in register blocks of even height."""
    max_rows = 6 if k.isa.lanes == 16 else 3
    count = stop - row
    num_blocks = (count + (max_rows - 1)) // max_rows
    with k.range(0, num_blocks) as block:
        start = row + count * block // num_blocks
        end = row + count * (block + 1) // num_blocks
        tile = _Tile(output=output, row_base=row, row=start, k_start=k_start, k_stop=k_stop)
        k.switch(end - start, range(1, max_rows + 1), lambda n: _emit_tile(k, spec, p, tile, n))


def _emit_tile(k: Builder, spec: GemmSpec, p: _Operands, tile: _Tile, n: int) -> None:
    """`n` rows of x against one group of W over one stretch of K."""
    if spec.epilogue is Epilogue.SILU_MUL:
        starts = (tile.output, tile.output + p.num_outputs)
        w_rows = [start + i for start in starts for i in range(GROUP // 2)]
    else:
        w_rows = [tile.output + i for i in range(GROUP)]
    is_wide = n * GROUP <= k.isa.lanes
    width = GROUP if is_wide else GROUP // 2
    at_once = 1 if spec.use_dot and n <= _MAX_STREAM_ROWS else width
    parts = [
        _emit_dots(k, spec, p, tile, n, w_rows[i : i + at_once]) for i in range(0, GROUP, at_once)
    ]
    totals = []
    for m in range(n):
        dots = [dot for part in parts for dot in part[m]]
        sums = [reduce_tree(k, dots[i : i + width]) for i in range(0, GROUP, width)]
        totals.append(k.var(sums[0] if is_wide else k.shuffle(sums[0], sums[1], range(GROUP))))
    kept = k.offset(p.scratch, (tile.row - tile.row_base) * GROUP, Storage.FLOAT32)
    with k.when(tile.k_start > 0):
        for m, total in enumerate(totals):
            total.set(k.load(kept, m * GROUP, Storage.FLOAT32, GROUP) + total.get())
    is_last = tile.k_stop >= p.k_size
    with k.when(is_last):
        for m, total in enumerate(totals):
            _store_outputs(k, spec, p, tile.row + m, tile.output, total.get())
    with k.otherwise(is_last):
        for m, total in enumerate(totals):
            k.store(kept, m * GROUP, total.get(), Storage.FLOAT32)


def _emit_dots(
    k: Builder, spec: GemmSpec, p: _Operands, tile: _Tile, n: int, w_rows: Sequence[Val]
) -> list[list[Val]]:
    """Accumulators [n][len(w_rows)] of the dot products over the tile's stretch of K."""
    lanes = k.isa.lanes
    zero = k.zeros(lanes)
    acc = [[k.var(zero) for _ in w_rows] for _ in range(n)]
    xs = [k.offset(p.x, (tile.row + m) * p.ldx, spec.storage) for m in range(n)]
    ws = [k.offset(p.w, r * p.k_size, spec.storage) for r in w_rows]
    with k.range(tile.k_start, tile.k_stop, lanes * (2 if spec.use_dot else 1)) as at:
        wv = [_load_operand(k, spec, w, at) for w in ws]
        # A low tile is bound by the stream itself, and there the requests would only cost.
        for w in ws if spec.fetch and n > 3 else ():
            k.prefetch(w, at + p.k_size * GROUP, spec.storage)
        for m in range(n):
            xv = _load_operand(k, spec, xs[m], at)
            for a, w in zip(acc[m], wv, strict=True):
                a.set(k.bf16_dot(a.get(), xv, w) if spec.use_dot else k.fma(xv, w, a.get()))
    return [[a.get() for a in line] for line in acc]


def _load_operand(k: Builder, spec: GemmSpec, base: Val, at: Val) -> Val:
    if spec.use_dot:
        return k.load_raw(base, at, BF16, 2 * k.isa.lanes)
    return k.load(base, at, spec.storage, k.isa.lanes)


def _store_outputs(
    k: Builder, spec: GemmSpec, p: _Operands, row: Val, output: Val, value: Val
) -> None:
    at = row * p.ldy + output
    match spec.epilogue:
        case Epilogue.BIAS:
            value = value + k.load(p.extra, output, spec.storage, GROUP)
        case Epilogue.ADD:
            value = k.round_to(value, spec.storage) + k.load(p.extra, at, spec.storage, GROUP)
        case Epilogue.SILU_MUL:
            half = GROUP // 2
            value = k.round_to(value, spec.storage)
            gate = k.shuffle(value, value, range(half))
            value = k.silu(gate) * k.shuffle(value, value, range(half, GROUP))
        case Epilogue.NONE:
            pass
    k.store(p.y, at, value, spec.storage)


def reduce_tree(k: Builder, accumulators: Sequence[Val]) -> Val:
    """Sum the lanes of each of n accumulators (n a power of two) into a vector of n sums.

    Each sum is taken by halving its own lanes, so it does not depend on n.
    """
    level = list(accumulators)
    lanes = segment = level[0].lanes
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [_fold(k, a, b, lanes, segment) for a, b in pairs]
        segment //= 2
    (value,) = level
    while segment > 1:
        value = _fold(k, value, None, lanes, segment)
        lanes, segment = lanes // 2, segment // 2
    return value


def _fold(k: Builder, a: Val, b: Val | None, lanes: int, segment: int) -> Val:
    """Add the two halves of each segment of lanes of `a`, followed by those of `b`."""
    half = segment // 2
    low = [start + i for start in range(0, lanes, segment) for i in range(half)]
    if b is not None:
        low += [lanes + i for i in low]
    return k.shuffle(a, b or a, low) + k.shuffle(a, b or a, [i + half for i in low])
