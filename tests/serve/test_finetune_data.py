"""JSON lines to tokens and label weights; every refusal names its line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve.fake_engine import EOS
from weft.base.errors import InvalidRequestError, UnsupportedError
from weft.engine.finetune import TrainingSample
from weft.model.tokenizer import Tokenizer
from weft.serve.finetune_data import (
    OverlongSamples,
    encode_examples,
    examples_from,
    read_examples,
)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    """One token a byte; the template writes `[role]content\\n`."""
    return Tokenizer.from_directory(model_dir)


def _lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def _chat(*turns: tuple[str, str] | tuple[str, str, int]) -> dict[str, Any]:
    keys = ("role", "content", "weight")
    return {"messages": [dict(zip(keys, turn, strict=False)) for turn in turns]}


def _labels(sample: TrainingSample) -> str:
    """The labelled bytes; other bytes as dots, EOS as a dollar."""
    return "".join(
        ("$" if token == EOS else chr(token)) if weight else "."
        for token, weight in zip(sample.token_ids, sample.label_weights, strict=True)
    )


def _one(row: Any, tokenizer: Tokenizer, **options: Any) -> TrainingSample:
    options.setdefault("max_tokens", 256)
    (sample,) = encode_examples(read_examples(_lines(row)), tokenizer, **options)
    return sample


def test_only_assistant_turns_are_labels(tokenizer: Tokenizer) -> None:
    row = _chat(("system", "S"), ("user", "u"), ("assistant", "yes"), ("user", "v"))
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "no"}]})
    sample = _one(row, tokenizer)
    text = "[system]S\n[user]u\n[assistant]yes\n[user]v\n[assistant]no\n"
    assert bytes(sample.token_ids.tolist()).decode() == text
    assert (
        _labels(sample)
        == "." * len("[system]S\n[user]u\n[assistant]")
        + "yes\n"
        + "." * len("[user]v\n[assistant]")
        + "no\n"
    )
    assert sample.token_ids.dtype.name == "int32"
    assert sample.label_weights.dtype.name == "float32"


def test_a_turn_of_weight_0_is_no_label(tokenizer: Tokenizer) -> None:
    row = _chat(("user", "u"), ("assistant", "bad", 0), ("user", "v"), ("assistant", "good", 1))
    assert _labels(_one(row, tokenizer)).strip(".") == "good\n"


def test_completions_and_texts_end_with_eos(tokenizer: Tokenizer) -> None:
    assert _labels(_one({"prompt": "2+2=", "completion": "4"}, tokenizer)) == "....4$"
    assert _labels(_one({"prompt": "", "completion": "4"}, tokenizer)) == "4$"
    assert _labels(_one({"text": "some text"}, tokenizer)) == "some text$"


def test_characters_of_several_bytes_are_whole_labels(tokenizer: Tokenizer) -> None:
    sample = _one({"prompt": "é", "completion": "ü"}, tokenizer)
    assert sample.label_weights.tolist() == [0, 0, 1, 1, 1]


def test_blank_lines_and_a_byte_order_mark_are_skipped() -> None:
    data = b"\xef\xbb\xbf" + _lines({"text": "a"}, "", "  ", {"text": "b\u2028c"}) + b"\n"
    assert [example.line for example in read_examples(data)] == [1, 4]


def test_objects_serve_as_well_as_lines(tokenizer: Tokenizer) -> None:
    samples = encode_examples(examples_from(["ab", {"text": "cd"}]), tokenizer, max_tokens=9)
    assert [_labels(sample) for sample in samples] == ["ab$", "cd$"]


def test_long_samples_are_refused_or_cut_as_one_likes(tokenizer: Tokenizer) -> None:
    row = {"prompt": "abc", "completion": "defgh"}
    with pytest.raises(InvalidRequestError, match=r"line 1: it has 9 tokens; at most 6"):
        _one(row, tokenizer, max_tokens=6)
    cut = _one(row, tokenizer, max_tokens=6, overlong=OverlongSamples.TRUNCATE)
    assert _labels(cut) == "...def"
    with pytest.raises(InvalidRequestError, match=r"line 1: no token within its first 3"):
        _one(row, tokenizer, max_tokens=3, overlong=OverlongSamples.TRUNCATE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no line"),
        (b"\n \n", "holds no line"),
        (_lines({"text": "a"}, "{oops"), "line 2: it is not JSON"),
        (_lines({"text": "a"}, "[1]"), "line 2: it is a JSON list"),
        (_lines('{"text": NaN}'), "line 1: it is not JSON"),
        (b'{"text": "a"}\n\xff', "line 2: it is not valid UTF-8"),
        (_lines({"text": "a"}, r'{"text": "\ud83d"}'), "line 2: it holds a lone surrogate"),
        (_lines(r'{"messages": [{"role": "user", "content": "\udc00"}]}'), "lone surrogate"),
        (_lines({"prompt": "a"}), "line 1: it needs `messages`"),
        (_lines({}), "line 1: it needs .* no key at all"),
        (_lines({"completion": "a"}), "line 1: it has `completion` but no `prompt`"),
        (_lines({"prompt": 1, "completion": "a"}), "line 1: `prompt` is a int"),
        (_lines({"text": "a"}, {"prompt": "a", "completion": "b"}), "line 2: it holds `compl"),
        (_lines({"text": ""}), "line 1: `text` must be a non-empty string"),
        (_lines({"text": "a", "x": 1}), "line 1: it has the unknown key 'x'"),
        (_lines({"messages": []}), "line 1: `messages` must be a list"),
        (_lines({"messages": [3]}), r"line 1: messages\[0\] is a int"),
        (_lines(_chat(("user", "hi"))), "line 1: it has no assistant turn"),
        (_lines(_chat(("robot", "hi"))), r"line 1: messages\[0\].role is 'robot'"),
        (_lines(_chat(("assistant", "hi", 0))), "line 1: every assistant turn has weight 0"),
        (_lines(_chat(("assistant", "hi", 2))), r"line 1: messages\[0\].weight is 2"),
        (_lines(_chat(("user", "hi", 1))), r"weight is given, but the role is user"),
        (_lines(_chat(("assistant", ""))), r"messages\[0\].content is empty"),
        (_lines({"messages": [{"role": "assistant"}]}), r"content is a NoneType"),
        (_lines({"messages": [{"role": "assistant", "content": "a", "z": 1}]}), "key 'z'"),
    ],
)
def test_malformed_files_are_refused_by_line(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_examples(data)


def test_characters_written_as_two_escapes_are_taken(tokenizer: Tokenizer) -> None:
    row = r'{"text": "\ud83d\ude00 \\ud83d"}'
    assert _one(row, tokenizer).token_ids[:-1].tobytes()[::4] == "\U0001f600 \\ud83d".encode()


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (_chat(("assistant", "a")) | {"tools": [{"type": "function"}]}, "`tools`"),
        (_chat(("tool", "a")), "'tool'"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "`tool_calls`"),
    ],
)
def test_tools_are_refused_by_name(row: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"line 1: .*{name}"):
        read_examples(_lines(row))


def test_a_role_that_the_template_refuses_names_the_line(tmp_path: Path) -> None:
    from serve.fake_engine import write_model_directory

    directory = write_model_directory(tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    tokenizer = Tokenizer.from_directory(directory)
    with pytest.raises(InvalidRequestError, match=r"line 1: .*never"):
        _one(_chat(("user", "u"), ("assistant", "a")), tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_noticed(tmp_path: Path) -> None:
    from serve.fake_engine import write_model_directory

    directory = write_model_directory(tmp_path / "model")
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}"
        "{% else %}(cut){% endif %};{% endfor %}"
    )
    tokenizer = Tokenizer.from_directory(directory)
    turns = (("user", "u"), ("assistant", "first"), ("user", "v"), ("assistant", "last"))
    with pytest.raises(InvalidRequestError, match=r"messages\[1\].*written|differently"):
        _one(_chat(*turns), tokenizer)
    only_last = _chat(turns[0], ("assistant", "first", 0), *turns[2:])
    assert _labels(_one(only_last, tokenizer)).strip(".") == "last;"


def test_an_eos_of_the_tokenizers_own_is_a_label_too(model_dir: Path, tmp_path: Path) -> None:
    """Such a token has no characters, and would count for nothing."""
    adds_eos = tmp_path / "model"
    shutil.copytree(model_dir, adds_eos)
    path = adds_eos / "tokenizer.json"
    raw = json.loads(path.read_text())
    eos = next(token for token in raw["added_tokens"] if token["id"] == EOS)["content"]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos, "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {eos: {"id": eos, "ids": [EOS], "tokens": [eos]}},
    }
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_directory(adds_eos)
    assert tokenizer.encode("ab")[-1] == EOS
    assert _labels(_one({"prompt": "ab", "completion": "cd"}, tokenizer)) == "..cd$"


def test_labels_end_with_the_templates_eos(tmp_path: Path) -> None:
    from serve.fake_engine import write_model_directory

    directory = write_model_directory(tmp_path / "model")
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<{% endif %}"
    )
    sample = _one(_chat(("user", "u"), ("assistant", "a")), Tokenizer.from_directory(directory))
    assert _labels(sample) == ".....a$."
