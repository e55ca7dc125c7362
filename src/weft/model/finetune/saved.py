"""What one sample keeps between forward and backward, layer by layer, in the windows it came in.

Shape legend: n tokens of the sample, s tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.base.errors import IntegrityError
from weft.model.linear import tensor_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    begin: int
    rows: Tensor
    """[s, width] of positions [begin, begin + s)."""

    @property
    def end(self) -> int:
        return self.begin + self.rows.shape[0]


class SavedTensors:
    """Tensors by (layer, name); a backward window may span forward windows or part of one."""

    def __init__(self, num_layers: int) -> None:
        self._layers: list[dict[str, list[_Piece]]] = [{} for _ in range(num_layers)]

    def keep(self, layer: int, name: str, begin: int, rows: Tensor) -> None:
        """Adopt rows [s, width] of positions [begin, begin + s); windows come left to right."""
        self._layers[layer].setdefault(name, []).append(_Piece(begin=begin, rows=rows))

    def names(self, layer: int) -> frozenset[str]:
        """What is kept of a layer."""
        return frozenset(self._layers[layer])

    def window(self, layer: int, begin: int, end: int) -> Mapping[str, Tensor]:
        """The rows [begin, end) of everything kept of a layer; views where one window has them.

        Raises:
            IntegrityError: part of the window was not kept, or is gone.
        """
        return {
            name: _rows(pieces, begin, end, f"{name} of layer {layer}")
            for name, pieces in self._layers[layer].items()
        }

    def release(self, layer: int, begin: int) -> None:
        """Forget what lies at `begin` and to its right, as far as whole windows go."""
        kept = self._layers[layer]
        for name, pieces in kept.items():
            kept[name] = [piece for piece in pieces if piece.begin < begin]
        if begin == 0:
            kept.clear()

    @property
    def size_bytes(self) -> int:
        """Bytes of the rows kept."""
        return sum(
            tensor_bytes(piece.rows)
            for layer in self._layers
            for pieces in layer.values()
            for piece in pieces
        )


def _rows(pieces: list[_Piece], begin: int, end: int, what: str) -> Tensor:
    parts = [
        piece.rows[max(0, begin - piece.begin) : end - piece.begin]
        for piece in pieces
        if piece.begin < end and piece.end > begin
    ]
    if sum(part.shape[0] for part in parts) != end - begin:
        raise IntegrityError(f"{what} is not kept for all tokens of [{begin}, {end})")
    return parts[0] if len(parts) == 1 else torch.cat(parts)
