"""One table says what becomes of every parameter; the server, the docs and OpenAI agree on it."""

from __future__ import annotations

import typing
from pathlib import Path

import httpx
import pytest
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chat

from weft.serve.parameters import (
    CHAT_EXTRA,
    CHAT_PARAMETERS,
    COMPLETION_EXTRA,
    COMPLETION_PARAMETERS,
    Handling,
    Parameter,
    render_table,
)
from weft.serve.protocol import ChatBody, CompletionBody

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "openai-parameters.md"
LOUD: dict[str, object] = {
    "best_of": 3,
    "suffix": "end",
    "store": True,
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "service_tier": "priority",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "verbosity": "high",
    "audio": {"voice": "alloy", "format": "wav"},
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "web_search_options": {},
}
"""For each parameter that may be refused: a value that asks for something."""


def _refusable(rows: tuple[Parameter, ...]) -> list[Parameter]:
    return [
        row
        for row in rows
        if row.handling is Handling.REFUSED
        or (row.handling is Handling.NEUTRAL and row.neutral and row.name != "parallel_tool_calls")
    ]


def _openai_names(params: type) -> set[str]:
    return {*typing.get_type_hints(params), "stream"}


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        (openai_completions.CompletionCreateParamsBase, COMPLETION_PARAMETERS),
        (openai_chat.CompletionCreateParamsBase, CHAT_PARAMETERS),
    ],
)
def test_every_parameter_of_the_installed_client_has_its_row(
    params: type, rows: tuple[Parameter, ...]
) -> None:
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    assert _openai_names(params) <= set(names)


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        (CompletionBody, (*COMPLETION_PARAMETERS, *COMPLETION_EXTRA)),
        (ChatBody, (*CHAT_PARAMETERS, *CHAT_EXTRA)),
    ],
)
def test_the_typed_bodies_take_exactly_the_table(
    body: type[CompletionBody], rows: tuple[Parameter, ...]
) -> None:
    assert set(body.model_fields) == {row.name for row in rows}


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text() == render_table()


@pytest.mark.parametrize("row", _refusable(COMPLETION_PARAMETERS), ids=lambda row: row.name)
def test_completions_refuse_by_name(http: httpx.Client, row: Parameter) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    _check_row(http, "/v1/completions", body, row)


@pytest.mark.parametrize("row", _refusable(CHAT_PARAMETERS), ids=lambda row: row.name)
def test_chat_refuses_by_name(http: httpx.Client, row: Parameter) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    _check_row(http, "/v1/chat/completions", body, row)


def _check_row(http: httpx.Client, path: str, body: dict[str, object], row: Parameter) -> None:
    for value in (None, *row.neutral):
        answer = http.post(path, json={**body, row.name: value})
        assert answer.status_code == 200, (value, answer.text)
    answer = http.post(path, json={**body, row.name: LOUD[row.name]})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == (row.name, "unsupported_parameter")
    assert row.name in error["message"]


if __name__ == "__main__":
    DOCS.write_text(render_table())
