"""Emits the row-wise kernels of finetuning's backward pass: each reads and writes its rows once.

Shape legend: T rows, F features, V vocabulary, H heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.model.kernels.cpu_ir import F16, F32, I16, I32, I64, Builder, Storage, Val, vector

NORM_BACKWARD_ARGS = (
    "dy",
    "dy_stride",
    "x",
    "x_stride",
    "weight",
    "residual",
    "residual_stride",
    "out",
    "num_rows",
    "size",
    "eps_bits",
)
SILU_BACKWARD_ARGS = (
    "d_act",
    "d_act_stride",
    "gate",
    "gate_stride",
    "up",
    "up_stride",
    "out",
    "num_rows",
    "size",
)
TURN_ARGS = (
    "x",
    "token_stride",
    "head_stride",
    "cos",
    "sin",
    "turn_stride",
    "out",
    "out_stride",
    "num_rows",
    "num_heads",
)
LOSS_ARGS = (
    "logits",
    "stride",
    "labels",
    "losses",
    "sums",
    "num_rows",
    "size",
    "wants_gradient",
    "scratch",
)
_F32 = Storage.FLOAT32
_LOWEST = -3.0e38


@dataclass(frozen=True, kw_only=True)
class NormBackwardSpec:
    """residual + the gradient of an RMS norm at its input."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"rms_norm_backward_{self.storage}"

    @property
    def variants(self) -> tuple[NormBackwardSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_norm_backward(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class SiluBackwardSpec:
    """The gradients of silu(gate) · up at both, side by side."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"silu_mul_backward_{self.storage}"

    @property
    def variants(self) -> tuple[SiluBackwardSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_silu_backward(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class TurnSpec:
    """Rotary embedding of heads, or with `is_backward` its transposed."""

    source: Storage
    turns: Storage
    """Of cos, sin, and the result."""
    head_dim: int
    is_backward: bool

    @property
    def name(self) -> str:
        """A C identifier."""
        back = "_backward" if self.is_backward else ""
        return f"turn_{self.source}_{self.turns}_d{self.head_dim}{back}"

    @property
    def variants(self) -> tuple[TurnSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_turn(self, k, args, thread, num_threads)


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """Cross-entropy, and its gradient in the place of the logits."""

    storage: Storage

    @property
    def name(self) -> str:
        """A C identifier."""
        return f"cross_entropy_{self.storage}"

    @property
    def variants(self) -> tuple[LossSpec, ...]:
        """This one alone."""
        return (self,)

    def emit(self, k: Builder, args: Val, thread: Val, num_threads: Val) -> None:
        """Write the body."""
        emit_loss(self, k, args, thread, num_threads)


def _load_args(k: Builder, args_at: Val, names: tuple[str, ...], pointers: str) -> dict[str, Val]:
    args = {name: k.at(args_at, i, I64) for i, name in enumerate(names)}
    return args | {name: k.pointer(args[name]) for name in pointers.split()}


def emit_norm_backward(
    spec: NormBackwardSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val
) -> None:
    """out [T, size] = residual + d(x / rms(x) · weight); arguments `NORM_BACKWARD_ARGS`.

    `size` is a multiple of the vector width.
    """
    args = _load_args(k, args_at, NORM_BACKWARD_ARGS, "dy x weight residual out")
    eps = k.at(args_at, 2 * NORM_BACKWARD_ARGS.index("eps_bits"), F32)
    lanes, size, storage = k.isa.lanes, args["size"], spec.storage
    with k.range(thread, args["num_rows"], num_threads) as row:
        x, dy, residual = (
            k.offset(args[name], row * args[f"{name}_stride"], storage)
            for name in ("x", "dy", "residual")
        )
        squares, products = k.var(k.zeros(lanes)), k.var(k.zeros(lanes))
        with k.range(0, size, lanes) as at:
            value = k.load(x, at, storage, lanes)
            dx = k.load(dy, at, storage, lanes) * k.load(args["weight"], at, storage, lanes)
            squares.set(k.fma(value, value, squares.get()))
            products.set(k.fma(value, dx, products.get()))
        num = k.to_float(size)
        scale = k.const(1.0, F32) / k.sqrt(k.sum_lanes(squares.get()) / num + eps)
        share = k.sum_lanes(products.get()) / num * scale * scale
        scale, share = k.splat(scale, lanes), k.splat(k.const(0.0, F32) - share, lanes)
        with k.range(0, size, lanes) as at:
            value = k.load(x, at, storage, lanes)
            dx = k.load(dy, at, storage, lanes) * k.load(args["weight"], at, storage, lanes)
            dx = k.fma(value, share, dx)
            dx = k.fma(dx, scale, k.load(residual, at, storage, lanes))
            k.store(args["out"], row * size + at, dx, storage)


def emit_silu_backward(
    spec: SiluBackwardSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val
) -> None:
    """out [T, 2 size] = gradients at gate and at up; arguments `SILU_BACKWARD_ARGS`.

    `size` is a multiple of the vector width.
    """
    args = _load_args(k, args_at, SILU_BACKWARD_ARGS, "d_act gate up out")
    lanes, size, storage = k.isa.lanes, args["size"], spec.storage
    with k.range(thread, args["num_rows"], num_threads) as row:
        d_act, gate, up = (
            k.offset(args[name], row * args[f"{name}_stride"], storage)
            for name in ("d_act", "gate", "up")
        )
        out = k.offset(args["out"], row * size * 2, storage)
        with k.range(0, size, lanes) as at:
            d, g = k.load(d_act, at, storage, lanes), k.load(gate, at, storage, lanes)
            one = k.const(1.0, g.type)
            share = one / (k.exp(k.const(0.0, g.type) - g) + 1.0)
            slope = k.fma(g, one - share, one) * share
            k.store(out, at, d * k.load(up, at, storage, lanes) * slope, storage)
            k.store(out, size + at, d * (g * share), storage)


def emit_turn(spec: TurnSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """out [T, H D], heads neighbours, from x [T, H, D]; arguments `TURN_ARGS`.

    cos and sin are [T, D / 2] by rows of `turn_stride`; pairs are (i, i + D / 2).
    """
    args = _load_args(k, args_at, TURN_ARGS, "x cos sin out")
    half = spec.head_dim // 2
    lanes = k.isa.lanes
    while half % lanes:
        lanes //= 2
    num_items = args["num_rows"] * args["num_heads"]
    with k.range(thread, num_items, num_threads) as item:
        token, head = item // args["num_heads"], item % args["num_heads"]
        place = token * args["token_stride"] + head * args["head_stride"]
        x = k.offset(args["x"], place, spec.source)
        place = token * args["out_stride"] + head * spec.head_dim
        out = k.offset(args["out"], place, spec.turns)
        for i in range(0, half, lanes):
            low = k.load(x, i, spec.source, lanes)
            high = k.load(x, i + half, spec.source, lanes)
            at = token * args["turn_stride"] + i
            cos = k.load(args["cos"], at, spec.turns, lanes)
            sin = k.load(args["sin"], at, spec.turns, lanes)
            zero = k.const(0.0, sin.type)
            if spec.is_backward:
                sin = zero - sin
            k.store(out, i, k.fma(low, cos, zero - high * sin), spec.turns)
            k.store(out, i + half, k.fma(high, cos, low * sin), spec.turns)


def emit_loss(spec: LossSpec, k: Builder, args_at: Val, thread: Val, num_threads: Val) -> None:
    """losses [T] + log sums [T] is the cross-entropy of logits [T, V]; arguments `LOSS_ARGS`.

    With `wants_gradient` the logits become probabilities less 1 at the label. `labels` are int64;
    `scratch` holds V float32 for each thread; V is a multiple of the vector width.
    """
    args = _load_args(k, args_at, LOSS_ARGS, "logits labels losses sums scratch")
    lanes, size, storage = k.isa.lanes, args["size"], spec.storage
    weights = k.offset(args["scratch"], thread * size, _F32)
    with k.range(thread, args["num_rows"], num_threads) as row:
        logits = k.offset(args["logits"], row * args["stride"], storage)
        label = k.at(args["labels"], row, I64)
        picked = _load_one(k, logits, label, storage)
        top_v = k.var(k.const(_LOWEST, vector(F32, lanes)))
        with k.range(0, size, lanes) as at:
            top_v.set(k.maximum(top_v.get(), k.load(logits, at, storage, lanes)))
        top = k.max_lanes(top_v.get())
        total = k.var(k.zeros(lanes))
        with k.range(0, size, lanes) as at:
            weight = k.exp_of_negative(k.load(logits, at, storage, lanes) - k.splat(top, lanes))
            total.set(total.get() + weight)
            k.store(weights, at, weight, _F32)
        summed = k.sum_lanes(total.get())
        k.put(args["losses"], row, top - picked)
        k.put(args["sums"], row, summed)
        with k.when(args["wants_gradient"] > 0):
            inverse = k.const(1.0, F32) / summed
            with k.range(0, size, lanes) as at:
                prob = k.load(weights, at, _F32, lanes) * k.splat(inverse, lanes)
                k.store(logits, at, prob, storage)
            at_label = k.at(weights, label, F32) * inverse - 1.0
            k.store(logits, label, at_label, storage)


def _load_one(k: Builder, base: Val, index: Val, storage: Storage) -> Val:
    """One element as float32."""
    if storage is Storage.FLOAT32:
        return k.at(base, index, F32)
    if storage is Storage.FLOAT16:
        return Val(k, k.b.fpext(k.at(base, index, F16).v, F32))
    wide = Val(k, k.b.zext(k.at(base, index, I16).v, I32)) << 16
    return k.bitcast(wide, F32)
