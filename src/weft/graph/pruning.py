"""Which forward tensors of a layer must live until backward, for a set of trainable weights.

Graph pruning, rematerialization and lossless compression (FlexLLM, arXiv 2402.18789 §5.2): build
the reverse graph, drop every operator that leads to no trainable weight, keep what the survivors
read, then drop what cheap operators can compute again, and keep only signs where signs are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from weft.graph.layer_graph import LAYER_INPUT, LAYER_OUTPUT, LayerGraph, LayerOp, Reads


class Remat(StrEnum):
    """What a sample keeps between forward and backward."""

    NONE = "none"
    """All that the pruned backward reads."""
    PRUNED = "pruned"
    """The same, less what cheap operators recompute."""
    LAYER_INPUT = "layer-input"
    """The input of each layer and the keys and values; the rest is computed again per window."""


class Encoding(StrEnum):
    """How much of a tensor is kept."""

    FULL = "full"
    SIGN_BITS = "sign-bits"
    """One bit an element: all that the backward of ReLU reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardNeeds:
    """What one layer's backward does and reads."""

    saved: Mapping[str, Encoding]
    """Tensors kept from forward to backward; keys and values, which lie in pages, are not here."""
    recomputed: tuple[str, ...]
    """Tensors that backward computes again, in the order in which it can."""
    reads_pages: bool
    """Whether it reads the keys and values in the pages."""
    gradients: frozenset[str]
    """Forward tensors whose gradient is computed; others' gradients lead to no trainable weight."""

    @property
    def is_empty(self) -> bool:
        """Whether backward need not enter the layer at all."""
        return not self.gradients

    def saved_bits_per_token(self, widths: Mapping[str, int], element_bits: int) -> int:
        """Bits that a token keeps in this layer, pages apart."""
        return sum(
            widths[name] * (1 if encoding is Encoding.SIGN_BITS else element_bits)
            for name, encoding in self.saved.items()
        )


def backward_needs(graph: LayerGraph, *, needs_input_grad: bool, remat: Remat) -> BackwardNeeds:
    """Prune the reverse graph of a layer; `needs_input_grad` where a lower layer is trained."""
    needs_grad = _tensors_with_gradient(graph, needs_input_grad=needs_input_grad)
    reads = list(_surviving_reads(graph, needs_grad, needs_input_grad=needs_input_grad))
    values = {name for read in reads for name in read.values}
    signs = {name for read in reads for name in read.signs} - values
    wanted = values | signs
    reads_pages = bool(wanted & graph.in_pages)
    producers = {op.output: op for op in graph.ops}
    kept = wanted - graph.in_pages
    match remat:
        case Remat.NONE:
            pass
        case Remat.PRUNED:
            # A tensor that only lends its signs is one bit an element: not worth computing again.
            kept = signs | _without_cheap(values - graph.in_pages, producers, graph.in_pages)
        case Remat.LAYER_INPUT:
            kept = {LAYER_INPUT} if wanted else set[str]()
    recomputed = _recomputed(graph, values - graph.in_pages - kept, kept)
    return BackwardNeeds(
        saved={
            name: Encoding.SIGN_BITS if name in signs else Encoding.FULL for name in sorted(kept)
        },
        recomputed=recomputed,
        reads_pages=reads_pages or (bool(recomputed) and "attn_out" in recomputed),
        gradients=frozenset(needs_grad),
    )


def _tensors_with_gradient(graph: LayerGraph, *, needs_input_grad: bool) -> set[str]:
    """Tensors whose gradient some trainable weight, here or below, is computed from.

    The worklist over the reverse graph runs from the trained weights to the loss: an operator for
    the gradient of an input survives if that input leads on to something trained.
    """
    useful = {LAYER_INPUT} if needs_input_grad else set[str]()
    for op in graph.ops:
        if op.weight_grads or useful.intersection(op.inputs):
            useful.add(op.output)
    # Only what reaches the loss has a gradient; a layer's every tensor does, by its output.
    return useful & _reaching(graph, LAYER_OUTPUT)


def _reaching(graph: LayerGraph, output: str) -> set[str]:
    found = {output}
    for op in reversed(graph.ops):
        if op.output in found:
            found.update(op.inputs)
    return found


def _surviving_reads(
    graph: LayerGraph, needs_grad: set[str], *, needs_input_grad: bool
) -> Iterable[Reads]:
    for op in graph.ops:
        if op.output not in needs_grad:
            continue
        yield from op.weight_grads.values()
        for name, read in op.input_grads.items():
            if name in needs_grad and (name != LAYER_INPUT or needs_input_grad):
                yield read


def _without_cheap(
    wanted: set[str], producers: Mapping[str, LayerOp], in_pages: frozenset[str]
) -> set[str]:
    """Drop every tensor that cheap operators can compute from the ones that stay."""
    kept = set(wanted)

    def is_available(name: str) -> bool:
        if name in kept or name in in_pages:
            return True
        producer = producers.get(name)
        return (
            producer is not None and producer.is_cheap and all(map(is_available, producer.inputs))
        )

    # Later tensors first: what they are computed from is then still there.
    order = {name: index for index, name in enumerate(producers)}
    for name in sorted(wanted, key=lambda name: order.get(name, -1), reverse=True):
        producer = producers.get(name)
        if producer is not None and producer.is_cheap and all(map(is_available, producer.inputs)):
            kept.discard(name)
    return kept


def _recomputed(graph: LayerGraph, missing: set[str], kept: set[str]) -> tuple[str, ...]:
    """What must be computed again, inputs of inputs included, in the order of the forward."""
    needed = set(missing)
    for op in reversed(graph.ops):
        if op.output in needed:
            needed.update(
                name for name in op.inputs if name not in kept and name not in graph.in_pages
            )
    return tuple(op.output for op in graph.ops if op.output in needed and op.output not in kept)
