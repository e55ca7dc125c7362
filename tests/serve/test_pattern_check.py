"""Patterns that a tenant gives are tried where they hold up nobody."""

from __future__ import annotations

import asyncio

import pytest

from weft.base.errors import InvalidRequestError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.serve.pattern_check import check_patterns


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v)_proj",
        r"model\.layers\.(\d|1\d)\.(self_attn|mlp)\.\w+_proj",
        r"(?!.*layers\.0\.).*down_proj",
        "all-linear",
    ],
)
def test_plain_patterns_pass(pattern: str) -> None:
    asyncio.run(check_patterns(AdapterSpec(target_modules=pattern)))


def test_names_need_no_trial() -> None:
    asyncio.run(check_patterns(AdapterSpec(target_modules=("q_proj", "((x+)+)+!"))))


@pytest.mark.parametrize(
    "pattern",
    ["((([a-z_.0-9])+)+)+!", "(?:.|.)*!", ".*" * 60 + "!", r"model\.layers\.200\.((.+)+)+!"],
)
def test_a_pattern_that_never_ends_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match="takes too long to match"):
        asyncio.run(check_patterns(AdapterSpec(target_modules=pattern)))
    ia3 = AdapterSpec(
        kind=AdapterKind.IA3, target_modules=("down_proj",), feedforward_modules=pattern
    )
    with pytest.raises(InvalidRequestError, match="takes too long to match"):
        asyncio.run(check_patterns(ia3))
