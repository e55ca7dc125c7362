"""Repeated layers of a model, for planners that split by counting layers."""

from __future__ import annotations

from collections.abc import Sequence

from weft.graph.graph import Graph


def layer_segments(graph: Graph, order: Sequence[int]) -> list[tuple[int, ...]]:
    """The operators in `order`, grouped by layer; what lies between joins the layer before it.

    A layer is a numbered child of the module list with the most children on an operator's path.
    What precedes the first layer joins it. A graph without numbered modules has one layer an
    operator.
    """
    siblings: dict[str, set[str]] = {}
    for op in graph.ops:
        for prefix, number in _numbered(op.module_path or op.id):
            siblings.setdefault(prefix, set()).add(number)
    segments: list[list[int]] = []
    before: list[int] = []
    current = ""
    for op in order:
        layer = _layer_of(graph.ops[op].module_path or graph.ops[op].id, siblings)
        if layer and layer != current:
            segments.append([])
            current = layer
        (segments[-1] if segments else before).append(op)
    if not segments:
        return [(op,) for op in order]
    segments[0] = before + segments[0]
    return [tuple(segment) for segment in segments]


def _numbered(path: str) -> list[tuple[str, str]]:
    """Every (parent path, number) on a module path."""
    parts = path.split(".")
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts) if part.isdigit()]


def _layer_of(path: str, siblings: dict[str, set[str]]) -> str:
    found = [(len(siblings[p]), f"{p}.{n}") for p, n in _numbered(path) if len(siblings[p]) > 1]
    return max(found, key=lambda row: row[0], default=(0, ""))[1]


def even_split(num_layers: int, num_parts: int) -> list[int]:
    """Layers of each part, differing by one at most, longer parts last."""
    short, longer = divmod(num_layers, num_parts)
    return [short] * (num_parts - longer) + [short + 1] * longer
