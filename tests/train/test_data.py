"""Order and columns of training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.small import data, model
from weft.base.errors import ConfigError
from weft.graph.capture import Capture
from weft.model.zoo.registry import ZooModel
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
    with pytest.raises(ConfigError, match=r"holds 2 tensors .* the model takes 3"):
        ColumnSource(TrainData(inputs=good.inputs), capture, 8)
    short = TrainData(inputs=good.inputs, targets=(good.targets[0][:-1],))
    with pytest.raises(ConfigError, match="unequal numbers of samples"):
        ColumnSource(short, capture, 8)


class Named(nn.Module):
    """Two inputs of one shape, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        return (self.one(first) - self.other(second)).squeeze(1) * ids


def named_capture() -> Capture:
    example = {"first": torch.zeros(2, 4), "second": torch.zeros(2, 4)}
    return ZooModel(
        name="named",
        module=Named(),
        example_inputs={**example, "ids": torch.zeros(2, dtype=torch.long)},
        targets=(torch.zeros(2),),
        loss=functional.mse_loss,
    ).trace()


def named_columns() -> dict[str, Tensor]:
    return {"first": torch.ones(8, 4), "second": torch.zeros(8, 4), "ids": torch.arange(8)}


def test_keyword_inputs_are_matched_by_name() -> None:
    columns = dict(reversed(named_columns().items()))
    assert list(columns) == ["ids", "second", "first"]
    source = ColumnSource(
        TrainData(inputs=columns, targets=(torch.zeros(8),)), named_capture(), 4, shuffles=False
    )
    found = source.fetch(0, (0, 1, 2), 0, 2)
    assert [tensor.float().mean().item() for tensor in found] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"third": torch.ones(8, 4)}, r"holds 5 tensors .*inputs\['third'\].* takes 4"),
        ({"first": torch.ones(8, 5)}, r"kwargs_first has shape \(8, 5\); .* \(samples, 4\)"),
        ({"first": torch.ones(8)}, r"kwargs_first has shape \(8,\); the model takes"),
        ({"ids": torch.rand(8)}, r"kwargs_ids holds torch.float32 where .* torch.int64"),
    ],
)
def test_columns_unlike_the_model_are_refused(change: dict[str, Tensor], message: str) -> None:
    held = TrainData(inputs=named_columns() | change, targets=(torch.zeros(8),))
    with pytest.raises(ConfigError, match=message):
        ColumnSource(held, named_capture(), 4)


def test_short_validation_data_is_named() -> None:
    with pytest.raises(ConfigError, match=r"validation data holds 24 .* one batch of the plan"):
        ColumnSource(data(), model().trace(), 32, what="validation data")
