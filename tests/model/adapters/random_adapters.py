"""Adapters with random weights, and models into which they are merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weft.graph.adapter_spec import AdapterSpec, module_name
from weft.model.adapters.weights import (
    AdapterWeights,
    FrozenBypass,
    collect_layers,
    model_targets,
    weight_shapes,
)
from weft.model.config import ModelConfig


def random_adapter(
    spec: AdapterSpec, config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float64
) -> AdapterWeights:
    """Weights far enough from nothing to change every token."""
    generator = torch.Generator().manual_seed(seed)
    bypasses: list[FrozenBypass] = []
    for target in model_targets(spec, config):
        weights = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.1).to(dtype)
            for name, shape in weight_shapes(target).items()
        }
        if "l" in weights:
            weights["l"] += 1
        bypasses.append(FrozenBypass(target=target, weights=weights, activation=spec.activation))
    return AdapterWeights(kind=spec.kind, layers=collect_layers(bypasses, config.num_layers))


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
