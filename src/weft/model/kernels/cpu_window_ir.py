"""Emits attention of a window of queries over keys and values that lie together, and its backward.

`cpu_attention_ir` reads each key once for every query, which decodes are bound by anyway. A window
of a training sample has hundreds of queries: here all products run on register tiles like those of
`cpu_panel_ir`, over keys and values that are turned into panels once for each head.

A block of query rows of one head goes through in steps: scores, softmax, and the output; or for
the backward the gradient of the probabilities, that of the scores, and three products for the
gradients of queries, keys and values. The probabilities are computed again; per block rows by keys
of them live in the second-level cache. Sums over tokens run in the order of the tokens whatever
the window, and each head belongs to one thread, so results do not depend on the threads.

Shape legend: s query rows of a head, c tokens seen, D head_dim, m rows of a block, W outputs of a
panel, H rows of a tile. A unit is 32 bits, as in `cpu_panel_ir`: a float32, or a pair of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weft.model.kernels.cpu_ir import BF16, F32, I16, I32, I64, Builder, Storage, Val, Var, vector
from weft.model.kernels.cpu_panel_ir import max_tile_rows, panel_width, transpose

WINDOW_ARGS = (
    "query",
    "query_stride",
    "d_out",
    "d_out_stride",
    "keys",
    "values",
    "num_held",
    "out",
    "d_keys",
    "d_values",
    "grad_stride",
    "num_rows",
    "num_kv_heads",
    "group",
    "num_before",
    "window",
    "block_tiles",
    "scratch",
    "scratch_size",
    "scale_bits",
)
ROW_PADDING = 16
"""Units between one row of a room and the next: a stride of a power of two would put the rows of a
column into few sets of the cache."""
_F32 = Storage.FLOAT32
_LOWEST = -3.0e38


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """One variant: forward, or backward with the gradients of queries, keys and values."""

    storage: Storage
    head_dim: int
    use_dot: bool
    is_backward: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        kind = "backward" if self.is_backward else "forward"
        dot = "_dot" if self.use_dot else ""
        return f"window_{kind}_{self.storage}_d{self.head_dim}{dot}"

    @property
    def variants(self) -> tuple[WindowSpec, ...]:
        """This one alone."""
        return (self,)

    @property
    def unit_size(self) -> int:
        """Elements of a unit."""
        return 2 if self.use_dot else 1

    @property
    def head_units(self) -> int:
        """Units of one row of a head."""
        return self.head_dim // self.unit_size

    def rooms(self, num_held: int, num_rows: int) -> dict[str, int]:
        """Units of each room of a thread's scratch, for blocks of `num_rows`, in their order."""
        panels, rows = num_held * self.head_units, num_rows * self.head_units
        wide = (num_held + ROW_PADDING) * num_rows
        narrow = wide // self.unit_size
        found = {
            "key_panels": panels,
            "row_panels": panels,
            "query": rows,
            "scores": wide,
            "chunks": narrow,
        }
        if self.is_backward:
            found |= {"value_panels": panels, "d_out": rows, "probs": narrow}
            if self.use_dot:
                found |= {"query_pairs": rows, "d_out_pairs": rows, "d_scores": narrow}
        return found

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body; its int64 arguments are `WINDOW_ARGS`, strides in elements, and where
        each of `rooms` begins in a thread's scratch.

        Query rows lie `query_stride` apart, heads one behind the other in a row; keys and values
        are [Hkv, num_held, D], `num_held` a multiple of the panel's width and rows beyond the last
        token zero. `num_before` of them come before the first query. `out` is the output, in the
        storage's type, or for the backward the queries' gradient in float32; both [s, Hq D].
        `d_keys` and `d_values` are float32, heads `grad_stride` apart, and are added to. `scratch`
        holds `scratch_size` units for each thread.
        """
        emit_window(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """One key-value head: arguments, the thread's rooms, and where the head begins."""

    args: dict[str, Val]
    rooms: dict[str, Val]
    keys: Val
    values: Val
    head: Val
    num_held: Val
    ld: Val
    """The row stride of rooms as wide as the context."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some query rows of one head."""

    head: Val
    """Of the queries."""
    start: Val
    num_rows: Val
    num_tiles: Val
    first: Val
    """First token of the panels that some row sees, a multiple of the panel's width."""
    last: Val
    """Behind the last token that some row sees."""
    stop: Val
    """`last`, rounded up to whole panels."""
    checked: Val
    """From this token on, a whole vector, not every row sees all; before it, all rows do."""


