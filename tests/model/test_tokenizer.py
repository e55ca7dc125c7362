"""Encoding, decoding piece by piece, and chat templates, on tokenizers trained in the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from weft.base.errors import InvalidRequestError, ModelLoadError
from weft.model.tokenizer import Tokenizer

TEXTS = ["hello world, héllo wörld 😀 日本語", "def f(x):\n\treturn x + 1\n"] * 3


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("tool call", special=False)])
    return backend


def byte_fallback_backend() -> Backend:
    """Shaped like Llama 2's: Metaspace pieces, and bytes for what they lack."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "he", "\u2581he"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(
            vocabulary, [("h", "e"), ("\u2581", "he")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BYTE_LEVEL = Tokenizer(
    byte_level_backend(), tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}}
)
BYTE_FALLBACK = Tokenizer(byte_fallback_backend())


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40), skip=st.booleans())
def test_stream_of_any_ids_equals_decoding_them_at_once(ids: list[int], skip: bool) -> None:
    stream = BYTE_LEVEL.stream(skip_special_tokens=skip)
    text = "".join(stream.push([token]) for token in ids) + stream.finish()
    assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(text=st.text(st.sampled_from("he lloé日😀\x00\n"), max_size=60))
def test_stream_of_byte_fallback_text_equals_decoding_it_at_once(text: str) -> None:
    # Only for ids that come from text: a decoder with byte fallback rewrites what it gave before
    # when a run of byte tokens turns out to be no UTF-8.
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    stream = BYTE_FALLBACK.stream()
    streamed = "".join(stream.push([token]) for token in ids) + stream.finish()
    assert streamed == BYTE_FALLBACK.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
def test_no_broken_character_is_ever_given_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello 😀 日本", add_special_tokens=False)
    stream = tokenizer.stream()
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) == "hello 😀 日本"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces, "the emoji should span several tokens, or the test shows nothing"


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("ab😀", add_special_tokens=False)[:-1]
    stream = BYTE_LEVEL.stream()
    assert stream.push(ids) == "ab"
    assert stream.finish() == "\ufffd"


def test_a_character_that_straddles_prompt_and_output_is_whole() -> None:
    ids = BYTE_LEVEL.encode("é😀", add_special_tokens=False)
    stream = BYTE_LEVEL.stream(ids[:-1])
    assert stream.push(ids[-1:]) == "😀"


def test_a_character_that_only_the_prompt_began_leaves_no_trace() -> None:
    begun = BYTE_LEVEL.encode("é😀", add_special_tokens=False)[:-1]
    (letter,) = BYTE_LEVEL.encode("x", add_special_tokens=False)
    stream = BYTE_LEVEL.stream(begun)
    assert stream.push([letter]) + stream.finish() == "x"
    assert BYTE_LEVEL.stream(begun).finish() == ""
    emoji = [BYTE_LEVEL.token_id(token) for token in "ðŁĺ"]
    first, second, third = [token for token in emoji if token is not None]
    # The answer's own broken bytes do show: a second byte, and no third.
    stream = BYTE_LEVEL.stream([first])
    assert stream.push([second, letter]) + stream.finish() == "\ufffdx"
    # A byte that continues characters, but not this one, is broken by itself.
    stream = BYTE_LEVEL.stream([first, second, third])
    assert stream.push([first, letter]) + stream.finish() == "\ufffdx"


def test_leading_space_of_a_metaspace_continuation_survives() -> None:
    prompt = BYTE_FALLBACK.encode("he", add_special_tokens=False)
    more = BYTE_FALLBACK.token_id("\u2581he")
    assert more is not None
    assert BYTE_FALLBACK.stream(prompt).push([more]) == " he"


def test_special_tokens_are_skipped_only_when_asked() -> None:
    eos = BYTE_LEVEL.eos_token_id
    assert eos is not None
    assert eos in BYTE_LEVEL.special_ids
    assert BYTE_LEVEL.stream().push([eos]) == ""
    assert BYTE_LEVEL.stream(skip_special_tokens=False).push([eos]) == "</s>"
    assert BYTE_LEVEL.decode([eos], skip_special_tokens=False) == "</s>"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
