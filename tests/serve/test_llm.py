"""`LLM` in vLLM's shape: over the closed-form model, and over the embedded one."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve.fake_engine import CHAT_TEMPLATE, greedy_text
from weft.base.errors import ConfigError, InvalidRequestError, UnsupportedError
from weft.engine.request import FinishReason, SequenceUpdate
from weft.engine.sampling import SamplingParams
from weft.model.embedded import embedded_model_path
from weft.serve.llm import LLM
from weft.serve.messages import Ready, decode_from_engine, encode

GREEDY = SamplingParams(temperature=0, max_tokens=10)
TURN = {"role": "user", "content": "hi"}


@pytest.fixture
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(str(model_dir), builder="serve.fake_engine:build") as opened:
        yield opened
        opened.check_integrity()
        assert opened.engine_stats.num_running == 0
        assert opened.engine_stats.kv_cache_usage == 0


def test_text_tokens_and_lists_are_prompts(llm: LLM) -> None:
    expected = greedy_text("hello", 10)
    ids = tuple(b"hello")
    for prompts in ("hello", {"prompt": "hello"}, {"prompt_token_ids": ids}):
        (output,) = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
        assert output.outputs[0].text == expected
        assert output.prompt_token_ids == ids
        assert output.finished
    outputs = llm.generate(["hello", {"prompt_token_ids": list(b"abc")}, "xyz"], GREEDY)
    assert [output.outputs[0].text for output in outputs] == [
        greedy_text(text, 10) for text in ("hello", "abc", "xyz")
    ]
    assert [output.prompt for output in outputs] == ["hello", None, "xyz"]


def test_more_prompts_than_slots_keep_their_order(llm: LLM) -> None:
    prompts = [f"prompt number {i}" for i in range(40)]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.outputs[0].text for o in outputs] == [greedy_text(p, 10) for p in prompts]


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    with pytest.raises(InvalidRequestError, match="3 entries for 2 prompts"):
        llm.generate(["a", "b"], params)


def test_defaults_come_from_the_model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    monkeypatch.setenv("FAKE_SAMPLING_DEFAULTS", '{"temperature": 0, "top_p": 0.5}')
    with LLM(llm.info.model_path, builder="serve.fake_engine:build") as advised:
        assert advised.get_default_sampling_params() == SamplingParams(temperature=0, top_p=0.5)
        assert advised.generate("hello")[0].outputs[0].text == greedy_text("hello", 16)


def test_stop_strings_choices_and_logprobs(llm: LLM) -> None:
    text = greedy_text("hello", 10)
    sampling = SamplingParams(
        temperature=0, max_tokens=10, n=2, stop=(text[6:8],), logprobs=1, prompt_logprobs=0
    )
    (output,) = llm.generate("hello", sampling)
    for index, choice in enumerate(output.outputs):
        assert (choice.index, choice.text) == (index, text[:6])
        assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, text[6:8])
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids) == 8
        assert choice.cumulative_logprob == -4.0
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 5
    assert output.prompt_logprobs[0] is None


def test_a_repeated_prompt_is_cached(llm: LLM) -> None:
    prompt = "sixteen and more tokens of a prompt"
    assert [llm.generate(prompt, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 32]


def test_preemption_changes_nothing(model_dir: Path) -> None:
    prompts = [f"{i} " * 30 for i in range(6)]
    sampling = SamplingParams(temperature=0, max_tokens=120)
    with LLM(str(model_dir), builder="serve.fake_engine:build_tight") as tight:
        outputs = tight.generate(prompts, sampling)
        assert tight.engine_stats.num_preemptions > 0
        tight.check_integrity()
    assert [o.outputs[0].text for o in outputs] == [greedy_text(p, 120) for p in prompts]


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    turns = [[{"role": "user", "content": text}] for text in ("hi", "ho")]
    expected = [greedy_text(f"[user]{text}\n[assistant]", 10) for text in ("hi", "ho")]
    assert [o.outputs[0].text for o in llm.chat(turns[0], GREEDY)] == expected[:1]
    assert [o.outputs[0].text for o in llm.chat(turns, GREEDY)] == expected
    (output,) = llm.chat(turns[0], GREEDY, chat_template="<{{ messages[0].content }}>")
    assert output.outputs[0].text == greedy_text("<hi>", 10)
    assert "weird" in CHAT_TEMPLATE
    with pytest.raises(InvalidRequestError, match="no weird role"):
        llm.chat([{"role": "weird", "content": "x"}], GREEDY)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["fine", ""], "prompt 1: the prompt is empty"),
        (["fine", "x" * 256], "prompt 1: the prompt has 256 tokens"),
        ([{"prompt_token_ids": [5, 999]}], "token id 999"),
        ([{"promt": "x"}], "a prompt is text"),
        ([3], "a prompt is text"),
        (["fine", "a\udc80"], "prompt 1: the prompt is not valid Unicode"),
        (None, "prompts is NoneType None; a prompt is text"),
        (5, "prompts is int 5"),
        (b"abc", "prompts is bytes"),
        ({"prompt": None}, "prompt 0: it is dict .'prompt': None"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids is str 'abc'"),
        ({"prompt_token_ids": None}, "prompt_token_ids is NoneType None"),
        ({"prompt_token_ids": [5, 1.5]}, "prompt_token_ids holds float 1.5"),
        ({"prompt_token_ids": ["1"]}, "prompt_token_ids holds str '1'"),
        ({"prompt_token_ids": [[1, 2]]}, r"prompt_token_ids holds list \[1, 2\]"),
        ({"prompt_token_ids": [5, True]}, "prompt_token_ids holds bool True"),
        ({"prompt_token_ids": np.array([True])}, "prompt_token_ids holds bool True"),
        ({"prompt_token_ids": np.array(5)}, "prompt_token_ids is ndarray array"),
    ],
)
def test_one_bad_prompt_is_named_and_nothing_runs(
    llm: LLM, prompts: list[object], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    assert llm.engine_stats.num_prompt_tokens == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None, GREEDY], r"sampling_params\[0\] is NoneType None; it must be SamplingParams"),
        ("ab", "sampling_params is str 'ab'"),
        (3, "sampling_params is int 3"),
        ({"n": 1}, "sampling_params is dict"),
        ([GREEDY], "sampling_params holds 1 entries for 2 prompts"),
        (iter([GREEDY] * 3), "sampling_params holds 3 entries for 2 prompts"),
    ],
)
def test_what_are_no_sampling_params_is_refused(llm: LLM, given: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(["a", "b"], given)
    assert caught.value.param == "sampling_params"
    with pytest.raises(InvalidRequestError, match="priority is int 5"):
        llm.generate(["a", "b"], GREEDY, priority=5)  # type: ignore[arg-type]


def test_any_integers_are_token_ids(llm: LLM) -> None:
    prompts: list[dict[str, list[int]]] = [{"prompt_token_ids": list(b"hello")}]
    (expected,) = llm.generate(prompts, GREEDY)
    for ids in (np.frombuffer(b"hello", np.uint8), range(104, 105), torch.tensor([*b"hello"])):
        (output,) = llm.generate({"prompt_token_ids": ids}, iter([GREEDY]))
        assert all(type(token) is int for token in output.prompt_token_ids)
        if len(ids) == 5:
            assert output.outputs == expected.outputs


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages is NoneType None; a conversation is a list"),
        (5, "messages is int 5"),
        ("hi", "messages is str 'hi'"),
        ([], "messages is empty"),
        ([[]], "messages is empty"),
        ([[TURN], []], "conversation 1: messages is empty"),
        ([[TURN], TURN], "conversation 1: it is dict"),
        (["a", "b"], r"messages\[0\] is str 'a'"),
        ([{"content": "x"}], r"messages\[0\].role is NoneType None"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is int 5"),
        ([TURN, {"role": "user", "content": [{"type": "image_url"}]}], "'image_url'.*is text"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is missing"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "text is int 1"),
        ([[TURN], [{"role": "user", "content": "\ud800"}]], "conversation 1: .*Unicode"),
        ([[TURN], [{"role": "user", "content": "x" * 300}]], "conversation 1: the prompt has"),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(messages, GREEDY)
    assert llm.engine_stats.num_prompt_tokens == 0


def test_content_parts_are_joined_as_the_server_joins_them(llm: LLM) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "ho"}]
    turns = [{"role": "assistant", "content": None}, {"role": "user", "content": parts}]
    (output,) = llm.chat(turns, GREEDY)
    prompt = "[assistant]\n[user]hi\nho\n[assistant]"
    assert bytes(output.prompt_token_ids).decode() == prompt


def test_template_variables_that_are_parameters_are_refused(llm: LLM) -> None:
    for name in ("messages", "continue_final_message"):
        with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs may not set {name}"):
            llm.chat([TURN], GREEDY, chat_template_kwargs={name: 1})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_model_len": "5"}, "max_model_len is '5'; it must be a whole number"),
        ({"max_model_len": 1.5}, "max_model_len is 1.5"),
        ({"max_model_len": 1}, "max_model_len is 1; it must be at least 2"),
        ({"kv_cache_memory_bytes": "1GiB"}, "kv_cache_memory_bytes is '1GiB'"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"trace": "/no/such/directory/trace.json"}, "/no/such/directory/trace.json.*exists"),
    ],
)
def test_settings_of_a_wrong_kind_are_named(
    model_dir: Path, setting: dict[str, Any], message: str
) -> None:
    # The builder would fail by another error: nothing is loaded before the settings are checked.
    with pytest.raises(ConfigError, match=message):
        LLM(str(model_dir), builder="serve.fake_engine:build_failing", **setting)


def test_a_model_has_a_name(model_dir: Path) -> None:
    for model in ("", None, 5):
        with pytest.raises(ConfigError, match=f"model is {model!r}; it must be a non-empty"):
            LLM(model, builder="serve.fake_engine:build")  # type: ignore[arg-type]
    with LLM(model_dir, builder="serve.fake_engine:build", seed=None) as llm:
        assert llm.generate("hello", GREEDY)[0].outputs[0].text == greedy_text("hello", 10)


def test_adapters_and_parallel_sizes_are_refused_by_name(llm: LLM, model_dir: Path) -> None:
    with pytest.raises(UnsupportedError, match="lora_request"):
        llm.generate("x", GREEDY, lora_request=object())
    with pytest.raises(UnsupportedError, match="tensor_parallel_size is 2"):
        LLM(str(model_dir), tensor_parallel_size=2)


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = llm._core.step, iter(range(100))

    def interrupted() -> list[SequenceUpdate]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "abc"], SamplingParams(max_tokens=100))
    monkeypatch.undo()
    assert llm.generate("hello", GREEDY)[0].outputs[0].text == greedy_text("hello", 10)


def test_closing_twice_is_fine_and_using_after_is_not(model_dir: Path) -> None:
    llm = LLM(str(model_dir), builder="serve.fake_engine:build")
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate("x"),
        lambda: llm.generate([]),
        lambda: llm.chat([TURN]),
        lambda: llm.engine_stats,
        llm.__enter__,
    ):
        with pytest.raises(ConfigError, match="closed"):
            use()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_bar_is_for_terminals(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    llm.generate(["a", "b"], GREEDY)
    assert ("2/2" in stream.getvalue()) == is_terminal


def test_the_embedded_model_completes_python() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=24, stop=("\n",))
    with LLM(str(embedded_model_path()), dtype="float32", max_num_seqs=4, num_threads=1) as llm:
        main = "\n\nif __name__ =="
        first, second = llm.generate(["import os\n\n\ndef main", main], sampling)
        assert first.outputs[0].text.startswith("(")
        assert second.outputs[0].text.strip(" '\":") == "__main__"
        assert (second.outputs[0].finish_reason, second.outputs[0].stop_reason) == ("stop", "\n")
        alone = llm.generate(main, sampling)[0]
        assert alone.outputs[0].token_ids == second.outputs[0].token_ids
        drawn = SamplingParams(seed=1, max_tokens=12, n=2)
        once, again = (llm.generate("def f(", drawn)[0] for _ in range(2))
        assert [c.token_ids for c in once.outputs] == [c.token_ids for c in again.outputs]
        assert once.outputs[0].token_ids != once.outputs[1].token_ids
        (chat,) = llm.chat([{"role": "user", "content": "import os\n"}], sampling)
        assert chat.outputs[0].text
        llm.check_integrity()


def test_advised_whole_numbers_stay_whole_on_their_way_to_the_server(llm: LLM) -> None:
    info = dataclasses.replace(llm.info, sampling_defaults={"top_k": 20, "top_p": 0.5})
    ready = decode_from_engine(encode(Ready(info=info)))
    assert isinstance(ready, Ready)
    assert SamplingParams(**ready.info.sampling_defaults) == SamplingParams(top_k=20, top_p=0.5)  # type: ignore[arg-type]
