"""The forward tensors that a layer's backward reads: kept, or computed again for its window.

Names are those of `weft.graph.layer_graph`. Nothing is computed that `weft.graph.pruning` did not
say would be.

Shape legend: s tokens of the window, h hidden, f feed-forward width, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from weft.base.errors import IntegrityError
from weft.graph.adapter_spec import SUB_LAYERS, Module
from weft.graph.layer_graph import LAYER_INPUT
from weft.graph.pruning import BackwardNeeds
from weft.model.finetune.attention import attention_forward
from weft.model.finetune.bypass import (
    TrainedBypass,
    bottleneck_active,
    bottleneck_inner,
    bottleneck_output,
    lora_inner,
)
from weft.model.finetune.dropout import DropoutKey, dropout_scale
from weft.model.finetune.primitives import silu_mul, turn_into
from weft.model.kernels.held_tokens import HeldTokens
from weft.model.kernels.interface import AttentionShape, Kernels
from weft.model.linear import LinearWeight
from weft.model.weights import LayerWeights

LINEAR_INPUT = {
    Module.Q_PROJ: "attn_normed",
    Module.K_PROJ: "attn_normed",
    Module.V_PROJ: "attn_normed",
    Module.O_PROJ: "attn_out",
    Module.GATE_PROJ: "mlp_normed",
    Module.UP_PROJ: "mlp_normed",
    Module.DOWN_PROJ: "act",
}
_OUTPUT_OF = {
    "query_raw": (Module.Q_PROJ,),
    "query_flat": (Module.Q_PROJ,),
    "key_raw": (Module.K_PROJ,),
    "key_flat": (Module.K_PROJ,),
    "gate": (Module.GATE_PROJ,),
    "up": (Module.UP_PROJ,),
    "attn_sub": (Module.SELF_ATTN, Module.O_PROJ),
    "mlp_sub": (Module.MLP, Module.DOWN_PROJ),
}
QKV = (Module.Q_PROJ, Module.K_PROJ, Module.V_PROJ)
GATE_UP = (Module.GATE_PROJ, Module.UP_PROJ)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One layer of one job: its frozen weights, its bypasses, and what its backward needs."""

    index: int
    shape: AttentionShape
    weights: LayerWeights
    bypasses: Mapping[Module, TrainedBypass]
    needs: BackwardNeeds
    kernels: Kernels
    window: int | None
    """Of sliding attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPlace:
    """Where a window stands: its positions [s] and their rotations [s, D/2]."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    dropout: DropoutKey | None
    """None where nothing is dropped."""


