"""`/v1/chat/completions` by the unmodified openai client."""

from __future__ import annotations

import openai
import pytest

from serve.fake_engine import greedy_text
from serve.fake_server import MODEL_NAME

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
PROMPT = "[system]be brief\n[user]hi\n[assistant]"


def test_a_conversation_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_completion_tokens=9,
        temperature=0,
    )
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", greedy_text(PROMPT, 9))
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 9)


def test_a_stream_begins_with_the_role_of_every_choice(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=MESSAGES,  # type: ignore[arg-type]
            max_completion_tokens=9,
            temperature=0,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert [(c.choices[0].index, c.choices[0].delta.role) for c in chunks[:2]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[2:-1]:
        (choice,) = chunk.choices
        assert choice.delta.role is None
        assert reasons[choice.index] is None, "nothing comes after the end"
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == [greedy_text(PROMPT, 9)] * 2
    assert reasons == ["length", "length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 18)


def test_the_older_name_of_max_completion_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=3,
        temperature=0,
    )
    assert answer.choices[0].message.content == greedy_text(PROMPT, 3)


def test_without_a_limit_the_context_is_the_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    entries = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs  # type: ignore[union-attr]
        for entry in chunk.choices[0].logprobs.content  # type: ignore[union-attr]
    ]
    assert "".join(entry.token for entry in entries) == greedy_text(PROMPT, 3)
    assert [entry.logprob for entry in entries] == [-0.5] * 3
    assert all(entry.bytes == list(entry.token.encode()) for entry in entries)
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]


def test_text_parts_are_joined_and_developer_is_system(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}],
        },
    ]
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
    )
    prompt = "[system]be brief\n[user]hi\nthere\n[assistant]"
    assert answer.choices[0].message.content == greedy_text(prompt, 4)


def test_an_answer_of_the_client_goes_back_in(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
    )
    history = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "more"}]
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=history,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
    )
    prompt = PROMPT + greedy_text(PROMPT, 4) + "\n[user]more\n[assistant]"
    assert answer.choices[0].message.content == greedy_text(prompt, 4)


def test_template_settings_reach_the_template(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
        extra_body={"chat_template_kwargs": {"shout": True}, "add_generation_prompt": False},
    )
    prompt = "[system]be brief\n[user]hi\n!"
    assert answer.choices[0].message.content == greedy_text(prompt, 4)

    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[*MESSAGES, {"role": "assistant", "content": "so"}],  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
        extra_body={"continue_final_message": True},
    )
    assert answer.choices[0].message.content == greedy_text(PROMPT + "so", 4)


def test_stop_and_seed(client: openai.OpenAI) -> None:
    text = greedy_text(PROMPT, 12)
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=12,
        temperature=0,
        stop=["never", text[5:7]],
        seed=3,
    )
    assert answer.choices[0].message.content == text[:5]
    assert answer.choices[0].finish_reason == "stop"


def test_neutral_parameters_change_nothing(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
        user="me",
        store=False,
        metadata={"run": "1"},
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        service_tier="auto",
        modalities=["text"],
        prompt_cache_key="k",
    )
    assert answer.choices[0].message.content == greedy_text(PROMPT, 4)
