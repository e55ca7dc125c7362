"""Emits the LoRAs beside stacked linears for a window of one adapter's tokens, both ways.

Shape legend: s tokens of the window, N out_features, K in_features, r rank, W the wide dimension of
a narrow product: N in backward's contraction, K in forward's, and the other way round when it
expands.

A launch is two kernels with a barrier between. `ContractSpec` splits the wide dimension among the
threads and sums source [s, W] times a weight to [s, r], one sum per thread; `ExpandSpec` adds these
up in the order of the threads and splits the other wide dimension. Backward sums the gradients of B
on the way there and of A on the way back, so each is written by one thread; every product is summed
in float32 in an order that only the number of threads changes.

All operands are copied block by block as float32, padded with zeros to whole vectors: no rank,
width or stride needs code of its own, and rows that lie a page apart do not fight for one line of
the cache. Ranks lie in chunks of one vector, [chunk][s][lanes].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from weft.model.kernels.cpu_ir import F32, I64, Builder, Storage, Val, Var
from weft.model.kernels.cpu_panel_ir import transpose

HEAD_ARGS = ("num_parts", "num_rows", "num_chunks", "num_slots", "sums", "totals")
"""Words before those of the parts; `sums` and `totals` are [slots, chunks, s padded, lanes]."""
PART_ARGS = (
    "rank",
    "chunk",
    "scale_bits",
    "source",
    "source_stride",
    "source_width",
    "narrowing",
    "narrowing_grad",
    "low",
    "low_stride",
    "widening",
    "widening_grad",
    "beside",
    "beside_stride",
    "out",
    "out_stride",
    "out_width",
)
"""Words of a LoRA. `source` is contracted with `narrowing`: dy with B, or forward x with A.
`widening` (A, or forward B) expands to `out` (dx of all parts, or forward each part's own); where
nothing is wanted `out` is 0 for dx, and `out_width` for the others. `low` is what B was applied to:
read by backward, written by forward unless it is 0. `beside` is x."""
ROW_TILE = 8
"""Rows of the sums are padded to a multiple of it."""
_TOKENS = 64
_COLUMNS = 64
_F32 = Storage.FLOAT32


@dataclass(frozen=True, kw_only=True)
class ContractSpec:
    """The kernel before the barrier."""

    storage: Storage
    is_backward: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"lora_contract_{self.storage}" + ("_backward" if self.is_backward else "")

    @property
    def variants(self) -> Sequence[ContractSpec | ExpandSpec]:
        """Both kernels of a launch."""
        return _both(self.storage, self.is_backward)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body; the words are `HEAD_ARGS` and `PART_ARGS` of every part."""
        emit_contract(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class ExpandSpec:
    """The kernel behind the barrier."""

    storage: Storage
    is_backward: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"lora_expand_{self.storage}" + ("_backward" if self.is_backward else "")

    @property
    def variants(self) -> Sequence[ContractSpec | ExpandSpec]:
        """Both kernels of a launch."""
        return _both(self.storage, self.is_backward)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body; the words are those of the `ContractSpec` before it."""
        emit_expand(self, k, args, thread, num_threads)


def _both(storage: Storage, is_backward: bool) -> Sequence[ContractSpec | ExpandSpec]:
    return (
        ContractSpec(storage=storage, is_backward=is_backward),
        ExpandSpec(storage=storage, is_backward=is_backward),
    )


# ---- the two kernels ----


def emit_contract(
    spec: ContractSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val
) -> None:
    """A thread's sums [chunks, s, lanes] of its columns; backward also adds to gradients of B."""
    head = _Head(k, args_at, thread, num_threads)
    lanes = k.isa.lanes
    rooms = _Rooms(k, source=_TOKENS * _COLUMNS, weight=_COLUMNS * lanes, low=_TOKENS * lanes)
    with head.when_busy():
        with k.range(0, head.num_chunks * head.padded * lanes, lanes) as at:
            k.store(head.own_sums, at, k.zeros(lanes), _F32)
        with (
            head.each_part() as part,
            _blocks(k, part.source_width, head) as (column, num_columns),
            head.token_blocks() as (token, num_tokens),
        ):
            at = token * part.source_stride + column
            source = k.offset(part.source, at, spec.storage)
            stride = part.source_stride
            _copy_rows(k, spec.storage, source, stride, num_tokens, num_columns, rooms["source"])
            with part.each_chunk() as (chunk, num_ranks):
                if spec.is_backward:
                    at = column * part.rank + chunk * lanes
                    source = k.offset(part.narrowing, at, spec.storage)
                    _copy_vectors(
                        k, spec.storage, source, part.rank, num_columns, num_ranks, rooms["weight"]
                    )
                else:
                    at = chunk * lanes * part.source_width + column
                    source = k.offset(part.narrowing, at, spec.storage)
                    _copy_turned_ranks(
                        k,
                        spec.storage,
                        source,
                        part.source_width,
                        num_ranks,
                        num_columns,
                        rooms["weight"],
                    )
                sums = k.offset(head.own_sums, head.place(part.chunk + chunk, token), _F32)
                _add_contraction(k, rooms, sums, num_tokens, num_columns)
                if spec.is_backward:
                    at = token * part.low_stride + chunk * lanes
                    source = k.offset(part.low, at, spec.storage)
                    _copy_vectors(
                        k,
                        spec.storage,
                        source,
                        part.low_stride,
                        num_tokens,
                        num_ranks,
                        rooms["low"],
                    )
                    at = column * part.rank + chunk * lanes
                    grad = k.offset(part.narrowing_grad, at, _F32)
                    _add_narrow_grad(k, rooms, part, grad, num_tokens, num_columns, num_ranks)


def emit_expand(spec: ExpandSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """Adds a thread's columns of what the low ranks [s, r] expand to, and of gradients of A."""
    head = _Head(k, args_at, thread, num_threads)
    rooms = _Rooms(
        k,
        beside=_TOKENS * _COLUMNS,
        out=_TOKENS * _COLUMNS,
        weight=k.isa.lanes * _COLUMNS,
    )
    with head.when_busy():
        with head.each_part() as part:
            _emit_totals(spec, k, head, part)
        if spec.is_backward:
            _emit_expand_backward(spec, k, head, rooms)
        else:
            _emit_expand_forward(spec, k, head, rooms)


def _emit_expand_backward(spec: ExpandSpec, k: Builder, head: _Head, rooms: _Rooms) -> None:
    """All parts read one x and add to one dx."""
    lanes, shared = k.isa.lanes, head.part(k.const(0))
    width = shared.out_width
    wants_out = shared.words["out"] > 0
    with (
        _blocks(k, width, head) as (column, num_columns),
        head.token_blocks() as (token, num_tokens),
    ):
        at = token * shared.beside_stride + column
        source = k.offset(shared.beside, at, spec.storage)
        _copy_rows(
            k,
            spec.storage,
            source,
            shared.beside_stride,
            num_tokens,
            num_columns,
            rooms["beside"],
        )
        out = k.offset(shared.out, token * shared.out_stride + column, spec.storage)
        stride = shared.out_stride
        with k.when(wants_out):
            _copy_rows(k, spec.storage, out, stride, num_tokens, num_columns, rooms["out"])
        with head.each_part() as part, part.each_chunk() as (chunk, num_ranks):
            total = k.offset(head.own_totals, head.place(part.chunk + chunk, token), _F32)
            at = chunk * lanes * width + column
            grad = k.offset(part.widening_grad, at, _F32)
            _add_wide_grad(k, rooms, grad, width, total, num_tokens, num_columns, num_ranks)
            with k.when(wants_out):
                source = k.offset(part.widening, at, spec.storage)
                _copy_rows(k, spec.storage, source, width, num_ranks, num_columns, rooms["weight"])
                _add_expansion(k, rooms, total, num_tokens, num_columns, num_ranks)
        with k.when(wants_out):
            _store_rows(k, spec.storage, rooms["out"], out, stride, num_tokens, num_columns)


def _emit_expand_forward(spec: ExpandSpec, k: Builder, head: _Head, rooms: _Rooms) -> None:
    """Every part adds to outputs of its own."""
    lanes = k.isa.lanes
    with (
        head.each_part() as part,
        _blocks(k, part.out_width, head) as (column, num_columns),
        head.token_blocks() as (token, num_tokens),
    ):
        out = k.offset(part.out, token * part.out_stride + column, spec.storage)
        stride = part.out_stride
        _copy_rows(k, spec.storage, out, stride, num_tokens, num_columns, rooms["out"])
        with part.each_chunk() as (chunk, num_ranks):
            total = k.offset(head.own_totals, head.place(part.chunk + chunk, token), _F32)
            at = column * part.rank + chunk * lanes
            source = k.offset(part.widening, at, spec.storage)
            _copy_turned_outputs(
                k, spec.storage, source, part.rank, num_columns, num_ranks, rooms["weight"]
            )
            _add_expansion(k, rooms, total, num_tokens, num_columns, num_ranks)
        _store_rows(k, spec.storage, rooms["out"], out, stride, num_tokens, num_columns)


def _emit_totals(spec: ExpandSpec, k: Builder, head: _Head, part: _Part) -> None:
    """scale · the threads' sums, in this thread's own room; forward writes its share of `low`."""
    lanes = k.isa.lanes
    scale = k.splat(part.scale, lanes)
    first = head.num_rows * head.thread // head.num_threads
    last = head.num_rows * (head.thread + 1) // head.num_threads
    with part.each_chunk() as (chunk, num_ranks), k.range(0, head.padded) as row:
        at = head.place(part.chunk + chunk, row)
        total = k.var(k.load(head.sums, at, _F32, lanes))
        with k.range(1, head.num_threads) as other:
            theirs = k.load(head.sums, other * head.slot_size + at, _F32, lanes)
            total.set(total.get() + theirs)
        k.store(head.own_totals, at, total.get() * scale, _F32)
        if not spec.is_backward:
            with k.when((row >= first) & (row < last) & (part.words["low"] > 0)):
                low = k.offset(part.low, row * part.low_stride + chunk * lanes, spec.storage)
                k.store_some(low, 0, total.get(), spec.storage, num_ranks)


# ---- words and places ----


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One LoRA's words, loaded."""

    k: Builder
    words: dict[str, Val]
    scale: Val

    def __getattr__(self, name: str) -> Val:
        word = self.words[name]
        return self.k.pointer(word) if name in _POINTERS else word

    @contextmanager
    def each_chunk(self) -> Iterator[tuple[Val, Val]]:
        """Emit for every chunk of ranks: its index, and how many ranks it holds."""
        k, lanes = self.k, self.k.isa.lanes
        rank = self.words["rank"]
        with k.range(0, (rank + (lanes - 1)) // lanes) as chunk:
            yield chunk, k.minimum(rank - chunk * lanes, k.const(lanes))


_POINTERS = frozenset(
    {
        "source",
        "narrowing",
        "narrowing_grad",
        "low",
        "widening",
        "widening_grad",
        "beside",
        "out",
    }
)


class _Head:
    """What holds for all parts of a launch."""

    def __init__(self, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
        words = {name: k.at(args_at, i, I64) for i, name in enumerate(HEAD_ARGS)}
        self._k = k
        self._args_at = args_at
        self.num_parts = words["num_parts"]
        self.num_rows = words["num_rows"]
        self.num_chunks = words["num_chunks"]
        self.thread = thread
        self.num_threads = k.minimum(num_threads, words["num_slots"])
        self.padded = (self.num_rows + (ROW_TILE - 1)) // ROW_TILE * ROW_TILE
        self.slot_size = self.num_chunks * self.padded * k.isa.lanes
        self.sums = k.pointer(words["sums"])
        own = thread * self.slot_size
        self.own_sums = k.offset(self.sums, own, _F32)
        self.own_totals = k.offset(k.pointer(words["totals"]), own, _F32)

    def when_busy(self) -> AbstractContextManager[None]:
        """Emit for the threads that have a slot."""
        return self._k.when(self.thread < self.num_threads)

    def place(self, chunk: Val, row: Val) -> Val:
        """Where a row of a chunk begins within a slot."""
        return (chunk * self.padded + row) * self._k.isa.lanes

    def part(self, index: Val) -> _Part:
        """A LoRA's words."""
        k = self._k
        first = index * len(PART_ARGS) + len(HEAD_ARGS)
        words = {name: k.at(self._args_at, first + i, I64) for i, name in enumerate(PART_ARGS)}
        scale = k.at(self._args_at, (first + PART_ARGS.index("scale_bits")) * 2, F32)
        return _Part(k=k, words=words, scale=scale)

    @contextmanager
    def each_part(self) -> Iterator[_Part]:
        """Emit for every LoRA."""
        with self._k.range(0, self.num_parts) as index:
            yield self.part(index)

    @contextmanager
    def token_blocks(self) -> Iterator[tuple[Val, Val]]:
        """Emit for blocks of the window: the first token, and how many."""
        k = self._k
        with k.range(0, self.num_rows, _TOKENS) as token:
            yield token, k.minimum(self.num_rows - token, k.const(_TOKENS))


@contextmanager
def _blocks(k: Builder, width: Val, head: _Head) -> Iterator[tuple[Val, Val]]:
    """Emit for blocks of a thread's share of a width: the first column, and how many."""
    lanes = k.isa.lanes
    vectors = (width + (lanes - 1)) // lanes
    first = vectors * head.thread // head.num_threads * lanes
    last = k.minimum(vectors * (head.thread + 1) // head.num_threads * lanes, width)
    with k.range(first, last, _COLUMNS) as column:
        yield column, k.minimum(last - column, k.const(_COLUMNS))


class _Rooms:
    """Blocks of float32 on a thread's stack, on whole cache lines."""

    def __init__(self, k: Builder, **sizes: int) -> None:
        self._found: dict[str, Val] = {}
        for name, size in sizes.items():
            start = k.scratch(F32, size + 16)
            number = Val(k, k.b.ptrtoint(start.v, I64))
            self._found[name] = k.pointer((number + 63) & -64)

    def __getitem__(self, name: str) -> Val:
        return self._found[name]


# ---- products ----


def _tile_rows(k: Builder) -> int:
    """Rows of a register tile."""
    return 8 if k.isa.lanes == 16 else 4


def _accumulate(
    k: Builder,
    acc: list[list[Var]],
    x: Val,
    x_row: int,
    x_step: int,
    w: Val,
    w_step: int,
    count: Val,
) -> None:
    """acc[i][v] += x[i x_row + u x_step] · vector v of w[u w_step ..], over u < count."""
    lanes = k.isa.lanes
    with k.range(0, count) as step:
        xs, ws = k.offset(x, step * x_step, _F32), k.offset(w, step * w_step, _F32)
        vectors = [k.load(ws, v * lanes, _F32, lanes) for v in range(len(acc[0]))]
        for i, line in enumerate(acc):
            factor = k.splat(k.at(xs, i * x_row, F32), lanes)
            for total, value in zip(line, vectors, strict=True):
                total.set(k.fma(factor, value, total.get()))


def _tile(k: Builder, num_vectors: int) -> list[list[Var]]:
    return [[k.var(k.zeros(k.isa.lanes)) for _ in range(num_vectors)] for _ in range(_tile_rows(k))]


def _add_contraction(
    k: Builder, rooms: _Rooms, sums: Val, num_tokens: Val, num_columns: Val
) -> None:
    """sums [tokens, lanes] += source [tokens, columns] times weight [columns, lanes]."""
    lanes, height = k.isa.lanes, _tile_rows(k)
    with k.range(0, num_tokens, height) as row:
        acc = _tile(k, 1)
        target = k.offset(sums, row * lanes, _F32)
        for i, (total,) in enumerate(acc):
            total.set(k.load(target, i * lanes, _F32, lanes))
        source = k.offset(rooms["source"], row * _COLUMNS, _F32)
        _accumulate(k, acc, source, _COLUMNS, 1, rooms["weight"], lanes, num_columns)
        for i, (total,) in enumerate(acc):
            k.store(target, i * lanes, total.get(), _F32)


def _add_narrow_grad(
    k: Builder,
    rooms: _Rooms,
    part: _Part,
    grad: Val,
    num_tokens: Val,
    num_columns: Val,
    num_ranks: Val,
) -> None:
    """grad [columns, r] += scale · source [tokens, columns]ᵀ low [tokens, lanes]."""
    lanes, height = k.isa.lanes, _tile_rows(k)
    scale = k.splat(part.scale, lanes)
    with k.range(0, num_columns, height) as column:
        acc = _tile(k, 1)
        source = k.offset(rooms["source"], column, _F32)
        _accumulate(k, acc, source, 1, _COLUMNS, rooms["low"], lanes, num_tokens)
        for i, (total,) in enumerate(acc):
            with k.when(column + i < num_columns):
                target = k.offset(grad, (column + i) * part.rank, _F32)
                before = k.load_some(target, 0, _F32, num_ranks)
                k.store_some(target, 0, k.fma(total.get(), scale, before), _F32, num_ranks)


def _add_wide_grad(
    k: Builder,
    rooms: _Rooms,
    grad: Val,
    width: Val,
    total: Val,
    num_tokens: Val,
    num_columns: Val,
    num_ranks: Val,
) -> None:
    """grad [r, K] += total [tokens, lanes]ᵀ beside [tokens, columns]."""
    lanes, height = k.isa.lanes, _tile_rows(k)
    with k.range(0, num_columns, 2 * lanes) as column, k.range(0, num_ranks, height) as rank:
        acc = _tile(k, 2)
        beside = k.offset(rooms["beside"], column, _F32)
        ranks = k.offset(total, rank, _F32)
        _accumulate(k, acc, ranks, 1, lanes, beside, _COLUMNS, num_tokens)
        for i, line in enumerate(acc):
            with k.when(rank + i < num_ranks):
                target = k.offset(grad, (rank + i) * width + column, _F32)
                for half, value in enumerate(line):
                    at, count = half * lanes, num_columns - column - half * lanes
                    before = k.load_some(target, at, _F32, count)
                    k.store_some(target, at, before + value.get(), _F32, count)


def _add_expansion(
    k: Builder, rooms: _Rooms, total: Val, num_tokens: Val, num_columns: Val, num_ranks: Val
) -> None:
    """out [tokens, columns] += total [tokens, lanes] times weight [lanes, columns]."""
    lanes, height = k.isa.lanes, _tile_rows(k)
    with (
        k.range(0, num_columns, 2 * lanes) as column,
        k.range(0, num_tokens, height) as row,
    ):
        acc = _tile(k, 2)
        target = k.offset(rooms["out"], row * _COLUMNS + column, _F32)
        for i, line in enumerate(acc):
            for half, value in enumerate(line):
                value.set(k.load(target, i * _COLUMNS + half * lanes, _F32, lanes))
        weight = k.offset(rooms["weight"], column, _F32)
        rows = k.offset(total, row * lanes, _F32)
        _accumulate(k, acc, rows, lanes, 1, weight, _COLUMNS, num_ranks)
        for i, line in enumerate(acc):
            for half, value in enumerate(line):
                k.store(target, i * _COLUMNS + half * lanes, value.get(), _F32)


# ---- copies ----


def _copy_rows(
    k: Builder,
    storage: Storage,
    source: Val,
    stride: Val,
    num_rows: Val,
    num_columns: Val,
    room: Val,
) -> None:
    """Rows to room [rows up to a tile, _COLUMNS] as float32, zero behind the last row or column."""
    lanes, height = k.isa.lanes, _tile_rows(k)
    counts = [num_columns - at for at in range(0, _COLUMNS, lanes)]
    with k.range(0, num_rows) as row:
        line = k.offset(source, row * stride, storage)
        target = k.offset(room, row * _COLUMNS, _F32)
        for i, count in enumerate(counts):
            k.store(target, i * lanes, k.load_some(line, i * lanes, storage, count), _F32)
    padded = (num_rows + (height - 1)) // height * height
    with k.range(num_rows * _COLUMNS, padded * _COLUMNS, lanes) as at:
        k.store(room, at, k.zeros(lanes), _F32)


def _store_rows(
    k: Builder,
    storage: Storage,
    room: Val,
    target: Val,
    stride: Val,
    num_rows: Val,
    num_columns: Val,
) -> None:
    """What `_copy_rows` copied, back in its place and rounded."""
    lanes = k.isa.lanes
    with k.range(0, num_rows) as row:
        line = k.offset(target, row * stride, storage)
        for at in range(0, _COLUMNS, lanes):
            value = k.load(room, row * _COLUMNS + at, _F32, lanes)
            k.store_some(line, at, value, storage, num_columns - at)


def _copy_vectors(
    k: Builder,
    storage: Storage,
    source: Val,
    stride: Val,
    num_rows: Val,
    num_ranks: Val,
    room: Val,
) -> None:
    """A chunk of ranks of rows [rows, r] to room [rows, lanes]."""
    lanes = k.isa.lanes
    with k.range(0, num_rows) as row:
        value = k.load_some(source, row * stride, storage, num_ranks)
        k.store(room, row * lanes, value, _F32)


def _load_square(
    k: Builder, storage: Storage, source: Val, stride: Val, num_rows: Val, num_columns: Val
) -> list[Val]:
    """A square of as many rows as lanes, turned; zero behind the last row or column."""
    lanes, nothing = k.isa.lanes, k.const(0)
    rows: list[Val] = []
    for i in range(lanes):
        # A row that is not there is not read: its mask is empty.
        count = k.select(num_rows > i, num_columns, nothing)
        rows.append(k.load_some(source, stride * i, storage, count))
    return transpose(k, rows)


def _copy_turned_ranks(
    k: Builder,
    storage: Storage,
    source: Val,
    stride: Val,
    num_ranks: Val,
    num_columns: Val,
    room: Val,
) -> None:
    """A chunk of rows [r, W] to room [columns, lanes]."""
    lanes = k.isa.lanes
    with k.range(0, num_columns, lanes) as column:
        start = k.offset(source, column, storage)
        square = _load_square(k, storage, start, stride, num_ranks, num_columns - column)
        for i, ranks in enumerate(square):
            k.store(room, (column + i) * lanes, ranks, _F32)


def _copy_turned_outputs(
    k: Builder,
    storage: Storage,
    source: Val,
    stride: Val,
    num_columns: Val,
    num_ranks: Val,
    room: Val,
) -> None:
    """A chunk of ranks of rows [W, r] to room [lanes, _COLUMNS]."""
    lanes = k.isa.lanes
    with k.range(0, _COLUMNS, lanes) as column:
        start = k.offset(source, column * stride, storage)
        square = _load_square(k, storage, start, stride, num_columns - column, num_ranks)
        for i, columns in enumerate(square):
            k.store(room, column + i * _COLUMNS, columns, _F32)
