"""Order and columns of training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from train.small import data, model
from weft.base.errors import ConfigError
from weft.train.data import ColumnSource, SampleOrder, TrainData


def test_every_epoch_holds_each_sample_once_in_an_order_of_its_own() -> None:
    order = SampleOrder(20, 5, seed=3)
    epochs = [
        np.concatenate([order.indices(4 * epoch + step, 0, 5) for step in range(4)])
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_seed_and_step_alone() -> None:
    one, other = SampleOrder(20, 5, seed=3), SampleOrder(20, 5, seed=3)
    late = other.indices(9, 2, 3).tolist()  # without the epochs before it
    for step in range(9):
        one.indices(step, 0, 5)
    assert one.indices(9, 2, 3).tolist() == late
    assert SampleOrder(20, 5, seed=4).indices(0, 0, 5).tolist() != one.indices(0, 0, 5).tolist()


def test_a_remainder_waits_for_another_epoch() -> None:
    order = SampleOrder(13, 5, seed=0)
    assert order.steps_per_epoch == 2
    assert len(order.indices(2, 0, 5)) == 5


def test_unshuffled_is_in_order() -> None:
    order = SampleOrder(12, 4, seed=0, shuffles=False)
    assert order.indices(2, 1, 2).tolist() == [9, 10]


def test_data_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds 24 samples; one optimizer step takes 32"):
        ColumnSource(data(), model().trace(), 32)


def test_columns_may_be_mapped_from_disk_and_take_the_models_dtype(tmp_path: Path) -> None:
    columns = data()
    arrays = [leaf.numpy().astype(np.float64) for leaf in columns.leaves]
    np.save(tmp_path / "a.npy", arrays[0])
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    source = ColumnSource(
        TrainData(inputs=(mapped, arrays[1]), targets=(arrays[2],)),
        model().trace(),
        8,
        shuffles=False,
    )
    a, wanted = source.fetch(1, (0, 2), 2, 3)
    assert a.dtype == torch.float32
    assert torch.equal(a, columns.leaves[0][10:13])
    assert torch.equal(wanted, columns.leaves[2][10:13])


def test_wrong_numbers_of_tensors_and_samples_are_refused() -> None:
    good, capture = data(), model().trace()
    with pytest.raises(ConfigError, match="holds 2 tensors; the model takes 3"):
        ColumnSource(TrainData(inputs=good.inputs), capture, 8)
    short = TrainData(inputs=good.inputs, targets=(good.targets[0][:-1],))
    with pytest.raises(ConfigError, match="unequal numbers of samples"):
        ColumnSource(short, capture, 8)
