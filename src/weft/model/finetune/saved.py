"""What one sample keeps between forward and backward, layer by layer, in the windows it came in.

Shape legend: n tokens of the sample, s tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.base.errors import IntegrityError
from weft.model.linear import tensor_bytes


@dataclass(kw_only=True, slots=True)
class _Window:
    """What is kept of a layer's forward window."""

    begin: int
    end: int
    rows: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """By name, [end - begin, width]."""


class SavedTensors:
    """Tensors by (layer, name); a backward window may span forward windows or part of one."""

    def __init__(self, num_layers: int) -> None:
        self._layers: list[list[_Window]] = [[] for _ in range(num_layers)]

    def keep(self, layer: int, name: str, begin: int, rows: Tensor) -> None:
        """Adopt rows [s, width] of positions [begin, begin + s); windows come left to right."""
        windows = self._layers[layer]
        if not windows or windows[-1].begin != begin:
            windows.append(_Window(begin=begin, end=begin + rows.shape[0]))
        windows[-1].rows[name] = rows

    def names(self, layer: int) -> frozenset[str]:
        """What is kept of a layer's latest window."""
        windows = self._layers[layer]
        return frozenset(windows[-1].rows) if windows else frozenset()

    def window(self, layer: int, begin: int, end: int) -> Mapping[str, Tensor]:
        """The rows [begin, end) of everything kept of a layer; views where one window has them.

        Raises:
            IntegrityError: part of the window was not kept, or is gone.
        """
        windows = self._layers[layer]
        if not windows:
            return {}
        within = [w for w in windows if w.begin < end and w.end > begin]
        covered = sum(min(w.end, end) - max(w.begin, begin) for w in within)
        if covered != end - begin or any(w.rows.keys() != within[0].rows.keys() for w in within):
            raise IntegrityError(f"layer {layer} is not kept for all tokens of [{begin}, {end})")
        if len(within) == 1 and within[0].end - within[0].begin == end - begin:
            return within[0].rows
        return {name: _joined(within, name, begin, end) for name in within[0].rows}

    def release(self, layer: int, begin: int) -> None:
        """Forget what lies at `begin` and to its right, as far as whole windows go."""
        windows = self._layers[layer]
        while windows and windows[-1].begin >= begin:
            windows.pop()

    @property
    def size_bytes(self) -> int:
        """Bytes of the rows kept."""
        return sum(
            tensor_bytes(rows)
            for windows in self._layers
            for window in windows
            for rows in window.rows.values()
        )


def _joined(windows: list[_Window], name: str, begin: int, end: int) -> Tensor:
    parts = [w.rows[name][max(0, begin - w.begin) : end - w.begin] for w in windows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
