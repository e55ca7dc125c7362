"""Where a run's samples come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from weft.base.errors import ConfigError
from weft.graph.capture import Capture


class SampleSource(Protocol):
    """Samples by step; every rank asks only for what its stages read."""

    def fetch(
        self, step: int, leaves: tuple[int, ...], first_sample: int, num_samples: int
    ) -> Sequence[Tensor]:
        """The tensors of these leaves (indices into `Capture.leaves`).

        Samples [first_sample, first_sample + num_samples) of the step's batch, which counts the
        samples of all its flushes, on the leaf's batch axis. A leaf without one is returned whole.
        """
        ...


class TensorSource:
    """Whole batches in memory: `batches(step)` returns (inputs, targets) as `capture` takes them.

    The last batch asked for is kept.
    """

    def __init__(self, capture: Capture, batches: Callable[[int], tuple[Any, Any]]) -> None:
        self._leaves = capture.leaves
        self._batches = batches
        self._step = -1
        self._tensors: list[Tensor] = []

    def fetch(
        self, step: int, leaves: tuple[int, ...], first_sample: int, num_samples: int
    ) -> Sequence[Tensor]:
        """Slices of the step's batch."""
        if step != self._step:
            inputs, targets = self._batches(step)
            args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
            flat = pytree.tree_leaves((args, kwargs, targets))
            self._tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
            self._step = step
            if len(self._tensors) != len(self._leaves):
                raise ConfigError(
                    f"step {step}'s batch holds {len(self._tensors)} tensors; the model was "
                    f"captured with {len(self._leaves)}"
                )
        found: list[Tensor] = []
        for index in leaves:
            axis, tensor = self._leaves[index].batch_axis, self._tensors[index]
            found.append(tensor if axis is None else tensor.narrow(axis, first_sample, num_samples))
        return found