class LayerTensors:
    """Forward tensors [s, width] of a window by name; missing ones are computed on first use."""

    def __init__(
        self,
        plan: LayerPlan,
        saved: Mapping[str, Tensor],
        place: WindowPlace,
        kv: HeldTokens | None,
    ) -> None:
        self._plan = plan
        self._found = dict(saved)
        self._place = place
        self._kv = kv
        self._allowed = frozenset(plan.needs.recomputed)

    def __getitem__(self, name: str) -> Tensor:
        found = self.found(name)
        if found is None:
            self._compute(name)
            found = self._found[name]
        return found

    def found(self, name: str) -> Tensor | None:
        """What is at hand of a name; None where it is to be computed again.

        Raises:
            IntegrityError: it is neither.
        """
        found = self._found.get(name)
        if found is None and name not in self._allowed:
            raise IntegrityError(
                f"backward of layer {self._plan.index} reads {name}, which is neither kept "
                f"({', '.join(self._plan.needs.saved)}) nor to be computed again"
            )
        return found

    def drop(self, *names: str) -> None:
        """Forget tensors that nothing reads any more."""
        for name in names:
            self._found.pop(name, None)

    @property
    def kv(self) -> HeldTokens:
        """Keys and values that the window sees."""
        if self._kv is None:
            raise IntegrityError(f"backward of layer {self._plan.index} was given no pages")
        return self._kv

    def dropout_scale(self, module: Module) -> Tensor | None:
        """What a LoRA's input was multiplied with; None without dropout."""
        key = self._place.dropout
        if key is None:
            return None
        target = self._plan.bypasses[module].target
        return dropout_scale(
            key,
            layer=target.layer,
            module=module,
            positions=self._place.positions,
            num_features=target.in_features,
            dtype=self._plan.weights.input_norm.dtype,
        )

    # ---- computing again ----

    def _compute(self, name: str) -> None:
        kind, _, of = name.partition(":")
        if of:
            self._compute_of_module(kind, Module(of))
            return
        simple: dict[str, Callable[[], Tensor]] = {
            "attn_normed": lambda: self._norm(LAYER_INPUT, self._plan.weights.input_norm),
            "mlp_normed": lambda: self._norm("mlp_input", self._plan.weights.post_attention_norm),
            "mlp_input": lambda: self[LAYER_INPUT] + self["attn_sub"],
            "act": self._activated,
            "query": self._query,
            "attn_out": lambda: attention_forward(self._heads("query"), self.kv),
        }
        if name in simple:
            self._found[name] = simple[name]()
        elif name == "query_flat" and self._plan.weights.query_norm is not None:
            self._found[name] = self._head_norm("query_raw", self._plan.weights.query_norm)
        elif name == "key_flat" and self._plan.weights.key_norm is not None:
            self._found[name] = self._head_norm("key_raw", self._plan.weights.key_norm)
        elif self._from_raw(name):
            pass
        elif name in ("query_raw", "query_flat", "key_raw", "key_flat"):
            self._compute_qkv()
        elif name in ("gate", "up"):
            self._compute_gate_up()
        elif name == "attn_sub":
            self._compute_end(Module.O_PROJ, self._plan.weights.output, Module.SELF_ATTN, name)
        elif name == "mlp_sub":
            self._compute_end(Module.DOWN_PROJ, self._plan.weights.down, Module.MLP, name)
        else:
            raise IntegrityError(f"there is no way to compute {name} again")

    def _from_raw(self, name: str) -> bool:
        """Compute a module's output from what it was before its bypass, where that is at hand."""
        for module in _OUTPUT_OF.get(name, ()):
            raw = self._found.get(f"raw:{module}")
            bypass = self._plan.bypasses.get(module)
            if raw is None or bypass is None:
                continue
            if module in SUB_LAYERS:
                active = bottleneck_active(bypass, bottleneck_inner(bypass, raw))
                self._found[name] = bottleneck_output(bypass, raw, active)
            else:
                self._found[name] = raw * bypass.weights["l"]
            return True
        return False

    def _compute_of_module(self, kind: str, module: Module) -> None:
        """`low_rank:`, `active:`, `scaled:` or `raw:` of a module."""
        bypass = self._plan.bypasses[module]
        name = f"{kind}:{module}"
        match kind:
            case "low_rank" if bypass.is_lora:
                x = self[LINEAR_INPUT[module]]
                scale = self.dropout_scale(module)
                self._found[name] = lora_inner(bypass, x, scale)
            case "low_rank":
                self._found[name] = bottleneck_inner(bypass, self[f"raw:{module}"])
            case "active":
                self._found[name] = bottleneck_active(bypass, self[f"low_rank:{module}"])
            case "scaled":
                self._found[name] = self[LINEAR_INPUT[module]] * bypass.weights["l"]
            case _ if module in QKV:
                self._compute_qkv()
            case _ if module in GATE_UP:
                self._compute_gate_up()
            case _ if module in (Module.O_PROJ, Module.SELF_ATTN):
                end = Module.SELF_ATTN
                self._compute_end(Module.O_PROJ, self._plan.weights.output, end, "attn_sub")
            case _:
                end = Module.MLP
                self._compute_end(Module.DOWN_PROJ, self._plan.weights.down, end, "mlp_sub")

    def _norm(self, source: str, weight: Tensor) -> Tensor:
        return self._plan.kernels.rms_norm(self[source], weight, self._plan.shape.norm_eps)

    def _head_norm(self, source: str, weight: Tensor) -> Tensor:
        heads = self._heads(source)
        return self._plan.kernels.rms_norm(heads, weight, self._plan.shape.norm_eps).flatten(1)

    def _heads(self, name: str) -> Tensor:
        """[s, H, D]."""
        return self[name].unflatten(1, (-1, self._plan.shape.head_dim))

    def _query(self) -> Tensor:
        heads = self._heads("query_flat")
        out = heads.new_empty(heads.shape[0], heads.shape[1] * heads.shape[2])
        turn_into(heads, self._place.cos, self._place.sin, out)
        return out

    def _activated(self) -> Tensor:
        return silu_mul(self["gate"], self["up"])

    def _compute_qkv(self) -> None:
        shape = self._plan.shape
        sizes = (shape.query_size, shape.kv_size, shape.kv_size)
        query, key, _ = self._group(QKV, self._plan.weights.qkv, sizes)
        has_norm = self._plan.weights.query_norm is not None
        self._found["query_raw" if has_norm else "query_flat"] = query
        self._found["key_raw" if has_norm else "key_flat"] = key

    def _compute_gate_up(self) -> None:
        size = self._plan.weights.gate_up.out_features // 2
        gate, up = self._group(GATE_UP, self._plan.weights.gate_up, (size, size))
        self._found["gate"], self._found["up"] = gate, up

    def _compute_end(
        self, module: Module, weight: LinearWeight, sub_layer: Module, name: str
    ) -> None:
        (out,) = self._group((module,), weight, (weight.out_features,))
        bottleneck = self._plan.bypasses.get(sub_layer)
        if bottleneck is not None:
            self._found[f"raw:{sub_layer}"] = out
            inner = bottleneck_inner(bottleneck, out)
            out = bottleneck_output(bottleneck, out, bottleneck_active(bottleneck, inner))
        self._found[name] = out

    def _group(
        self, modules: tuple[Module, ...], weight: LinearWeight, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Outputs of linears that share an input, bypasses added."""
        x = self[LINEAR_INPUT[modules[0]]]
        outputs = list(weight.forward(x).split(sizes, dim=1))
        for index, module in enumerate(modules):
            bypass = self._plan.bypasses.get(module)
            if bypass is None:
                continue
            if bypass.is_lora:
                low_rank = self._low_rank(module)
                outputs[index].addmm_(low_rank, bypass.weights["B"].t(), alpha=bypass.target.scale)
            elif bypass.target.scales_input:
                scaled = x * bypass.weights["l"]
                outputs[index] = weight.forward(scaled).split(sizes, dim=1)[index]
            else:
                self._found[f"raw:{module}"] = outputs[index]
                outputs[index] = outputs[index] * bypass.weights["l"]
        return tuple(outputs)

    def _low_rank(self, module: Module) -> Tensor:
        name = f"low_rank:{module}"
        if name not in self._found:
            self._compute_of_module("low_rank", module)
        return self._found[name]
