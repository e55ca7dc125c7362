"""Dropout masks: pure functions of the element, of the right share, unrelated to each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from weft.graph.adapter_spec import Module
from weft.model.finetune.dropout import DropoutKey, dropout_scale

KEY = DropoutKey(seed=7, step=3, index=1, probability=0.25)


def scale(
    key: DropoutKey = KEY,
    begin: int = 0,
    end: int = 400,
    layer: int = 2,
    module: Module = Module.Q_PROJ,
    num_features: int = 300,
) -> Tensor:
    return dropout_scale(
        key,
        layer=layer,
        module=module,
        positions=torch.arange(begin, end),
        num_features=num_features,
        dtype=torch.float64,
    )


def test_windows_do_not_change_a_mask() -> None:
    whole = scale()
    parts = torch.cat([scale(begin=0, end=7), scale(begin=7, end=250), scale(begin=250, end=400)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.25, 0.5, 0.9])
def test_the_dropped_share_and_the_scale_are_right(probability: float) -> None:
    found = scale(dataclasses.replace(KEY, probability=probability))
    num = found.numel()
    share = float((found == 0).sum()) / num
    assert abs(share - probability) < 5 * (probability * (1 - probability) / num) ** 0.5 + 1e-12
    kept = found[found != 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - probability), dtype=torch.float64))
    # No row and no column is odd either.
    if probability > 0:
        for axis in (0, 1):
            shares = (found == 0).double().mean(axis)
            spread = (probability * (1 - probability) / found.shape[axis]) ** 0.5
            assert float((shares - probability).abs().max()) < 5 * spread


def test_any_other_key_layer_module_or_position_gives_an_unrelated_mask() -> None:
    base = (scale() == 0).double() - 0.25
    others = [
        scale(dataclasses.replace(KEY, seed=8)),
        scale(dataclasses.replace(KEY, step=4)),
        scale(dataclasses.replace(KEY, index=0)),
        scale(layer=1),
        scale(module=Module.K_PROJ),
        scale(begin=1, end=401),
        # Swapping two numbers is another key.
        scale(dataclasses.replace(KEY, step=1, index=3)),
    ]
    bound = 5 * 0.25 * 0.75 / base.numel() ** 0.5
    for other in others:
        assert abs(float((base * ((other == 0).double() - 0.25)).mean())) < bound
    # Nor are neighbouring rows and columns of one mask related.
    assert abs(float((base[1:] * base[:-1]).mean())) < bound
    assert abs(float((base[:, 1:] * base[:, :-1]).mean())) < bound
