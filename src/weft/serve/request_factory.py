"""From an API body to engine requests: names, defaults, limits, tokens."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from weft.base.errors import ConfigError, InvalidRequestError
from weft.engine.admission import Admission
from weft.engine.batch import AdapterRef
from weft.engine.config import PolicyConfig
from weft.engine.request import Request
from weft.engine.sampling import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from weft.model.tokenizer import Tokenizer
from weft.serve.api_keys import Tenant
from weft.serve.engine_config import EngineInfo
from weft.serve.parameters import check_parameters
from weft.serve.prompts import content_text
from weft.serve.protocol import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerationBody,
    StreamOptions,
    TokenizeBody,
)

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""
_TOKENIZE_CHARS = 2**20
"""Texts up to here can be tokenised whatever the context holds, to see by how much they exceed."""
_INLINE_CHARS = 8192
"""Longer prompts are tokenised in a thread, so that other requests' streams flow on."""
_ROLES = ("system", "developer", "user", "assistant")
_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)
"""Fields that a body and `SamplingParams` share by name and meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one HTTP request may ask for.

    Raises:
        ConfigError: a limit is below 1, or above what the engine can do.
    """

    max_body_bytes: int = 16 * 2**20
    max_file_bytes: int = 128 * 2**20
    """Of an upload."""
    max_prompts: int = 1024
    """Prompts of one completions request."""
    max_choices: int = 128
    """`n`."""
    max_logprobs: int = MAX_LOGPROBS
    max_stop: int = MAX_STOP_STRINGS
    max_prompt_tokens: int | None = None
    """None leaves the bound to the model's context."""

    def __post_init__(self) -> None:
        highest = {"max_logprobs": MAX_LOGPROBS, "max_stop": MAX_STOP_STRINGS}
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= highest.get(name, value):
                bound = f" and at most {highest[name]}" if name in highest else ""
                raise ConfigError(f"{name} is {value}; it must be at least 1{bound}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request that the engine will take, and its prompt as text where it was given as text."""

    request: Request
    prompt: str | None


class RequestFactory:
    """Checks bodies against the model and the limits; raises InvalidRequestError by name."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        info: EngineInfo,
        sampling_defaults: Mapping[str, float],
        limits: RequestLimits,
    ) -> None:
        self._tokenizer = tokenizer
        self._defaults: dict[str, Any] = dict(sampling_defaults)
        self._limits = limits
        self._max_model_len = info.max_model_len
        self._admission = Admission(
            PolicyConfig(max_model_len=info.max_model_len), vocab_size=info.vocab_size
        )
        longest = max(
            (len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)), default=1
        )
        self._max_prompt_chars = info.max_model_len * max(longest, 8)

    async def completions(
        self, body: CompletionBody, tenant: Tenant, *, adapter: AdapterRef | None = None
    ) -> list[Prepared]:
        """One request a prompt."""
        check_parameters("completions", _given(body, exclude={"best_of"}))
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequestError(
                f"best_of is {body.best_of} and n is {body.n or 1}; searching for the best of "
                "several answers is not supported: leave best_of out",
                "best_of",
                "unsupported_parameter",
            )
        _check_stream_options(body)
        self._check_counts(body, body.logprobs, "logprobs")
        prompts = await self._encode_prompts(body)
        echoed = body.logprobs if body.echo else None
        overrides: dict[str, Any] = {} if echoed is None else {"prompt_logprobs": echoed}
        return [
            Prepared(
                prompt=text,
                request=self._request(
                    body,
                    tenant,
                    token_ids,
                    prefix="cmpl",
                    prompt_param="prompt",
                    max_tokens=("max_tokens", body.max_tokens),
                    default_max_tokens=DEFAULT_COMPLETION_TOKENS,
                    logprobs=body.logprobs,
                    adapter=adapter,
                    **overrides,
                ),
            )
            for text, token_ids in prompts
        ]

    async def chat(
        self, body: ChatBody, tenant: Tenant, *, adapter: AdapterRef | None = None
    ) -> Prepared:
        """One request, its prompt written by the model's chat template."""
        check_parameters("chat", _given(body))
        _check_stream_options(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequestError(
                "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value"
            )
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequestError(
                "prompt_logprobs of a chat is not available with stream: true", "prompt_logprobs"
            )
        self._check_counts(body, body.top_logprobs, "top_logprobs")
        token_ids = await self.encode_conversation(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        request = self._request(
            body,
            tenant,
            token_ids,
            prefix="chatcmpl",
            prompt_param="messages",
            max_tokens=(name, getattr(body, name)),
            default_max_tokens=None,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            adapter=adapter,
        )
        return Prepared(prompt=None, request=request)

    async def tokenize(self, body: TokenizeBody) -> list[int]:
        """Token ids of a text or a conversation."""
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        if body.messages is not None:
            return await self.encode_conversation(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            )
        special = body.add_special_tokens is not False
        return (
            await self._encode(
                [body.prompt or ""],
                add_special_tokens=special,
                max_chars=max(self._max_prompt_chars, _TOKENIZE_CHARS),
            )
        )[0]

    async def encode_conversation(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        """Render and tokenise messages."""
        turns = [_turn(message, index) for index, message in enumerate(messages)]
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        render = partial(
            self._tokenizer.render_chat,
            turns,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=bool(continue_final_message),
            chat_template_kwargs=chat_template_kwargs,
        )
        # A template is a program of the model's author; in a thread it delays nobody else.
        text = await asyncio.to_thread(render)
        return (await self._encode([text], add_special_tokens=False, param="messages"))[0]

    # ---- pieces ----

    async def _encode_prompts(self, body: CompletionBody) -> list[tuple[str | None, Sequence[int]]]:
        prompt = body.prompt
        is_single = isinstance(prompt, str) or isinstance(prompt[0], int)
        items: list[Any] = [prompt] if is_single else list(prompt)
        if len(items) > self._limits.max_prompts:
            raise InvalidRequestError(
                f"prompt holds {len(items)} prompts; at most {self._limits.max_prompts} are "
                "allowed in one request",
                "prompt",
            )
        texts = [item for item in items if isinstance(item, str)]
        if not texts:
            return [(None, item) for item in items]
        special = body.add_special_tokens is not False
        encoded = await self._encode(texts, add_special_tokens=special)
        return list(zip(texts, encoded, strict=True))

    async def _encode(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool,
        param: str = "prompt",
        max_chars: int | None = None,
    ) -> list[list[int]]:
        longest = max(map(len, texts))
        max_chars = max_chars or self._max_prompt_chars
        if longest > max_chars:
            raise InvalidRequestError(
                f"the prompt has {longest} characters; at most {max_chars} are taken for this "
                f"model's context of {self._max_model_len} tokens",
                param,
                "context_length_exceeded",
            )
        encode = partial(self._tokenizer.encode_batch, texts, add_special_tokens=add_special_tokens)
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return encode()
        return await asyncio.to_thread(encode)

    def _request(
        self,
        body: GenerationBody,
        tenant: Tenant,
        token_ids: Sequence[int],
        *,
        prefix: str,
        prompt_param: str,
        max_tokens: tuple[str, int | None],
        default_max_tokens: int | None,
        logprobs: int | None,
        adapter: AdapterRef | None,
        **overrides: Any,
    ) -> Request:
        given = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        fields: dict[str, Any] = self._defaults | given | overrides
        room = self._max_model_len - len(token_ids)
        self._check_length(len(token_ids), room, max_tokens, prompt_param)
        name, wanted = max_tokens
        if wanted is None:
            wanted = (
                default_max_tokens
                if default_max_tokens is None
                else max(1, min(default_max_tokens, room))
            )
        try:
            sampling = SamplingParams(
                **fields,
                max_tokens=wanted,
                logprobs=logprobs,
                logit_bias=_logit_bias(body.logit_bias),
                stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            )
            request = Request(
                id=f"{prefix}-{uuid.uuid4().hex}",
                prompt_token_ids=tuple(token_ids),
                sampling=sampling,
                priority=_priority(body.priority, tenant),
                adapter=adapter,
                cache_salt=f"{tenant.name}\0{body.cache_salt or ''}",
                arrival_s=time.monotonic(),
            )
            self._admission.validate(request)
        except InvalidRequestError as error:
            renamed = {"prompt": prompt_param, "max_tokens": name}
            param = renamed.get(error.param or "", error.param)
            raise InvalidRequestError(error.message, param, error.code) from None
        return request

    def _check_length(
        self, num_prompt: int, room: int, max_tokens: tuple[str, int | None], prompt_param: str
    ) -> None:
        bound = self._limits.max_prompt_tokens
        if bound is not None and num_prompt > bound:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens; this server takes at most {bound}",
                prompt_param,
                "context_length_exceeded",
            )
        name, wanted = max_tokens
        if wanted is not None and 0 < room < wanted:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens and {name} is {wanted}; this model's context "
                f"holds {self._max_model_len}: lower {name} to {room} or shorten the prompt",
                name,
                "context_length_exceeded",
            )

    def _check_counts(self, body: GenerationBody, logprobs: int | None, param: str) -> None:
        limits = self._limits
        stops = 1 if isinstance(body.stop, str) else len(body.stop or ())
        for name, value, bound in (
            ("n", body.n, limits.max_choices),
            (param, logprobs, limits.max_logprobs),
            ("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs),
            ("stop", stops, limits.max_stop),
        ):
            if value is not None and value > bound:
                what = "holds" if name == "stop" else "is"
                raise InvalidRequestError(
                    f"{name} {what} {value}; this server allows at most {bound}", name
                )


def _given(
    body: GenerationBody, exclude: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    return {name: getattr(body, name) for name in type(body).model_fields if name not in exclude}


def _check_stream_options(body: GenerationBody) -> None:
    options: StreamOptions | None = body.stream_options
    if options is None:
        return
    if not body.stream:
        raise InvalidRequestError("stream_options needs stream: true", "stream_options")
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if getattr(options, name):
            raise InvalidRequestError(
                f"stream_options.{name} is not supported; leave it out",
                "stream_options",
                "unsupported_parameter",
            )


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(
                f"logit_bias names token {key!r}; its keys are token ids", "logit_bias"
            )
        bias[int(key)] = value
    return bias


def _priority(given: int | None, tenant: Tenant) -> int:
    if tenant.priority is None:
        return given or 0
    return tenant.priority if given is None else max(given, tenant.priority)


def _turn(message: ChatMessage, index: int) -> dict[str, str]:
    """A message as chat templates know it."""
    where = f"messages[{index}]"
    if message.role not in _ROLES:
        raise InvalidRequestError(
            f"{where}.role is {message.role!r}; supported are {', '.join(_ROLES)}", "messages"
        )
    for name in ("tool_calls", "function_call", "audio", "refusal", "annotations", "tool_call_id"):
        if getattr(message, name):
            raise InvalidRequestError(
                f"{where}.{name} is not supported; messages carry text",
                "messages",
                "unsupported_parameter",
            )
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": _content(message, where)}
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _content(message: ChatMessage, where: str) -> str:
    content = message.content
    if not isinstance(content, list):
        return content_text(content, where)
    return content_text([{"type": part.type, "text": part.text} for part in content], where)
