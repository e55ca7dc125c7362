"""Adapters with random weights, and models into which they are merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weft.graph.adapter_spec import (
    AdapterKind,
    AdapterSpec,
    BypassTarget,
    LayerWidths,
    Module,
    module_name,
    resolve_targets,
)
from weft.model.adapters.weights import AdapterWeights, FrozenBypass
from weft.model.config import ModelConfig


def random_adapter(
    spec: AdapterSpec, config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float64
) -> AdapterWeights:
    """Weights far enough from nothing to change every token."""
    generator = torch.Generator().manual_seed(seed)
    widths = LayerWidths(
        hidden=config.hidden_size,
        query=config.query_size,
        kv=config.kv_size,
        ffn=config.intermediate_size,
    )
    layers: list[dict[Module, FrozenBypass]] = [{} for _ in range(config.num_layers)]
    for target in resolve_targets(spec, num_layers=config.num_layers, widths=widths):
        weights = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.1).to(dtype)
            for name, shape in weight_shapes(spec.kind, target).items()
        }
        if "l" in weights:
            weights["l"] += 1
        layers[target.layer][target.module] = FrozenBypass(
            target=target, weights=weights, activation=spec.activation
        )
    return AdapterWeights(kind=spec.kind, layers=tuple(layers))


def weight_shapes(kind: AdapterKind, target: BypassTarget) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one bypass's tensors."""
    rank, num_in, num_out = target.rank, target.in_features, target.out_features
    match kind:
        case AdapterKind.LORA:
            return {"A": (rank, num_in), "B": (num_out, rank)}
        case AdapterKind.IA3:
            return {"l": (num_in if target.scales_input else num_out,)}
        case AdapterKind.BOTTLENECK:
            return {
                "down": (rank, num_out),
                "down_bias": (rank,),
                "up": (num_out, rank),
                "up_bias": (num_out,),
            }


def merge(model: PreTrainedModel, adapter: AdapterWeights) -> None:
    """Change a transformers model's own weights to what LoRA or (IA)³ makes of them."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    for bypass in adapter:
        target, weights = bypass.target, bypass.weights
        name = module_name(target.layer, target.module)
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        if "A" in weights:
            weight += target.scale * weights["B"] @ weights["A"]
        elif target.scales_input:
            weight *= weights["l"]
        else:
            weight *= weights["l"][:, None]
            if bias is not None:
                bias *= weights["l"]
