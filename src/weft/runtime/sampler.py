"""From logits to tokens, for all rows of an iteration at once.

Every number of a row is computed from that row alone and in a fixed order, so that a token does not
depend on what else is in the batch. Draws take the inverse of the cumulative distribution in the
order of token ids, at a number in [0, 1) that is a pure function of (seed, choice, position).

Shape legend: S sampled rows, V vocabulary, N likeliest tokens reported, C rows of a subset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.runtime.sampling_plan import DrawRows, PenaltyRows, SamplingPlan, ScoreEdits
from weft.runtime.transfer import upload

_FIRST_SORTED = 128
"""Candidates looked at first for top_p; all are sorted only where these are not enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedLogprobs:
    """Log-probabilities of one token a row under the model's own distribution."""

    chosen: Tensor
    """[C]."""
    ranks: Tensor
    """[C] 1 for the likeliest."""
    top_ids: Tensor
    """[C, N] likeliest first."""
    top: Tensor
    """[C, N]."""

    def columns(self) -> dict[str, Tensor]:
        """The tensors by their names here."""
        return {
            "chosen": self.chosen,
            "ranks": self.ranks,
            "top_ids": self.top_ids,
            "top": self.top,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What `sample` chose."""

    tokens: Tensor
    """[S] int32; 0 where not ok."""
    is_ok: Tensor
    """[S] bool: the row had a finite likeliest token."""
    logprobs: RankedLogprobs | None
    """Of `SamplingPlan.logprob_rows`."""


def sample(logits: Tensor, plan: SamplingPlan) -> Sampled:
    """Choose one token for each row of logits [S, V]."""
    best = logits.max(dim=-1)
    if plan.is_plain:
        return _checked(best.values, best.indices, None)
    wide = logits if logits.dtype is torch.float64 else logits.float()
    best_values, tokens = best.values, best.indices
    if plan.edits is not None:
        scores = edit_scores(wide, plan.edits)
        edited = scores.max(dim=-1)
        # A NaN in the raw logits must not hide behind a ban.
        best_values, tokens = best.values + edited.values, edited.indices
    else:
        scores = wide
    if plan.draws is not None:
        tokens[plan.draws.rows] = draw(scores[plan.draws.rows], plan.draws)
    sampled = _checked(best_values, tokens, None)
    if plan.logprob_rows is None:
        return sampled
    rows = upload(plan.logprob_rows, wide.device)
    logprobs = rank(wide[rows], sampled.tokens[rows], plan.num_top_logprobs)
    return Sampled(tokens=sampled.tokens, is_ok=sampled.is_ok, logprobs=logprobs)


def _checked(best: Tensor, tokens: Tensor, logprobs: RankedLogprobs | None) -> Sampled:
    is_ok = best.isfinite()
    return Sampled(tokens=torch.where(is_ok, tokens, 0).int(), is_ok=is_ok, logprobs=logprobs)


def edit_scores(logits: Tensor, edits: ScoreEdits) -> Tensor:
    """Apply masks, bans, biases and penalties, in this order, to a copy of logits [S, V]."""
    scores = logits.clone()
    if edits.masks is not None:
        scores.masked_fill_(~_unpack_bits(edits.masks, scores.shape[1]), -math.inf)
    if edits.banned is not None:
        scores[edits.banned[0], edits.banned[1]] = -math.inf
    if edits.biased is not None and edits.biases is not None:
        biases = edits.biases.to(scores.dtype)
        scores.index_put_((edits.biased[0], edits.biased[1]), biases, accumulate=True)
    if edits.penalties is not None:
        rows = edits.penalties.rows
        scores[rows] = _penalise(scores[rows], edits.penalties)
    return scores


def _unpack_bits(masks: Tensor, vocab_size: int) -> Tensor:
    """[S, W] int32 words, lowest bit first, to [S, V] bool."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def _penalise(scores: Tensor, penalties: PenaltyRows) -> Tensor:
    """Repetition (CTRL, Keskar et al., 2019), then frequency and presence (OpenAI)."""
    counts = penalties.output_counts
    repetition, presence, frequency = (
        values.to(scores.dtype)[:, None]
        for values in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    pushed = torch.where(scores > 0, scores / repetition, scores * repetition)
    seen = (counts > 0) | penalties.in_prompt
    scores = torch.where(seen, pushed, scores)
    return scores - frequency * counts - presence * (counts > 0)


def draw(scores: Tensor, draws: DrawRows) -> Tensor:
    """Draw one token for each row of scores [C, V]: int64 [C]."""
    scores = scores / draws.temperature.to(scores.dtype)[:, None]
    top = scores.amax(dim=-1, keepdim=True)
    floor = top + draws.log_min_p.to(scores.dtype)[:, None]
    if draws.has_cuts:
        scores = scores.masked_fill(scores < floor, -math.inf)
        floor = cut_floor(scores, top, draws)
    weights = torch.exp(scores - top).masked_fill_(scores < floor, 0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Rounding must not push the target to the total: no token lies beyond it.
    target = torch.minimum(draws.uniforms[:, None] * total, total.nextafter(total.new_zeros(1)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=scores.shape[1] - 1)


def cut_floor(scores: Tensor, top: Tensor, draws: DrawRows) -> Tensor:
    """The least score that top_k, then top_p keep: [C, 1]. Equal scores share their fate.

    `top` [C, 1] is each row's greatest score. top_p keeps the smallest set of the likeliest tokens
    whose share of what top_k left reaches top_p.
    """
    vocab_size = scores.shape[1]
    bound = vocab_size if draws.needs_full_sort else min(vocab_size, draws.max_top_k)
    if draws.has_top_p and not draws.needs_full_sort:
        bound = min(vocab_size, max(bound, _FIRST_SORTED))
    ranked = scores.topk(bound, dim=-1).values
    kth = ranked.gather(1, (draws.top_k[:, None] - 1).clamp(0, bound - 1))
    floor = torch.where(draws.top_k[:, None] > 0, kth, -math.inf)
    if not draws.has_top_p:
        return floor
    kept = torch.exp(scores - top).masked_fill_(scores < floor, 0)
    goal = draws.top_p[:, None] * kept.cumsum(dim=-1, dtype=torch.float64)[:, -1:]
    mass = torch.exp(ranked - top).masked_fill_(ranked < floor, 0).double()
    reached = mass.cumsum(dim=-1)
    if bound < vocab_size and bool((reached[:, -1:] < goal).any()):
        ranked = scores.sort(dim=-1, descending=True).values
        mass = torch.exp(ranked - top).masked_fill_(ranked < floor, 0).double()
        reached = mass.cumsum(dim=-1)
    num_kept = (reached - mass < goal).sum(dim=-1, keepdim=True).clamp_(min=1)
    nucleus = ranked.gather(1, num_kept - 1)
    return torch.where(draws.top_p[:, None] < 1, torch.maximum(floor, nucleus), floor)


def rank(logits: Tensor, tokens: Tensor, num_top: int) -> RankedLogprobs:
    """Log-probability and rank of tokens [C] under logits [C, V], and the likeliest tokens."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    norm = wide.logsumexp(dim=-1, keepdim=True)
    score = wide.gather(1, tokens.long()[:, None])
    top = wide.topk(min(num_top, wide.shape[1]), dim=-1)
    return RankedLogprobs(
        chosen=(score - norm)[:, 0],
        ranks=(wide > score).sum(dim=-1) + 1,
        top_ids=top.indices,
        top=top.values - norm,
    )
