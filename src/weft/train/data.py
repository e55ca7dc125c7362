"""Training data: columns of samples, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    asked for are read. A tensor that the model takes whole (no batch axis) is given whole. Mappings
    are matched by their keys, in any order.
    """

    inputs: tuple[Any, ...] | Mapping[str, Any]
    targets: tuple[Any, ...] = ()
    validation: TrainData | None = None

    @property
    def leaves(self) -> list[Any]:
        """Tensors and arrays in the order of `Capture.leaves`."""
        return [leaf for _, leaf in self.paths]

    @property
    def paths(self) -> list[tuple[tuple[Any, ...], Any]]:
        """Each tensor and array with its key path within (args, kwargs, targets)."""
        arguments = (self.inputs, {}) if isinstance(self.inputs, tuple) else ((), dict(self.inputs))
        flat, _ = pytree.tree_flatten_with_path((*arguments, self.targets))
        return [(path, leaf) for path, leaf in flat if isinstance(leaf, (Tensor, np.ndarray))]


class SampleOrder:
    """Which sample comes when: a permutation an epoch, whole batches only."""

    def __init__(
        self,
        num_samples: int,
        batch_samples: int,
        *,
        seed: int,
        shuffles: bool = True,
        what: str = "data",
    ) -> None:
        """`batch_samples` make one optimizer step; an epoch's remainder waits for another epoch.

        `what` names the samples in errors.

        Raises:
            ConfigError: there are fewer samples than one step takes.
        """
        if num_samples < batch_samples:
            taker = "one optimizer step" if what == "data" else "one batch of the plan"
            raise ConfigError(
                f"the {what} holds {num_samples} samples; {taker} takes {batch_samples}: "
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
        what: str = "data",
    ) -> None:
        """`batch_samples` are the samples of one optimizer step, of all its flushes.

        Raises:
            ConfigError: tensors are missing, of other names, shapes or kinds of number than the
                model's, of unequal lengths, or fewer samples than one step; `what` names them.
        """
        self._columns = _in_order(data, capture, what)
        self._axes = tuple(leaf.batch_axis for leaf in capture.leaves)
        values = _examples(capture)
        self._dtypes = [value.dtype for value in values]
        names = [leaf.name for leaf in capture.leaves]
        for name, column, axis, value in zip(names, self._columns, self._axes, values, strict=True):
            _check_column(f"the {what}'s {name}", column, axis, value)
        lengths = {
            name: column.shape[axis]
            for name, column, axis in zip(names, self._columns, self._axes, strict=True)
            if axis is not None
        }
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ConfigError(f"the {what}'s tensors hold unequal numbers of samples ({listed})")
        self.num_samples: int = next(iter(lengths.values()), 0)
        self.order = SampleOrder(
            self.num_samples, batch_samples, seed=seed, shuffles=shuffles, what=what
        )

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


def _examples(capture: Capture) -> list[Tensor]:
    """What the model was captured with, by leaf: dtypes and shapes."""
    by_name = {
        node.name: node.meta["val"]
        for node in capture.program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    }
    return [by_name[leaf.name] for leaf in capture.leaves]


def _in_order(data: TrainData, capture: Capture, what: str) -> list[Any]:
    """The data's columns in the order of the model's leaves: by key where there are keys."""
    given, wanted = dict(data.paths), _leaf_paths(capture)
    if given.keys() == set(wanted):
        return [given[path] for path in wanted]
    has_keys = any(isinstance(key, pytree.MappingKey) for path in given for key in path)
    if has_keys or len(given) != len(wanted):
        raise ConfigError(
            f"the {what} holds {len(given)} tensors ({_listed(given)}); the model takes "
            f"{len(wanted)} ({_listed(wanted)})"
        )
    return list(given.values())


def _listed(paths: Iterable[tuple[Any, ...]]) -> str:
    """Key paths within (args, kwargs, targets) as a reader would write them."""
    roots = ("inputs", "inputs", "targets")
    return ", ".join(roots[path[0].idx] + pytree.keystr(path[1:]) for path in paths) or "none"


def _leaf_paths(capture: Capture) -> list[tuple[Any, ...]]:
    """The key path of each leaf within (args, kwargs, targets)."""
    spec = capture.program.call_spec.in_spec
    if spec is None:
        raise ConfigError(
            f"graph {capture.graph.name!r} was captured without a call; capture again"
        )
    flat, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    path_of = {position: path for path, position in flat}
    inputs = capture.program.graph_signature.input_specs
    names = [entry.arg.name for entry in inputs if entry.kind.name == "USER_INPUT"]
    # torch.export was given these three as positional arguments.
    return [path_of[names.index(leaf.name)][1:] for leaf in capture.leaves]


def _check_column(name: str, column: Any, axis: int | None, example: Tensor) -> None:
    """Refuse a column whose samples are not shaped like the model's."""
    wanted = ["samples" if i == axis else int(size) for i, size in enumerate(example.shape)]
    found = ["samples" if i == axis else int(size) for i, size in enumerate(column.shape)]
    if found != wanted:
        shape = ", ".join(map(str, wanted))
        raise ConfigError(
            f"{name} has shape {tuple(column.shape)}; the model takes ({shape}): give columns "
            "like its example inputs"
        )
    kinds = column if isinstance(column, Tensor) else torch.from_numpy(np.empty(0, column.dtype))
    if kinds.is_floating_point() and not example.is_floating_point():
        raise ConfigError(
            f"{name} holds {kinds.dtype} where the model takes {example.dtype}, and would lose "
            "its fractions; convert it"
        )
