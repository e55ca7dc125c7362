"""Applies adapters beside the linears of a layer, each of which runs once over all tokens.

LoRA: y += s · B A x. (IA)³: y = l ⊙ W x, or y = W (l ⊙ x). A bottleneck behind a sub-layer:
y += U f(D y + d) + u (Houlsby et al., arXiv 1902.00751; He et al., arXiv 2110.04366).

Shape legend: T tokens of the iteration, n tokens of a group, K in_features, N out_features, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from weft.graph.adapter_spec import Module
from weft.graph.layer_graph import bypass_raw, low_rank
from weft.model.adapters.table import Field, GroupedRows, Linear
from weft.model.adapters.weights import Bypass
from weft.model.finetune.dropout import dropout_scale
from weft.model.finetune.primitives import activation
from weft.model.forward_step import BypassGroup, ForwardStep, Taps
from weft.model.kernels import cpu_linear, cpu_lora_window
from weft.model.kernels.cpu_lora_window import LoraOutput
from weft.model.linear import LinearWeight

_NOTHING: frozenset[str] = frozenset()


class BypassedLayer:
    """One layer of one iteration whose tokens may have adapters or be tapped."""

    def __init__(self, layer: int, step: ForwardStep, taps: Taps | None) -> None:
        self._layer = layer
        self._step = step
        self._taps = taps
        self._wanted: Collection[str] = _NOTHING if taps is None else taps.wants(layer)
        groups = () if step.bypass is None else step.bypass.groups
        self._rows: GroupedRows | None = None if step.bypass is None else step.bypass.rows
        self._groups = tuple(group for group in groups if group.adapter.layers[layer])

    def keep(self, name: str, value: Tensor) -> None:
        """Show taps a tensor [T, width], if they want it."""
        if self._taps is not None and name in self._wanted:
            rows = self._taps.rows
            self._taps.keep(self._layer, name, rows, value[rows])

    def linears(self, parts: tuple[Linear, ...], weight: LinearWeight, x: Tensor) -> Tensor:
        """x [T, K] through linears that share it, bypasses added: [T, N1 + N2 + ..]."""
        outputs = self._forward(parts, weight, x)
        self._add_low_rank(parts, x, outputs)
        for part in parts:
            self.keep(part.name, _columns(outputs, part))
        return outputs

    def silu_mul(self, parts: tuple[Linear, ...], weight: LinearWeight, x: Tensor) -> Tensor:
        """silu(gate(x)) · up(x) [T, N]; x [T, K]."""
        if not self._concerns(parts):
            return weight.forward_silu_mul(x)
        return weight.silu_mul(self.linears(parts, weight, x))

    def end(
        self, part: Linear, sub_layer: Linear, weight: LinearWeight, x: Tensor, residual: Tensor
    ) -> Tensor:
        """A sub-layer's last linear, its bottlenecks, and the residual stream [T, N] added.

        `x` may be overwritten.
        """
        parts = (part,)
        if not self._ends_apart(part, sub_layer):
            x_scaled, _ = self._scale_inputs(parts, x)
            outputs = weight.forward_add(x_scaled, residual)
            self._add_low_rank(parts, x, outputs)
            return outputs
        outputs = self._forward(parts, weight, x)
        self._add_low_rank(parts, x, outputs)
        self.keep(bypass_raw(sub_layer.module), outputs)
        for group, bypass in self._bypasses(sub_layer.module):
            self._add_bottleneck(group, bypass, outputs)
        if self._rows is not None and self._rows.has(self._layer, sub_layer.module, Field.RANK):
            kernels = self._rows.table.kernels
            kernels.add_low_rank(outputs, outputs, (sub_layer,), self._rows, self._layer)
        self.keep(part.name, outputs)
        return outputs.add_(residual)

    # ---- pieces ----

    def _bypasses(self, module: Module) -> Iterator[tuple[BypassGroup, Bypass]]:
        for group in self._groups:
            bypass = group.adapter.layers[self._layer].get(module)
            if bypass is not None:
                yield group, bypass

    def _concerns(self, parts: tuple[Linear, ...]) -> bool:
        """Whether outputs of the parts are changed or shown."""
        fields = (Field.RANK, Field.SCALE_OUTPUT)
        rows = self._rows
        return any(
            part.name in self._wanted
            or bypass_raw(part.module) in self._wanted
            or (rows is not None and any(rows.has(self._layer, part.module, f) for f in fields))
            or any(True for _ in self._bypasses(part.module))
            for part in parts
        )

    def _ends_apart(self, part: Linear, sub_layer: Linear) -> bool:
        """Whether a sub-layer's output is needed without the residual stream."""
        rows, layer = self._rows, self._layer
        return (
            part.name in self._wanted
            or bypass_raw(part.module) in self._wanted
            or any(True for _ in self._bypasses(sub_layer.module))
            or any(_scales_output(bypass) for _, bypass in self._bypasses(part.module))
            or (
                rows is not None
                and (
                    rows.has(layer, sub_layer.module, Field.RANK)
                    or rows.has(layer, part.module, Field.SCALE_OUTPUT)
                )
            )
        )

    def _forward(self, parts: tuple[Linear, ...], weight: LinearWeight, x: Tensor) -> Tensor:
        """The one call of a base weight, with what (IA)³ does before and behind it."""
        num_tokens = x.shape[0]
        x, extra = self._scale_inputs(parts, x)
        outputs = weight.forward(x)
        for index, part in enumerate(parts):
            view = _columns(outputs, part)
            for rows, first, last in extra.get(index, ()):
                view[rows] = view[first:last]
            self.keep(bypass_raw(part.module), view)
            for group, bypass in self._bypasses(part.module):
                if _scales_output(bypass):
                    view[group.rows] *= bypass.weights["l"]
        outputs = outputs[:num_tokens]
        rows = self._rows
        if rows is not None and rows.has_any(self._layer, parts, Field.SCALE_OUTPUT):
            rows.table.kernels.scale(outputs, parts, rows, self._layer, Field.SCALE_OUTPUT)
        return outputs

    def _scale_inputs(
        self, parts: tuple[Linear, ...], x: Tensor
    ) -> tuple[Tensor, dict[int, list[tuple[slice | Tensor, int, int]]]]:
        """What the base weight is applied to where (IA)³ scales inputs.

        A linear on its own sees the scaled rows in place of the plain ones. Of stacked linears the
        others must see the plain rows, so scaled copies are appended; returns, by part, which rows
        of the output they replace, and where they begin and end.
        """
        grouped = self._rows
        if grouped is not None and grouped.has_any(self._layer, parts, Field.SCALE_INPUT):
            (part,) = parts
            place = Linear(module=part.module, name="", begin=0, width=x.shape[1])
            grouped.table.kernels.scale(x, (place,), grouped, self._layer, Field.SCALE_INPUT)
        copies: list[Tensor] = []
        replaced: dict[int, list[tuple[slice | Tensor, int, int]]] = {}
        end = x.shape[0]
        for index, part in enumerate(parts):
            for group, bypass in self._bypasses(part.module):
                if not bypass.target.scales_input:
                    continue
                scaled = x[group.rows] * bypass.weights["l"]
                self._keep_of(group, f"scaled:{part.module}", scaled)
                if len(parts) == 1:
                    x[group.rows] = scaled
                    continue
                begin, end = end, end + scaled.shape[0]
                copies.append(scaled)
                replaced.setdefault(index, []).append((group.rows, begin, end))
        return (torch.cat([x, *copies]) if copies else x), replaced

    def _add_low_rank(self, parts: tuple[Linear, ...], x: Tensor, outputs: Tensor) -> None:
        for group in self._groups:
            bypasses = group.adapter.layers[self._layer]
            loras = [
                (bypass, _columns(outputs, part))
                for part in parts
                if (bypass := bypasses.get(part.module)) is not None and "A" in bypass.weights
            ]
            if loras and not self._add_window(group, loras, x):
                for bypass, columns in loras:
                    self._add_lora(group, bypass, x, columns)
        rows = self._rows
        if rows is not None and rows.has_any(self._layer, parts, Field.RANK):
            rows.table.kernels.add_low_rank(x, outputs, parts, rows, self._layer)

    def _add_window(
        self, group: BypassGroup, loras: Sequence[tuple[Bypass, Tensor]], x: Tensor
    ) -> bool:
        """Add all LoRAs of neighbouring rows at once, where there is a kernel for it."""
        rows = group.rows
        if group.dropout is not None or not isinstance(rows, slice):
            return False
        source = x[rows]
        names = [low_rank(bypass.target.module) for bypass, _ in loras]
        parts = [
            LoraOutput(
                a=(a := bypass.weights["A"]),
                b=bypass.weights["B"],
                scale=bypass.target.scale,
                low_rank=source.new_empty(source.shape[0], a.shape[0])
                if self._keeps(group, name)
                else None,
                out=columns[rows],
            )
            for name, (bypass, columns) in zip(names, loras, strict=True)
        ]
        if not cpu_lora_window.forward(parts, source):
            return False
        for name, part in zip(names, parts, strict=True):
            if part.low_rank is not None:
                self._keep_of(group, name, part.low_rank)
        return True

    def _add_lora(self, group: BypassGroup, bypass: Bypass, x: Tensor, outputs: Tensor) -> None:
        rows, target = group.rows, bypass.target
        source = x[rows]
        if group.dropout is not None:
            source = source * dropout_scale(
                group.dropout,
                layer=target.layer,
                module=target.module,
                positions=self._step.positions[rows],
                num_features=target.in_features,
                dtype=source.dtype,
            )
        inner = cpu_linear.linear(source, bypass.weights["A"])
        self._keep_of(group, low_rank(target.module), inner)
        up = bypass.weights["B"].t()
        if isinstance(rows, slice):
            outputs[rows].addmm_(inner, up, alpha=target.scale)
        else:
            outputs[rows] += (inner @ up).mul_(target.scale)

    def _add_bottleneck(self, group: BypassGroup, bypass: Bypass, outputs: Tensor) -> None:
        source, weights = outputs[group.rows], bypass.weights
        inner = torch.addmm(weights["down_bias"], source, weights["down"].t())
        self._keep_of(group, low_rank(bypass.target.module), inner)
        active = activation(bypass.activation, inner)
        self._keep_of(group, f"active:{bypass.target.module}", active)
        outputs[group.rows] += torch.addmm(weights["up_bias"], active, weights["up"].t())

    def _keep_of(self, group: BypassGroup, name: str, value: Tensor) -> None:
        """Show taps a tensor [n, width] of a group whose tokens are theirs."""
        taps, rows = self._taps, group.rows
        if taps is not None and isinstance(rows, slice) and self._keeps(group, name):
            taps.keep(self._layer, name, rows, value)

    def _keeps(self, group: BypassGroup, name: str) -> bool:
        """Whether taps want a tensor of a group, whose tokens are theirs."""
        taps, rows = self._taps, group.rows
        if taps is None or name not in self._wanted or not isinstance(rows, slice):
            return False
        return taps.rows.start <= rows.start and rows.stop <= taps.rows.stop


def _columns(outputs: Tensor, part: Linear) -> Tensor:
    return outputs[:, part.begin : part.begin + part.width]


def _scales_output(bypass: Bypass) -> bool:
    return "l" in bypass.weights and not bypass.target.scales_input
