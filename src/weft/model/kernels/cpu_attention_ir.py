"""Emits attention over paged keys and values, read in place.

Shape legend: T query rows, Hq query heads, H key/value heads, G = Hq / H, D head_dim.

A work item is (a block of query rows of one sequence, one key/value head). It walks the sequence's
pages in stretches of a few tiles, a tile being as many tokens as a vector has lanes, and each
stretch serves all G query heads and all rows of the block while it is in the cache. Softmax runs
online (Milakov and Gimelshein 2018): per row and head a running maximum, a running sum and D
weighted values, all in float32. Stretches are counted from the start of the sequence, so a row's
result does not depend, in any bit, on the other rows of its block, nor on the threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.model.kernels.cpu_gemm import reduce_tree
from weft.model.kernels.cpu_ir import BF16, F32, I64, Builder, Storage, Val, Var, vector

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
    """One variant of the kernel.

    `fetch` asks for keys and values ahead: pages lie apart, so the processor's own prefetcher does
    not cross from one to the next. It pays where each is used once (decodes), not in prompts.
    """

    storage: Storage
    head_dim: int
    group: int
    fetch: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        suffix = "_fetch" if self.fetch else ""
        return f"attention_{self.storage}_d{self.head_dim}_g{self.group}{suffix}"

    @property
    def num_tiles(self) -> int:
        """Tiles of a stretch: as many as leave its keys and values in the first-level cache."""
        return 4 if self.head_dim * self.storage.num_bytes <= 256 else 2

    @property
    def max_block_rows(self) -> int:
        """The most query rows that one work item may hold."""
        return max(1, _MAX_STATES // self.group)

    @property
    def variants(self) -> tuple[AttentionSpec, ...]:
        """With and without fetching ahead: decodes want one, prompts the other."""
        return tuple(replace(self, fetch=fetch) for fetch in (False, True))

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_attention(self, k, args, thread, num_threads)


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
    weights: Val  # scratch [tiles, lanes], the current stretch's scores, then weights
    offsets: Val  # scratch int64 [2, tiles], where this and the next stretch's tiles lie


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """What one query row and head sees of a stretch: its tokens [begin, stop)."""

    state: Val
    begin: Val
    stop: Val
    first_tile: Val
    last_tile: Val


def emit_attention(
    spec: AttentionSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val
) -> None:
    """The body of one variant; its int64 arguments are `ATTENTION_ARGS`, strides in elements.

    `work` is int32 [num_blocks, WORK_FIELDS], or 0: then block b is query row b alone, with row b
    of the page table and context_lens[b]. `window` counts the last tokens that a row may see.
    """
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(ATTENTION_ARGS)}
    for name in ("q", "out", "keys", "values", "page_table", "context_lens", "work"):
        args[name] = k.pointer(args[name])
    args["scale"] = k.at(args_at, 2 * ATTENTION_ARGS.index("scale_bits"), F32)
    num_states = spec.max_block_rows * spec.group
    scratch = {
        "largest": k.scratch(F32, num_states),
        "total": k.scratch(F32, num_states),
        "weighted": k.scratch(F32, num_states * spec.head_dim),
        "weights": k.scratch(F32, spec.num_tiles * k.isa.lanes),
        "offsets": k.scratch(I64, 2 * spec.num_tiles),
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


def _emit_item(k: Builder, spec: AttentionSpec, it: _Item) -> None:
    lanes, d = k.isa.lanes, spec.head_dim
    with k.range(0, it.num_rows * spec.group) as state:
        k.put(it.largest, state, k.const(_LOWEST, F32))
        k.put(it.total, state, k.const(0.0, F32))
        with k.range(0, d, lanes) as at:
            k.store(it.weighted, state * d + at, k.zeros(lanes), Storage.FLOAT32)
    first = k.maximum(it.context_len - it.args["window"], k.const(0))
    last = it.context_len + it.num_rows - 1
    size = spec.num_tiles * lanes
    with k.range(first // size * size, last, size) as start:
        _find_tiles(k, spec, it, start, first, last, 0)
        if spec.fetch:
            _find_tiles(k, spec, it, start + size, first, last, spec.num_tiles)
        with k.range(0, it.num_rows) as row:
            stop = it.context_len + row
            begin = k.maximum(stop - it.args["window"], k.const(0))
            with k.when((start < stop) & (begin < start + size)):
                begin = k.maximum(begin - start, k.const(0))
                stop = k.minimum(stop - start, k.const(size))
                with k.range(0, spec.group) as g:
                    stretch = _Stretch(
                        state=row * spec.group + g,
                        begin=begin,
                        stop=stop,
                        first_tile=begin // lanes,
                        last_tile=(stop + (lanes - 1)) // lanes,
                    )
                    _emit_stretch(k, spec, it, stretch, row, g)
    with k.range(0, it.num_rows) as row, k.range(0, spec.group) as g:
        _store_row(k, spec, it, row, g)


def _find_tiles(
    k: Builder, spec: AttentionSpec, it: _Item, start: Val, first: Val, last: Val, index: int
) -> None:
    """Look up where a stretch's tiles lie, from `offsets[index]` on; 0 beyond the sequence."""
    lanes, page_tokens = k.isa.lanes, it.args["page_tokens"]
    for tile in range(spec.num_tiles):
        token = start + tile * lanes
        k.put(it.offsets, index + tile, k.const(0))
        with k.when((token < last) & (first < token + lanes)):
            slot = it.table_row * it.args["table_stride"] + token // page_tokens
            page = k.index_at(it.args["page_table"], slot)
            inside = (it.head * page_tokens + token % page_tokens) * spec.head_dim
            k.put(it.offsets, index + tile, page * it.args["page_stride"] + inside)


