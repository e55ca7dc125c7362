"""What becomes of every parameter of OpenAI's API: one table, read by the server and the docs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from weft.base.errors import InvalidRequestError


class Handling(StrEnum):
    """What the server does with a parameter."""

    USED = "used"
    NEUTRAL = "accepted when neutral"
    """Taken where it changes nothing that Weft could do otherwise, refused by name elsewhere."""
    REFUSED = "refused"
    """400 with the parameter's name, unless null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One row of the table."""

    name: str
    handling: Handling
    note: str
    neutral: tuple[Any, ...] = ()
    """Values besides null that ask for nothing; for NEUTRAL without any, every value is a label."""

    def check(self, value: Any) -> None:
        """Refuse a value that asks for something that Weft does not do.

        Raises:
            InvalidRequestError: with code `unsupported_parameter`.
        """
        if self.handling is Handling.USED or value is None:
            return
        if self.handling is Handling.NEUTRAL and (not self.neutral or _is_in(value, self.neutral)):
            return
        accepted = ", ".join(_spell(v) for v in self.neutral)
        hint = f"; accepted values: {accepted}" if accepted else "; leave it out"
        raise InvalidRequestError(
            f"{self.name} is not supported here: {self.note}{hint}",
            param=self.name,
            code="unsupported_parameter",
        )


