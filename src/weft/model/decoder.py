"""The one decoder: Llama, Mistral, Qwen2 and Qwen3 are its named variations.

Shape legend: T tokens of an iteration, M rows that need logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from weft.graph.adapter_spec import Module
from weft.graph.layer_graph import LAYER_INPUT
from weft.model.adapters.bypass import BypassedLayer
from weft.model.adapters.table import Linear
from weft.model.adapters.weights import layer_widths
from weft.model.config import ModelConfig
from weft.model.forward_step import ForwardStep, KvLayer, RopeRows, Taps
from weft.model.kernels.interface import AttentionShape, HeadNorms, Kernels
from weft.model.rope import RopeTable
from weft.model.weights import DecoderWeights, LayerWeights


def attention_shape(config: ModelConfig) -> AttentionShape:
    """The heads of a model's layers."""
    return AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
    )


class Decoder:
    """Runs the tokens of an iteration, of any sequences, through the layers."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        kernels: Kernels,
        rope: RopeTable,
        layer_groups: Sequence[int],
    ) -> None:
        """`layer_groups` holds the cache group of each layer."""
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self.rope = rope
        self._groups = tuple(layer_groups)
        self._eps = config.rms_norm_eps
        self._norms = tuple(_head_norms(layer) for layer in weights.layers)
        self._linears = _Linears.of(config)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [T] to hidden states [T, hidden]."""
        return self.weights.embedding.rows(token_ids)

    def forward(
        self,
        hidden: Tensor,
        step: ForwardStep,
        kv: Sequence[KvLayer],
        layers: range | None = None,
        *,
        taps: Taps | None = None,
    ) -> Tensor:
        """Pass hidden states [T, hidden] through `layers` (default: all of them).

        `kv` holds the cache of every layer of the model. The keys and values of the iteration's
        tokens are written on the way. Whatever `step.bypass` and `taps` ask for, each linear of
        the model is called once.
        """
        rope = RopeRows(cos=self.rope.cos[step.positions], sin=self.rope.sin[step.positions])
        for index in range(len(self._norms)) if layers is None else layers:
            if step.bypass is None and taps is None:
                hidden = self._layer(index, hidden, rope, kv[index], step)
            else:
                layer = BypassedLayer(index, step, taps)
                hidden = self._bypassed_layer(index, hidden, rope, kv[index], step, layer)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, hidden] behind the last layer to logits [M, V]."""
        normed = self.kernels.rms_norm(hidden, self.weights.final_norm, self._eps)
        return self.weights.lm_head.forward(normed)

    def _layer(
        self, index: int, hidden: Tensor, rope: RopeRows, kv: KvLayer, step: ForwardStep
    ) -> Tensor:
        weights, kernels = self.weights.layers[index], self.kernels
        normed = kernels.rms_norm(hidden, weights.input_norm, self._eps)
        mixed = kernels.attention(
            weights.qkv.forward(normed),
            self._norms[index],
            rope,
            kv,
            step,
            step.groups[self._groups[index]],
        )
        hidden = weights.output.forward_add(mixed, hidden)
        normed = kernels.rms_norm(hidden, weights.post_attention_norm, self._eps)
        return weights.down.forward_add(weights.gate_up.forward_silu_mul(normed), hidden)

    def _bypassed_layer(
        self,
        index: int,
        hidden: Tensor,
        rope: RopeRows,
        kv: KvLayer,
        step: ForwardStep,
        layer: BypassedLayer,
    ) -> Tensor:
        """`_layer` with adapters beside the linears, and tensors shown to taps."""
        weights, kernels, linears = self.weights.layers[index], self.kernels, self._linears
        layer.keep(LAYER_INPUT, hidden)
        normed = kernels.rms_norm(hidden, weights.input_norm, self._eps)
        layer.keep("attn_normed", normed)
        mixed = kernels.attention(
            layer.linears(linears.qkv, weights.qkv, normed),
            self._norms[index],
            rope,
            kv,
            step,
            step.groups[self._groups[index]],
        )
        layer.keep("attn_out", mixed)
        hidden = layer.end(linears.output, linears.self_attn, weights.output, mixed, hidden)
        layer.keep("mlp_input", hidden)
        normed = kernels.rms_norm(hidden, weights.post_attention_norm, self._eps)
        layer.keep("mlp_normed", normed)
        active = layer.silu_mul(linears.gate_up, weights.gate_up, normed)
        layer.keep("act", active)
        return layer.end(linears.down, linears.mlp, weights.down, active, hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Linears:
    """What the stacked weights of a layer hold."""

    qkv: tuple[Linear, ...]
    output: Linear
    self_attn: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    mlp: Linear

    @staticmethod
    def of(config: ModelConfig) -> _Linears:
        state = "raw" if config.qk_norm else "flat"
        sizes = layer_widths(config)
        hidden = {"begin": 0, "width": sizes.hidden}
        return _Linears(
            qkv=_stack(
                (Module.Q_PROJ, f"query_{state}", sizes.query),
                (Module.K_PROJ, f"key_{state}", sizes.kv),
                (Module.V_PROJ, "values", sizes.kv),
            ),
            output=Linear(module=Module.O_PROJ, name="attn_sub", **hidden),
            self_attn=Linear(module=Module.SELF_ATTN, name="attn_sub", **hidden),
            gate_up=_stack(
                (Module.GATE_PROJ, "gate", sizes.ffn), (Module.UP_PROJ, "up", sizes.ffn)
            ),
            down=Linear(module=Module.DOWN_PROJ, name="mlp_sub", **hidden),
            mlp=Linear(module=Module.MLP, name="mlp_sub", **hidden),
        )


def _stack(*parts: tuple[Module, str, int]) -> tuple[Linear, ...]:
    """Linears side by side, of (module, name, width)."""
    found: list[Linear] = []
    begin = 0
    for module, name, width in parts:
        found.append(Linear(module=module, name=name, begin=begin, width=width))
        begin += width
    return tuple(found)


def _head_norms(layer: LayerWeights) -> HeadNorms | None:
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return HeadNorms(query=layer.query_norm, key=layer.key_norm)
