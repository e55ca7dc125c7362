"""The operator graph of one decoder layer with its bypasses, to decide what backward needs.

An operator says what each of its backward operators reads: the gradient of an input may need other
forward tensors (attention) or none (a frozen linear, a residual), and so may the gradient of a
trainable weight. `pruning` works on nothing else. The table is that of FlexLLM (arXiv 2402.18789
§5.2), per operator for a frozen backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weft.base.errors import GraphError
from weft.graph.adapter_spec import BypassTarget, LayerWidths, Module

LAYER_INPUT = "layer_input"
LAYER_OUTPUT = "layer_output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """Forward tensors that one backward operator reads."""

    values: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    """Of these only the sign of each element (ReLU)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOp:
    """One forward operator and its backward operators."""

    name: str
    output: str
    input_grads: Mapping[str, Reads]
    """Each input, and what the operator for its gradient reads."""
    weight_grads: Mapping[str, Reads] = field(default_factory=dict[str, Reads])
    """Each trainable weight, and what the operator for its gradient reads."""
    is_cheap: bool = False
    """Element-wise, a norm, or a product of a bypass's rank: worth computing twice."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Forward tensors that it reads, weights apart."""
        return tuple(self.input_grads)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGraph:
    """Operators in the order of the forward, and the width of each tensor."""

    ops: tuple[LayerOp, ...]
    widths: Mapping[str, int]
    """Elements per token."""
    in_pages: frozenset[str]
    """Tensors that the KV cache holds anyhow."""

    @property
    def trainable(self) -> tuple[str, ...]:
        """Weights that have a gradient operator."""
        return tuple(weight for op in self.ops for weight in op.weight_grads)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """What varies between decoder families."""

    widths: LayerWidths
    qk_norm: bool = False
    gated: bool = True
    """SwiGLU; False is a plain ReLU feed-forward block (OPT)."""


def low_rank(module: Module) -> str:
    """Name of the tensor inside a LoRA or a bottleneck: the rank-wide product."""
    return f"low_rank:{module}"


def bypass_raw(module: Module) -> str:
    """Name of a module's output before its (IA)³ scale or its bottleneck is applied."""
    return f"raw:{module}"


def build_layer_graph(options: LayerOptions, targets: Sequence[BypassTarget] = ()) -> LayerGraph:
    """The operators of one layer whose bypasses are `targets` (all of the same layer).

    Raises:
        GraphError: targets of several layers, or two on one module.
    """
    if len({target.layer for target in targets}) > 1:
        raise GraphError("bypass targets of several layers cannot share one layer's graph")
    by_module = {target.module: target for target in targets}
    if len(by_module) != len(targets):
        raise GraphError("two bypasses on one module of a layer; merge them into one")
    builder = _Builder(options, by_module)
    builder.attention()
    builder.feed_forward()
    return LayerGraph(
        ops=tuple(builder.ops),
        widths=builder.widths,
        in_pages=frozenset(("keys", "values")),
    )


