"""Emits products of many rows: outer products of packed rows of x with packed panels of W.

Shape legend: M rows, U units of the contraction, N outputs.

The kernel of `cpu_gemm` sums across lanes at the end of every output, and reads each row of x once
for every few outputs: cheap while M is small. With many rows it pays to copy a panel of W (two
vectors of outputs) into the second-level cache, contraction outermost, and to hold a tile of rows
by that panel in registers: every step multiplies one broadcast element of x with the panel's two
vectors and nothing is summed across lanes. W itself stays the plain row-major [N, K] tensor; the
panel is made anew by each product and shared by all of its rows.

A unit is what one step multiplies, 32 bits: a float32, or a pair of bfloat16 for `vdpbf16ps`. Every
output is one chain of multiply-adds in the order of the contraction whatever M and the blocking,
so a row's result does not depend, in any bit, on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.model.kernels.cpu_gemm import Epilogue
from weft.model.kernels.cpu_ir import BF16, F32, I32, I64, Builder, Isa, Storage, Val, Var, vector

CHUNK = 16
"""Units of a row of x that lie together; a contraction is a multiple of it."""
MIN_PANEL_ROWS = 32
"""The fewest rows of a product: from here on a panel of W is worth the copying."""
MIN_GRAD_ROWS = 8
"""The same for a gradient, whose panels are copied as they lie."""
PACK_ARGS = ("x", "ldx", "packed", "m", "units")
PANEL_ARGS = (
    "packed",
    "w",
    "ldw",
    "y",
    "ldy",
    "extra",
    "m",
    "n",
    "units",
    "sums",
    "is_first",
    "is_last",
    "scratch",
    "num_slots",
)
_UNROLL = 2
_F32 = Storage.FLOAT32


def panel_width(isa: Isa) -> int:
    """Rows of W (or its columns, for the gradient) in a panel."""
    return 2 * isa.lanes


def max_tile_rows(isa: Isa) -> int:
    """Rows of a register tile: with the panel's two vectors they fill the register file."""
    return 14 if isa.lanes == 16 else 6


