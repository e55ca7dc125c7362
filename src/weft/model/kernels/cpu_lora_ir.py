"""Emits the kernels of adapters: many rows, each through an adapter of its own, in one call.

What a row's adapter holds for a module is read from a table of words (`weft.model.adapters.table`),
so a call needs no list of pairs, and a row without an adapter costs one comparison. Every thread
passes over all rows and takes its share of a row's ranks, or of its columns: two threads finish
together whatever the mix of ranks. A row's result does not depend, in any bit, on other rows.

Shape legend: T tokens, K in_features, N out_features, r rank, M modules that share an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.model.adapters.table import FIELDS, Field
from weft.model.kernels.cpu_ir import BF16, F32, I64, Builder, Storage, Val

SHRINK_ARGS = (
    "x",
    "ldx",
    "k_size",
    "slots",
    "num_rows",
    "words",
    "slot_words",
    "module",
    "num_modules",
    "inner",
    "max_rank",
)
EXPAND_ARGS = (
    "out",
    "ldo",
    "slots",
    "num_rows",
    "words",
    "slot_words",
    "module",
    "num_modules",
    "inner",
    "max_rank",
    "columns",
)
SCALE_ARGS = (
    "data",
    "ldd",
    "slots",
    "num_rows",
    "words",
    "slot_words",
    "module",
    "num_modules",
    "field",
    "columns",
)
_AT_ONCE = 4  # ranks: as many chains of sums as hide the latency of an addition
_BLOCK = 1024  # columns whose sums stay in the first-level cache while all ranks pass over them


@dataclass(frozen=True, kw_only=True)
class ShrinkSpec:
    """inner = s · A x (+ bias); `use_dot`: K is a multiple of a bfloat16 dot's width."""

    storage: Storage
    use_dot: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"shrink_{self.storage}" + ("_dot" if self.use_dot else "")

    @property
    def variants(self) -> Sequence[ShrinkSpec]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_shrink(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class ExpandSpec:
    """out += B inner (+ bias)."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"expand_{self.storage}"

    @property
    def variants(self) -> Sequence[ExpandSpec]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_expand(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class ScaleSpec:
    """data *= l."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"scale_{self.storage}"

    @property
    def variants(self) -> Sequence[ScaleSpec]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_scale(self, k, args, thread, num_threads)


def emit_shrink(spec: ShrinkSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """inner [T, M, max_rank] float32 of the rows x [T, K]; arguments `SHRINK_ARGS`."""
    args = _load_args(k, args_at, SHRINK_ARGS, ("x", "slots", "words", "inner"))

    def ranks(entry: Val) -> tuple[Val, Val]:
        rank = k.at(entry, Field.RANK, I64)
        return rank * thread // num_threads, rank * (thread + 1) // num_threads

    def body(row: Val, index: Val, entry: Val, after: Val) -> None:
        first, last = ranks(entry)
        x = k.offset(args["x"], row * args["ldx"], spec.storage)
        a = k.pointer(k.at(entry, Field.A, I64))
        bias = k.at(entry, Field.DOWN_BIAS, I64)
        inner = (row * args["num_modules"] + index) * args["max_rank"]
        inner_at = k.offset(args["inner"], inner, Storage.FLOAT32)
        scale = k.at(entry, 2 * Field.SCALE, F32)
        next_a = k.offset(
            k.pointer(k.at(after, Field.A, I64)), ranks(after)[0] * args["k_size"], spec.storage
        )

        def dots(n: int, start: Val) -> None:
            own = k.offset(a, (start + n) * args["k_size"], spec.storage)
            ahead = k.select(start + n < last, own, next_a)
            sums = _emit_dots(k, spec, x, a, start, n, args["k_size"], ahead)
            for i, total in enumerate(sums):
                value = k.var(k.sum_lanes(total) * scale)
                with k.otherwise(bias.equals(0)):
                    value.set(value.get() + k.load(k.pointer(bias), start + i, spec.storage, 1))
                k.put(inner_at, start + i, value.get())

        with k.range(first, last, _AT_ONCE) as start:
            count = k.minimum(last - start, k.const(_AT_ONCE))
            k.switch(count, range(1, _AT_ONCE + 1), lambda n: dots(n, start))

    _each_entry(k, args, body)


def _emit_dots(
    k: Builder, spec: ShrinkSpec, x: Val, a: Val, start: Val, n: int, k_size: Val, ahead: Val
) -> list[Val]:
    """Accumulators of n neighbouring rows of A against one row of x; fetches `ahead` meanwhile."""
    lanes = k.isa.lanes
    totals = [k.var(k.zeros(lanes)) for _ in range(n)]
    rows = [k.offset(a, (start + i) * k_size, spec.storage) for i in range(n)]

    def load(base: Val, at: Val) -> Val:
        if spec.use_dot:
            return k.load_raw(base, at, BF16, 2 * lanes)
        return k.load(base, at, spec.storage, lanes)

    with k.range(0, k_size, lanes * (2 if spec.use_dot else 1)) as at:
        xv = load(x, at)
        for i, (total, row) in enumerate(zip(totals, rows, strict=True)):
            k.prefetch(ahead, at + i * k_size, spec.storage)
            av = load(row, at)
            kept = total.get()
            total.set(k.bf16_dot(kept, xv, av) if spec.use_dot else k.fma(xv, av, kept))
    return [total.get() for total in totals]


def emit_expand(spec: ExpandSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """out [T, columns of M modules] += B inner, summed in float32; arguments `EXPAND_ARGS`.

    B lies transposed, [r, N]; `columns` holds (first, width) of each module's outputs.
    """
    args = _load_args(k, args_at, EXPAND_ARGS, ("out", "slots", "words", "inner", "columns"))
    sums, lanes = k.scratch(F32, _BLOCK), k.isa.lanes

    def body(row: Val, index: Val, entry: Val, after: Val) -> None:
        rank = k.at(entry, Field.RANK, I64)
        next_b = k.pointer(k.at(after, Field.B, I64))
        begin, width = (
            k.at(args["columns"], index * 2, I64),
            k.at(args["columns"], index * 2 + 1, I64),
        )
        out = k.offset(args["out"], row * args["ldo"] + begin, spec.storage)
        b = k.pointer(k.at(entry, Field.B, I64))
        bias = k.at(entry, Field.UP_BIAS, I64)
        inner = (row * args["num_modules"] + index) * args["max_rank"]
        inner_at = k.offset(args["inner"], inner, Storage.FLOAT32)
        first, last = _share(k, width, thread, num_threads)
        with k.otherwise(rank.equals(0)), k.range(first, last, _BLOCK) as block:
            stop = k.minimum(block + _BLOCK, last)

            def add(n: int, start: Val) -> None:
                factors = [k.splat(k.at(inner_at, start + i, F32), lanes) for i in range(n)]
                rows = [k.offset(b, (start + i) * width, spec.storage) for i in range(n)]
                own = k.offset(b, (start + n) * width, spec.storage)
                ahead = k.select(start + n < rank, own, next_b)
                with k.range(block, stop, lanes) as at:
                    total = k.load(sums, at - block, Storage.FLOAT32, lanes)
                    for i, (factor, source) in enumerate(zip(factors, rows, strict=True)):
                        k.prefetch(ahead, at + i * width, spec.storage)
                        total = k.fma(factor, k.load(source, at, spec.storage, lanes), total)
                    k.store(sums, at - block, total, Storage.FLOAT32)

            with k.range(block, stop, lanes) as at:
                k.store(sums, at - block, k.load(out, at, spec.storage, lanes), Storage.FLOAT32)
            with k.otherwise(bias.equals(0)), k.range(block, stop, lanes) as at:
                value = k.load(sums, at - block, Storage.FLOAT32, lanes)
                value = value + k.load(k.pointer(bias), at, spec.storage, lanes)
                k.store(sums, at - block, value, Storage.FLOAT32)
            with k.range(0, rank, _AT_ONCE) as start:
                count = k.minimum(rank - start, k.const(_AT_ONCE))
                k.switch(count, range(1, _AT_ONCE + 1), lambda n: add(n, start))
            with k.range(block, stop, lanes) as at:
                value = k.load(sums, at - block, Storage.FLOAT32, lanes)
                k.store(out, at, value, spec.storage)

    _each_entry(k, args, body)


def emit_scale(spec: ScaleSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """data [T, columns of M modules] *= l; arguments `SCALE_ARGS`, `field` names the vector."""
    args = _load_args(k, args_at, SCALE_ARGS, ("data", "slots", "words", "columns"))
    lanes = k.isa.lanes

    def body(row: Val, index: Val, entry: Val, _after: Val) -> None:
        begin, width = (
            k.at(args["columns"], index * 2, I64),
            k.at(args["columns"], index * 2 + 1, I64),
        )
        data = k.offset(args["data"], row * args["ldd"] + begin, spec.storage)
        vector = k.at(entry, args["field"], I64)
        first, last = _share(k, width, thread, num_threads)
        with k.otherwise(vector.equals(0)), k.range(first, last, lanes) as at:
            value = k.load(data, at, spec.storage, lanes)
            value = value * k.load(k.pointer(vector), at, spec.storage, lanes)
            k.store(data, at, value, spec.storage)

    _each_entry(k, args, body)


# ---- pieces ----


def _load_args(
    k: Builder, args_at: Val, names: Sequence[str], pointers: Sequence[str]
) -> dict[str, Val]:
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(names)}
    return args | {name: k.pointer(args[name]) for name in pointers}


def _each_entry(
    k: Builder, args: dict[str, Val], body: Callable[[Val, Val, Val, Val], None]
) -> None:
    """Emit `body(row, index of the module, its words, words after)` for rows with an adapter.

    The words after are those of the entry that comes next, so that its weights can be fetched
    ahead: each lies elsewhere, and is too short for the processor to foresee.
    """
    one, zero = k.const(1), k.const(0)

    def words_of(slot: Val, index: Val) -> Val:
        word = slot * args["slot_words"] + (args["module"] + index) * FIELDS
        return k.byte_offset(args["words"], word * 8)

    with k.range(0, args["num_rows"]) as row:
        slot = k.at(args["slots"], row, I64)
        with k.when(slot >= 0), k.range(0, args["num_modules"]) as index:
            is_last = index + one >= args["num_modules"]
            next_row = k.minimum(row + one, args["num_rows"] - one)
            next_slot = k.maximum(k.at(args["slots"], next_row, I64), zero)
            after = words_of(
                k.select(is_last, next_slot, slot), k.select(is_last, zero, index + one)
            )
            body(row, index, words_of(slot, index), after)


def _share(k: Builder, width: Val, thread: Val, num_threads: Val) -> tuple[Val, Val]:
    """This thread's columns [first, last) of a width that is a multiple of the lanes."""
    vectors = width // k.isa.lanes
    first = vectors * thread // num_threads * k.isa.lanes
    return first, vectors * (thread + 1) // num_threads * k.isa.lanes
