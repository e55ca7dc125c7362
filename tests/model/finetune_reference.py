"""The reference for finetuning: one plain model over whole sequences, differentiated by autograd.

It shares no code with the decoder, its kernels or its backward: tensors of a state dict by their
names in a checkpoint, one line of torch an operation, scores of all pairs of tokens at once. Taken
from outside are the rotations of positions and the dropout masks, as plain tables.

Shape legend: n tokens, h hidden, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from weft.graph.adapter_spec import AdapterKind, AdapterSpec, BypassTarget, module_name

Masks = Callable[[BypassTarget, int], Tensor]
"""What to multiply a LoRA's input with: (target, number of tokens) to [n, in_features]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceModel:
    """Frozen weights, and the rotations cos and sin [positions, D / 2]."""

    config: PretrainedConfig
    state: Mapping[str, Tensor]
    cos: Tensor
    sin: Tensor
    windows: Sequence[int | None]
    """Of each layer's attention."""


@dataclass(kw_only=True, slots=True)
class ReferenceAdapter:
    """Trained weights by (layer, module, name), as leaves of autograd."""

    spec: AdapterSpec
    targets: Mapping[str, BypassTarget]
    """By the module's name in a checkpoint."""
    weights: dict[str, Tensor]
    """By `layer.module.name`."""
    masks: Masks | None = None

    def of(self, target: BypassTarget, name: str) -> Tensor:
        """One weight."""
        return self.weights[f"{target.layer}.{target.module}.{name}"]


@dataclass(kw_only=True, slots=True)
class ReferenceRun:
    """Hidden states behind the last layer, and the tensors on the way, by layer."""

    hidden: Tensor
    tensors: list[dict[str, Tensor]] = field(default_factory=list)


def make_adapter(
    spec: AdapterSpec, targets: Sequence[BypassTarget], weights: Mapping[str, Tensor]
) -> ReferenceAdapter:
    """Leaves from given values."""
    return ReferenceAdapter(
        spec=spec,
        targets={module_name(target.layer, target.module): target for target in targets},
        weights={
            key: value.detach().double().clone().requires_grad_() for key, value in weights.items()
        },
    )


def run(model: ReferenceModel, adapter: ReferenceAdapter, tokens: Tensor) -> ReferenceRun:
    """One sequence through all layers."""
    hidden = model.state["model.embed_tokens.weight"][tokens.long()].double()
    out = ReferenceRun(hidden=hidden)
    for layer in range(model.config.num_hidden_layers):
        found: dict[str, Tensor] = {"layer_input": hidden}
        hidden = _layer(model, adapter, layer, hidden, found)
        out.tensors.append(found)
    out.hidden = hidden
    return out


def loss(model: ReferenceModel, hidden: Tensor, tokens: Tensor, label_weights: Tensor) -> Tensor:
    """Weighted sum of the losses of tokens 1 to n - 1."""
    normed = _norm(model, hidden, model.state["model.norm.weight"])
    head = model.state.get("lm_head.weight", model.state["model.embed_tokens.weight"]).double()
    losses = F.cross_entropy((normed @ head.T)[:-1], tokens[1:].long(), reduction="none")
    return (losses * label_weights[1:].double()).sum()


