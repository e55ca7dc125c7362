"""Backward of one decoder layer for one window of a sample, in closed form.

Frozen weights get no gradients; a tensor's gradient is computed where `weft.graph.pruning` says
that some trained weight, here or below, depends on it (FlexLLM, arXiv 2402.18789 §5.2, §6.1).

Shape legend: s tokens of the window, n tokens of the sample, h hidden, Hq query heads, Hkv
key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.graph.adapter_spec import Module
from weft.graph.layer_graph import LAYER_INPUT
from weft.model.finetune.attention import KvGrads, attention_backward
from weft.model.finetune.bypass import (
    LoraWindow,
    bottleneck_backward,
    loras_backward,
    scale_backward,
)
from weft.model.finetune.layer_tensors import (
    GATE_UP,
    LINEAR_INPUT,
    QKV,
    LayerPlan,
    LayerTensors,
    WindowPlace,
)
from weft.model.finetune.primitives import (
    add_rms_norm_backward,
    rms_norm_backward,
    silu_mul_backward,
    turn_backward,
    turn_backward_into,
)
from weft.model.linear import LinearWeight


def layer_backward(
    plan: LayerPlan,
    tensors: LayerTensors,
    place: WindowPlace,
    d_output: Tensor,
    kv_grads: KvGrads,
) -> Tensor | None:
    """Sum gradients of the layer's bypasses; returns that of the layer's input, if it is needed.

    `d_output` [s, h] is the gradient of the layer's output. `kv_grads` must hold the shares of all
    windows to the right, and holds this one's afterwards.
    """
    return _LayerBackward(plan, tensors, place).run(d_output, kv_grads)


def wants_kv_grads(plan: LayerPlan) -> tuple[bool, bool]:
    """Whether the backward needs gradients of keys, and of values."""
    return "keys" in plan.needs.gradients, "values" in plan.needs.gradients


class _LayerBackward:
    def __init__(self, plan: LayerPlan, tensors: LayerTensors, place: WindowPlace) -> None:
        self._plan = plan
        self._tensors = tensors
        self._place = place
        self._wanted = plan.needs.gradients

    def run(self, d_output: Tensor, kv_grads: KvGrads) -> Tensor | None:
        weights = self._plan.weights
        d_normed = self._feed_forward(d_output)
        if "mlp_input" not in self._wanted:
            return None
        d_mlp_input = d_output
        if d_normed is not None:
            d_mlp_input = self._through_norm(
                d_normed, "mlp_input", weights.post_attention_norm, d_output
            )
        self._tensors.drop("mlp_input", "mlp_normed")
        d_normed = self._attention(d_mlp_input, kv_grads)
        if LAYER_INPUT not in self._wanted:
            return None
        if d_normed is None:
            return d_mlp_input
        return self._through_norm(d_normed, LAYER_INPUT, weights.input_norm, d_mlp_input)

    def _through_norm(self, dy: Tensor, source: str, weight: Tensor, residual: Tensor) -> Tensor:
        eps = self._plan.shape.norm_eps
        return add_rms_norm_backward(dy, self._tensors[source], weight, residual, eps)

    def _feed_forward(self, d_output: Tensor) -> Tensor | None:
        """Gradient of `mlp_normed`."""
        if "mlp_sub" not in self._wanted:
            return None
        weights = self._plan.weights
        d_sub = self._bottleneck(Module.MLP, d_output)
        d_act = self._linears((Module.DOWN_PROJ,), weights.down, d_sub)
        self._tensors.drop("act")
        if d_act is None or not {"gate", "up"} & self._wanted:
            return None
        up = self._tensors["up"] if "gate" in self._wanted else None
        d_gate_up = silu_mul_backward(d_act, self._tensors["gate"], up)
        self._tensors.drop("gate", "up")
        return self._linears(GATE_UP, weights.gate_up, d_gate_up)

    def _attention(self, d_mlp_input: Tensor, kv_grads: KvGrads) -> Tensor | None:
        """Gradient of `attn_normed`."""
        if "attn_sub" not in self._wanted:
            return None
        plan, tensors = self._plan, self._tensors
        d_sub = self._bottleneck(Module.SELF_ATTN, d_mlp_input)
        d_out = self._linears((Module.O_PROJ,), plan.weights.output, d_sub)
        tensors.drop("attn_out")
        if d_out is None or not {"query", "keys", "values"} & self._wanted:
            return None
        wants_query = "query" in self._wanted
        shape = plan.shape
        # Where only values lead on, the queries are read all the same, for the probabilities.
        query = tensors["query"].unflatten(1, (-1, shape.head_dim))
        d_query = attention_backward(d_out, query, tensors.kv, kv_grads, wants_query=wants_query)
        tensors.drop("query")
        d_qkv = d_out.new_empty(d_out.shape[0], shape.query_size + 2 * shape.kv_size)
        parts = d_qkv.split([shape.query_size, shape.kv_size, shape.kv_size], dim=1)
        window = slice(tensors.kv.begin, tensors.kv.end)
        self._turn_back(d_query, "query_raw", plan.weights.query_norm, parts[0])
        d_keys = None if kv_grads.keys is None else kv_grads.keys[:, window].transpose(0, 1)
        self._turn_back(d_keys, "key_raw", plan.weights.key_norm, parts[1])
        if kv_grads.values is not None:
            d_values = kv_grads.values[:, window].transpose(0, 1)
            parts[2].unflatten(1, (-1, shape.head_dim)).copy_(d_values)
        return self._linears(QKV, plan.weights.qkv, d_qkv)

    def _turn_back(self, dy: Tensor | None, raw: str, norm: Tensor | None, out: Tensor) -> None:
        """From the gradient [s, H, D] of turned heads to that of a linear's output [s, H D]."""
        if dy is None:
            return
        cos, sin = self._place.cos, self._place.sin
        if norm is None:
            turn_backward_into(dy, cos, sin, out)
            return
        head_dim = self._plan.shape.head_dim
        heads = self._tensors[raw].unflatten(1, (-1, head_dim))
        d_flat = turn_backward(dy, cos, sin)
        d_flat = rms_norm_backward(d_flat, heads, norm, self._plan.shape.norm_eps)
        out.unflatten(1, (-1, head_dim)).copy_(d_flat)

    def _bottleneck(self, sub_layer: Module, dy: Tensor) -> Tensor:
        bypass = self._plan.bypasses.get(sub_layer)
        if bypass is None:
            return dy
        raw, inner, active = (self._tensors[f"{k}:{sub_layer}"] for k in _BOTTLENECK)
        return bottleneck_backward(bypass, dy, raw, inner, active)

    def _linears(
        self, modules: tuple[Module, ...], weight: LinearWeight, dy: Tensor
    ) -> Tensor | None:
        """Through linears that share an input, outputs side by side in dy; gradient of the input.

        Parts of `dy` whose gradient is not wanted may hold anything.
        """
        source = LINEAR_INPUT[modules[0]]
        sizes = _widths(self._plan, modules)
        parts = list(dy.split(sizes, dim=1))
        scaled: list[int] = []
        for index, module in enumerate(modules):
            bypass = self._plan.bypasses.get(module)
            if bypass is None or bypass.is_lora:
                continue
            if bypass.target.scales_input:
                scaled.append(index)
            else:
                parts[index] = scale_backward(bypass, parts[index], self._tensors[f"raw:{module}"])
                dy = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                parts = list(dy.split(sizes, dim=1))
        wants_input = source in self._wanted
        dx: Tensor | None = None
        if scaled:
            dx = self._through_scaled(modules, weight, parts, scaled, wants_input)
        elif wants_input:
            dx = weight.grad_input(dy)
        loras = [
            LoraWindow(
                bypass=bypass,
                dy=part,
                low_rank=self._tensors.found(f"low_rank:{module}"),
                dropout_scale=self._tensors.dropout_scale(module),
            )
            for module, part in zip(modules, parts, strict=True)
            if (bypass := self._plan.bypasses.get(module)) is not None and bypass.is_lora
        ]
        if loras:
            loras_backward(loras, self._tensors[source], dx)
        return dx

    def _through_scaled(
        self,
        modules: tuple[Module, ...],
        weight: LinearWeight,
        parts: list[Tensor],
        scaled: list[int],
        wants_input: bool,
    ) -> Tensor | None:
        """Linears of which some read the input scaled by (IA)³: each such one on its own."""
        source = LINEAR_INPUT[modules[0]]

        def grad_input(chosen: set[int]) -> Tensor:
            if len(chosen) == len(parts):
                return weight.grad_input(torch.cat(parts, dim=1))
            zeroed = [p if i in chosen else torch.zeros_like(p) for i, p in enumerate(parts)]
            return weight.grad_input(torch.cat(zeroed, dim=1))

        rest = set(range(len(parts))) - set(scaled)
        dx = grad_input(rest) if rest and wants_input else None
        for index in scaled:
            bypass = self._plan.bypasses[modules[index]]
            share = scale_backward(bypass, grad_input({index}), self._tensors[source])
            dx = share if dx is None else dx.add_(share)
        return dx if wants_input else None


_BOTTLENECK = ("raw", "low_rank", "active")


def _widths(plan: LayerPlan, modules: tuple[Module, ...]) -> list[int]:
    shape, weights = plan.shape, plan.weights
    if modules == QKV:
        return [shape.query_size, shape.kv_size, shape.kv_size]
    if modules == GATE_UP:
        return [weights.gate_up.out_features // 2] * 2
    return [weights.output.out_features]
