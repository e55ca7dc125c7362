"""Training data: columns of samples, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.base.errors import ConfigError
from weft.graph.capture import Capture


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Samples as columns: every tensor holds all samples on the batch axis that the model has.

    `inputs` are the model's positional (tuple) or keyword (mapping) arguments, `targets` the loss's
    further arguments: tensors or NumPy arrays, memory-mapped ones too, of which only the samples
    asked for are read. A tensor that the model takes whole (no batch axis) is given whole.
    """

    inputs: tuple[Any, ...] | Mapping[str, Any]
    targets: tuple[Any, ...] = ()
    validation: TrainData | None = None

    @property
    def leaves(self) -> list[Any]:
        """Tensors and arrays in the order of `Capture.leaves`."""
        arguments = (self.inputs, {}) if isinstance(self.inputs, tuple) else ((), self.inputs)
        flat = pytree.tree_leaves((*arguments, self.targets))
        return [leaf for leaf in flat if isinstance(leaf, (Tensor, np.ndarray))]


class SampleOrder:
    """Which sample comes when: a permutation an epoch, whole batches only."""

    def __init__(
        self, num_samples: int, batch_samples: int, *, seed: int, shuffles: bool = True
    ) -> None:
        """`batch_samples` make one optimizer step; an epoch's remainder waits for another epoch.

        Raises:
            ConfigError: there are fewer samples than one step takes.
        """
        if num_samples < batch_samples:
            raise ConfigError(
                f"the data holds {num_samples} samples; one optimizer step takes {batch_samples}: "
                "give more data or a plan with a smaller batch"
            )
        self.steps_per_epoch = num_samples // batch_samples
        self._num_samples = num_samples
        self._batch_samples = batch_samples
        self._seed = seed
        self._shuffles = shuffles
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def indices(self, step: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """Samples [first, first + count) of a step's batch, as rows of the columns."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if not self._shuffles:
            begin = within * self._batch_samples + first
            return np.arange(begin, begin + count)
        if epoch != self._epoch:
            # Philox's key takes both numbers, so epochs need not be drawn one after another.
            bits = np.random.Philox(key=(self._seed % 2**64) + (epoch << 64))
            self._permutation = np.random.Generator(bits).permutation(self._num_samples)
            self._epoch = epoch
        begin = within * self._batch_samples + first
        return self._permutation[begin : begin + count]


class ColumnSource:
    """Feeds an executor from `TrainData` (a `weft.runtime.batch_source.SampleSource`)."""

    def __init__(
        self,
        data: TrainData,
        capture: Capture,
        batch_samples: int,
        *,
        seed: int = 0,
        shuffles: bool = True,
    ) -> None:
        """`batch_samples` are the samples of one optimizer step, of all its flushes.

        Raises:
            ConfigError: tensors are missing, of unequal lengths, or fewer samples than one step.
        """
        self._columns = data.leaves
        self._axes = tuple(leaf.batch_axis for leaf in capture.leaves)
        self._dtypes = _dtypes(capture)
        names = [leaf.name for leaf in capture.leaves]
        if len(self._columns) != len(names):
            raise ConfigError(
                f"the data holds {len(self._columns)} tensors; the model takes {len(names)} "
                f"({', '.join(names)})"
            )
        lengths = {
            name: column.shape[axis]
            for name, column, axis in zip(names, self._columns, self._axes, strict=True)
            if axis is not None
        }
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ConfigError(f"the data's tensors hold unequal numbers of samples ({listed})")
        self.num_samples: int = next(iter(lengths.values()), 0)
        self.order = SampleOrder(self.num_samples, batch_samples, seed=seed, shuffles=shuffles)

    def fetch(
        self, step: int, leaves: tuple[int, ...], first_sample: int, num_samples: int
    ) -> Sequence[Tensor]:
        """The tensors of these leaves for a range of a step's samples."""
        rows = self.order.indices(step, first_sample, num_samples)
        return [self._take(leaf, rows) for leaf in leaves]

    def _take(self, leaf: int, rows: npt.NDArray[np.int64]) -> Tensor:
        column, axis = self._columns[leaf], self._axes[leaf]
        if isinstance(column, Tensor):
            found = column
            if axis is not None:
                found = column.index_select(axis, torch.from_numpy(np.ascontiguousarray(rows)))
        else:
            array = cast("npt.NDArray[Any]", column)
            picked = array if axis is None else np.take(array, rows, axis=axis)
            found = torch.from_numpy(np.ascontiguousarray(picked))
        wanted = self._dtypes[leaf]
        return found if found.dtype == wanted else found.to(wanted)


def _dtypes(capture: Capture) -> list[torch.dtype]:
    """The dtypes with which the model was captured, by leaf."""
    by_name = {
        node.name: node.meta["val"].dtype
        for node in capture.program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    }
    return [by_name[leaf.name] for leaf in capture.leaves]