def _layer(
    model: ReferenceModel,
    adapter: ReferenceAdapter,
    layer: int,
    hidden: Tensor,
    found: dict[str, Tensor],
) -> Tensor:
    config, prefix = model.config, f"model.layers.{layer}"
    num_heads, num_kv = config.num_attention_heads, config.num_key_value_heads

    def linear(name: str, x: Tensor) -> Tensor:
        return _linear(model, adapter, f"{prefix}.{name}", x, found)

    normed = _norm(model, hidden, model.state[f"{prefix}.input_layernorm.weight"])
    found["attn_normed"] = normed
    query = linear("self_attn.q_proj", normed)
    key = linear("self_attn.k_proj", normed)
    found["values"] = linear("self_attn.v_proj", normed)
    if f"{prefix}.self_attn.q_norm.weight" in model.state:
        found["query_raw"], found["key_raw"] = query, key
        query = _head_norm(model, query, model.state[f"{prefix}.self_attn.q_norm.weight"])
        key = _head_norm(model, key, model.state[f"{prefix}.self_attn.k_norm.weight"])
    found["query_flat"], found["key_flat"] = query, key
    found["query"] = _rotate(model, query, num_heads)
    found["keys"] = _rotate(model, key, num_kv)
    found["attn_out"] = _attend(model, layer, found["query"], found["keys"], found["values"])
    sub = linear("self_attn.o_proj", found["attn_out"])
    found["attn_sub"] = _bottleneck(adapter, f"{prefix}.self_attn", sub, found)
    found["mlp_input"] = hidden + found["attn_sub"]
    normed = _norm(
        model, found["mlp_input"], model.state[f"{prefix}.post_attention_layernorm.weight"]
    )
    found["mlp_normed"] = normed
    found["gate"] = linear("mlp.gate_proj", normed)
    found["up"] = linear("mlp.up_proj", normed)
    found["act"] = F.silu(found["gate"]) * found["up"]
    sub = linear("mlp.down_proj", found["act"])
    found["mlp_sub"] = _bottleneck(adapter, f"{prefix}.mlp", sub, found)
    return found["mlp_input"] + found["mlp_sub"]


def _linear(
    model: ReferenceModel,
    adapter: ReferenceAdapter,
    name: str,
    x: Tensor,
    found: dict[str, Tensor],
) -> Tensor:
    target = adapter.targets.get(name)
    weight = model.state[f"{name}.weight"].double()
    bias = model.state.get(f"{name}.bias")
    is_scale = target is not None and adapter.spec.kind is AdapterKind.IA3
    if target is not None and is_scale and target.scales_input:
        x = x * adapter.of(target, "l")
        found[f"scaled:{target.module}"] = x
    y = x @ weight.T
    if bias is not None:
        y = y + bias.double()
    if target is None or (is_scale and target.scales_input):
        return y
    if is_scale:
        found[f"raw:{target.module}"] = y
        return y * adapter.of(target, "l")
    if adapter.masks is not None:
        x = x * adapter.masks(target, x.shape[0])
    found[f"low_rank:{target.module}"] = x @ adapter.of(target, "A").T
    return y + target.scale * (found[f"low_rank:{target.module}"] @ adapter.of(target, "B").T)


def _bottleneck(
    adapter: ReferenceAdapter, name: str, y: Tensor, found: dict[str, Tensor]
) -> Tensor:
    target = adapter.targets.get(name)
    if target is None:
        return y
    module = target.module
    found[f"raw:{module}"] = y
    inner = y @ adapter.of(target, "down").T + adapter.of(target, "down_bias")
    active = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[adapter.spec.activation](inner)
    found[f"low_rank:{module}"], found[f"active:{module}"] = inner, active
    return y + active @ adapter.of(target, "up").T + adapter.of(target, "up_bias")


def _norm(model: ReferenceModel, x: Tensor, weight: Tensor) -> Tensor:
    mean = (x * x).mean(-1, keepdim=True)
    return x / (mean + model.config.rms_norm_eps).sqrt() * weight.double()


def _head_norm(model: ReferenceModel, x: Tensor, weight: Tensor) -> Tensor:
    return _norm(model, x.unflatten(1, (-1, weight.shape[0])), weight).flatten(1)


def _rotate(model: ReferenceModel, x: Tensor, num_heads: int) -> Tensor:
    heads = x.unflatten(1, (num_heads, -1))
    half = heads.shape[2] // 2
    cos, sin = (table[: x.shape[0], None, :].double() for table in (model.cos, model.sin))
    first, second = heads[..., :half], heads[..., half:]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(1)


def _attend(
    model: ReferenceModel, layer: int, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    num, num_kv = query.shape[0], model.config.num_key_value_heads
    group = model.config.num_attention_heads // num_kv
    q = query.unflatten(1, (num_kv * group, -1)).transpose(0, 1)
    k, v = (
        x.unflatten(1, (num_kv, -1)).transpose(0, 1).repeat_interleave(group, 0)
        for x in (keys, values)
    )
    distance = torch.arange(num)[:, None] - torch.arange(num)[None, :]
    hidden = distance < 0
    window = model.windows[layer]
    if window is not None:
        hidden = hidden | (distance >= window)
    scores = (q @ k.transpose(1, 2)) / q.shape[2] ** 0.5
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1).flatten(1)
