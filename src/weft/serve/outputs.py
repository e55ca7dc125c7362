"""What generation gives back, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass

from weft.engine.request import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int
    """1 for the likeliest."""
    decoded_token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One choice of one request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """The token that stopped it included."""
    cumulative_logprob: float | None
    """Sum over the sampled tokens; None where no logprobs were asked for."""
    logprobs: tuple[dict[int, Logprob], ...] | None
    """One dictionary a token: the sampled one and the likeliest; None where not asked for."""
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    """The stop string or stop token that ended it; None for EOS and for length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A request and all its choices."""

    request_id: str
    prompt: str | None
    """The text as it was given; None for a prompt of token ids."""
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    """One entry a prompt token, None for the first; None where not asked for."""
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    """Prompt tokens whose keys and values were found in the prefix cache."""
    finished: bool = True