class _Builder:
    def __init__(self, options: LayerOptions, targets: Mapping[Module, BypassTarget]) -> None:
        self._options = options
        self._targets = targets
        self.ops: list[LayerOp] = []
        self.widths: dict[str, int] = {LAYER_INPUT: options.widths.hidden}

    def attention(self) -> None:
        sizes = self._options.widths
        self._norm("attn_norm", LAYER_INPUT, "attn_normed", sizes.hidden)
        query = "query_raw" if self._options.qk_norm else "query_flat"
        key = "key_raw" if self._options.qk_norm else "key_flat"
        self._linear(Module.Q_PROJ, "attn_normed", query, sizes.query)
        self._linear(Module.K_PROJ, "attn_normed", key, sizes.kv)
        self._linear(Module.V_PROJ, "attn_normed", "values", sizes.kv)
        if self._options.qk_norm:
            self._norm("q_norm", query, "query_flat", sizes.query)
            self._norm("k_norm", key, "key_flat", sizes.kv)
        # Turning a gradient back needs the positions only.
        self._elementwise("rope_query", {"query_flat": Reads()}, "query", sizes.query)
        self._elementwise("rope_key", {"key_flat": Reads()}, "keys", sizes.kv)
        # The probabilities are computed again from queries and keys.
        scores = Reads(values=("query", "keys", "values"))
        self._op(
            "attention",
            {"query": scores, "keys": scores, "values": Reads(values=("query", "keys"))},
            "attn_out",
            sizes.query,
        )
        self._linear(Module.O_PROJ, "attn_out", "attn_sub", sizes.hidden, Module.SELF_ATTN)
        self._residual(LAYER_INPUT, "attn_sub", "mlp_input")

    def feed_forward(self) -> None:
        sizes = self._options.widths
        self._norm("mlp_norm", "mlp_input", "mlp_normed", sizes.hidden)
        if self._options.gated:
            self._linear(Module.GATE_PROJ, "mlp_normed", "gate", sizes.ffn)
            self._linear(Module.UP_PROJ, "mlp_normed", "up", sizes.ffn)
            reads = {"gate": Reads(values=("gate", "up")), "up": Reads(values=("gate",))}
        else:
            self._linear(Module.UP_PROJ, "mlp_normed", "up", sizes.ffn)
            reads = {"up": Reads(signs=("act",))}
        self._elementwise("activation", reads, "act", sizes.ffn)
        self._linear(Module.DOWN_PROJ, "act", "mlp_sub", sizes.hidden, Module.MLP)
        self._residual("mlp_input", "mlp_sub", LAYER_OUTPUT)

    # ---- pieces ----

    def _op(
        self,
        name: str,
        input_grads: Mapping[str, Reads],
        output: str,
        width: int,
        *,
        weight_grads: Mapping[str, Reads] | None = None,
        is_cheap: bool = False,
    ) -> None:
        self.ops.append(
            LayerOp(
                name=name,
                output=output,
                input_grads=input_grads,
                weight_grads=weight_grads or {},
                is_cheap=is_cheap,
            )
        )
        self.widths[output] = width

    def _elementwise(
        self, name: str, input_grads: Mapping[str, Reads], output: str, width: int
    ) -> None:
        self._op(name, input_grads, output, width, is_cheap=True)

    def _norm(self, name: str, source: str, output: str, width: int) -> None:
        # The root mean square is one number a token: it is computed again.
        self._elementwise(name, {source: Reads(values=(source,))}, output, width)

    def _residual(self, base: str, addend: str, output: str) -> None:
        width = self._options.widths.hidden
        self._elementwise(f"add:{addend}", {base: Reads(), addend: Reads()}, output, width)

    def _linear(
        self,
        module: Module,
        source: str,
        output: str,
        width: int,
        sub_layer: Module | None = None,
    ) -> None:
        """A frozen linear with the bypasses of its module and, at its end, of its sub-layer."""
        target = self._targets.get(module)
        bottleneck = self._targets.get(sub_layer) if sub_layer else None
        raw = output if bottleneck is None or sub_layer is None else bypass_raw(sub_layer)
        if target is None:
            self._op(module, {source: Reads()}, raw, width)
        elif target.rank:
            self._lora(target, source, raw, width)
        elif target.scales_input:
            scaled = f"scaled:{module}"
            self._scale(target, source, scaled, self.widths[source])
            self._op(module, {scaled: Reads()}, raw, width)
        else:
            unscaled = bypass_raw(module)
            self._op(module, {source: Reads()}, unscaled, width)
            self._scale(target, unscaled, raw, width)
        if bottleneck is not None:
            self._bottleneck(bottleneck, raw, output)

    def _scale(self, target: BypassTarget, source: str, output: str, width: int) -> None:
        self._op(
            f"ia3:{target.module}",
            {source: Reads()},
            output,
            width,
            weight_grads={f"{target.module}.l": Reads(values=(source,))},
            is_cheap=True,
        )

    def _lora(self, target: BypassTarget, source: str, output: str, width: int) -> None:
        inner = low_rank(target.module)
        self._op(
            f"{target.module}.lora_A",
            {source: Reads()},
            inner,
            target.rank,
            weight_grads={f"{target.module}.A": Reads(values=(source,))},
            is_cheap=True,
        )
        self._op(
            target.module,
            {source: Reads(), inner: Reads()},
            output,
            width,
            weight_grads={f"{target.module}.B": Reads(values=(inner,))},
        )

    def _bottleneck(self, target: BypassTarget, source: str, output: str) -> None:
        inner, active = low_rank(target.module), f"active:{target.module}"
        self._op(
            f"{target.module}.down",
            {source: Reads()},
            inner,
            target.rank,
            weight_grads={f"{target.module}.down": Reads(values=(source,))},
            is_cheap=True,
        )
        # Whatever the activation, the rank-wide tensor is small and comes back from `source`.
        self._elementwise(
            f"{target.module}.activation", {inner: Reads(values=(inner,))}, active, target.rank
        )
        self._op(
            f"{target.module}.up",
            {source: Reads(), active: Reads()},
            output,
            self._options.widths.hidden,
            weight_grads={f"{target.module}.up": Reads(values=(active,))},
            is_cheap=True,
        )
