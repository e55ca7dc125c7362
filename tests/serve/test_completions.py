"""`/v1/completions` by the unmodified openai client."""

from __future__ import annotations

import asyncio

import openai
import pytest

from serve.conftest import Server
from serve.fake_engine import greedy_text, next_token
from serve.fake_server import MODEL_NAME


def test_a_completion_is_what_the_model_says(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL_NAME, prompt="hello", max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == greedy_text("hello", 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.model == MODEL_NAME
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 17


def test_sixteen_tokens_are_the_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt="hello", temperature=0)
    assert answer.choices[0].text == greedy_text("hello", 16)


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL_NAME,
            prompt="hello",
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == greedy_text("hello", 12)
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({c.id for c in chunks}) == 1


def test_no_usage_chunk_unless_asked_for(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model=MODEL_NAME, prompt="hi", max_tokens=3, stream=True)
    )
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_batches_of_text_and_of_tokens_keep_their_order(
    client: openai.OpenAI, stream: bool
) -> None:
    texts = ["hello", "abc", "xyz"]
    for prompt in (texts, [list(text.encode()) for text in texts]):
        answer = client.completions.create(
            model=MODEL_NAME, prompt=prompt, n=2, max_tokens=5, temperature=0, stream=stream
        )
        parts = [""] * 6
        for chunk in answer if stream else [answer]:
            for choice in chunk.choices:  # type: ignore[union-attr]
                parts[choice.index] += choice.text
        assert parts == [greedy_text(text, 5) for text in texts for _ in range(2)]


def test_token_ids_are_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL_NAME, prompt=list(b"hello"), max_tokens=5, temperature=0
    )
    assert answer.choices[0].text == greedy_text("hello", 5)


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(
            model=MODEL_NAME, prompt="hello", max_tokens=6, n=3, seed=seed, temperature=1
        )
        return [choice.text for choice in answer.choices]

    expected = []
    for choice in range(3):
        tokens = list(b"hello")
        for _ in range(6):
            tokens.append(next_token(tokens[-1], len(tokens) - 1, seed=7, choice=choice))
        expected.append(bytes(tokens[5:]).decode())
    assert texts(7) == texts(7) == expected
    assert len(set(expected)) == 3
    assert texts(8) != expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_echo_brings_the_prompt_and_its_logprobs(
    client: openai.OpenAI, stream: bool, as_tokens: bool
) -> None:
    answer = client.completions.create(
        model=MODEL_NAME,
        prompt=list(b"hello") if as_tokens else "hello",
        max_tokens=3,
        temperature=0,
        echo=True,
        logprobs=2,
        stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    text = "hello" + greedy_text("hello", 3)
    assert "".join(c.choices[0].text for c in chunks) == text  # type: ignore[union-attr]
    logprobs = [c.choices[0].logprobs for c in chunks]  # type: ignore[union-attr]
    tokens = [token for entry in logprobs for token in entry.tokens]
    offsets = [offset for entry in logprobs for offset in entry.text_offset]
    values = [value for entry in logprobs for value in entry.token_logprobs]
    tops = [top for entry in logprobs for top in entry.top_logprobs]
    assert "".join(tokens) == text
    assert offsets == list(range(8))
    assert values == [None] + [-0.5] * 7
    assert tops[0] is None
    assert len(tops[1]) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("é漢x<|bos|>y", "é漢x<|bos|>y", [0, 0, 1, 1, 1, 2, 3, 10]),
        ([256, 104, 195, 169, 257, 105], "héi", [0, 0, 1, 1, 2, 2]),
    ],
    ids=["text", "token ids"],
)
def test_offsets_are_places_in_the_text(
    client: openai.OpenAI, stream: bool, prompt: str | list[int], text: str, expected: list[int]
) -> None:
    answer = client.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=3, echo=True, logprobs=0, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    whole = "".join(c.choices[0].text for c in chunks)  # type: ignore[union-attr]
    logprobs = [c.choices[0].logprobs for c in chunks]  # type: ignore[union-attr]
    offsets = [offset for entry in logprobs for offset in entry.text_offset]
    tokens = [token for entry in logprobs for token in entry.tokens]
    assert whole.startswith(text)
    begin = len(text)
    assert offsets == [*expected, begin, begin + 1, begin + 2]
    for token, offset in list(zip(tokens, offsets, strict=True))[-3:]:
        assert whole[offset : offset + 1] == token


