"""A small vector language over LLVM, in which the CPU kernels are written.

A kernel is a Python function that emits code through a `Builder`: arithmetic on `Val`s reads like
NumPy, `range` makes a loop, `load` and `store` move scalars or whole vectors. llvmlite, the code
generator under numba, compiles it in memory in about a tenth of a second, so neither a C compiler
nor a cache on disk is needed.

Why not numba itself: register blocking needs vector values that stay in registers, fused
multiply-adds and `vdpbf16ps` by name; none of them can be written there.

Every kernel has the same C signature, `void kernel(int64 *args, int64 thread, int64 num_threads)`:
see `cpu_team` for who calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
PTR = ir.PointerType()
VOID = ir.VoidType()


class _BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite does not name; only ever loaded and passed on."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


BF16 = _BFloatType()


class Storage(StrEnum):
    """Element types that kernels read and write in memory; arithmetic is always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def num_bytes(self) -> int:
        """Bytes per element."""
        return 4 if self is Storage.FLOAT32 else 2


@dataclass(frozen=True, kw_only=True)
class Isa:
    """What the kernels ask of the host processor."""

    lanes: int
    has_bf16_dot: bool
    has_amx_bf16: bool

    @staticmethod
    def detect() -> Isa:
        """Read the host's vector width and bfloat16 instructions."""
        features = llvm.get_host_cpu_features()
        has_512 = bool(features.get("avx512f") and features.get("avx512vl"))
        return Isa(
            lanes=16 if has_512 else 8 if features.get("avx2") else 4,
            has_bf16_dot=has_512 and bool(features.get("avx512bf16")),
            has_amx_bf16=bool(features.get("amx-bf16")),
        )


