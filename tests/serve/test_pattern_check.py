"""Patterns that a tenant gives are tried where they hold up nobody."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from weft.base.errors import InvalidRequestError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.serve.pattern_check import check_directory_patterns, check_patterns


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


_SLOW = "((([a-z_.0-9])+)+)+!"


@pytest.mark.parametrize("name", ["adapter_config.json", "bottleneck.json"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": _SLOW},
        {"target_modules": ["q_proj"], "exclude_modules": _SLOW},
        {"target_modules": ".*q_proj", "feedforward_modules": _SLOW},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4, _SLOW: 8}},
        {"target_modules": "all-linear", "alpha_pattern": {_SLOW: 8.0}},
    ],
    ids=lambda fields: next(reversed(fields)),
)
def test_a_directory_with_such_a_pattern_is_refused(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(InvalidRequestError) as caught:
        asyncio.run(check_directory_patterns(tmp_path))
    assert _SLOW in caught.value.message
    assert "takes too long to match" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"target_modules": 3, "rank_pattern": [1]}',
        '{"target_modules": "("}',
        '{"target_modules": ".*proj", "rank_pattern": {"q_proj": 4}}',
    ],
)
def test_what_else_is_wrong_with_a_directory_is_left_to_the_engine(
    tmp_path: Path, text: str
) -> None:
    asyncio.run(check_directory_patterns(tmp_path))
    (tmp_path / "adapter_config.json").write_text(text)
    asyncio.run(check_directory_patterns(tmp_path))
