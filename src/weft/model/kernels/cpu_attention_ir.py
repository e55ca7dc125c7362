"""Emits attention over paged keys and values, read in place.

Shape legend: T query rows, Hq query heads, H key/value heads, G = Hq / H, D head_dim.

A work item is (a block of query rows of one sequence, one key/value head). It walks the sequence's
pages a tile of tokens at a time, as many as a vector has lanes, and each tile serves all G query
heads and all rows of the block while it is in the first-level cache. Softmax runs online (Milakov
and Gimelshein 2018): per row and head a running maximum, a running sum and D weighted values, all
in float32. A row's result does not depend on the other rows of its block, nor on the threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weft.model.kernels.cpu_gemm import reduce_tree
from weft.model.kernels.cpu_ir import F32, I64, Builder, Storage, Val

ATTENTION_ARGS = (
    "q",
    "q_stride",
    "out",
    "out_stride",
    "keys",
    "values",
    "page_stride",
    "page_table",
    "table_stride",
    "context_lens",
    "work",
    "num_blocks",
    "num_kv_heads",
    "page_tokens",
    "window",
    "scale_bits",
)
WORK_FIELDS = ("table_row", "first_row", "num_rows", "first_context_len")
_MAX_STATES = 16  # query rows times heads whose running state is kept in the first-level cache
_LOWEST = -3.0e38


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One variant of the kernel."""

    storage: Storage
    head_dim: int
    group: int

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"attention_{self.storage}_d{self.head_dim}_g{self.group}"

    @property
    def max_block_rows(self) -> int:
        """The most query rows that one work item may hold."""
        return max(1, _MAX_STATES // self.group)


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One work item: the kernel's arguments with what concerns this block and head."""

    args: dict[str, Val]
    head: Val
    table_row: Val
    first_row: Val
    num_rows: Val
    context_len: Val  # tokens visible to the first row; each later row sees one more
    largest: Val  # scratch [rows, G]
    total: Val  # scratch [rows, G]
    weighted: Val  # scratch [rows, G, D]
    weights: Val  # scratch [lanes], the current tile's


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """One tile of tokens: where it starts in the sequence, and its keys and values."""

    start: Val
    keys: Val
    values: Val
    first_valid: Val
    last_valid: Val


def emit_attention(spec: AttentionSpec) -> Callable[[Builder, Val, Val, Val], None]:
    """The body of one variant; its int64 arguments are `ATTENTION_ARGS`, strides in elements.

    `work` is int32 [num_blocks, WORK_FIELDS], or 0: then block b is query row b alone, with row b
    of the page table and context_lens[b]. `window` counts the last tokens that a row may see.
    """

    def emit(k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
        args = {name: k.at(args_at, i, I64) for i, name in enumerate(ATTENTION_ARGS)}
        for name in ("q", "out", "keys", "values", "page_table", "context_lens", "work"):
            args[name] = k.pointer(args[name])
        args["scale"] = k.at(args_at, 2 * ATTENTION_ARGS.index("scale_bits"), F32)
        num_states = spec.max_block_rows * spec.group
        scratch = {
            "largest": k.scratch(F32, num_states),
            "total": k.scratch(F32, num_states),
            "weighted": k.scratch(F32, num_states * spec.head_dim),
            "weights": k.scratch(F32, k.isa.lanes),
        }
        num_items = args["num_blocks"] * args["num_kv_heads"]
        has_work = k.at(args_at, ATTENTION_ARGS.index("work"), I64) > 0
        # Neighbouring items cost alike, so dealing them out in turn balances the threads.
        with k.range(thread, num_items, num_threads) as item:
            block = item // args["num_kv_heads"]
            fields = [k.var(v) for v in (block, block, k.const(1), k.const(0))]
            with k.when(has_work):
                for i, field in enumerate(fields):
                    field.set(k.index_at(args["work"], block * len(WORK_FIELDS) + i))
            with k.otherwise(has_work):
                fields[3].set(k.index_at(args["context_lens"], block))
            table_row, first_row, num_rows, context_len = (field.get() for field in fields)
            _emit_item(
                k,
                spec,
                _Item(
                    args=args,
                    head=item % args["num_kv_heads"],
                    table_row=table_row,
                    first_row=first_row,
                    num_rows=num_rows,
                    context_len=context_len,
                    **scratch,
                ),
            )

    return emit


def _emit_item(k: Builder, spec: AttentionSpec, it: _Item) -> None:
    lanes, d = k.isa.lanes, spec.head_dim
    with k.range(0, it.num_rows * spec.group) as state:
        k.put(it.largest, state, k.const(_LOWEST, F32))
        k.put(it.total, state, k.const(0.0, F32))
        with k.range(0, d, lanes) as at:
            k.store(it.weighted, state * d + at, k.zeros(lanes), Storage.FLOAT32)
    first = k.maximum(it.context_len - it.args["window"], k.const(0))
    last = it.context_len + it.num_rows - 1
    page_tokens = it.args["page_tokens"]
    with k.range(first // lanes * lanes, last, lanes) as start:
        slot = it.table_row * it.args["table_stride"] + start // page_tokens
        page = k.index_at(it.args["page_table"], slot)
        inside = (it.head * page_tokens + start % page_tokens) * d
        at = page * it.args["page_stride"] + inside
        tile = _Tile(
            start=start,
            keys=k.offset(it.args["keys"], at, spec.storage),
            values=k.offset(it.args["values"], at, spec.storage),
            first_valid=k.maximum(first - start, k.const(0)),
            last_valid=k.minimum(last - start, k.const(lanes)) - 1,
        )
        with k.range(0, it.num_rows) as row:
            stop = it.context_len + row
            begin = k.maximum(stop - it.args["window"], k.const(0))
            sees_tile = (start < stop) & (begin < start + lanes)
            with k.when(sees_tile), k.range(0, spec.group) as g:
                _emit_tile(k, spec, it, tile, row, g, begin - start, stop - start)
    with k.range(0, it.num_rows) as row, k.range(0, spec.group) as g:
        _store_row(k, spec, it, row, g)


def _emit_tile(
    k: Builder, spec: AttentionSpec, it: _Item, tile: _Tile, row: Val, g: Val, begin: Val, stop: Val
) -> None:
    """One query row and head against one tile, of which tokens [begin, stop) are visible."""
    lanes, d = k.isa.lanes, spec.head_dim
    state = row * spec.group + g
    q_at = (it.first_row + row) * it.args["q_stride"] + (it.head * spec.group + g) * d
    q = [k.load(it.args["q"], q_at + at, spec.storage, lanes) for at in range(0, d, lanes)]
    dots = []
    for token in range(lanes):
        dot = k.zeros(lanes)
        for i, part in enumerate(q):
            at = token * d + i * lanes
            dot = k.fma(part, k.load(tile.keys, at, spec.storage, lanes), dot)
        dots.append(dot)
    scores = reduce_tree(k, dots) * k.splat(it.args["scale"], lanes)
    token_ids = k.iota(lanes)
    is_visible = (token_ids >= k.splat(k.to_i32(begin), lanes)) & (
        token_ids < k.splat(k.to_i32(stop), lanes)
    )
    scores = k.select(is_visible, scores, k.const(_LOWEST, scores.type))
    before = k.at(it.largest, state, F32)
    largest = k.maximum(before, k.max_lanes(scores))
    weights = k.exp(scores - k.splat(largest, lanes))
    # A row that has seen only masked scores has largest = lowest: its e⁰ must not count.
    weights = k.select(is_visible, weights, k.zeros(lanes))
    shrink = k.exp(before - largest)
    k.put(it.largest, state, largest)
    total = k.at(it.total, state, F32) * shrink + k.sum_lanes(weights)
    k.put(it.total, state, total)
    k.store(it.weights, 0, weights, Storage.FLOAT32)
    is_whole = (tile.first_valid < 1) & (tile.last_valid >= lanes - 1)
    with k.when(is_whole):
        _add_values(k, spec, it, state, shrink, [tile.values] * lanes, range(lanes))
    with k.otherwise(is_whole):
        # Slots outside the sequence may hold anything, NaN too: read a valid neighbour, weigh it 0.
        tokens = [
            k.minimum(k.maximum(k.const(token), tile.first_valid), tile.last_valid)
            for token in range(lanes)
        ]
        rows = [k.offset(tile.values, token * d, spec.storage) for token in tokens]
        _add_values(k, spec, it, state, shrink, rows, [0] * lanes)


def _add_values(
    k: Builder,
    spec: AttentionSpec,
    it: _Item,
    state: Val,
    shrink: Val,
    rows: list[Val],
    offsets: range | list[int],
) -> None:
    """weighted = weighted · shrink + Σ weights[t] · values[t], in two interleaved chains."""
    lanes, d = k.isa.lanes, spec.head_dim
    num_parts = d // lanes
    even = [
        k.load(it.weighted, state * d + i * lanes, Storage.FLOAT32, lanes) * k.splat(shrink, lanes)
        for i in range(num_parts)
    ]
    odd = [k.zeros(lanes)] * num_parts
    for token, (values, offset) in enumerate(zip(rows, offsets, strict=True)):
        weight = k.splat(k.at(it.weights, token, F32), lanes)
        chain = odd if token % 2 else even
        for i in range(num_parts):
            part = k.load(values, offset * d + i * lanes, spec.storage, lanes)
            chain[i] = k.fma(weight, part, chain[i])
    for i in range(num_parts):
        at = state * d + i * lanes
        k.store(it.weighted, at, even[i] + odd[i], Storage.FLOAT32)


def _store_row(k: Builder, spec: AttentionSpec, it: _Item, row: Val, g: Val) -> None:
    lanes, d = k.isa.lanes, spec.head_dim
    state = row * spec.group + g
    total = k.at(it.total, state, F32)
    # A row that sees no token at all gives zeros.
    inverse = k.select(total > 0.0, k.const(1.0, F32) / total, k.const(0.0, F32))
    out_at = (it.first_row + row) * it.args["out_stride"] + (it.head * spec.group + g) * d
    for at in range(0, d, lanes):
        value = k.load(it.weighted, state * d + at, Storage.FLOAT32, lanes)
        k.store(it.args["out"], out_at + at, value * k.splat(inverse, lanes), spec.storage)
