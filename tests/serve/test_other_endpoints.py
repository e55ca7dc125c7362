"""Models, tokens, health, version, request ids, and the shape of the API."""

from __future__ import annotations

import httpx
import openai

import weft
from serve.fake_server import MODEL_NAME


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME, "alias"]
    assert client.models.retrieve(MODEL_NAME).owned_by == "weft"
    assert client.models.retrieve("alias").root == MODEL_NAME  # type: ignore[attr-defined]


def test_an_alias_is_the_same_model(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="alias", prompt="x", max_tokens=1)
    assert answer.model == MODEL_NAME


def test_text_becomes_tokens_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé"}


def test_a_conversation_becomes_tokens(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    assert bytes(tokens) == b"[user]hi\n"


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").status_code == http.head("/health").status_code == 200
    assert http.get("/health/").status_code == 404  # Not a redirect, which POST would lose.
    assert http.get("/version").json() == {"version": weft.__version__}


def test_a_request_id_is_echoed_or_made(http: httpx.Client) -> None:
    given = http.get("/version", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = {http.get("/version").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    for bad in ("x" * 300, "tab\there"):
        assert http.get("/nowhere", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_the_schema_names_every_body(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        content = schema["paths"][path]["post"]["requestBody"]["content"]
        reference = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert schema["components"]["schemas"][reference]["properties"]