def test_ids_of_a_padded_output_layer_stand_for_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello", add_special_tokens=False)
    stream = tokenizer.stream()
    padded = [tokenizer.vocab_size, *ids, tokenizer.vocab_size + 7]
    assert stream.push(padded) == "hello"
    assert tokenizer.decode(padded) == "hello"
    after = tokenizer.stream(padded)
    assert after.push(ids) + after.finish() == tokenizer.decode([*ids, *ids])[len("hello") :]


def test_token_bytes_concatenate_to_the_text() -> None:
    text = "wörld 😀 tool call"
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert b"".join(BYTE_LEVEL.token_bytes(token) for token in ids) == text.encode()
    assert BYTE_LEVEL.token_bytes(10**6) == b""


@pytest.mark.parametrize("token", [-1, 10**9])
def test_ids_out_of_range_are_refused_by_number(token: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{token} is out of range.*\[0, 512\)"):
        BYTE_LEVEL.check_ids([token], num_ids=512)
    with pytest.raises(InvalidRequestError, match="-1 is out of range; it must be 0 or more"):
        BYTE_LEVEL.decode([-1])


@pytest.mark.parametrize(
    "given", [{"messages": []}, {"continue_final_message": 1}, {1: 2}, "shout", [1]]
)
def test_template_variables_that_are_parameters_are_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs") as caught:
        BYTE_LEVEL.render_chat(
            [{"role": "user", "content": "x"}], chat_template="x", chat_template_kwargs=given
        )
    assert caught.value.param == "chat_template_kwargs"


def test_any_other_name_is_a_template_variable() -> None:
    text = BYTE_LEVEL.render_chat(
        [{"role": "user", "content": "x"}],
        chat_template="{{ self_ }}{{ template_kwargs }}",
        chat_template_kwargs={"self_": 1, "template_kwargs": 2},
    )
    assert text == "12"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        BYTE_LEVEL.encode("a\ud800")


@pytest.mark.parametrize(("by_file", "by_flag"), [(True, False), (False, True), (True, True)])
def test_add_bos_token_overrules_the_post_processor(by_file: bool, by_flag: bool) -> None:
    backend = byte_level_backend()
    if by_file:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = Tokenizer(backend, tokenizer_config={"bos_token": "<s>", "add_bos_token": by_flag})
    assert (tokenizer.encode("hello")[0] == 0) is by_flag
    assert tokenizer.encode("hello").count(0) == int(by_flag)
    assert 0 not in tokenizer.encode("hello", add_special_tokens=False)


TEMPLATE = """\
{{- bos_token -}}
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == "system" and not loop.first %}{{ raise_exception("system comes first") }}
{%- endif -%}
[{{ message.role }}]{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt %}[assistant]{% if thinking %}<think>{% endif %}{% endif -%}
"""


def write_directory(directory: Path) -> None:
    byte_level_backend().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "old"})
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def test_chat_template_file_wins_and_renders(tmp_path: Path) -> None:
    write_directory(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    messages = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": "hé"}]
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(messages) == "<s>[system]be <b></s>[user]hé</s>[assistant]"
    assert tokenizer.render_chat(
        messages[1:], chat_template_kwargs={"thinking": True}, tools=[{"name": "é<"}]
    ) == ('<s>[{"name": "é<"}][user]hé</s>[assistant]<think>')
    assert tokenizer.encode_chat(messages)[0] == tokenizer.bos_token_id


def test_final_message_is_left_open_to_continue(tmp_path: Path) -> None:
    write_directory(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    text = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s>[user]a</s>[assistant]b"


def test_what_the_template_refuses_is_a_bad_request(tmp_path: Path) -> None:
    write_directory(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    with pytest.raises(InvalidRequestError, match="system comes first"):
        tokenizer.render_chat(
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
        )
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        tokenizer.render_chat([])
    with pytest.raises(InvalidRequestError, match="no chat template"):
        BYTE_LEVEL.render_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.items() }}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="refuses"):
        BYTE_LEVEL.render_chat([{"role": "user", "content": "a"}], chat_template=template)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    write_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_directory(tmp_path)