def test_no_offset_lies_beyond_a_text_that_a_stop_string_cut(client: openai.OpenAI) -> None:
    stop = greedy_text("hello", 12)[4:7]
    choice = client.completions.create(
        model=MODEL_NAME, prompt="hello", max_tokens=12, temperature=0, stop=stop, logprobs=0
    ).choices[0]
    assert choice.logprobs is not None
    assert len(choice.text) == 4
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4, 4, 4]


def test_echo_without_new_tokens_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL_NAME, prompt="hello", max_tokens=0, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == "hello"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text(client: openai.OpenAI, stream: bool) -> None:
    text = greedy_text("hello", 12)
    stop = text[4:7]
    answer = client.completions.create(
        model=MODEL_NAME, prompt="hello", max_tokens=12, temperature=0, stop=stop, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    said = "".join(c.choices[0].text for c in chunks)  # type: ignore[union-attr]
    last = chunks[-1].choices[0]  # type: ignore[union-attr]
    assert said == text[:4]
    assert last.finish_reason == "stop"
    assert last.stop_reason == stop  # type: ignore[union-attr]


def test_eos_ends_and_can_be_ignored(client: openai.OpenAI) -> None:
    def run(**extra: object) -> tuple[str, str, int]:
        answer = client.completions.create(
            model=MODEL_NAME, prompt="helloZ", max_tokens=4, temperature=0, extra_body=extra
        )
        assert answer.usage is not None
        choice = answer.choices[0]
        return choice.text, choice.finish_reason, answer.usage.completion_tokens

    assert run() == ("", "stop", 1)
    text, reason, number = run(ignore_eos=True)
    assert (reason, number) == ("length", 4)
    assert len(text) == 3, "the special token is left out"
    assert run(min_tokens=2)[2] == 4


def test_vllms_parameters_by_extra_body(client: openai.OpenAI) -> None:
    text = greedy_text("hello", 8)
    answer = client.completions.create(
        model=MODEL_NAME,
        prompt="hello",
        max_tokens=8,
        temperature=0,
        extra_body={
            "stop_token_ids": [ord(text[3])],
            "include_stop_str_in_output": True,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "prompt_logprobs": 1,
            "priority": -1,
            "cache_salt": "mine",
            "skip_special_tokens": False,
        },
    )
    choice = answer.choices[0]
    assert choice.text == text[: text.index(text[3]) + 1]
    assert choice.stop_reason == ord(text[3])  # type: ignore[attr-defined]
    scored = choice.prompt_logprobs  # type: ignore[attr-defined]
    assert scored[0] is None
    assert scored[1] == {"101": {"logprob": -0.5, "rank": 1, "decoded_token": "e"}}


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "a prompt of which two full pages of sixteen tokens are found"
    cached = []
    for salt in ("one", "one", "two"):
        answer = client.completions.create(
            model=MODEL_NAME, prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, len(prompt) // 16 * 16, 0]


def test_what_vllm_bench_serve_sends(server: Server) -> None:
    body = {
        "model": MODEL_NAME,
        "prompt": "hello",
        "repetition_penalty": 1.0,
        "max_tokens": 6,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "best_of": 1,
        "top_p": None,
        "user": None,
    }
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"
    assert '"completion_tokens":6' in lines[-2]


def test_many_clients_at_once_do_not_mix(server: Server) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:

            async def one(i: int) -> None:
                prompt = f"client {i} asks"
                stream = await client.completions.create(
                    model=MODEL_NAME, prompt=prompt, max_tokens=20 + i, temperature=0, stream=True
                )
                text = "".join([chunk.choices[0].text async for chunk in stream])
                assert text == greedy_text(prompt, 20 + i)

            await asyncio.gather(*(one(i) for i in range(24)))

    asyncio.run(run())
