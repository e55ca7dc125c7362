"""Text to token ids and back, from a model directory's `tokenizer.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from weft.base.errors import InvalidRequestError, ModelLoadError
from weft.model.chat_template import ChatTemplate, read_chat_templates
from weft.model.detokenizer import (
    ByteLevelStream,
    DetokenizeStream,
    WindowStream,
    byte_level_bytes,
)

_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
"""Template variables that requests set by parameters of their own."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Tokenizer:
    """A model's vocabulary, chat template and special tokens. Immutable; safe between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        tokenizer_config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        config = tokenizer_config or {}
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the highest token id; a model's logits may be wider."""
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special_tokens = _special_token_texts(config)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        """The tokenizer's own; the ids that end a generation are in `GenerationDefaults`."""
        self.eos_token = self._special_tokens.get("eos_token")
        self._is_byte_level = _is_byte_level(backend)
        self._add_bos = _explicit_bos(backend, config, self.bos_token_id)
        self._templates = {
            name: ChatTemplate(source=source, variables=self._special_tokens)
            for name, source in (chat_templates or {}).items()
        }
        for template in self._templates.values():
            template.check()

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template.

        Raises:
            ModelLoadError: a file is missing or malformed; the message names it.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(
                f"{path} is missing; a tokenizer.json is needed (slow tokenizers are not read: "
                "convert one with transformers' save_pretrained)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelLoadError(f"{path} is not a tokenizer: {error}") from error
        config = _read_json(directory / "tokenizer_config.json")
        special = _read_json(directory / "special_tokens_map.json")
        return cls(
            backend,
            tokenizer_config={**special, **config},
            chat_templates=read_chat_templates(directory, config, _read_text),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works without a template from the caller."""
        return "default" in self._templates

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids; special tokens written out in it are recognised.

        Raises:
            InvalidRequestError: the text holds lone surrogates, which no UTF-8 can carry.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts, on several threads where that pays."""
        for text in texts:
            _check_unicode(text)
        encodings = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        ids = [encoding.ids for encoding in encodings]
        if not add_special_tokens or self._add_bos is None or self.bos_token_id is None:
            return ids
        return [_with_bos(row, self.bos_token_id, self._add_bos) for row in ids]

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the characters [begin, end) of `text` that it covers.

        Special tokens that the tokenizer adds cover nothing: (0, 0).

        Raises:
            InvalidRequestError: the text holds lone surrogates, which no UTF-8 can carry.
        """
        _check_unicode(text)
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        if not add_special_tokens or self._add_bos is None or self.bos_token_id is None:
            return ids, offsets
        with_bos = _with_bos(ids, self.bos_token_id, self._add_bos)
        if len(with_bos) > len(ids):
            offsets.insert(0, (0, 0))
        return with_bos, offsets[len(offsets) - len(with_bos) :]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD.

        Ids beyond the vocabulary, which padded output layers have, stand for nothing: which ids a
        prompt may hold is for the model to say, not for its tokenizer.

        Raises:
            InvalidRequestError: an id is negative.
        """
        ids = [i for i in self.check_ids(token_ids) if i < self.vocab_size]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def check_ids(self, token_ids: Iterable[int], *, num_ids: int | None = None) -> list[int]:
        """Return the ids as a list; `num_ids` is the width of the model's logits.

        Raises:
            InvalidRequestError: an id is negative, or not below `num_ids`.
        """
        ids = list(token_ids)
        for token_id in ids:
            if token_id < 0 or (num_ids is not None and token_id >= num_ids):
                bound = "0 or more" if num_ids is None else f"in [0, {num_ids})"
                raise InvalidRequestError(
                    f"token id {token_id} is out of range; it must be {bound}", param="prompt"
                )
        return ids

    def stream(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DetokenizeStream:
        """Start an incremental decoding of the tokens that follow a prompt."""
        if self._is_byte_level:
            return ByteLevelStream(self, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        return WindowStream(self, prompt_token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, part of a character or several; for logprobs.

        Empty for ids beyond the vocabulary, which padded output layers have.
        """
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return byte_level_bytes(token)
        byte = _BYTE_TOKEN.match(token)
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token written as the vocabulary has it, or None."""
        return self._backend.token_to_id(token)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a conversation as one prompt, by the model's template or the caller's.

        Raises:
            InvalidRequestError: no template, no messages, or the template refuses them.
        """
        return self._template(chat_template, bool(tools)).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            template_kwargs=_template_variables(chat_template_kwargs),
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **render_kwargs: Any) -> list[int]:
        """Token ids of `render_chat`; the template writes the special tokens itself."""
        return self.encode(self.render_chat(messages, **render_kwargs), add_special_tokens=False)

    def _template(self, override: str | None, has_tools: bool) -> ChatTemplate:
        if override is not None:
            try:
                template = ChatTemplate(source=override, variables=self._special_tokens)
                template.check()
            except ModelLoadError as error:
                raise InvalidRequestError(str(error), param="chat_template") from error
            return template
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        template = self._templates.get("default")
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template; use completions, or give one "
                "(chat_template.jinja in the model directory, or --chat-template)",
                param="messages",
            )
        return template

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the prompt is not valid Unicode text: {error}", param="prompt"
        ) from error


def _template_variables(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A caller's own variables; those that have their own parameter may not come this way."""
    variables: Any = {} if given is None else given
    if not isinstance(variables, Mapping):
        raise InvalidRequestError(
            f"chat_template_kwargs is {given!r}; it must be a mapping of names to values",
            param="chat_template_kwargs",
        )
    clash = [str(key) for key in variables if not isinstance(key, str) or key in _RESERVED]
    if clash:
        raise InvalidRequestError(
            f"chat_template_kwargs may not set {', '.join(sorted(clash))}; its keys are names of "
            f"the template's own variables, other than {', '.join(sorted(_RESERVED))}",
            param="chat_template_kwargs",
        )
    return variables


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value


def _special_token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ...: each is written as a string or as an object with `content`."""
    texts: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            texts[name] = value
    return texts


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether decoding is only the byte-level alphabet, so that tokens are byte strings."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    if decoder.get("type") == "Sequence":
        steps = decoder.get("decoders", [])
        return len(steps) == 1 and steps[0].get("type") == "ByteLevel"
    return decoder.get("type") == "ByteLevel"


def _explicit_bos(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], bos_token_id: int | None
) -> bool | None:
    """What `add_bos_token` asks for where tokenizer.json does otherwise; None where they agree."""
    wanted = config.get("add_bos_token")
    if not isinstance(wanted, bool) or bos_token_id is None:
        return None
    done = backend.encode("", add_special_tokens=True).ids[:1] == [bos_token_id]
    return None if done == wanted else wanted


def _with_bos(ids: list[int], bos_token_id: int, add: bool) -> list[int]:
    if add:
        return [bos_token_id, *ids]
    return ids[1:] if ids[:1] == [bos_token_id] else ids