def _is_in(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 1 == True in Python, not in JSON.
    return any(type(value) is type(v) and value == v for v in neutral)


def _spell(value: Any) -> str:
    return (
        {True: "true", False: "false"}.get(value, repr(value))
        if isinstance(value, bool)
        else repr(value).replace("'", '"')
    )


def _used(name: str, note: str) -> Parameter:
    return Parameter(name=name, handling=Handling.USED, note=note)


def _neutral(name: str, note: str, *neutral: Any) -> Parameter:
    return Parameter(name=name, handling=Handling.NEUTRAL, note=note, neutral=neutral)


def _refused(name: str, note: str) -> Parameter:
    return Parameter(name=name, handling=Handling.REFUSED, note=note)


_SHARED = (
    _used("model", "the served model's name; another name is 404 (`model_not_found`)"),
    _used("n", "choices a prompt; they share the prompt's pages; at most `--max-choices`"),
    _used("temperature", "0 is greedy; the model's generation_config.json gives the default"),
    _used("top_p", "in (0, 1]"),
    _used("frequency_penalty", "in [-2, 2]"),
    _used("presence_penalty", "in [-2, 2]"),
    _used("logit_bias", "token id (as a string) to a bias in [-100, 100]"),
    _used(
        "seed",
        "draws follow from seed, choice and position alone, never from what else runs; the logits "
        "under them do only up to rounding, which depends on the batch: in float64 answers repeat "
        "exactly, in float32 but for near-ties, in bfloat16 and float16 they can differ",
    ),
    _used(
        "stop",
        "a string or up to 16, each of 1 to 1024 characters; may span tokens; the text ends before "
        "it",
    ),
    _used("stream", "server-sent events, ended by `data: [DONE]`"),
    _used(
        "stream_options",
        "`include_usage` sends a last chunk with the usage; `include_obfuscation` and "
        "`continuous_usage_stats` only false",
    ),
    _neutral("user", "a label; nothing depends on it"),
)

COMPLETION_PARAMETERS = (
    *_SHARED,
    _used("prompt", "a string, a list of strings, token ids, or a list of lists of token ids"),
    _used("max_tokens", "default 16; 0 with `echo` scores the prompt alone"),
    _used("logprobs", "0 to 20: of the sampled token and of this many likeliest"),
    _used("echo", "the prompt's text comes before the answer, with its logprobs if asked for"),
    _neutral("best_of", "searching for the best of several answers is not done", 1),
    _neutral("suffix", "inserting text before a suffix is not done", ""),
)
"""`POST /v1/completions`."""

CHAT_PARAMETERS = (
    *_SHARED,
    _used(
        "messages",
        "roles system, developer (as system), user, assistant; content a string or parts of type "
        "`text`, joined by newlines; other parts are refused by name",
    ),
    _used("max_completion_tokens", "default: what the context still holds"),
    _used("max_tokens", "the older name of max_completion_tokens; the newer wins"),
    _used("logprobs", "true for the logprobs of the sampled tokens"),
    _used("top_logprobs", "0 to 20, with `logprobs: true`"),
    _neutral("store", "completions are not stored", False),
    _neutral("metadata", "a label; nothing depends on it"),
    _neutral("safety_identifier", "a label; nothing depends on it"),
    _neutral("prompt_cache_key", "a hint; prefixes are found by content, without a key"),
    _neutral(
        "prompt_cache_retention",
        "the prefix cache lives in memory and forgets what was used least recently",
        "in_memory",
        "in-memory",
    ),
    _neutral("prompt_cache_options", "the prefix cache has no options for a request", {}),
    _neutral("service_tier", "there is one tier", "auto", "default"),
    _neutral("response_format", "constrained output is not built yet", {"type": "text"}),
    _neutral("tools", "tool calling is not built yet", []),
    _neutral("tool_choice", "tool calling is not built yet", "none", "auto"),
    _neutral("parallel_tool_calls", "tool calling is not built yet", True, False),
    _neutral("functions", "tool calling is not built yet", []),
    _neutral("function_call", "tool calling is not built yet", "none", "auto"),
    _neutral("modalities", "models read and write text", ["text"]),
    _neutral("verbosity", "models have no such control", "medium"),
    _refused("audio", "models read and write text"),
    _refused("moderation", "there is no moderation"),
    _refused("prediction", "predicted outputs are not built"),
    _refused(
        "reasoning_effort",
        "give what the model's chat template understands in `chat_template_kwargs`",
    ),
    _refused("web_search_options", "the server searches nothing"),
)
"""`POST /v1/chat/completions`."""

_EXTRA = (
    _used("top_k", "keep the k likeliest tokens; 0 and -1 keep all"),
    _used("min_p", "drop tokens less likely than this share of the likeliest"),
    _used(
        "repetition_penalty",
        "in [0.01, 100]; divides positive logits of earlier tokens, multiplies negative",
    ),
    _used("min_tokens", "EOS, stop tokens and stop strings wait until so many tokens are out"),
    _used("ignore_eos", "go on after EOS"),
    _used("stop_token_ids", "tokens that end the answer"),
    _used("skip_special_tokens", "leave special tokens out of the text (default true)"),
    _used("include_stop_str_in_output", "the stop string or token stays in the text"),
    _used("prompt_logprobs", "0 to 20: logprobs of the prompt's tokens, in `prompt_logprobs`"),
    _used("priority", "lower runs earlier; a tenant's own priority is the lower bound"),
    _used("cache_salt", "prefixes are shared only between equal salts, never across tenants"),
)
COMPLETION_EXTRA = (*_EXTRA, _used("add_special_tokens", "let the tokenizer add BOS and the like"))
"""vLLM's parameters of completions, given by the client's `extra_body`."""
CHAT_EXTRA = (
    *_EXTRA,
    _used("chat_template_kwargs", "variables for the model's chat template"),
    _used("add_generation_prompt", "open the assistant's turn (default true)"),
    _used("continue_final_message", "go on with the last message instead of opening a turn"),
)
"""vLLM's parameters of chat, given by the client's `extra_body`."""

_BY_NAME: dict[str, Mapping[str, Parameter]] = {
    "completions": {p.name: p for p in (*COMPLETION_PARAMETERS, *COMPLETION_EXTRA)},
    "chat": {p.name: p for p in (*CHAT_PARAMETERS, *CHAT_EXTRA)},
}


def check_parameters(endpoint: str, values: Mapping[str, Any]) -> None:
    """Refuse what `endpoint` ("completions" or "chat") does not do.

    Raises:
        InvalidRequestError: names the first such parameter.
    """
    table = _BY_NAME[endpoint]
    for name, value in values.items():
        if name in table:
            table[name].check(value)


def render_table() -> str:
    """The page `docs/reference/openai-parameters.md`; a test keeps the two equal."""
    parts = [_HEAD]
    for title, rows in (
        ("`POST /v1/completions`", COMPLETION_PARAMETERS),
        ("`POST /v1/chat/completions`", CHAT_PARAMETERS),
        ("vLLM's parameters, completions (`extra_body`)", COMPLETION_EXTRA),
        ("vLLM's parameters, chat (`extra_body`)", CHAT_EXTRA),
    ):
        parts.append(f"\n## {title}\n\n| parameter | handling | remarks |\n|---|---|---|\n")
        for row in rows:
            remark = row.note
            if row.handling is Handling.NEUTRAL and row.neutral:
                remark += "; neutral: " + ", ".join(f"`{_spell(v)}`" for v in row.neutral)
            parts.append(f"| `{row.name}` | {row.handling} | {remark} |\n")
    return "".join(parts)


_HEAD = """# OpenAI's parameters, one by one

Every parameter of OpenAI's completions and chat completions is **used**, **accepted when neutral**
(it asks for nothing that Weft would do otherwise), or **refused** by name with status 400 and code
`unsupported_parameter`. `null` counts as not given for every parameter below. Keys that are in no
table, `null` or not, are 400 with code `unknown_parameter`; with `--allow-unknown-params` they are
ignored with a warning in the log. Values outside their range or of the wrong type are 400, and
`param` names them.
"""
