"""Finetuning data: JSON lines, checked, and turned into tokens with a weight for every label.

Three forms, one to a file: conversations as OpenAI's API takes them (`messages`, with an optional
`weight` of 0 or 1 on assistant turns), `prompt` with `completion`, and `text`. Only what the model
itself would have to say is a label: assistant turns, completions, all of a text. Every refusal
names its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from weft.base.errors import InvalidRequestError, UnsupportedError
from weft.engine.finetune import TrainingSample
from weft.model.tokenizer import Tokenizer

MIN_SAMPLE_TOKENS = 2
"""A label needs a token before it."""
_ROLES = ("system", "developer", "user", "assistant")
_TOOL_ROLES = ("tool", "function")
_TOOL_KEYS = ("tools", "functions", "parallel_tool_calls", "tool_calls", "function_call")
_CHAT_KEYS = frozenset(("messages",))
_MESSAGE_KEYS = frozenset(("role", "content", "weight", "name"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON writes half of a character beyond U+FFFF; two of them are one character."""


class OverlongSamples(StrEnum):
    """What becomes of a sample that is longer than a job's samples may be."""

    REFUSE = "refuse"
    TRUNCATE = "truncate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    weight: float
    """1 where its tokens are labels; 0 for all but assistant turns."""
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One checked line: a conversation, or a prompt (maybe empty) and what follows it."""

    line: int
    """Counted from 1."""
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [begin, end) of a text that are labels."""

    begin: int
    end: int