def _emit_stretch(
    k: Builder, spec: AttentionSpec, it: _Item, stretch: _Stretch, row: Val, g: Val
) -> None:
    """One query row and head against one stretch."""
    lanes = k.isa.lanes
    for tile in range(spec.num_tiles):
        unseen = k.const(_LOWEST, vector(F32, lanes))
        k.store(it.weights, tile * lanes, unseen, Storage.FLOAT32)
    _emit_scores(k, spec, it, stretch, row, g)
    scores = [k.load(it.weights, t * lanes, Storage.FLOAT32, lanes) for t in range(spec.num_tiles)]
    highest = scores[0]
    for score in scores[1:]:
        highest = k.maximum(highest, score)
    before = k.at(it.largest, stretch.state, F32)
    largest = k.maximum(before, k.max_lanes(highest))
    weights = [k.exp(score - k.splat(largest, lanes)) for score in scores]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    for tile, weight in enumerate(weights):
        k.store(it.weights, tile * lanes, weight, Storage.FLOAT32)
    shrink = k.exp(before - largest)
    k.put(it.largest, stretch.state, largest)
    summed = k.at(it.total, stretch.state, F32) * shrink + k.sum_lanes(total)
    k.put(it.total, stretch.state, summed)
    _add_values(k, spec, it, stretch, shrink)


def _emit_scores(
    k: Builder, spec: AttentionSpec, it: _Item, stretch: _Stretch, row: Val, g: Val
) -> None:
    """Write the scaled scores of the visible tokens into `weights`."""
    lanes, d = k.isa.lanes, spec.head_dim
    q_at = (it.first_row + row) * it.args["q_stride"] + (it.head * spec.group + g) * d
    scale = k.splat(it.args["scale"], lanes)
    query = k.offset(it.args["q"], q_at, spec.storage)
    use_dot = k.isa.has_bf16_dot and spec.storage is Storage.BFLOAT16 and d % (2 * lanes) == 0
    step = 2 * lanes if use_dot else lanes

    def load(base: Val, at: int) -> Val:
        if use_dot:
            return k.load_raw(base, at, BF16, step)
        return k.load(base, at, spec.storage, step)

    q = [load(query, at) for at in range(0, d, step)]
    begin = k.splat(k.to_i32(stretch.begin), lanes)
    stop = k.splat(k.to_i32(stretch.stop), lanes)
    with k.range(stretch.first_tile, stretch.last_tile) as tile:
        keys = _tile_at(k, spec, it, "keys", tile)
        values = _tile_at(k, spec, it, "values", tile)
        dots = []
        for token in range(lanes):
            dot = k.zeros(lanes)
            for i, part in enumerate(q):
                at = token * d + i * step
                _fetch_line(k, spec, values, at)
                key = load(keys, at)
                dot = k.bf16_dot(dot, part, key) if use_dot else k.fma(part, key, dot)
            dots.append(dot)
        tokens = k.iota(lanes) + k.splat(k.to_i32(tile * lanes), lanes)
        is_visible = (tokens >= begin) & (tokens < stop)
        scores = reduce_tree(k, dots) * scale
        scores = k.select(is_visible, scores, k.const(_LOWEST, scores.type))
        k.store(it.weights, tile * lanes, scores, Storage.FLOAT32)


