"""A decoder's weights: what a checkpoint must hold, and the layers built from it.

Queries, keys and values share one linear, and so do gate and up: fewer, larger products.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weft.model.config import ModelConfig
from weft.model.linear import LinearWeight, tensor_bytes

MakeLinear = Callable[[Tensor, Tensor | None], LinearWeight]


class TensorSource(Protocol):
    """Where tensors come from, by their name in a checkpoint."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, in the dtype and on the device of the model.

        Raises:
            ModelLoadError: it is missing, unreadable or of another shape.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor
    qkv: LinearWeight
    """Rows: all query heads, all key heads, all value heads."""
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: LinearWeight
    post_attention_norm: Tensor
    gate_up: LinearWeight
    """Rows: the gate, then the up projection."""
    down: LinearWeight

    @property
    def size_bytes(self) -> int:
        """Bytes held by the layer."""
        norms = (self.input_norm, self.query_norm, self.key_norm, self.post_attention_norm)
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return sum(tensor_bytes(norm) for norm in norms) + sum(w.size_bytes for w in linears)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """All weights of a decoder; a tied embedding is the output layer itself."""

    embedding: LinearWeight
    """[V, hidden], read by rows."""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: LinearWeight

    @property
    def size_bytes(self) -> int:
        """Bytes held, a tied output layer counted once."""
        head = 0 if self.lm_head is self.embedding else self.lm_head.size_bytes
        layers = sum(layer.size_bytes for layer in self.layers)
        return self.embedding.size_bytes + layers + head + tensor_bytes(self.final_norm)


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds, by its Hugging Face name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        shapes.update(_layer_shapes(config, f"model.layers.{layer}"))
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _layer_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, kv = config.query_size, config.kv_size
    linears = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.output_bias),
        "mlp.gate_proj": (ffn, hidden, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (num_out, num_in, has_bias) in linears.items():
        shapes[f"{prefix}.{name}.weight"] = (num_out, num_in)
        if has_bias:
            shapes[f"{prefix}.{name}.bias"] = (num_out,)
    for name, size in norms.items():
        shapes[f"{prefix}.{name}.weight"] = (size,)
    return shapes


def build_weights(
    config: ModelConfig, source: TensorSource, make_linear: MakeLinear
) -> DecoderWeights:
    """Assemble the layers, one at a time, so that at most one layer is held twice."""
    shapes = checkpoint_shapes(config)

    def tensor(name: str) -> Tensor:
        return source.tensor(name, shapes[name])

    def linear(*names: str) -> LinearWeight:
        weights = [tensor(f"{name}.weight") for name in names]
        biases = [tensor(f"{name}.bias") for name in names if f"{name}.bias" in shapes]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        return make_linear(weight, bias)

    def layer(prefix: str) -> LayerWeights:
        attention = f"{prefix}.self_attn"
        return LayerWeights(
            input_norm=tensor(f"{prefix}.input_layernorm.weight"),
            qkv=linear(*(f"{attention}.{name}_proj" for name in "qkv")),
            query_norm=tensor(f"{attention}.q_norm.weight") if config.qk_norm else None,
            key_norm=tensor(f"{attention}.k_norm.weight") if config.qk_norm else None,
            output=linear(f"{attention}.o_proj"),
            post_attention_norm=tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=linear(f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
            down=linear(f"{prefix}.mlp.down_proj"),
        )

    layers = tuple(layer(f"model.layers.{index}") for index in range(config.num_layers))
    embedding = linear("model.embed_tokens")
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        final_norm=tensor("model.norm.weight"),
        lm_head=embedding if config.tie_word_embeddings else linear("lm_head"),
    )


class RandomSource:
    """Normal random weights, a pure function of (seed, name): for benchmarks and profiles.

    Norm weights are ones, so that activations keep the scale of a trained model.
    """

    def __init__(
        self,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        std: float = 0.02,
    ) -> None:
        self._seed = seed
        self._dtype = dtype
        self._device = torch.device(device)
        self._std = std

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(device=self._device)
        # 32 bits, since torch's CPU generator looks at no more of a seed.
        generator.manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        return out.normal_(0.0, self._std, generator=generator)