def read_examples(data: bytes, *, what: str = "the training file") -> list[Example]:
    """Check the lines of a JSONL file.

    Raises:
        InvalidRequestError: it is empty or a line is malformed; the message names the line.
        UnsupportedError: a line uses tools.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = _Line(what=what, number=data[: error.start].count(b"\n") + 1)
        raise line.refusal(f"it is not valid UTF-8 (byte {error.start})") from None
    examples: list[Example] = []
    form = ""
    for line, fields in _json_lines(text, what):
        _refuse_tools(fields, str(line))
        found = next((key for key in ("messages", "completion", "text") if key in fields), "")
        if not found:
            raise line.refusal(
                "it needs `messages`, or `prompt` and `completion`, or `text`; it has "
                f"{_names(fields)}",
            )
        form = form or found
        if found != form:
            raise line.refusal(f"it holds `{found}`, the lines above `{form}`; a file has one form")
        examples.append(_example(found, fields, line))
    if not examples:
        raise InvalidRequestError(
            f"{what} holds no line; give at least one JSON object a line", "training_file"
        )
    return examples


def examples_from(rows: Iterable[Mapping[str, Any] | str]) -> list[Example]:
    """Examples from Python objects: dictionaries like the lines of a file, or plain texts.

    Raises:
        InvalidRequestError: a row is malformed; the message names its number.
    """
    what = "the data"
    lines: list[str] = []
    for number, row in enumerate(rows, start=1):
        line = _Line(what=what, number=number)
        if not isinstance(row, str | Mapping):
            raise line.refusal(f"it is a {type(row).__name__}; a dictionary or a text is needed")
        try:
            lines.append(json.dumps({"text": row} if isinstance(row, str) else dict(row)))
        except (TypeError, ValueError, RecursionError) as error:
            raise line.refusal(f"it cannot be written as JSON ({error})") from None
    return read_examples("\n".join(lines).encode(), what=what)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    overlong: OverlongSamples = OverlongSamples.REFUSE,
    what: str = "the training file",
) -> tuple[TrainingSample, ...]:
    """Tokens and label weights of every example, in order.

    Raises:
        InvalidRequestError: a sample is longer than `max_tokens` and may not be cut, too short, or
            left without a label; the message names the line.
    """
    return tuple(_encode(example, tokenizer, max_tokens, overlong, what) for example in examples)


# ---- reading ----


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """Where something was found, for messages."""

    what: str
    number: int

    def __str__(self) -> str:
        return f"{self.what}, line {self.number}"

    def refusal(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self}: {reason}", "training_file", "invalid_file")


def _json_lines(text: str, what: str) -> Iterator[tuple[_Line, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        line = _Line(what=what, number=number)
        try:
            fields = json.loads(row, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise line.refusal(f"it is not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise line.refusal(f"it is a JSON {type(fields).__name__}; an object is needed")
        if _SURROGATE.search(row) and not _is_unicode(fields):
            raise line.refusal("it holds a lone surrogate (\\ud800 to \\udfff), which is no text")
        yield line, fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _is_unicode(fields: Mapping[str, Any]) -> bool:
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_tools(fields: Mapping[str, Any], where: str) -> None:
    for key in _TOOL_KEYS:
        if fields.get(key):
            raise UnsupportedError(
                f"{where}: `{key}` is not supported; training data carries text only: leave it out"
            )


def _example(form: str, fields: dict[str, Any], line: _Line) -> Example:
    if form == "messages":
        _only(fields, _CHAT_KEYS | set(_TOOL_KEYS), line)
        return Example(line=line.number, turns=_turns(fields["messages"], line))
    if form == "text":
        _only(fields, {"text"}, line)
        return Example(line=line.number, completion=_text(fields, "text", line))
    _only(fields, {"prompt", "completion"}, line)
    if "prompt" not in fields:
        raise line.refusal("it has `completion` but no `prompt`; give both, or `text`")
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise line.refusal(f"`prompt` is a {type(prompt).__name__}; it must be a string")
    completion = _text(fields, "completion", line)
    return Example(line=line.number, prompt=prompt, completion=completion)


def _text(fields: Mapping[str, Any], key: str, line: _Line) -> str:
    value = fields[key]
    if not isinstance(value, str) or not value:
        raise line.refusal(f"`{key}` must be a non-empty string")
    return value


def _turns(messages: object, line: _Line) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise line.refusal("`messages` must be a list of at least one message")
    turns = tuple(_turn(message, index, line) for index, message in enumerate(messages))
    if not any(turn.role == "assistant" for turn in turns):
        raise line.refusal("it has no assistant turn, so there is nothing to learn")
    if not any(turn.weight for turn in turns):
        raise line.refusal("every assistant turn has weight 0; give one weight 1")
    return turns


def _turn(message: object, index: int, line: _Line) -> Turn:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise line.refusal(f"{where} is a {type(message).__name__}, not an object")
    _refuse_tools(message, f"{line}: {where}")
    role = message.get("role")
    if role in _TOOL_ROLES:
        raise UnsupportedError(
            f"{line}: {where}.role is {role!r}; tools are not supported, supported "
            f"roles are {', '.join(_ROLES)}"
        )
    if role not in _ROLES:
        raise line.refusal(f"{where}.role is {role!r}; it must be one of {', '.join(_ROLES)}")
    _only(message, _MESSAGE_KEYS | set(_TOOL_KEYS), line, where)
    content = _content(message.get("content"), where, line)
    if role == "assistant" and not content:
        raise line.refusal(f"{where}.content is empty; an assistant turn needs a text")
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise line.refusal(f"{where}.name must be a string")
    return Turn(
        role="system" if role == "developer" else str(role),
        content=content,
        weight=_weight(message, str(role), where, line),
        name=name,
    )


def _content(content: object, where: str, line: _Line) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts: list[str] = []
        for part in content:
            fields: Mapping[str, Any] = part if isinstance(part, dict) else {}
            if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
                raise line.refusal(f"{where}.content holds a part that is no text")
            texts.append(fields["text"])
        return "\n".join(texts)
    raise line.refusal(f"{where}.content is a {type(content).__name__}; it must be a string")


def _weight(message: Mapping[str, Any], role: str, where: str, line: _Line) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0 if role == "assistant" else 0.0
    if role != "assistant":
        raise line.refusal(
            f"{where}.weight is given, but the role is {role}; only assistant turns have a weight"
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise line.refusal(f"{where}.weight is {weight!r}; it must be 0 or 1")
    return float(weight)


def _only(
    fields: Mapping[str, Any],
    known: frozenset[str] | set[str],
    line: _Line,
    where: str = "it",
) -> None:
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise line.refusal(f"{where} has the unknown key {unknown[0][:80]!r}")


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key[:40]}`" for key in list(fields)[:5]) or "no key at all"


# ---- encoding ----


def _encode(
    example: Example,
    tokenizer: Tokenizer,
    max_tokens: int,
    overlong: OverlongSamples,
    what: str,
) -> TrainingSample:
    line = _Line(what=what, number=example.line)
    if example.turns:
        try:
            text, spans = _render(example.turns, tokenizer)
        except InvalidRequestError as error:
            raise line.refusal(error.message) from None
        ids, weights = _weigh(text, spans, tokenizer, add_special_tokens=False)
    else:
        text = example.prompt + example.completion
        span = Span(begin=len(example.prompt), end=len(text))
        ids, weights = _weigh(text, [span], tokenizer, add_special_tokens=True)
        if tokenizer.eos_token_id is not None:
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
                weights.append(1.0)
            weights[-1] = 1.0  # Also where the tokenizer itself adds it, which has no characters.
    if len(ids) > max_tokens:
        if overlong is OverlongSamples.REFUSE:
            raise line.refusal(
                f"it has {len(ids)} tokens; at most {max_tokens} are taken: shorten it, or have "
                'long samples cut with {"weft": {"overlong_samples": "truncate"}}',
            )
        ids, weights = ids[:max_tokens], weights[:max_tokens]
    if len(ids) < MIN_SAMPLE_TOKENS:
        raise line.refusal(f"it has {len(ids)} tokens; at least {MIN_SAMPLE_TOKENS} are needed")
    if not any(weights[1:]):
        cut = f" within its first {max_tokens} tokens" if len(ids) == max_tokens else ""
        raise line.refusal(f"no token{cut} is a label, so there is nothing to learn")
    return TrainingSample(
        token_ids=np.array(ids, np.int32),
        label_weights=np.array(weights, np.float32),
        line=example.line,
    )


def _weigh(
    text: str, spans: Sequence[Span], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> tuple[list[int], list[float]]:
    """A token is a label where any of its characters lies in a span, as transformers has it."""
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=add_special_tokens)
    is_label = np.zeros(len(text) + 1, np.int64)
    for span in spans:
        is_label[span.begin : span.end] = 1
    ends = np.concatenate(([0], np.cumsum(is_label)))
    weights = [float(ends[end] > ends[begin]) for begin, end in offsets]
    return ids, weights


def _render(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The conversation as the chat template writes it, and what of it the assistant says.

    An assistant turn begins where the prompt for it ends, as it will when the model is asked.
    """
    messages = [
        {"role": turn.role, "content": turn.content}
        | ({} if turn.name is None else {"name": turn.name})
        for turn in turns
    ]
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if not turn.weight:
            continue
        until = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
        if index:
            before = tokenizer.render_chat(messages[:index], add_generation_prompt=True)
        else:
            before = until[: max(0, until.find(turn.content.strip()))]
        if not (until.startswith(before) and whole.startswith(until)):
            raise InvalidRequestError(
                f"messages[{index}]: the chat template writes this turn differently when more "
                "turns follow it; give earlier assistant turns weight 0, or one line each"
            )
        spans.append(Span(begin=len(before), end=_end_of_turn(until, len(before), tokenizer)))
    return whole, spans


def _end_of_turn(text: str, begin: int, tokenizer: Tokenizer) -> int:
    """Behind the end-of-sequence token where the template writes one: nothing after it is said."""
    if tokenizer.eos_token is None:
        return len(text)
    found = text.rfind(tokenizer.eos_token, begin)
    return len(text) if found < 0 else found + len(tokenizer.eos_token)
