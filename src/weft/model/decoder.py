"""The one decoder: Llama, Mistral, Qwen2 and Qwen3 are its named variations.

Shape legend: T tokens of an iteration, M rows that need logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weft.model.config import ModelConfig
from weft.model.forward_step import ForwardStep, KvLayer, RopeRows
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
        self._kernels = kernels
        self._rope = rope
        self._groups = tuple(layer_groups)
        self._eps = config.rms_norm_eps
        self._norms = tuple(_head_norms(layer) for layer in weights.layers)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [T] to hidden states [T, hidden]."""
        return self.weights.embedding.rows(token_ids)

    def forward(
        self,
        hidden: Tensor,
        step: ForwardStep,
        kv: Sequence[KvLayer],
        layers: range | None = None,
    ) -> Tensor:
        """Pass hidden states [T, hidden] through `layers` (default: all of them).

        `kv` holds the cache of every layer of the model. The keys and values of the iteration's
        tokens are written on the way.
        """
        rope = RopeRows(cos=self._rope.cos[step.positions], sin=self._rope.sin[step.positions])
        for index in range(len(self._norms)) if layers is None else layers:
            hidden = self._layer(index, hidden, rope, kv[index], step)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, hidden] behind the last layer to logits [M, V]."""
        normed = self._kernels.rms_norm(hidden, self.weights.final_norm, self._eps)
        return self.weights.lm_head.forward(normed)

    def _layer(
        self, index: int, hidden: Tensor, rope: RopeRows, kv: KvLayer, step: ForwardStep
    ) -> Tensor:
        weights, kernels = self.weights.layers[index], self._kernels
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


def _head_norms(layer: LayerWeights) -> HeadNorms | None:
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return HeadNorms(query=layer.query_norm, key=layer.key_norm)
