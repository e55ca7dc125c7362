"""Few cases that hold every pair of values of any two options: all-pairs testing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def pairwise(
    axes: Mapping[str, Sequence[Any]], is_valid: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Rows in which every pair that some valid row holds occurs; greedy, always the same."""
    names = list(axes)
    rows = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    rows = [row for row in rows if is_valid(row)]
    columns = [[axes[name].index(row[name]) for name in names] for row in rows]
    value = np.array(columns, dtype=np.int64).reshape(len(rows), len(names))
    # One column a pair of values: whether a row holds it.
    holds = np.stack(
        [
            (value[:, a] == i) & (value[:, b] == j)
            for a, b in itertools.combinations(range(len(names)), 2)
            for i in range(len(axes[names[a]]))
            for j in range(len(axes[names[b]]))
        ],
        axis=1,
    ).astype(np.float32)
    left = holds.any(axis=0).astype(np.float32)
    chosen: list[Row] = []
    while left.any():
        best = int(np.argmax(holds @ left))
        chosen.append(rows[best])
        left[holds[best] > 0] = 0
    return chosen


def name_of(row: Row) -> str:
    """A test's id."""
    return "-".join(str(value).replace(" ", "") for value in row.values())