def emit_window(spec: WindowSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """The body of one variant; see `WindowSpec.emit`."""
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(WINDOW_ARGS)}
    args["scale"] = k.at(args_at, 2 * WINDOW_ARGS.index("scale_bits"), F32)
    for name in ("query", "d_out", "keys", "values", "out", "d_keys", "d_values", "scratch"):
        args[name] = k.pointer(args[name])
    height, width = max_tile_rows(k.isa), panel_width(k.isa)
    most_rows = args["block_tiles"] * height
    scratch = k.offset(args["scratch"], args["scratch_size"] * thread, _F32)
    rooms = {
        name: k.offset(scratch, k.at(args_at, len(WINDOW_ARGS) + i, I64), _F32)
        for i, name in enumerate(spec.rooms(0, 0))
    }
    with k.range(thread, args["num_kv_heads"], num_threads) as kv_head:
        begin = kv_head * args["num_held"] * spec.head_dim
        head = _Head(
            args=args,
            rooms=rooms,
            keys=k.offset(args["keys"], begin, spec.storage),
            values=k.offset(args["values"], begin, spec.storage),
            head=kv_head,
            num_held=args["num_held"],
            ld=args["num_held"] + ROW_PADDING,
        )
        _emit_panels(k, spec, head)
        with (
            k.range(0, args["group"]) as g,
            k.range(0, args["num_rows"], most_rows) as start,
        ):
            num_rows = k.minimum(args["num_rows"] - start, most_rows)
            seen = args["num_before"] + start + 1
            first = k.maximum(seen - args["window"], k.const(0)) // width * width
            last = seen + num_rows - 1
            slides = last > args["window"]
            checked = k.select(slides, first, seen // k.isa.lanes * k.isa.lanes)
            block = _Block(
                head=kv_head * args["group"] + g,
                start=start,
                num_rows=num_rows,
                num_tiles=(num_rows + (height - 1)) // height,
                first=first,
                last=last,
                stop=(last + (width - 1)) // width * width,
                checked=checked,
            )
            _emit_block(k, spec, head, block)


def _emit_block(k: Builder, spec: WindowSpec, head: _Head, block: _Block) -> None:
    args, rooms = head.args, head.rooms
    _emit_rows(k, spec, block, args["query"], args["query_stride"], head, "query")
    _emit_wide_product(k, spec, head, block, "query", "key_panels")
    _each_pair(k, spec, block, lambda row: _emit_softmax(k, spec, head, block, row))
    if not spec.is_backward:
        _emit_tall_product(k, spec, head, block)
        return
    _emit_rows(k, spec, block, args["d_out"], args["d_out_stride"], head, "d_out")
    _emit_wide_product(k, spec, head, block, "d_out", "value_panels")
    _each_pair(k, spec, block, lambda row: _emit_d_scores(k, spec, head, block, row))
    _emit_tall_product(k, spec, head, block)
    pairs = "_pairs" if spec.use_dot else ""
    d_scores = rooms["d_scores" if spec.use_dot else "scores"]
    _emit_turned_product(k, spec, head, block, rooms["probs"], f"d_out{pairs}", "d_values")
    _emit_turned_product(k, spec, head, block, d_scores, f"query{pairs}", "d_keys")


# ---- operands ----


def _emit_panels(k: Builder, spec: WindowSpec, head: _Head) -> None:
    """Turn this head's keys and values; once for all of its blocks."""
    turned = {"key_panels": head.keys}
    if spec.is_backward:
        turned["value_panels"] = head.values
    for name, source in turned.items():
        _emit_turned(k, spec, head, source, head.rooms[name])
    # Rows of keys are what gradients of scores are multiplied with; of values, what probabilities.
    source = head.keys if spec.is_backward else head.values
    lanes, d = k.isa.lanes, spec.head_dim
    with k.range(0, head.num_held, spec.unit_size) as token, k.range(0, d, lanes) as at:
        target = token // spec.unit_size * d + at
        where = token * d + at
        if spec.use_dot:
            k.b.store(
                _pair_bits(k, source, where, where + d, lanes).v,
                k.offset(head.rooms["row_panels"], target, _F32).v,
                align=4,
            )
        else:
            value = k.load(source, where, spec.storage, lanes)
            k.store(head.rooms["row_panels"], target, value, _F32)


def _emit_turned(k: Builder, spec: WindowSpec, head: _Head, source: Val, target: Val) -> None:
    """Rows [c, D] to panels [c / W][D units][W]."""
    lanes, width = k.isa.lanes, panel_width(k.isa)
    with k.range(0, head.num_held, width) as token:
        panel = k.offset(target, token * spec.head_units, _F32)
        for half in (0, 1):
            with k.range(0, spec.head_units, lanes) as unit:
                rows: list[Val] = []
                for i in range(lanes):
                    at = (token + half * lanes + i) * spec.head_dim + unit * spec.unit_size
                    storage = _F32 if spec.use_dot else spec.storage
                    row = k.offset(source, at, spec.storage)
                    rows.append(k.load(row, 0, storage, lanes))
                for i, units in enumerate(transpose(k, rows)):
                    k.store(panel, (unit + i) * width + half * lanes, units, _F32)


def _emit_rows(
    k: Builder,
    spec: WindowSpec,
    block: _Block,
    source: Val,
    stride: Val,
    head: _Head,
    name: str,
) -> None:
    """Copy a block's rows of one head as units, and in pairs of rows where those are multiplied.

    Tiles are whole: rows behind the last are zero.
    """
    lanes, d = k.isa.lanes, spec.head_dim
    rows, words = head.rooms[name], spec.head_units
    padded = block.num_tiles * max_tile_rows(k.isa)
    with k.range(0, padded) as row:
        is_row = row < block.num_rows
        at = (block.start + k.minimum(row, block.num_rows - 1)) * stride + block.head * d
        line = k.offset(source, at, spec.storage)
        with k.range(0, words, lanes) as unit:
            storage = _F32 if spec.use_dot else spec.storage
            place = k.offset(line, unit * spec.unit_size, spec.storage)
            value = k.load(place, 0, storage, lanes)
            value = k.select(is_row, value, k.zeros(lanes))
            k.store(rows, row * words + unit, value, _F32)
    if not (spec.use_dot and spec.is_backward):
        return
    pairs = head.rooms[f"{name}_pairs"]
    with k.range(0, padded, 2) as row, k.range(0, d, lanes) as at:
        where = row * d + at
        bits = _pair_bits(k, rows, where, where + d, lanes)
        k.b.store(bits.v, k.offset(pairs, row // 2 * d + at, _F32).v, align=4)


def _pair_bits(k: Builder, base: Val, low: Val, high: Val, lanes: int) -> Val:
    """Two stretches of bfloat16, element beside element."""
    return _joined(k, k.load_raw(base, low, I16, lanes), k.load_raw(base, high, I16, lanes))


def _joined(k: Builder, low: Val, high: Val) -> Val:
    typ = vector(I32, low.lanes)
    return Val(k, k.b.zext(low.v, typ)) | (Val(k, k.b.zext(high.v, typ)) << 16)


def _bf16_bits(k: Builder, value: Val) -> Val:
    """A float32 vector rounded to bfloat16."""
    narrow = k.call("llvm.x86.avx512bf16.cvtneps2bf16.512", vector(BF16, value.lanes), value)
    return k.bitcast(narrow, vector(I16, value.lanes))


# ---- products ----


def _accumulators(k: Builder, num_rows: int) -> list[list[Var]]:
    return [[k.var(k.zeros(k.isa.lanes)) for _ in range(2)] for _ in range(num_rows)]


def _emit_steps(
    k: Builder,
    spec: WindowSpec,
    acc: list[list[Var]],
    x: Val,
    x_row: int,
    x_unit: Val | int,
    w: Val,
    w_unit: int,
    num_units: Val | int,
) -> None:
    """acc += rows of x times two vectors of w, over `num_units`; all strides in units."""
    lanes = k.isa.lanes
    with k.range(0, num_units) as unit:
        xs = k.offset(x, unit * x_unit, _F32)
        ws = k.offset(w, unit * w_unit, _F32)
        if spec.use_dot:
            wv = [k.load_raw(ws, half * 2 * lanes, BF16, 2 * lanes) for half in (0, 1)]
        else:
            wv = [k.load(ws, half * lanes, _F32, lanes) for half in (0, 1)]
        for r, line in enumerate(acc):
            scalar = k.at(xs, r * x_row, I32 if spec.use_dot else F32)
            xv = k.splat(scalar, lanes)
            if spec.use_dot:
                xv = k.bitcast(xv, vector(BF16, 2 * lanes))
            for a, part in zip(line, wv, strict=True):
                add = k.bf16_dot(a.get(), xv, part) if spec.use_dot else k.fma(xv, part, a.get())
                a.set(add)


def _emit_wide_product(
    k: Builder, spec: WindowSpec, head: _Head, block: _Block, rows: str, panels: str
) -> None:
    """scores [m, c] = rows [m, D] times panels."""
    height, lanes, width = max_tile_rows(k.isa), k.isa.lanes, panel_width(k.isa)
    with (
        k.range(block.first, block.stop, width) as token,
        k.range(0, block.num_tiles) as tile,
    ):
        acc = _accumulators(k, height)
        x = k.offset(head.rooms[rows], tile * (height * spec.head_units), _F32)
        w = k.offset(head.rooms[panels], token * spec.head_units, _F32)
        _emit_steps(k, spec, acc, x, spec.head_units, 1, w, width, spec.head_units)
        for r, line in enumerate(acc):
            at = (tile * height + r) * head.ld + token
            for half, a in enumerate(line):
                k.store(head.rooms["scores"], at + half * lanes, a.get(), _F32)


def _emit_tall_product(k: Builder, spec: WindowSpec, head: _Head, block: _Block) -> None:
    """out [m, D] = chunks [m, c] times rows of keys or values."""
    height, lanes, width = max_tile_rows(k.isa), k.isa.lanes, panel_width(k.isa)
    args, d = head.args, spec.head_dim
    chunk = width // spec.unit_size
    rows = block.num_tiles * height
    out_stride = args["num_kv_heads"] * args["group"] * d
    storage = _F32 if spec.is_backward else spec.storage
    with k.range(0, block.num_tiles) as tile, k.range(0, d, width) as column:
        acc = _accumulators(k, height)
        with k.range(block.first, block.stop, width) as token:
            at = token // width * rows + tile * height
            x = k.offset(head.rooms["chunks"], at * chunk, _F32)
            w = k.offset(head.rooms["row_panels"], token // spec.unit_size * d + column, _F32)
            _emit_steps(k, spec, acc, x, chunk, 1, w, d, chunk)
        for r, line in enumerate(acc):
            row = tile * height + r
            with k.when(row < block.num_rows):
                at = (block.start + row) * out_stride + block.head * d + column
                for half, a in enumerate(line):
                    k.store(args["out"], at + half * lanes, a.get(), storage)


def _emit_turned_product(
    k: Builder, spec: WindowSpec, head: _Head, block: _Block, x: Val, rows: str, grads: str
) -> None:
    """grads [c, D] += x [m, c] turned, times rows [m, D]."""
    height, width, d = max_tile_rows(k.isa), panel_width(k.isa), spec.head_dim
    units = block.num_tiles * height // spec.unit_size
    base = k.offset(head.args[grads], head.head * head.args["grad_stride"], _F32)

    def tile(token: Val, num_rows: int) -> None:
        with k.range(0, d, width) as column:
            target = k.offset(base, token * d + column, _F32)
            acc = _accumulators(k, num_rows)
            lanes = k.isa.lanes
            for r, line in enumerate(acc):
                for half, a in enumerate(line):
                    a.set(k.load(target, r * d + half * lanes, _F32, lanes))
            w = k.offset(head.rooms[rows], column, _F32)
            _emit_steps(k, spec, acc, k.offset(x, token, _F32), 1, head.ld, w, d, units)
            for r, line in enumerate(acc):
                for half, a in enumerate(line):
                    k.store(target, r * d + half * lanes, a.get(), _F32)

    whole = (block.last - block.first) // height
    with k.range(0, whole) as i:
        tile(block.first + i * height, height)
    token = k.var(block.first + whole * height)
    rest = block.last - token.get()
    for num_rows in (8, 4, 2, 1):
        if num_rows < height:
            with k.when((rest & num_rows) > 0):
                tile(token.get(), num_rows)
                token.set(token.get() + num_rows)


# ---- rows of scores ----


def _each_pair(k: Builder, spec: WindowSpec, block: _Block, body: Callable[[Val], None]) -> None:
    """Rows by the unit: in pairs where a unit is a pair."""
    with k.range(0, block.num_tiles * max_tile_rows(k.isa), spec.unit_size) as row:
        body(row)


def _visible(k: Builder, block: _Block, head: _Head, row: Val) -> Callable[[Val], Val]:
    """For a row: which of the tokens from a given one on it sees, as a mask of a vector."""
    lanes = k.isa.lanes
    last = head.args["num_before"] + block.start + row
    last = k.select(row < block.num_rows, last, k.const(-1))
    first = k.maximum(last + 1 - head.args["window"], k.const(0))
    last_v, first_v = (k.splat(k.to_i32(v), lanes) for v in (last, first))

    def mask(token: Val) -> Val:
        tokens = k.iota(lanes) + k.splat(k.to_i32(token), lanes)
        return (tokens <= last_v) & (tokens >= first_v)

    return mask


def _emit_softmax(k: Builder, spec: WindowSpec, head: _Head, block: _Block, row: Val) -> None:
    """A unit's rows of scores to probabilities: what the products read, rounded to the storage."""
    lanes, scores = k.isa.lanes, head.rooms["scores"]
    scale = k.splat(head.args["scale"], lanes)
    inverses: list[Val] = []
    for i in range(spec.unit_size):
        base = (row + i) * head.ld
        mask = _visible(k, block, head, row + i)
        top = k.var(k.const(_LOWEST, vector(F32, lanes)))
        with k.range(block.first, block.checked, lanes) as token:
            top.set(k.maximum(top.get(), k.load(scores, base + token, _F32, lanes)))
        with k.range(block.checked, block.stop, lanes) as token:
            score = k.load(scores, base + token, _F32, lanes)
            top.set(k.maximum(top.get(), k.select(mask(token), score, top.get())))
        # With a negative scale the largest would be the least; there is none.
        most = k.splat(k.max_lanes(top.get()) * head.args["scale"], lanes)
        total = k.var(k.zeros(lanes))
        with k.range(block.first, block.checked, lanes) as token:
            score = k.load(scores, base + token, _F32, lanes)
            weight = k.exp_of_negative(score * scale - most)
            total.set(total.get() + weight)
            k.store(scores, base + token, weight, _F32)
        with k.range(block.checked, block.stop, lanes) as token:
            score = k.load(scores, base + token, _F32, lanes)
            weight = k.exp_of_negative(score * scale - most)
            weight = k.select(mask(token), weight, k.zeros(lanes))
            total.set(total.get() + weight)
            k.store(scores, base + token, weight, _F32)
        summed = k.sum_lanes(total.get())
        inverse = k.select(summed > 0.0, k.const(1.0, F32) / summed, k.const(0.0, F32))
        inverses.append(k.splat(inverse, lanes))
    with k.range(block.first, block.stop, lanes) as token:
        lines = [
            k.load(scores, (row + i) * head.ld + token, _F32, lanes) * inverse
            for i, inverse in enumerate(inverses)
        ]
        if spec.is_backward:
            _store_unit(k, spec, head, "probs", row, token, lines)
        else:
            _store_chunk(k, spec, head, block, row, token, lines)


def _emit_d_scores(k: Builder, spec: WindowSpec, head: _Head, block: _Block, row: Val) -> None:
    """A unit's rows of the gradient of probabilities to that of the scores before their scale."""
    lanes, size = k.isa.lanes, spec.unit_size
    scale = k.splat(head.args["scale"], lanes)
    sums = [k.var(k.zeros(lanes)) for _ in range(size)]

    def load(token: Val) -> list[tuple[Val, Val]]:
        probs = _load_unit(k, spec, head, "probs", row, token)
        grads = [
            k.load(head.rooms["scores"], (row + i) * head.ld + token, _F32, lanes)
            for i in range(size)
        ]
        return list(zip(probs, grads, strict=True))

    with k.range(block.first, block.stop, lanes) as token:
        for total, (prob, grad) in zip(sums, load(token), strict=True):
            total.set(k.fma(prob, grad, total.get()))
    means = [k.splat(k.sum_lanes(total.get()), lanes) for total in sums]
    with k.range(block.first, block.stop, lanes) as token:
        parts = zip(load(token), means, strict=True)
        lines = [prob * (grad - mean) * scale for (prob, grad), mean in parts]
        name = "d_scores" if spec.use_dot else "scores"
        _store_unit(k, spec, head, name, row, token, lines)
        _store_chunk(k, spec, head, block, row, token, lines)


def _store_unit(
    k: Builder, spec: WindowSpec, head: _Head, name: str, row: Val, token: Val, lines: list[Val]
) -> None:
    """Rows of a unit side by side: [m / unit, c]."""
    at = row // spec.unit_size * head.ld + token
    if not spec.use_dot:
        k.store(head.rooms[name], at, lines[0], _F32)
        return
    low, high = (_bf16_bits(k, line) for line in lines)
    k.b.store(_joined(k, low, high).v, k.offset(head.rooms[name], at, _F32).v, align=4)


def _load_unit(
    k: Builder, spec: WindowSpec, head: _Head, name: str, row: Val, token: Val
) -> list[Val]:
    """What `_store_unit` stored, as float32."""
    at, lanes = row // spec.unit_size * head.ld + token, k.isa.lanes
    if not spec.use_dot:
        return [k.load(head.rooms[name], at, _F32, lanes)]
    wide = vector(F32, lanes)
    both = k.load_raw(k.offset(head.rooms[name], at, _F32), 0, I32, lanes)
    return [k.bitcast(both << 16, wide), k.bitcast(both & -65536, wide)]


def _store_chunk(
    k: Builder,
    spec: WindowSpec,
    head: _Head,
    block: _Block,
    row: Val,
    token: Val,
    lines: list[Val],
) -> None:
    """Rows as units along the tokens, panel by panel: [c / W][m][W units]."""
    width = panel_width(k.isa)
    chunk = width // spec.unit_size
    rows = block.num_tiles * max_tile_rows(k.isa)
    for i, line in enumerate(lines):
        at = (token // width * rows + row + i) * chunk
        target = k.offset(head.rooms["chunks"], at, _F32)
        if spec.use_dot:
            bits = _bf16_bits(k, line)
            k.b.store(bits.v, k.offset(target, token % width, Storage.BFLOAT16).v, align=2)
        else:
            k.store(target, token % width, line, _F32)
