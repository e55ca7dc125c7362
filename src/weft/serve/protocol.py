"""The bodies that the HTTP API takes: typed, bounded, strict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints
from pydantic_core import PydanticCustomError

MAX_NAME_CHARS = 512
MAX_STOP_CHARS = 1024
MAX_BIASED_TOKENS = 4096
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 4096
MAX_PROMPTS = 65536
MAX_STOP_ITEMS = 256
MAX_STOP_TOKENS = 4096
MAX_TOKEN_IDS = 2**21
"""Bounds of shape, so that no body is much work; the server's own limits are far below them."""
_INT32_MAX = 2**31 - 1


def without_nul(text: str) -> str:
    """Refuse U+0000, which no name holds and PostgreSQL keeps in no text."""
    if "\0" in text:
        raise PydanticCustomError("nul_character", "It holds the character U+0000; leave it out")
    return text


Name = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_NAME_CHARS),
    AfterValidator(without_nul),
]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=_INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]
# One wrong element is answer enough: an error for each of a million would take seconds to build.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenIdPrompts = Annotated[
    list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
]


class Body(BaseModel):
    """Strict types; unknown keys are kept, so that they can be refused (or warned of) by name."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        frozen=True,
        hide_input_in_errors=True,
        # Prompts rarely come twice: a cache of them would only hold memory.
        cache_strings="none",
    )

    def unknown_keys(self, prefix: str = "") -> Iterator[str]:
        """Keys that no field takes, nested ones by their path."""
        for key in self.model_extra or ():
            yield f"{prefix}{key}"
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Body):
                yield from value.unknown_keys(f"{prefix}{name}.")
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if not isinstance(item, Body):
                        break
                    yield from item.unknown_keys(f"{prefix}{name}[{index}].")


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What completions and chat have in common; null means not given."""

    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=_INT32_MAX)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32_MAX)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[dict[str, Number], Field(max_length=MAX_BIASED_TOKENS, fail_fast=True)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=MAX_STOP_ITEMS, fail_fast=True)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Count | None = None
    priority: Annotated[int, Field(ge=-_INT32_MAX, le=_INT32_MAX)] | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | TokenIds | Prompts | TokenIdPrompts
    logprobs: Count | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class ContentPart(Body):
    """One part of a message's content; only `text` is understood."""

    type: Name
    text: str | None = None

    def unknown_keys(self, prefix: str = "") -> Iterator[str]:
        """As for every body; but a part of another type is refused by that, not by its keys."""
        if self.type == "text":
            yield from super().unknown_keys(prefix)


class ChatMessage(Body):
    """One turn."""

    role: Name
    content: (
        str
        | Annotated[list[ContentPart], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]
        | None
    ) = None
    name: Name | None = None
    refusal: JsonValue = None
    audio: JsonValue = None
    annotations: JsonValue = None
    tool_calls: JsonValue = None
    tool_call_id: JsonValue = None
    function_call: JsonValue = None


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class ConversationBody(Body):
    """What a chat template is given."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class ChatBody(GenerationBody, ConversationBody):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    store: bool | None = None
    metadata: dict[str, JsonValue] | None = None
    safety_identifier: JsonValue = None
    prompt_cache_key: JsonValue = None
    prompt_cache_retention: JsonValue = None
    prompt_cache_options: JsonValue = None
    service_tier: JsonValue = None
    response_format: JsonValue = None
    tools: list[JsonValue] | None = None
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    functions: list[JsonValue] | None = None
    function_call: JsonValue = None
    modalities: list[JsonValue] | None = None
    verbosity: JsonValue = None
    audio: JsonValue = None
    moderation: JsonValue = None
    prediction: JsonValue = None
    reasoning_effort: JsonValue = None
    web_search_options: JsonValue = None


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]


EXPECTED: dict[str, str] = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a non-empty string or a list of non-empty strings, each of at most 1024 characters",
    "content": "a string or a list of content parts",
    "n_epochs": "'auto' or a whole number in [1, 1000]",
    "batch_size": "'auto' or a whole number in [1, 4096]",
    "learning_rate_multiplier": "'auto' or a positive number",
    "target_modules": "a list of names, a regular expression or all-linear",
}
"""What a field takes, where a union's own error message would be a riddle."""


def first_problem(errors: list[Any]) -> tuple[str, str | None]:
    """Turn pydantic's list into one sentence and the name of the offending parameter.

    Of a union, the branch speaks that got beyond the value's type, and what the field takes is
    said as well.
    """
    error = errors[0]
    param = next((str(part) for part in error["loc"][:1]), None)
    union = next((part for part in reversed(error["loc"]) if part in EXPECTED), None)
    expected = f"{union} must be {EXPECTED[union]}" if union and len(errors) > 1 else ""
    if expected:
        same = [other for other in errors if union in other["loc"]]
        error = next((e for e in same if not e["type"].endswith(("_type", "literal_error"))), None)
        if error is None:
            return expected, param
    if error["type"] == "json_invalid" or not error["loc"]:
        return f"the body is not a valid JSON object: {error['msg']}", None
    where = _spell_path(error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing; it is required", param
    said = f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}"
    return f"{said}; {expected}" if expected else said, param


def _spell_path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`; the names of a union's branches are left out."""
    parts = [f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc if _is_in_body(p)]
    return "".join(parts).lstrip(".")[:MAX_NAME_CHARS]


def _is_in_body(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part != "str")
