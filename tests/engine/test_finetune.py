"""Settings of a job, as callers write them by hand."""

from __future__ import annotations

from typing import Any

import pytest

from weft.base.errors import ConfigError
from weft.engine.finetune import OptimizerName, OptimizerSpec, ScheduleName


def test_names_written_by_hand_are_the_members_that_executors_ask_for() -> None:
    by_hand: Any = {"name": "adamw", "schedule": "cosine"}
    spec = OptimizerSpec(**by_hand)
    # An executor that asks `is ADAMW` must not take a plain string for the other optimizer.
    assert spec.name is OptimizerName.ADAMW
    assert spec.schedule is ScheduleName.COSINE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "optimizer name is 'adam'; it must be one of adamw, sgd"),
        ({"schedule": "step"}, "it must be one of constant, linear, cosine"),
        ({"lr": 0.0}, "learning rate is 0.0"),
        ({"lr": float("nan")}, "learning rate is nan"),
        ({"lr": float("inf")}, "learning rate is inf"),
        ({"lr": 1e39}, "learning rate is 1e[+]39; .* 1e[+]06 at most"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": 1e300}, r"weight_decay is 1e[+]300; it must be in \[0, 1e[+]06\]"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerSpec(**options)
