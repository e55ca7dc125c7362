"""Keys, tenants, and what stays open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from serve.conftest import Server
from serve.fake_server import MODEL_NAME
from weft.base.errors import ConfigError
from weft.serve.api_keys import ANYONE, ApiKeys, Tenant


def test_keys_guard_everything_but_health_version_and_metrics(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"key-a": "a", "key-b": {"tenant": "b", "priority": 5}}))
    server = start_server(api_keys=["plain"], key_file=str(file))
    with server.http() as http:
        for path in ("/health", "/version", "/metrics"):
            assert http.get(path).status_code == 200
        for path in ("/v1/models", "/v1/nothing", "/openapi.json"):
            assert http.get(path).status_code == 401
        refused = http.post("/tokenize", json={"prompt": "x"})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        server.openai("wrong").models.list()

    prompt = "a prompt of two pages, shared by nobody but its tenant's requests"
    cached: list[int] = []
    for key in ("plain", "key-a", "key-a", "key-b"):
        answer = server.openai(key).completions.create(
            model=MODEL_NAME, prompt=prompt, max_tokens=1
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached == [0, 0, len(prompt) // 16 * 16, 0]


def test_the_right_key_is_found_and_no_other() -> None:
    keys = ApiKeys({"one": Tenant(name="1"), "two": Tenant(name="2")})
    assert keys.tenant("Bearer one") == Tenant(name="1")
    assert keys.tenant("bearer two") == Tenant(name="2")
    for header in (None, "", "one", "Basic one", "Bearer", "Bearer on", "Bearer onee"):
        assert keys.tenant(header) is None
    assert ApiKeys({}).tenant(None) is ANYONE


def test_a_file_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\n beta \n")
    keys = ApiKeys.load((), file)
    assert len(keys) == 2
    assert keys.tenant("Bearer beta") is ANYONE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key"),
        ("{", "not valid JSON"),
        ("{}", "holds no key"),
        ('{"secret-key": 3}', "needs a tenant name"),
        ('{"secret-key": {"tenant": "a", "wait": 1}}', "unknown settings: wait"),
        ('{"secret-key": {"tenant": "a", "priority": "x"}}', "whole number"),
        ('{"": "a"}', "is empty"),
    ],
)
def test_a_bad_file_is_refused_without_showing_keys(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.load((), file)
    assert "secret-key" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.load((), tmp_path / "none")


@pytest.mark.parametrize("text", ['["key"]', '"key"', '{"key": "a", "key": "b"}', "[" * 9999])
def test_json_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match="keys"):
        ApiKeys.load((), path)
