"""Picks from a forward pass what the backward of the samples in it will read.

Shape legend: T tokens of the iteration, s tokens of a row, D head_dim.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from weft.model.finetune.layer_tensors import LayerPlan
from weft.model.finetune.primitives import turn_into
from weft.model.finetune.saved import SavedTensors

# What the decoder makes anew in every layer and does not write to again.
_LASTING = frozenset(
    {
        "layer_input",
        "attn_normed",
        "attn_out",
        "mlp_input",
        "mlp_normed",
        "gate",
        "up",
        "act",
    }
)


_QUERY_SOURCES = frozenset({"query_flat", "query_raw"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TappedRow:
    """A forward row of a sample in training."""

    rows: slice
    """Its tokens within the iteration."""
    begin: int
    """Position of the first of them in the sample."""
    plans: Sequence[LayerPlan]
    saved: SavedTensors
    cos: Tensor
    """[s, D/2] of its positions."""
    sin: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _LayerTaps:
    wanted: frozenset[str]
    may_adopt: bool
    """Whether tensors may be kept as they are, and not copied."""


class SampleTaps:
    """`weft.model.forward_step.Taps` that hands each row's tensors to its sample."""

    def __init__(self, rows: Sequence[TappedRow], num_tokens: int) -> None:
        """`rows`, at least one, follow each other; `num_tokens` is T."""
        self._rows = tuple(rows)
        self.rows = slice(rows[0].rows.start, rows[-1].rows.stop)
        covered = sum(row.rows.stop - row.rows.start for row in rows)
        self._layers = [
            _LayerTaps(
                wanted=frozenset(
                    source
                    for row in rows
                    for name in row.plans[layer].needs.saved
                    for source in (name, *_sources(row.plans[layer], name))
                ),
                # Where all tokens are the samples' own, nobody else holds on to the tensors.
                may_adopt=covered == num_tokens
                and not any(_scales_inputs(row.plans[layer]) for row in rows),
            )
            for layer in range(len(rows[0].plans))
        ]

    def wants(self, layer: int) -> Collection[str]:
        """Names that some row's sample keeps of a layer, or that such a tensor is made from."""
        return self._layers[layer].wanted

    def keep(self, layer: int, name: str, rows: slice, value: Tensor) -> None:
        """Hand out `value` [.., width] of the tokens `rows`."""
        adopts = self._layers[layer].may_adopt and name in _LASTING
        for row in self._rows:
            begin, end = row.rows.start - rows.start, row.rows.stop - rows.start
            if begin < 0 or end > value.shape[0]:
                continue
            plan, part = row.plans[layer], value[begin:end]
            if name in plan.needs.saved:
                row.saved.keep(layer, name, row.begin, part if adopts else part.clone())
            if name in _QUERY_SOURCES and "query" in plan.needs.saved:
                row.saved.keep(layer, "query", row.begin, _query(plan, row, part))


def _scales_inputs(plan: LayerPlan) -> bool:
    """(IA)³ may scale a linear's input where it lies."""
    return any(bypass.target.scales_input for bypass in plan.bypasses.values())


def _sources(plan: LayerPlan, name: str) -> tuple[str, ...]:
    """Where a tensor that only the attention kernels see comes from."""
    if name != "query":
        return ()
    return ("query_flat",) if plan.weights.query_norm is None else ("query_raw",)


def _query(plan: LayerPlan, row: TappedRow, flat: Tensor) -> Tensor:
    heads = flat.unflatten(1, (-1, plan.shape.head_dim))
    if plan.weights.query_norm is not None:
        heads = plan.kernels.rms_norm(heads, plan.weights.query_norm, plan.shape.norm_eps)
    out = heads.new_empty(flat.shape)
    turn_into(heads, row.cos, row.sin, out)
    return out
