"""Every mistake of a client is a clear message in OpenAI's shape, and nobody else's problem."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from serve.conftest import Server
from serve.fake_engine import greedy_text
from serve.fake_server import MODEL_NAME
from weft.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TURN = {"role": "user", "content": "x"}


def _completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "x", "max_tokens": 1, **fields}


def _chat(*messages: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": list(messages) or [TURN], "max_tokens": 1, **fields}


MISTAKES: dict[str, tuple[tuple[str, dict[str, Any]], str | None, str]] = {
    "empty prompt": (_completion(prompt=""), "prompt", "empty"),
    "no prompts": (_completion(prompt=[]), "prompt", "a list of strings"),
    "empty token list": (_completion(prompt=[[]]), "prompt", "list"),
    "no prompt": ((COMPLETIONS, {"max_tokens": 1}), "prompt", "missing"),
    "null prompt": (_completion(prompt=None), "prompt", "a list of strings"),
    "mixed prompt": (_completion(prompt=["a", 1]), "prompt", "a list of strings"),
    "too long": (_completion(prompt="x" * 256), "prompt", "256 tokens"),
    "much too long": (_completion(prompt="x" * 10_000), "prompt", "10000 characters"),
    "no room for max_tokens": (_completion(prompt="x" * 250, max_tokens=10), "max_tokens", "6"),
    "token too large": (_completion(prompt=[259]), "prompt", "0 to 258"),
    "negative token": (_completion(prompt=[-1]), "prompt", "list"),
    "second prompt bad": (_completion(prompt=["fine", ""]), "prompt", "empty"),
    "temperature < 0": (_completion(temperature=-0.1), "temperature", "greater than or equal to 0"),
    "temperature as text": (_completion(temperature="1"), "temperature", "number"),
    "top_p 0": (_completion(top_p=0), "top_p", "greater than 0"),
    "top_p > 1": (_completion(top_p=1.01), "top_p", "less than or equal to 1"),
    "top_k -2": (_completion(top_k=-2), "top_k", "-1"),
    "n 0": (_completion(n=0), "n", "greater than or equal to 1"),
    "n true": (_completion(n=True), "n", "integer"),
    "n too large": (_completion(n=1000), "n", "128"),
    "max_tokens -1": (_completion(max_tokens=-1), "max_tokens", "0"),
    "min over max": (_completion(min_tokens=5), "min_tokens", "max_tokens"),
    "logprobs 21": (_completion(logprobs=21), "logprobs", "20"),
    "prompt_logprobs 21": (_completion(prompt_logprobs=21), "prompt_logprobs", "20"),
    "17 stops": (_completion(stop=["x"] * 17), "stop", "16"),
    "empty stop": (_completion(stop=[""]), "stop", "non-empty"),
    "stop 3": (_completion(stop=3), "stop", "non-empty string"),
    "huge seed": (_completion(seed=2**70), "seed", "less than"),
    "bias of nothing": (_completion(logit_bias={"x": 1}), "logit_bias", "token ids"),
    "bias out of range": (_completion(logit_bias={"1": 101}), "logit_bias", "100"),
    "bias beyond vocabulary": (_completion(logit_bias={"259": 1}), "logit_bias", "258"),
    "stop token beyond": (_completion(stop_token_ids=[259]), "stop_token_ids", "258"),
    "repetition_penalty tiny": (
        _completion(repetition_penalty=1e-300),
        "repetition_penalty",
        "0.01",
    ),
    "repetition_penalty huge": (_completion(repetition_penalty=101), "repetition_penalty", "100"),
    "stop too long": (_completion(stop=["x" * 1025]), "stop", "1024 characters"),
    "unknown null": (_completion(unknown=None), "unknown", "unknown parameter"),
    "a key for the renderer": (
        _chat(chat_template_kwargs={"self": 1}),
        "messages",
        "self",
    ),
    "a key of the request": (
        _chat(chat_template_kwargs={"continue_final_message": True}),
        "chat_template_kwargs",
        "continue_final_message",
    ),
    "repetition_penalty 0": (_completion(repetition_penalty=0), "repetition_penalty", "0"),
    "presence_penalty 3": (_completion(presence_penalty=3), "presence_penalty", "2"),
    "unknown key": (_completion(temprature=1), "temprature", "unknown parameter"),
    "unknown nested key": (
        _completion(stream=True, stream_options={"x": 1}),
        "stream_options",
        "stream_options.x",
    ),
    "stream_options alone": (
        _completion(stream_options={"include_usage": True}),
        "stream_options",
        "stream: true",
    ),
    "best_of": (_completion(best_of=2), "best_of", "n is 1"),
    "no messages": (_chat(messages=[]), "messages", "at least 1"),
    "messages missing": ((CHAT, {}), "messages", "missing"),
    "no role": (_chat({"content": "x"}), "messages", "role"),
    "odd role": (_chat({"role": "wizard", "content": "x"}), "messages", "system, developer"),
    "content 3": (_chat({"role": "user", "content": 3}), "messages", "content must be"),
    "an image": (
        _chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "messages",
        "image_url",
    ),
    "a part without text": (
        _chat({"role": "user", "content": [{"type": "text"}]}),
        "messages",
        "text is missing",
    ),
    "a part with more": (
        _chat({"role": "user", "content": [{"type": "text", "text": "x", "cache_control": 1}]}),
        "messages",
        "messages[0].content[0].cache_control",
    ),
    "tool calls": (
        _chat({"role": "assistant", "tool_calls": [{"id": "1"}]}),
        "messages",
        "tool_calls",
    ),
    "top_logprobs alone": (_chat(top_logprobs=1), "top_logprobs", "logprobs: true"),
    "top_logprobs 21": (_chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
    "template's variables": (
        _chat(chat_template_kwargs={"messages": []}),
        "chat_template_kwargs",
        "messages",
    ),
    "template's parameters": (
        _chat(chat_template_kwargs={"continue_final_message": 1}),
        "chat_template_kwargs",
        "continue_final_message",
    ),
    "too long a chat": (_chat({"role": "user", "content": "x" * 300}), "messages", "256"),
    "no room in chat": (_chat(max_completion_tokens=255), "max_completion_tokens", "lower"),
    "prompt_logprobs of a chat stream": (
        _chat(stream=True, prompt_logprobs=1),
        "prompt_logprobs",
        "stream",
    ),
    "both to tokenize": (
        ("/tokenize", {"prompt": "x", "messages": [TURN]}),
        "prompt",
        "either prompt or messages",
    ),
    "much too long to tokenize": (
        ("/tokenize", {"prompt": "x" * (2**20 + 1)}),
        "prompt",
        "at most 1048576",
    ),
    "unknown token": (("/detokenize", {"tokens": [999]}), "tokens", "999"),
    "tokens as text": (("/detokenize", {"tokens": "x"}), "tokens", "array"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_400_and_named(http: httpx.Client, name: str) -> None:
    (path, body), param, hint = MISTAKES[name]
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = _error(answer)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert hint in error["message"], error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "x", "\\ud800": 1}',
    ],
    ids=lambda content: repr(content[:30]),
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_object_is_400(
    http: httpx.Client, path: str, content: bytes
) -> None:
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert _error(answer)["type"] == "invalid_request_error"


def _many(item: str) -> str:
    return "[" + ",".join([item] * 100_000) + "]"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (CompletionBody, f'{{"prompt": {_many("-1")}}}'),
        (CompletionBody, f'{{"prompt": {_many("[-1]")}}}'),
        (CompletionBody, f'{{"prompt": {_many("{}")}}}'),
        (CompletionBody, f'{{"prompt": "x", "stop": {_many("1")}}}'),
        (CompletionBody, f'{{"prompt": "x", "stop_token_ids": {_many("-1")}}}'),
        (CompletionBody, json.dumps({"prompt": "x", "logit_bias": dict.fromkeys(range(9999), "")})),
        (ChatBody, f'{{"messages": {_many("1")}}}'),
        (ChatBody, f'{{"messages": [{{"role": "user", "content": {_many("1")}}}]}}'),
        (DetokenizeBody, f'{{"tokens": {_many("-1")}}}'),
    ],
    ids=lambda value: value if isinstance(value, type) else value[:45],
)
def test_a_body_that_is_wrong_throughout_is_judged_by_its_first_mistakes(
    kind: type[Body], content: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(content)
    assert caught.value.error_count() <= 8


def test_unknown_names_are_quoted_and_bounded(http: httpx.Client) -> None:
    body = {"prompt": "x", **{f"k\n{i}" + "y" * 10_000: i for i in range(50)}}
    answer = http.post(COMPLETIONS, json=body)
    message = _error(answer)["message"]
    assert message.count("'k\\n") == 10
    assert len(answer.content) < 3000


def test_a_surrogate_in_free_form_values_is_no_crash(http: httpx.Client) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "verbosity": "\\ud800"}'
    assert http.post(CHAT, content=body).status_code == 400


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    assert _error(http.get("/v1/nothing"), 404)["code"] == "not_found"
    answer = http.get(COMPLETIONS)
    assert _error(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


def test_a_model_that_is_not_served_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    assert MODEL_NAME in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_the_clients_exceptions_say_what_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL_NAME, prompt="x" * 300)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_fail_one_request_only(server: Server, stream: bool) -> None:
    bad = {"prompt": "bad\x02", "max_tokens": 5, "stream": stream}
    with server.http() as http:
        answer = http.post(COMPLETIONS, json=bad)
    if stream:
        assert answer.status_code == 200
        events = [line[6:] for line in answer.text.splitlines() if line]
        assert json.loads(events[-2])["error"]["code"] == "generation_failed"
        assert events[-1] == "[DONE]"
    else:
        assert _error(answer, 500)["code"] == "generation_failed"


def test_bad_neighbours_do_no_harm(server: Server) -> None:
    stop = threading.Event()

    def misbehave() -> None:
        with server.http() as http:
            while not stop.is_set():
                for (path, body), _, _ in MISTAKES.values():
                    assert http.post(path, json=body).status_code == 400
                http.post(COMPLETIONS, json={"prompt": "bad\x02", "max_tokens": 5})

    thread = threading.Thread(target=misbehave)
    thread.start()
    try:
        client = server.openai()
        for i in range(20):
            prompt = f"a good request {i}"
            answer = client.completions.create(
                model=MODEL_NAME, prompt=prompt, max_tokens=40, temperature=0
            )
            assert answer.choices[0].text == greedy_text(prompt, 40)
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def limited() -> Iterator[Server]:
    from serve.conftest import running_server

    limits = {
        "max_body_bytes": 2000,
        "max_prompts": 2,
        "max_choices": 2,
        "max_logprobs": 1,
        "max_stop": 1,
        "max_prompt_tokens": 10,
    }
    with running_server(limits=limits, allow_unknown_params=True) as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b", "c"]}, "prompt"),
        ({"n": 3}, "n"),
        ({"logprobs": 2}, "logprobs"),
        ({"stop": ["a", "b"]}, "stop"),
        ({"prompt": "x" * 11}, "prompt"),
    ],
)
def test_limits_are_settings(limited: Server, fields: dict[str, Any], param: str) -> None:
    with limited.http() as http:
        answer = http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1, **fields})
        assert answer.status_code == 400
        assert _error(answer)["param"] == param


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_too_large_is_413(limited: Server, is_announced: bool) -> None:
    content = json.dumps({"prompt": "x" * 4000}).encode()

    def pieces() -> Iterator[bytes]:
        yield from (content[i : i + 500] for i in range(0, len(content), 500))

    with limited.http() as http:
        answer = http.post(COMPLETIONS, content=content if is_announced else pieces())
        assert _error(answer, 413)["code"] == "body_too_large"
        assert http.get("/health").status_code == 200


def test_who_sends_before_listening_hears_413_too(limited: Server) -> None:
    size = 8 * 2**20
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
    address = httpx.URL(limited.url)
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"x" * size)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_unknown_parameters_can_be_allowed(limited: Server) -> None:
    with limited.http() as http:
        body = {"prompt": "x", "max_tokens": 2, "temperature": 0, "top_a": 1}
        answer = http.post(COMPLETIONS, json=body)
        assert answer.json()["choices"][0]["text"] == greedy_text("x", 2)


def test_a_full_queue_is_429(start_server: Callable[..., Server]) -> None:
    server = start_server(builder="build_slow", max_num_seqs=1, max_waiting=1)
    with server.http() as http:
        body = {"prompt": "x", "max_tokens": 100, "stream": True}
        with (
            http.stream("POST", COMPLETIONS, json=body) as running,
            http.stream("POST", COMPLETIONS, json=body) as waiting,
        ):
            lines = running.iter_lines()  # Dropping the iterator would hang up.
            next(lines)
            refused = http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1})
            assert _error(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            assert waiting.status_code == 200
        metrics = http.get("/metrics").text
        assert 'weft:admission_rejections_total{model_name="fake/model"} 1.0' in metrics
        many = http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1, "n": 3})
        error = _error(many)
        assert "at most 2" in error["message"]
        assert error["param"] == "n"
        prompts = http.post(COMPLETIONS, json={"prompt": ["x"] * 3, "max_tokens": 1})
        assert _error(prompts)["param"] == "prompt"


def _error(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    return error
