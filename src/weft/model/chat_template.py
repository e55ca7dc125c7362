"""Chat templates: sandboxed Jinja with the functions and variables that model authors rely on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weft.base.errors import InvalidRequestError, ModelLoadError


class _GenerationTag(Extension):
    """Accepts `{% generation %}` around assistant turns, which only training needs to know of."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateRaised(jinja2.TemplateError):
    """What a template's own `raise_exception` raises."""


def _raise_exception(message: str) -> None:
    raise _TemplateRaised(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would change what the model reads.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _environment()


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    source: str
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """bos_token, eos_token and the like."""

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _ENVIRONMENT.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template is not valid Jinja: {error}") from error

    def check(self) -> None:
        """Compile now.

        Raises:
            ModelLoadError: the template is not valid Jinja.
        """
        self._compiled  # noqa: B018 - compiling is the point

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the messages as one prompt.

        Raises:
            InvalidRequestError: there are no messages, or the template refuses them.
        """
        if not messages:
            raise InvalidRequestError(
                "messages is empty; at least one message is needed", param="messages"
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other; set one",
                param="continue_final_message",
            )
        values: dict[str, Any] = {**self.variables, **(template_kwargs or {})}
        try:
            text = self._compiled.render(
                **values,
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=list(documents) if documents else None,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return _open_final_message(text, messages[-1]) if continue_final_message else text


def _open_final_message(text: str, message: Mapping[str, Any]) -> str:
    """Cut the prompt behind the last message's content, so that the model goes on with it."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise InvalidRequestError(
            "continue_final_message needs a last message whose content is a non-empty string",
            param="messages",
        )
    begin = text.rfind(content.strip())
    if begin < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template changes the last message's content, so the "
            "end of it cannot be found",
            param="messages",
        )
    return text[: begin + len(content.strip())]


def read_chat_templates(
    directory: Path, tokenizer_config: Mapping[str, Any], read_text: Callable[[Path], str]
) -> dict[str, str]:
    """Collect a model directory's templates by name; `default` is the plain one.

    `chat_template.jinja` wins over `chat_template.json`, which wins over `tokenizer_config.json`.
    """
    templates: dict[str, str] = {}
    declared = tokenizer_config.get("chat_template")
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates.update({entry["name"]: entry["template"] for entry in declared})
    as_json = directory / "chat_template.json"
    if as_json.is_file():
        try:
            templates["default"] = str(json.loads(read_text(as_json))["chat_template"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelLoadError(
                f"{as_json}: no JSON object with chat_template: {error}"
            ) from error
    as_jinja = directory / "chat_template.jinja"
    if as_jinja.is_file():
        templates["default"] = read_text(as_jinja)
    return templates