def tile_heights(isa: Isa, fewest_rows: int = MIN_PANEL_ROWS) -> range:
    """The heights that tiles of so many rows or more, dealt evenly, can have."""
    most = max_tile_rows(isa)
    least = min(rows // -(-rows // most) for rows in range(fewest_rows, most * most))
    return range(least, most + 1)


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """Copies x [M, K] so that a tile's rows lie together, chunk by chunk, as units."""

    storage: Storage
    use_dot: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"pack_{self.storage}" + ("_dot" if self.use_dot else "")

    @property
    def variants(self) -> tuple[PackSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body; its int64 arguments are `PACK_ARGS`, `ldx` in elements."""
        x, ldx, packed, num_rows, units = (k.at(args, i, I64) for i in range(len(PACK_ARGS)))
        x, packed = k.pointer(x), k.pointer(packed)
        tiles = _num_tiles(k, num_rows)
        with k.range(tiles * thread // num_threads, tiles * (thread + 1) // num_threads) as tile:
            start, stop = _tile_bounds(num_rows, tiles, tile)
            height = stop - start
            with k.range(start, stop) as row:
                source = k.offset(x, row * ldx, self.storage)
                target = k.offset(packed, start * units + (row - start) * CHUNK, _F32)
                with k.range(0, units, CHUNK) as unit:
                    for i in range(0, CHUNK, k.isa.lanes):
                        value = _load_units(k, self.storage, self.use_dot, source, unit + i)
                        k.store(target, unit * height + i, value, _F32)


@dataclass(frozen=True, kw_only=True)
class PanelSpec:
    """One variant of the product: y = x Wᵀ, or with `is_grad` dx = dy W.

    The contraction runs over W's columns, or over its rows for the gradient. A sum over tokens,
    `is_sum`, is a product of the second kind whose few rows may be any number, and whose result is
    float32.
    """

    storage: Storage
    epilogue: Epilogue
    use_dot: bool
    is_grad: bool = False
    is_sum: bool = False

    @property
    def name(self) -> str:
        """A C identifier."""
        flags = ("_dot" if self.use_dot else "") + ("_grad" if self.is_grad else "")
        flags += "_sum" if self.is_sum else ""
        return f"panel_{self.storage}_{self.epilogue}{flags}"

    @property
    def variants(self) -> tuple[PanelSpec, ...]:
        """This one alone."""
        return (self,)

    @property
    def unit_size(self) -> int:
        """Elements of a unit."""
        return 2 if self.use_dot else 1

    @property
    def output(self) -> Storage:
        """What y is stored as."""
        return _F32 if self.is_sum else self.storage

    def heights(self, isa: Isa) -> range:
        """Those that tiles can have."""
        if self.is_sum:
            return range(1, max_tile_rows(isa) + 1)
        return tile_heights(isa, MIN_GRAD_ROWS if self.is_grad else MIN_PANEL_ROWS)

    def outputs_per_panel(self, isa: Isa) -> int:
        """Outputs that one panel makes; the fewest that the kernel can make."""
        return isa.lanes * (1 if self.epilogue is Epilogue.SILU_MUL else 2)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body; its int64 arguments are `PANEL_ARGS`, leading dimensions in elements.

        `extra` is the bias [N] or the addend [M, N] (row stride ldy). For SILU_MUL, W is [2N, K],
        the gates' rows before the ups'. A long contraction is cut into several calls: all but the
        last leave float32 `sums` [panels, M, panel_width], all but the first go on from them.
        `scratch` is [num_slots, units, panel_width] of float32; threads beyond the slots rest.
        """
        p = _load_operands(k, args, thread)
        # A replay may meet a larger team than the one that it was recorded with.
        num_threads = k.minimum(num_threads, p.num_slots)
        width = self.outputs_per_panel(k.isa)
        tiles = _num_tiles(k, p.num_rows)
        panels = (p.num_outputs + (width - 1)) // width
        # Few panels are also cut by rows, so that no thread waits for another's last panel.
        is_even = (panels % num_threads).equals(0)
        is_fine = k.select(is_even, panels, panels // 8) >= num_threads
        parts = k.select(is_fine, k.const(1), k.minimum(num_threads, tiles))
        items = panels * parts
        first = k.minimum(items * thread // num_threads, items)
        last = k.minimum(items * (thread + 1) // num_threads, items)
        with k.range(first, last) as item:
            panel, part = item // parts, item % parts
            # The last panel is pulled back to end at N; what overlaps is made twice, alike.
            output = k.minimum(panel * width, p.num_outputs - width)
            first_tile, last_tile = tiles * part // parts, tiles * (part + 1) // parts
            following = k.minimum((item + 1) // parts * width, p.num_outputs - width)
            _emit_pack_panel(k, self, p, output)
            with k.range(first_tile, last_tile) as tile:
                start, stop = _tile_bounds(p.num_rows, tiles, tile)
                fetches = (CHUNK + last_tile - first_tile - 1) // (last_tile - first_tile)
                at = _Tile(
                    output=output,
                    row=start,
                    sums=k.offset(p.sums, panel * p.num_rows * panel_width(k.isa), _F32),
                    following=following,
                    num_fetches=fetches,
                    first_fetch=(tile - first_tile) * fetches,
                )
                k.switch(
                    stop - start,
                    self.heights(k.isa),
                    lambda n, at=at: _emit_tile(k, self, p, at, n),
                )


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """The kernel's arguments, loaded; `panel` is the thread's own scratch."""

    packed: Val
    w: Val
    ldw: Val
    y: Val
    ldy: Val
    extra: Val
    num_rows: Val
    num_outputs: Val
    units: Val
    sums: Val
    is_first: Val
    is_last: Val
    num_slots: Val
    panel: Val


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Where in the product a register tile lies, and its share in asking for the next panel."""

    output: Val
    row: Val
    sums: Val
    following: Val
    num_fetches: Val
    first_fetch: Val


def _load_operands(k: Builder, args: Val, thread: Val) -> _Operands:
    words = dict(zip(PANEL_ARGS, (k.at(args, i, I64) for i in range(len(PANEL_ARGS))), strict=True))
    own = words["units"] * panel_width(k.isa) * thread
    return _Operands(
        packed=k.pointer(words["packed"]),
        w=k.pointer(words["w"]),
        ldw=words["ldw"],
        y=k.pointer(words["y"]),
        ldy=words["ldy"],
        extra=k.pointer(words["extra"]),
        num_rows=words["m"],
        num_outputs=words["n"],
        units=words["units"],
        sums=k.pointer(words["sums"]),
        is_first=words["is_first"] > 0,
        is_last=words["is_last"] > 0,
        num_slots=words["num_slots"],
        panel=k.offset(k.pointer(words["scratch"]), own, _F32),
    )


def _num_tiles(k: Builder, num_rows: Val) -> Val:
    height = max_tile_rows(k.isa)
    return (num_rows + (height - 1)) // height


def _tile_bounds(num_rows: Val, tiles: Val, tile: Val) -> tuple[Val, Val]:
    """Rows dealt to tiles evenly, so that all are nearly as high as they may be."""
    return num_rows * tile // tiles, num_rows * (tile + 1) // tiles


def _load_units(k: Builder, storage: Storage, use_dot: bool, base: Val, unit: Val) -> Val:
    """A vector of units of a row, as float32 (a pair of bfloat16 keeps its bits)."""
    return k.load(base, unit, _F32 if use_dot else storage, k.isa.lanes)


def _panel_source(k: Builder, spec: PanelSpec, p: _Operands, output: Val, half: int) -> Val:
    """Where half a panel starts in W: the first of its rows, or for the gradient its columns."""
    first = output + half * k.isa.lanes
    if spec.is_grad:
        return k.offset(p.w, first, spec.storage)
    if half and spec.epilogue is Epilogue.SILU_MUL:
        first = output + p.num_outputs
    return k.offset(p.w, first * p.ldw, spec.storage)


def _emit_pack_panel(k: Builder, spec: PanelSpec, p: _Operands, output: Val) -> None:
    """The panel that starts at `output`: [units, panel_width] of float32."""
    halves = [_panel_source(k, spec, p, output, half) for half in (0, 1)]
    lanes, width = k.isa.lanes, panel_width(k.isa)
    with k.range(0, p.units, lanes) as unit:
        target = k.offset(p.panel, unit * width, _F32)
        for half, source in enumerate(halves):
            load = _load_grad_square if spec.is_grad else _load_turned_square
            for i, units in enumerate(load(k, spec, p, source, unit)):
                k.store(target, i * width + half * lanes, units, _F32)


def _load_turned_square(
    k: Builder, spec: PanelSpec, p: _Operands, source: Val, unit: Val
) -> list[Val]:
    """Units of a few rows of W, turned: the rows of a panel."""
    rows = []
    for i in range(k.isa.lanes):
        row = k.offset(source, p.ldw * i, spec.storage)
        rows.append(_load_units(k, spec.storage, spec.use_dot, row, unit))
    return transpose(k, rows)


def _load_grad_square(
    k: Builder, spec: PanelSpec, p: _Operands, source: Val, unit: Val
) -> list[Val]:
    """Columns of a few rows of W, units of the gradient's contraction: one row, or a pair."""
    lanes, bits = k.isa.lanes, vector(I32, k.isa.lanes)
    size = spec.unit_size
    found = []
    for i in range(0, lanes * size, size):
        row = k.offset(source, (unit * size + i) * p.ldw, spec.storage)
        value = k.load(row, 0, spec.storage, lanes)
        if spec.use_dot:
            above = k.bitcast(k.load(row, p.ldw, spec.storage, lanes), bits)
            value = k.bitcast((k.bitcast(value, bits) >> 16) | above, value.type)
        found.append(value)
    return found


def transpose(k: Builder, rows: Sequence[Val]) -> list[Val]:
    """Turn a square of 8 or 16 float32 vectors, in the shuffles that x86 has as one instruction."""
    lanes = len(rows)
    work = list(rows)
    quads = range(0, lanes, 4)
    low = [lane for q in quads for lane in (q, lanes + q, q + 1, lanes + q + 1)]
    high = [lane + 2 for lane in low]
    for i in range(0, lanes, 2):
        a, b = work[i], work[i + 1]
        work[i], work[i + 1] = k.shuffle(a, b, low), k.shuffle(a, b, high)
    low = [lane for q in quads for lane in (q, q + 1, lanes + q, lanes + q + 1)]
    high = [lane + 2 for lane in low]
    for i in range(0, lanes, 4):
        a, b, c, d = work[i : i + 4]
        work[i : i + 4] = [k.shuffle(s, t, m) for s, t in ((a, c), (b, d)) for m in (low, high)]
    # work[4 g + c] now holds, in quad q, column 4 q + c of rows 4 g to 4 g + 3.
    columns = [work[c::4] for c in range(4)]
    turned = [_turn_quads(k, column) for column in columns]
    return [turned[i % 4][i // 4] for i in range(lanes)]


def _turn_quads(k: Builder, parts: Sequence[Val]) -> list[Val]:
    """Quad q of each part, side by side, for every q."""
    lanes = parts[0].lanes
    if len(parts) == 2:
        masks = [[*range(s, s + 4), *range(lanes + s, lanes + s + 4)] for s in (0, 4)]
        return [k.shuffle(parts[0], parts[1], mask) for mask in masks]
    even = [base + i for base in (0, 8, 16, 24) for i in range(4)]
    odd = [lane + 4 for lane in even]
    pairs = [[k.shuffle(a, b, m) for m in (even, odd)] for a, b in (parts[:2], parts[2:])]
    by_parity = [
        [k.shuffle(pairs[0][odd_one], pairs[1][odd_one], m) for m in (even, odd)]
        for odd_one in range(2)
    ]
    return [by_parity[q % 2][q // 2] for q in range(4)]


def _emit_tile(k: Builder, spec: PanelSpec, p: _Operands, tile: _Tile, n: int) -> None:
    """`n` rows of x against one panel."""
    lanes, width = k.isa.lanes, panel_width(k.isa)
    acc = [[k.var(k.zeros(lanes)) for _ in range(2)] for _ in range(n)]
    kept = k.offset(tile.sums, tile.row * width, _F32)
    with k.otherwise(p.is_first):
        for r, line in enumerate(acc):
            for half, a in enumerate(line):
                a.set(k.load(kept, r * width + half * lanes, _F32, lanes))
    rows = k.offset(p.packed, tile.row * p.units, _F32)
    ahead = [_panel_source(k, spec, p, tile.following, half) for half in (0, 1)]
    with k.range(0, p.units, CHUNK) as unit:
        xs = k.offset(rows, unit * n, _F32)
        ws = k.offset(p.panel, unit * width, _F32)
        _emit_fetch(k, spec, p, tile, ahead, unit)
        with k.range(0, CHUNK, _UNROLL) as at:
            for step in range(_UNROLL):
                _emit_step(k, spec, acc, xs, ws, at + step)
    with k.when(p.is_last):
        for r, line in enumerate(acc):
            _store_outputs(k, spec, p, tile.row + r, tile.output, [a.get() for a in line])
    with k.otherwise(p.is_last):
        for r, line in enumerate(acc):
            for half, a in enumerate(line):
                k.store(kept, r * width + half * lanes, a.get(), _F32)


def _emit_fetch(
    k: Builder, spec: PanelSpec, p: _Operands, tile: _Tile, ahead: list[Val], unit: Val
) -> None:
    """This tile's share of the next panel at this chunk: a few of its rows, or of its units."""
    size = spec.unit_size
    stop = k.minimum(tile.first_fetch + tile.num_fetches, k.const(CHUNK))
    with k.range(tile.first_fetch, stop) as i:
        if not spec.is_grad:
            for source in ahead:
                k.prefetch(source, i * p.ldw + unit * size, spec.storage, near=2)
        elif spec.use_dot:
            row = (unit + i) * 2 * p.ldw
            k.prefetch(ahead[0], row, spec.storage, near=2)
            k.prefetch(ahead[0], row + p.ldw, spec.storage, near=2)
        else:
            for source in ahead:
                k.prefetch(source, (unit + i) * p.ldw, spec.storage, near=2)


def _emit_step(
    k: Builder, spec: PanelSpec, acc: list[list[Var]], xs: Val, ws: Val, unit: Val
) -> None:
    """One unit of every row of the tile times the panel's."""
    lanes, width = k.isa.lanes, panel_width(k.isa)
    if spec.use_dot:
        wv = [k.load_raw(ws, (unit * width + half * lanes) * 2, BF16, 2 * lanes) for half in (0, 1)]
    else:
        wv = [k.load(ws, unit * width + half * lanes, _F32, lanes) for half in (0, 1)]
    for r, line in enumerate(acc):
        if spec.use_dot:
            pair = k.splat(k.at(xs, unit + r * CHUNK, I32), lanes)
            xv = k.bitcast(pair, vector(BF16, 2 * lanes))
            for a, w in zip(line, wv, strict=True):
                a.set(k.bf16_dot(a.get(), xv, w))
        else:
            xv = k.splat(k.at(xs, unit + r * CHUNK, F32), lanes)
            for a, w in zip(line, wv, strict=True):
                a.set(k.fma(xv, w, a.get()))


def _store_outputs(
    k: Builder, spec: PanelSpec, p: _Operands, row: Val, output: Val, values: list[Val]
) -> None:
    lanes = k.isa.lanes
    if spec.epilogue is Epilogue.SILU_MUL:
        # Rounded first, as in `forward`: fused or apart, the bits are the same.
        gate, up = (k.round_to(value, spec.storage) for value in values)
        k.store(p.y, row * p.ldy + output, k.silu(gate) * up, spec.storage)
        return
    for half, value in enumerate(values):
        column = output + half * lanes
        at = row * p.ldy + column
        if spec.epilogue is Epilogue.BIAS:
            value = value + k.load(p.extra, column, spec.storage, lanes)
        elif spec.epilogue is Epilogue.ADD:
            value = k.round_to(value, spec.storage) + k.load(p.extra, at, spec.storage, lanes)
        k.store(p.y, at, value, spec.output)