def vector(element: ir.Type, lanes: int) -> ir.Type:
    """The vector type of `lanes` elements; the element itself for one lane."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


class Val:
    """An SSA value with operators; Python numbers are turned into constants of its type."""

    __slots__ = ("k", "v")

    # llvmlite types the results of its own builder methods too loosely to name here.
    def __init__(self, k: Builder, v: Any) -> None:
        self.k = k
        self.v = v

    @property
    def type(self) -> ir.Type:
        """The LLVM type."""
        return self.v.type

    @property
    def lanes(self) -> int:
        """How many elements; 1 for a scalar."""
        return self.type.count if isinstance(self.type, ir.VectorType) else 1

    @property
    def is_float(self) -> bool:
        """Whether arithmetic on it is floating-point."""
        element = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        return not isinstance(element, ir.IntType)

    def _peer(self, other: Val | float) -> Any:
        if isinstance(other, Val):
            return other.v
        return self.k.const(other, self.type).v

    def _binary(self, other: Val | float, integer: str, floating: str) -> Val:
        build = getattr(self.k.b, floating if self.is_float else integer)
        return Val(self.k, build(self.v, self._peer(other)))

    def __add__(self, other: Val | float) -> Val:
        return self._binary(other, "add", "fadd")

    __radd__ = __add__

    def __sub__(self, other: Val | float) -> Val:
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: float) -> Val:
        return self.k.const(other, self.type) - self

    def __mul__(self, other: Val | float) -> Val:
        return self._binary(other, "mul", "fmul")

    __rmul__ = __mul__

    def __truediv__(self, other: Val | float) -> Val:
        return self._binary(other, "sdiv", "fdiv")

    def __floordiv__(self, other: Val | int) -> Val:
        return Val(self.k, self.k.b.udiv(self.v, self._peer(other)))

    def __mod__(self, other: Val | int) -> Val:
        return Val(self.k, self.k.b.urem(self.v, self._peer(other)))

    def __lshift__(self, other: Val | int) -> Val:
        return Val(self.k, self.k.b.shl(self.v, self._peer(other)))

    def __rshift__(self, other: Val | int) -> Val:
        return Val(self.k, self.k.b.lshr(self.v, self._peer(other)))

    def __and__(self, other: Val | int) -> Val:
        return Val(self.k, self.k.b.and_(self.v, self._peer(other)))

    def __or__(self, other: Val | int) -> Val:
        return Val(self.k, self.k.b.or_(self.v, self._peer(other)))

    def _compare(self, op: str, other: Val | float) -> Val:
        build = self.k.b.fcmp_ordered if self.is_float else self.k.b.icmp_signed
        return Val(self.k, build(op, self.v, self._peer(other)))

    def __lt__(self, other: Val | float) -> Val:
        return self._compare("<", other)

    def __le__(self, other: Val | float) -> Val:
        return self._compare("<=", other)

    def __gt__(self, other: Val | float) -> Val:
        return self._compare(">", other)

    def __ge__(self, other: Val | float) -> Val:
        return self._compare(">=", other)

    def equals(self, other: Val | float) -> Val:
        """Elementwise equality as i1."""
        return self._compare("==", other)


class Var:
    """A mutable local; LLVM turns it into a register."""

    __slots__ = ("_slot", "_type", "k")

    def __init__(self, k: Builder, init: Val) -> None:
        self.k = k
        self._type = init.type
        with k.b.goto_entry_block():
            self._slot = k.b.alloca(init.type)
        self.set(init)

    def get(self) -> Val:
        """The current value."""
        return Val(self.k, self.k.b.load(self._slot, typ=self._type))

    def set(self, value: Val | float) -> None:
        """Replace the value."""
        v = value.v if isinstance(value, Val) else self.k.const(value, self._type).v
        self.k.b.store(v, self._slot)


class Builder:
    """Emits one kernel body; `isa` says how wide its vectors are."""

    def __init__(self, b: ir.IRBuilder, isa: Isa) -> None:
        self.b = b
        self.isa = isa

    def const(self, value: float, typ: ir.Type = I64) -> Val:
        """A constant; of a vector type, in every lane."""
        if isinstance(typ, ir.VectorType):
            return Val(self, ir.Constant(typ, [ir.Constant(typ.element, value)] * typ.count))
        return Val(self, ir.Constant(typ, value))

    def zeros(self, lanes: int) -> Val:
        """A float32 vector of zeros."""
        return self.const(0.0, vector(F32, lanes))

    def var(self, init: Val) -> Var:
        """A mutable local that starts as `init`."""
        return Var(self, init)

    def scratch(self, element: ir.Type, count: int) -> Val:
        """Memory on the stack for `count` elements, private to the thread."""
        with self.b.goto_entry_block():
            memory = self.b.alloca(ir.ArrayType(element, count))
            return Val(self, self.b.inttoptr(self.b.ptrtoint(memory, I64), PTR))

    @contextmanager
    def range(self, start: Val | int, stop: Val | int, step: Val | int = 1) -> Iterator[Val]:
        """A counting loop over int64; the body is what is emitted inside the `with`."""
        first = start if isinstance(start, Val) else self.const(start)
        counter = self.var(first)
        bound = stop if isinstance(stop, Val) else self.const(stop)
        head = self.b.append_basic_block("head")
        body = self.b.append_basic_block("body")
        done = self.b.append_basic_block("done")
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch((counter.get() < bound).v, body, done)
        self.b.position_at_end(body)
        index = counter.get()
        yield index
        counter.set(index + step)
        self.b.branch(head)
        self.b.position_at_end(done)

    @contextmanager
    def when(self, condition: Val) -> Iterator[None]:
        """Emit the body of the `with` under a condition."""
        with self.b.if_then(condition.v):
            yield

    @contextmanager
    def otherwise(self, condition: Val) -> Iterator[None]:
        """Emit the body of the `with` under the negation of a condition."""
        with self.b.if_then(self.b.not_(condition.v)):
            yield

    def switch(self, value: Val, cases: Sequence[int], emit: Callable[[int], None]) -> None:
        """Emit `emit(case)` for each case and jump to the one that equals `value`."""
        done = self.b.append_basic_block("switched")
        table = self.b.switch(value.v, done)
        for case in cases:
            block = self.b.append_basic_block(f"case{case}")
            table.add_case(ir.Constant(value.type, case), block)
            self.b.position_at_end(block)
            emit(case)
            self.b.branch(done)
        self.b.position_at_end(done)

    def select(self, condition: Val, yes: Val, no: Val) -> Val:
        """Lanewise choice."""
        return Val(self, self.b.select(condition.v, yes.v, no.v))

    def minimum(self, a: Val, b: Val) -> Val:
        """The smaller of two int64."""
        return self.select(a < b, a, b)

    def maximum(self, a: Val, b: Val) -> Val:
        """The larger, of integers or (lanewise) of floats."""
        return self.select(a > b, a, b)

    def pointer(self, address: Val) -> Val:
        """An int64 address as a pointer."""
        return Val(self, self.b.inttoptr(address.v, PTR))

    def offset(self, base: Val, num_elements: Val, storage: Storage) -> Val:
        """The pointer `num_elements` behind `base`."""
        element = _ELEMENT[storage]
        return Val(self, self.b.gep(base.v, [num_elements.v], source_etype=element))

    def at(self, base: Val, index: Val | int, element: ir.Type) -> Val:
        """A scalar of any LLVM type read at `base[index]`."""
        return Val(self, self.b.load(self._gep(base, index, element), typ=element))

    def byte_offset(self, base: Val, num_bytes: Val) -> Val:
        """The pointer `num_bytes` behind `base`."""
        return Val(self, self.b.gep(base.v, [num_bytes.v], source_etype=I8))

    def copy_bytes(self, target: Val, source: Val, num_bytes: Val) -> None:
        """Copy memory that does not overlap."""
        name, module = "llvm.memcpy.p0.p0.i64", self.b.module
        callee = module.globals.get(name)
        if callee is None:
            callee = ir.Function(module, ir.FunctionType(VOID, [PTR, PTR, I64, I1]), name)
        self.b.call(callee, [target.v, source.v, num_bytes.v, ir.Constant(I1, 0)])

    def index_at(self, base: Val, index: Val | int) -> Val:
        """A non-negative int32 read at `base[index]`, as int64."""
        return Val(self, self.b.zext(self.at(base, index, I32).v, I64))

    def to_i32(self, value: Val) -> Val:
        """An int64 cut to int32."""
        return Val(self, self.b.trunc(value.v, I32))

    def iota(self, lanes: int) -> Val:
        """The int32 vector 0, 1, 2, ..."""
        numbers = [ir.Constant(I32, lane) for lane in range(lanes)]
        return Val(self, ir.Constant(vector(I32, lanes), numbers))

    def put(self, base: Val, index: Val | int, value: Val) -> None:
        """Write a scalar at `base[index]`."""
        self.b.store(value.v, self._gep(base, index, value.type))

    def _gep(self, base: Val, index: Val | int, element: ir.Type) -> ir.Value:
        at = index if isinstance(index, Val) else self.const(index)
        return self.b.gep(base.v, [at.v], source_etype=element)

    def load(self, base: Val, index: Val | int, storage: Storage, lanes: int) -> Val:
        """`lanes` elements from `base[index]`, as float32."""
        element = _ELEMENT[storage]
        where = self._gep(base, index, element)
        raw_type = vector(I16 if storage is Storage.BFLOAT16 else element, lanes)
        raw = Val(self, self.b.load(where, align=storage.num_bytes, typ=raw_type))
        return self._widened(raw, storage)

    def load_some(self, base: Val, index: Val | int, storage: Storage, count: Val) -> Val:
        """A vector whose first `count` elements are read, as float32; zero behind them.

        `count` may be negative, or more than the lanes. Memory behind it is not touched.
        """
        where, lanes = Val(self, self._gep(base, index, _ELEMENT[storage])), self.isa.lanes
        raw_type = vector(_ELEMENT[storage], lanes)
        zeros = Val(self, ir.Constant(raw_type, None))
        name = f"llvm.masked.load.v{lanes}{_SUFFIX[storage]}.p0"
        align, mask = self.const(storage.num_bytes, I32), self._first(count)
        return self._widened(self.call(name, raw_type, where, align, mask, zeros), storage)

    def _first(self, count: Val) -> Val:
        """Which lanes come before `count`."""
        lanes = self.isa.lanes
        return self.iota(lanes) < self.splat(self.to_i32(count), lanes)

    def _widened(self, raw: Val, storage: Storage) -> Val:
        lanes = raw.lanes
        if storage is Storage.FLOAT32:
            return raw
        if storage is Storage.FLOAT16:
            return Val(self, self.b.fpext(raw.v, vector(F32, lanes)))
        wide = Val(self, self.b.zext(raw.v, vector(I32, lanes))) << 16
        return self.bitcast(wide, vector(F32, lanes))

    def load_raw(self, base: Val, index: Val | int, element: ir.Type, lanes: int) -> Val:
        """`lanes` elements from `base[index]` without conversion, aligned to two bytes at least."""
        where = self._gep(base, index, element)
        return Val(self, self.b.load(where, align=2, typ=vector(element, lanes)))

    def prefetch(self, base: Val, index: Val, storage: Storage, near: int = 3) -> None:
        """Ask for the cache line of `base[index]`; any address is allowed.

        `near`: 3 for the first-level cache, 2 for the second.
        """
        where = Val(self, self._gep(base, index, _ELEMENT[storage]))
        read, keep, data = (self.const(n, I32) for n in (0, near, 1))
        module = self.b.module
        name = "llvm.prefetch.p0"
        callee = module.globals.get(name)
        if callee is None:
            callee = ir.Function(module, ir.FunctionType(VOID, [PTR, I32, I32, I32]), name)
        self.b.call(callee, [where.v, read.v, keep.v, data.v])

    def store(self, base: Val, index: Val | int, value: Val, storage: Storage) -> None:
        """Write a float32 vector to `base[index]`, rounded to nearest even where narrower."""
        where = self._gep(base, index, _ELEMENT[storage])
        raw = self._narrowed(value, storage)
        self.b.store(raw.v, where, align=storage.num_bytes)

    def store_some(
        self, base: Val, index: Val | int, value: Val, storage: Storage, count: Val
    ) -> None:
        """Write the first `count` elements of a whole vector, rounded as by `store`."""
        where = Val(self, self._gep(base, index, _ELEMENT[storage]))
        name = f"llvm.masked.store.v{value.lanes}{_SUFFIX[storage]}.p0"
        align, mask = self.const(storage.num_bytes, I32), self._first(count)
        self.call(name, VOID, self._narrowed(value, storage), where, align, mask)

    def _narrowed(self, value: Val, storage: Storage) -> Val:
        if storage is Storage.FLOAT16:
            return Val(self, self.b.fptrunc(value.v, vector(F16, value.lanes)))
        if storage is Storage.BFLOAT16:
            return self._to_bf16_bits(value, value.lanes)
        return value

    def _to_bf16_bits(self, value: Val, lanes: int) -> Val:
        bits = self.bitcast(value, vector(I32, lanes))
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding could carry a NaN's payload into infinity; a NaN keeps its own quiet pattern.
        quiet = (bits >> 16) | 0x40
        is_nan = Val(self, self.b.fcmp_unordered("uno", value.v, value.v))
        return Val(self, self.b.trunc(self.select(is_nan, quiet, rounded).v, vector(I16, lanes)))

    def bitcast(self, value: Val, typ: ir.Type) -> Val:
        """The same bits as another type."""
        return Val(self, self.b.bitcast(value.v, typ))

    def splat(self, scalar: Val, lanes: int) -> Val:
        """A scalar in every lane."""
        if lanes == 1:
            return scalar
        typ = vector(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(typ, ir.Undefined), scalar.v, ir.Constant(I32, 0))
        mask = ir.Constant(vector(I32, lanes), [ir.Constant(I32, 0)] * lanes)
        return Val(self, self.b.shuffle_vector(one, ir.Constant(typ, ir.Undefined), mask))

    def shuffle(self, a: Val, b: Val, lanes: Sequence[int]) -> Val:
        """Lanes of `a` followed by `b`, by index."""
        mask = ir.Constant(vector(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
        return Val(self, self.b.shuffle_vector(a.v, b.v, mask))

    def lane(self, value: Val, index: int) -> Val:
        """One lane of a vector."""
        return Val(self, self.b.extract_element(value.v, ir.Constant(I32, index)))

    def call(self, name: str, result: ir.Type, *args: Val) -> Val:
        """Call an LLVM intrinsic or an external symbol."""
        module = self.b.module
        callee = module.globals.get(name)
        if callee is None:
            callee = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
        return Val(self, self.b.call(callee, [a.v for a in args]))

    def fma(self, a: Val, b: Val, c: Val) -> Val:
        """a * b + c with one rounding."""
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{suffix}", a.type, a, b, c)

    def bf16_dot(self, acc: Val, a: Val, b: Val) -> Val:
        """acc[i] += a[2i]·b[2i] + a[2i+1]·b[2i+1] over raw bfloat16 vectors of twice the lanes."""
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", acc.type, acc, a, b)

    def sqrt(self, x: Val) -> Val:
        """The square root of a float32 scalar."""
        return self.call("llvm.sqrt.f32", x.type, x)

    def to_float(self, value: Val) -> Val:
        """An int64 as float32."""
        return Val(self, self.b.sitofp(value.v, F32))

    def round_to(self, value: Val, storage: Storage) -> Val:
        """The float32 values that `storage` can hold nearest to these."""
        lanes = value.lanes
        if storage is Storage.FLOAT32:
            return value
        if storage is Storage.FLOAT16:
            narrow = self.b.fptrunc(value.v, vector(F16, lanes))
            return Val(self, self.b.fpext(narrow, vector(F32, lanes)))
        bits = self._to_bf16_bits(value, lanes)
        wide = Val(self, self.b.zext(bits.v, vector(I32, lanes))) << 16
        return self.bitcast(wide, value.type)

    def sum_lanes(self, value: Val) -> Val:
        """The sum over the lanes, by halving: the order does not depend on the compiler."""
        return self._reduce_lanes(value, lambda a, b: a + b)

    def max_lanes(self, value: Val) -> Val:
        """The largest lane."""
        return self._reduce_lanes(value, self.maximum)

    def _reduce_lanes(self, value: Val, combine: Callable[[Val, Val], Val]) -> Val:
        lanes = value.lanes
        if lanes == 1:
            return value
        while lanes > 2:
            half = lanes // 2
            low = self.shuffle(value, value, range(half))
            value = combine(low, self.shuffle(value, value, range(half, lanes)))
            lanes = half
        return combine(self.lane(value, 0), self.lane(value, 1))

    def exp(self, x: Val) -> Val:
        """eˣ in float32 to about 2 ulp; below -87 it is 0, above 88 it stays at e⁸⁸."""
        is_tiny = x < -87.0
        x = self.select(x > 88.0, self.const(88.0, x.type), x)
        x = self.select(is_tiny, self.const(-87.0, x.type), x)
        return self.select(is_tiny, self.const(0.0, x.type), self._exp_in_range(x))

    def exp_of_negative(self, x: Val) -> Val:
        """eˣ for x up to 0, or a rounding above it; below -87 it stays at e⁻⁸⁷."""
        lowest = self.const(-87.0, x.type)
        return self._exp_in_range(self.select(x < -87.0, lowest, x))

    def _exp_in_range(self, x: Val) -> Val:
        lanes = x.lanes
        suffix = f"v{lanes}f32" if lanes > 1 else "f32"
        n = self.call(f"llvm.nearbyint.{suffix}", x.type, x * 1.4426950408889634)
        # ln 2 in two parts keeps the reduced argument exact (Cody and Waite).
        r = self.fma(n, self.const(-0.693359375, x.type), x)
        r = self.fma(n, self.const(2.12194440e-4, x.type), r)
        p = self.const(1.9875691500e-4, x.type)
        for c in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ):
            p = self.fma(p, r, self.const(c, x.type))
        p = self.fma(p, r * r, r + 1.0)
        exponent = Val(self, self.b.fptosi(n.v, vector(I32, lanes)))
        return p * self.bitcast((exponent + 127) << 23, x.type)

    def silu(self, x: Val) -> Val:
        """x / (1 + e⁻ˣ)."""
        return x / (self.exp(self.const(0.0, x.type) - x) + 1.0)


_ELEMENT: dict[Storage, ir.Type] = {
    Storage.FLOAT32: F32,
    Storage.BFLOAT16: I16,
    Storage.FLOAT16: F16,
}
_SUFFIX = {Storage.FLOAT32: "f32", Storage.BFLOAT16: "i16", Storage.FLOAT16: "f16"}


def define_kernel(
    module: ir.Module, name: str, isa: Isa, emit: Callable[[Builder, Val, Val, Val], None]
) -> None:
    """Add `void name(args*, thread, num_threads)` to the module, its body made by `emit`."""
    function = ir.Function(module, ir.FunctionType(VOID, [PTR, I64, I64]), name)
    block = ir.IRBuilder(function.append_basic_block("entry"))
    k = Builder(block, isa)
    args, thread, num_threads = (Val(k, a) for a in function.args)
    emit(k, args, thread, num_threads)
    block.ret_void()
