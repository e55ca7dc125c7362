"""What a body's mistake is called, where a field takes several kinds of values."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from weft.serve.finetune_bodies import JobBody
from weft.serve.protocol import first_problem


def problem(**fields: Any) -> tuple[str, str | None]:
    """What is said of a job's body."""
    body = {"model": "m", "training_file": "f", **fields}
    with pytest.raises(ValidationError) as refused:
        JobBody.model_validate_json(json.dumps(body))
    return first_problem(refused.value.errors(include_url=False, include_context=False))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_epochs", 0, "greater than or equal to 1; n_epochs must be 'auto' or a whole number"),
        ("n_epochs", 10**9, r"less than or equal to 1000; n_epochs must be 'auto'"),
        ("n_epochs", "three", r"^n_epochs must be 'auto' or a whole number in \[1, 1000\]$"),
        ("n_epochs", 1.5, "whole number"),
        ("batch_size", 0, "greater than or equal to 1; batch_size must be 'auto'"),
        ("learning_rate_multiplier", 0, "greater than 0"),
        ("learning_rate_multiplier", "nan", "^learning_rate_multiplier must be 'auto' or a pos"),
    ],
)
def test_a_hyperparameter_takes_more_than_auto(name: str, value: Any, message: str) -> None:
    assert re.search(message, problem(hyperparameters={name: value})[0])
    nested = {"type": "supervised", "supervised": {"hyperparameters": {name: value}}}
    assert "auto" in problem(method=nested)[0]


def test_target_modules_take_a_list_or_a_pattern() -> None:
    said, param = problem(weft={"lora": {"target_modules": [3]}})
    assert "a list of names, a regular expression or all-linear" in said
    assert param == "weft"
