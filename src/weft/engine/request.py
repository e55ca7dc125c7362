"""The nouns above the batch: what a caller asks for and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from weft.engine.batch import AdapterRef
from weft.engine.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"
    """An EOS token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the model's context is full."""
    ABORT = "abort"
    """Cancelled by its caller."""
    ERROR = "error"
    """Its logits were not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt and how to continue it; `sampling.n` choices share the prompt's pages."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Lower runs earlier; ties run in order of arrival."""
    adapter: AdapterRef | None = None
    cache_salt: str = ""
    """Prefix blocks are shared only between equal salts (one a tenant)."""
    arrival_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token, and of the likeliest tokens at its position."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first."""


class SequenceUpdate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """News of one choice of one request from one iteration.

    A msgspec struct, not a dataclass: hundreds are made in every iteration, ten times as fast.
    """

    request_id: str
    choice: int
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token where the request asked; else empty."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """For prompt tokens in order, starting with the second; choice 0 only; over several updates."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that stopped it, where it was not EOS."""
    first_scheduled_s: float = 0.0
    """When the request first left the waiting queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of gauges and counters, for metrics and tests. Counters only grow."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of the arena's pages that running sequences hold, in [0, 1]."""
    prefix_cache_queries: int
    """Prompt tokens looked up."""
    prefix_cache_hits: int
    """Prompt tokens found."""
    num_preemptions: int
    num_finished: int
    num_prompt_tokens: int
    """Prompt tokens of admitted requests."""
    num_generated_tokens: int
    num_chunked_prefills: int
    """Rows that carried only a part of what was left of a prompt."""