def _add_values(k: Builder, spec: AttentionSpec, it: _Item, stretch: _Stretch, shrink: Val) -> None:
    """weighted = weighted · shrink + Σ weights[t] · values[t], in two interleaved chains."""
    lanes, d = k.isa.lanes, spec.head_dim
    num_parts = d // lanes
    weighted = k.offset(it.weighted, stretch.state * d, Storage.FLOAT32)
    chains = [
        [
            k.var(k.load(weighted, i * lanes, Storage.FLOAT32, lanes) * k.splat(shrink, lanes))
            for i in range(num_parts)
        ],
        [k.var(k.zeros(lanes)) for _ in range(num_parts)],
    ]
    with k.range(stretch.first_tile, stretch.last_tile) as tile:
        values = _tile_at(k, spec, it, "values", tile)
        next_keys = _tile_at(k, spec, it, "keys", tile + spec.num_tiles if spec.fetch else tile)
        weights = k.offset(it.weights, tile * lanes, Storage.FLOAT32)
        lowest = k.maximum(stretch.begin - tile * lanes, k.const(0))
        highest = k.minimum(stretch.stop - tile * lanes, k.const(lanes)) - 1
        is_whole = (lowest < 1) & (highest >= lanes - 1)
        with k.when(is_whole):
            _add_tile(k, spec, chains, weights, [values] * lanes, range(lanes), next_keys)
        with k.otherwise(is_whole):
            # Slots out of sight may hold anything, NaN too: read one in sight and weigh it 0.
            seen = [k.minimum(k.maximum(k.const(token), lowest), highest) for token in range(lanes)]
            rows = [k.offset(values, token * d, spec.storage) for token in seen]
            _add_tile(k, spec, chains, weights, rows, [0] * lanes, next_keys)
    for i in range(num_parts):
        value = chains[0][i].get() + chains[1][i].get()
        k.store(weighted, i * lanes, value, Storage.FLOAT32)


def _add_tile(
    k: Builder,
    spec: AttentionSpec,
    chains: list[list[Var]],
    weights: Val,
    rows: list[Val],
    offsets: range | list[int],
    next_keys: Val,
) -> None:
    lanes, d = k.isa.lanes, spec.head_dim
    for token, (values, offset) in enumerate(zip(rows, offsets, strict=True)):
        weight = k.splat(k.at(weights, token, F32), lanes)
        for i, chain in enumerate(chains[token % 2]):
            _fetch_line(k, spec, next_keys, token * d + i * lanes)
            part = k.load(values, offset * d + i * lanes, spec.storage, lanes)
            chain.set(k.fma(weight, part, chain.get()))


def _tile_at(k: Builder, spec: AttentionSpec, it: _Item, which: str, tile: Val) -> Val:
    return k.offset(it.args[which], k.at(it.offsets, tile, I64), spec.storage)


def _fetch_line(k: Builder, spec: AttentionSpec, base: Val, at: int) -> None:
    """Ask for the cache line that starts at `base[at]`, if one does."""
    if spec.fetch and at * spec.storage.num_bytes % 64 == 0:
        k.prefetch(base, k.const(at), spec.storage)


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
