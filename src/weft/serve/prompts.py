"""What callers of the offline API hand in, checked and put into one form; refusals by name."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from weft.base.errors import InvalidRequestError
from weft.engine.sampling import SamplingParams

_PROMPT_FORMS = 'a prompt is text, {"prompt": text} or {"prompt_token_ids": ids}'
_MESSAGE_FORMS = (
    'a conversation is a list of messages like {"role": "user", "content": text}, and several are '
    "a list of such lists"
)


def prompt_list(prompts: object) -> list[Any]:
    """One prompt, or any iterable of prompts, as a list.

    Raises:
        InvalidRequestError: it is neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(f"prompts is {_show(prompts)}; {_PROMPT_FORMS}", "prompts")
    return list(prompts)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptParts:
    """A prompt as it was given: as text, or as token ids."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None


def prompt_parts(prompt: object) -> PromptParts:
    """Text or token ids of one prompt; where both are given, the ids.

    Raises:
        InvalidRequestError: it is no prompt.
    """
    if isinstance(prompt, str):
        return PromptParts(text=prompt)
    fields: Mapping[Any, Any] = prompt if isinstance(prompt, Mapping) else {}
    if set(fields) == {"prompt"} and isinstance(fields["prompt"], str):
        return PromptParts(text=fields["prompt"])
    if "prompt_token_ids" in fields and set(fields) <= {"prompt_token_ids", "prompt"}:
        return PromptParts(token_ids=token_ids(fields["prompt_token_ids"]))
    raise InvalidRequestError(f"it is {_show(prompt)}; {_PROMPT_FORMS}", "prompts")


def token_ids(given: object) -> tuple[int, ...]:
    """Whole numbers of any kind (a list, an array, a tensor) as a tuple of int.

    Raises:
        InvalidRequestError: it is something else, or holds something else.
    """
    to_list = getattr(given, "tolist", None)
    values: Any = given if to_list is None else to_list()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidRequestError(
            f"prompt_token_ids is {_show(given)}; it must be a list of token ids", "prompts"
        )
    ids: tuple[Any, ...] = tuple(values)
    if set(map(type, ids)) <= {int}:
        return ids
    return tuple(_token_id(value) for value in ids)


def conversation_list(messages: object) -> list[list[dict[str, Any]]]:
    """One conversation, or several, as lists of messages whose content is text.

    Raises:
        InvalidRequestError: it is neither, or a message cannot be given to a chat template.
    """
    if not _is_list(messages):
        raise InvalidRequestError(f"messages is {_show(messages)}; {_MESSAGE_FORMS}", "messages")
    given: list[Any] = list(messages)  # pyright: ignore[reportArgumentType] - _is_list says so
    if not given or not _is_list(given[0]):
        return [_conversation(given)]
    conversations: list[list[dict[str, Any]]] = []
    for number, conversation in enumerate(given):
        with naming(f"conversation {number}"):
            if not _is_list(conversation):
                raise InvalidRequestError(
                    f"it is {_show(conversation)}; {_MESSAGE_FORMS}", "messages"
                )
            conversations.append(_conversation(list(conversation)))
    return conversations


def content_text(content: object, where: str) -> str:
    """A message's content as one text: parts of type `text` joined by newlines, None empty.

    Raises:
        InvalidRequestError: it holds something else; `where` says whose content it is.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not _is_list(content):
        raise InvalidRequestError(
            f"{where}.content is {_show(content)}; it must be a string or a list of content parts",
            "messages",
        )
    parts: list[Any] = list(content)  # pyright: ignore[reportArgumentType] - _is_list says so
    texts: list[str] = []
    for position, part in enumerate(parts):
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {"type": _kind(part)}
        if fields.get("type") != "text":
            raise InvalidRequestError(
                f"{where}.content[{position}] is of type {fields.get('type')!r}, which is not "
                "supported; supported is text",
                "messages",
                "unsupported_parameter",
            )
        text = fields.get("text")
        if text is None:
            raise InvalidRequestError(f"{where}.content[{position}].text is missing", "messages")
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"{where}.content[{position}].text is {_show(text)}; it must be a string",
                "messages",
            )
        texts.append(text)
    return "\n".join(texts)


def sampling_list(given: object, number: int) -> list[SamplingParams]:
    """One `SamplingParams` for each of so many prompts.

    Raises:
        InvalidRequestError: it is neither one for all nor one a prompt.
    """
    if isinstance(given, SamplingParams):
        return [given] * number
    values = per_prompt("sampling_params", given, number, "SamplingParams")
    for position, value in enumerate(values):
        if not isinstance(value, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params[{position}] is {_show(value)}; it must be SamplingParams",
                "sampling_params",
            )
    return values


def per_prompt(name: str, given: object, number: int, kind: str) -> list[Any]:
    """A list with one entry for each of so many prompts.

    Raises:
        InvalidRequestError: it is no list, or one of another length.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise InvalidRequestError(
            f"{name} is {_show(given)}; it must be {kind}, or a list with one a prompt", name
        )
    values: list[Any] = list(given)
    if len(values) != number:
        raise InvalidRequestError(
            f"{name} holds {len(values)} entries for {number} prompts; give one for all, or one "
            "a prompt",
            name,
        )
    return values


@contextlib.contextmanager
def naming(what: str) -> Generator[None]:
    """Say of which prompt it was where one of several is refused."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{what}: {error.message}", error.param, error.code) from None


def _token_id(value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise InvalidRequestError(
            f"prompt_token_ids holds {_show(value)}; token ids are whole numbers", "prompts"
        ) from None


def _conversation(messages: Sequence[object]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{where} is {_show(message)}; {_MESSAGE_FORMS}", "messages")
        fields: dict[str, Any] = dict(message)
        if not isinstance(fields.get("role"), str):
            raise InvalidRequestError(
                f"{where}.role is {_show(fields.get('role'))}; it must be a string, like 'user'",
                "messages",
            )
        turns.append({**fields, "content": content_text(fields.get("content"), where)})
    return turns


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _kind(value: object) -> str:
    return type(value).__name__


def _show(value: object) -> str:
    """A value for an error message, cut short."""
    text = repr(value)
    return f"{_kind(value)} {text if len(text) <= 60 else text[:57] + '...'}"
