"""Emits the small row-wise kernels: RMS norm, and RoPE fused with the writes to the KV arena.

Shape legend: T tokens, D head_dim, Hq query heads, H key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.model.kernels.cpu_ir import F32, I64, Builder, Storage, Val

GATHER_ARGS = ("table", "table_stride_bytes", "ids", "out", "num_rows", "row_bytes")
NORM_ARGS = ("x", "x_stride", "weight", "out", "num_rows", "size", "eps_bits")
SILU_MUL_ARGS = ("gate_up", "stride", "out", "num_rows", "size")
ROPE_ARGS = (
    "qkv",
    "qkv_stride",
    "cos",
    "sin",
    "turn_stride",
    "keys",
    "values",
    "page_stride",
    "slots",
    "num_tokens",
    "num_heads",
    "num_kv_heads",
    "page_tokens",
    "query_norm",
    "key_norm",
    "eps_bits",
)


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """One variant of the RMS norm."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"rms_norm_{self.storage}"

    @property
    def variants(self) -> tuple[NormSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_rms_norm(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One variant of RoPE and KV write; `has_norms`: heads are RMS-normed before they turn."""

    storage: Storage
    head_dim: int
    has_norms: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"rope_{self.storage}_d{self.head_dim}" + ("_norms" if self.has_norms else "")

    @property
    def variants(self) -> tuple[RopeSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_rope(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class SiluMulSpec:
    """One variant of silu(gate) · up."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"silu_mul_{self.storage}"

    @property
    def variants(self) -> tuple[SiluMulSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_silu_mul(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class GatherSpec:
    """Rows of bytes by int64 index; there is one variant."""

    name: str = "gather"

    @property
    def variants(self) -> tuple[GatherSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_gather(self, k, args, thread, num_threads)


def emit_gather(spec: GatherSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """out[i] = table[ids[i]] for rows of `row_bytes`; arguments `GATHER_ARGS`."""
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(GATHER_ARGS)}
    table, ids, out = (k.pointer(args[name]) for name in ("table", "ids", "out"))
    with k.range(thread, args["num_rows"], num_threads) as row:
        source = k.byte_offset(table, k.at(ids, row, I64) * args["table_stride_bytes"])
        k.copy_bytes(k.byte_offset(out, row * args["row_bytes"]), source, args["row_bytes"])


def emit_rms_norm(spec: NormSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """out [T, size] = x / rms(x) · weight; arguments `NORM_ARGS`, eps as float32 bits."""
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(NORM_ARGS)}
    eps = k.at(args_at, 2 * NORM_ARGS.index("eps_bits"), F32)
    x, weight, out = (k.pointer(args[name]) for name in ("x", "weight", "out"))
    lanes, size = k.isa.lanes, args["size"]
    with k.range(thread, args["num_rows"], num_threads) as row:
        total = k.var(k.zeros(lanes))
        with k.range(0, size, lanes) as at:
            value = k.load(x, row * args["x_stride"] + at, spec.storage, lanes)
            total.set(k.fma(value, value, total.get()))
        mean = k.sum_lanes(total.get()) / k.to_float(size)
        scale = k.splat(k.const(1.0, F32) / k.sqrt(mean + eps), lanes)
        with k.range(0, size, lanes) as at:
            value = k.load(x, row * args["x_stride"] + at, spec.storage, lanes) * scale
            value = k.round_to(value, spec.storage) * k.load(weight, at, spec.storage, lanes)
            k.store(out, row * size + at, value, spec.storage)


def emit_silu_mul(
    spec: SiluMulSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val
) -> None:
    """out [T, size] = silu(gate) · up for gate_up [T, 2 size]; arguments `SILU_MUL_ARGS`.

    `size` is at least the vector width.
    """
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(SILU_MUL_ARGS)}
    source, out = k.pointer(args["gate_up"]), k.pointer(args["out"])
    lanes, size = k.isa.lanes, args["size"]
    with k.range(thread, args["num_rows"], num_threads) as row:
        gate = k.offset(source, row * args["stride"], spec.storage)
        up, target = k.offset(gate, size, spec.storage), k.offset(out, row * size, spec.storage)
        with k.range(0, size, lanes) as start:
            # The last vector is pulled back to end with the row; what overlaps is made twice.
            at = k.minimum(start, size - lanes)
            value = k.silu(k.load(gate, at, spec.storage, lanes))
            value = value * k.load(up, at, spec.storage, lanes)
            k.store(target, at, value, spec.storage)


def emit_rope(spec: RopeSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """Turn queries in place, write turned keys and plain values to their slots of the arena.

    Arguments `ROPE_ARGS`: qkv [T, (Hq + 2H) D]; cos and sin [T, D/2] by rows of `turn_stride`;
    slots int64 [T], page · page_tokens + offset. A pair is (i, i + D/2), as in transformers.
    """
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(ROPE_ARGS)}
    pointers = ("qkv", "cos", "sin", "keys", "values", "slots", "query_norm", "key_norm")
    for name in pointers:
        args[name] = k.pointer(args[name])
    args["eps"] = k.at(args_at, 2 * ROPE_ARGS.index("eps_bits"), F32)
    num_heads, num_kv_heads = args["num_heads"], args["num_kv_heads"]
    heads_per_token = num_heads + num_kv_heads * 2
    num_items = args["num_tokens"] * heads_per_token
    with k.range(thread, num_items, num_threads) as item:
        token, head = item // heads_per_token, item % heads_per_token
        source = k.offset(
            args["qkv"], token * args["qkv_stride"] + head * spec.head_dim, spec.storage
        )
        slot = k.at(args["slots"], token, I64)
        page, offset = slot // args["page_tokens"], slot % args["page_tokens"]

        def in_page(kv_head: Val, page: Val = page, offset: Val = offset) -> Val:
            inside = (kv_head * args["page_tokens"] + offset) * spec.head_dim
            return page * args["page_stride"] + inside

        is_query = head < num_heads
        is_key = head < num_heads + num_kv_heads
        with k.when(is_query):
            _emit_turn(k, spec, args, token, source, source, "query_norm")
        with k.otherwise(is_query), k.when(is_key):
            target = k.offset(args["keys"], in_page(head - num_heads), spec.storage)
            _emit_turn(k, spec, args, token, source, target, "key_norm")
        with k.otherwise(is_key):
            at = in_page(head - num_heads - num_kv_heads)
            target = k.offset(args["values"], at, spec.storage)
            lanes = _lanes(k, spec.head_dim)
            for i in range(0, spec.head_dim, lanes):
                k.store(target, i, k.load(source, i, spec.storage, lanes), spec.storage)


def _lanes(k: Builder, size: int) -> int:
    """The widest vector that divides `size`."""
    lanes = k.isa.lanes
    while size % lanes:
        lanes //= 2
    return lanes


def _emit_turn(
    k: Builder,
    spec: RopeSpec,
    args: dict[str, Val],
    token: Val,
    source: Val,
    target: Val,
    norm: str,
) -> None:
    half = spec.head_dim // 2
    lanes = _lanes(k, half)
    starts = range(0, half, lanes)
    low = [k.load(source, i, spec.storage, lanes) for i in starts]
    high = [k.load(source, i + half, spec.storage, lanes) for i in starts]
    if spec.has_norms:
        total = k.zeros(lanes)
        for value in low + high:
            total = k.fma(value, value, total)
        mean = k.sum_lanes(total) / float(spec.head_dim)
        scale = k.splat(k.const(1.0, F32) / k.sqrt(mean + args["eps"]), lanes)
        for values, shift in ((low, 0), (high, half)):
            for n, i in enumerate(starts):
                weight = k.load(args[norm], i + shift, spec.storage, lanes)
                values[n] = k.round_to(values[n] * scale, spec.storage) * weight
    for n, i in enumerate(starts):
        at = token * args["turn_stride"] + i
        cos = k.load(args["cos"], at, spec.storage, lanes)
        sin = k.load(args["sin"], at, spec.storage, lanes)
        zero = k.const(0.0, low[n].type)
        k.store(target, i, k.fma(low[n], cos, zero - high[n] * sin), spec.storage)
        k.store(target, i + half, k.fma(high[n], cos, low[n] * sin), spec.storage)
