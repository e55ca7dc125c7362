"""From logits to tokens, for all rows of an iteration at once.

Every number of a row is computed from that row alone and in a fixed order, so that a token does not
depend on what else is in the batch. Draws take the inverse of the cumulative distribution in the
order of token ids at a number in [0, 1) that is a pure function of (seed, choice, position).

Shape legend: S sampled rows, V vocabulary, N likeliest tokens reported, C rows of a subset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.runtime.sampling_plan import DrawRows, PenaltyRows, SamplingPlan, ScoreEdits
from weft.runtime.transfer import upload

_CACHED_SCORES = 1 << 16
"""Scores worked on at once on a CPU: more would fall out of its cache between two operations."""
_SHORT_VOCABULARY = 4096
_NUMPY_DTYPES = (torch.float32, torch.float64)
_DRAW_BLOCK = 64
"""Tokens whose sum is searched before the tokens themselves."""


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
    if plan.is_plain and logits.device.type == "cpu" and logits.dtype in _NUMPY_DTYPES:
        return _take_likeliest(logits)
    best = logits.max(dim=-1)
    if plan.is_plain:
        return _checked(best.values, best.indices)
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
        tokens[plan.draws.rows] = draw(scores, plan.draws)
    sampled = _checked(best_values, tokens)
    if plan.logprob_rows is None:
        return sampled
    rows = upload(plan.logprob_rows, wide.device)
    logprobs = rank(wide[rows], sampled.tokens[rows], plan.num_top_logprobs)
    return Sampled(tokens=sampled.tokens, is_ok=sampled.is_ok, logprobs=logprobs)


def _take_likeliest(logits: Tensor) -> Sampled:
    """The greedy choice by NumPy, whose few calls cost a fraction of torch's."""
    scores = logits.numpy()
    tokens = scores.argmax(axis=-1)
    is_ok = np.isfinite(scores[np.arange(len(tokens)), tokens])
    return Sampled(
        tokens=torch.from_numpy((tokens * is_ok).astype(np.int32)),
        is_ok=torch.from_numpy(is_ok),
        logprobs=None,
    )


def _checked(best: Tensor, tokens: Tensor) -> Sampled:
    is_ok = best.isfinite()
    return Sampled(tokens=torch.where(is_ok, tokens, 0).int(), is_ok=is_ok, logprobs=None)


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
        for part in row_blocks(edits.penalties.rows, scores.shape[1]):
            rows = edits.penalties.rows[part]
            scores[rows] = _penalise(scores[rows], edits.penalties, part)
    return scores


def row_blocks(rows: Tensor, vocab_size: int) -> list[slice]:
    """Cut `rows` [C]: on the CPU into blocks whose scores stay in the cache, else not at all."""
    num_rows = rows.shape[0]
    size = max(1, _CACHED_SCORES // vocab_size) if rows.device.type == "cpu" else num_rows
    return [slice(begin, begin + size) for begin in range(0, num_rows, size)]


def _unpack_bits(masks: Tensor, vocab_size: int) -> Tensor:
    """[S, W] int32 words, lowest bit first, to [S, V] bool."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def _penalise(scores: Tensor, penalties: PenaltyRows, part: slice) -> Tensor:
    """Repetition (CTRL, Keskar et al., 2019), then frequency and presence (OpenAI)."""
    counts = penalties.output_counts[penalties.pool_rows[part]]
    in_prompt = penalties.in_prompt[penalties.pool_rows[part]]
    repetition, presence, frequency = (
        values[part].to(scores.dtype)[:, None]
        for values in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    in_output = counts > 0
    pushed = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(in_prompt | in_output, pushed, scores)
    return scores - frequency * counts - presence * in_output


def draw(scores: Tensor, draws: DrawRows) -> Tensor:
    """Draw one token for each of `draws.rows` of scores [S, V]: int64 [C]."""
    blocks = row_blocks(draws.rows, scores.shape[1])
    drawn = [_draw_block(scores[draws.rows[part]], draws.part(part)) for part in blocks]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def _draw_block(scores: Tensor, draws: DrawRows) -> Tensor:
    shares = torch.softmax(scores / draws.temperature.to(scores.dtype)[:, None], dim=-1)
    if draws.has_min_p:
        least = draws.min_p.to(shares.dtype)[:, None] * shares.amax(dim=-1, keepdim=True)
        shares = shares.masked_fill_(shares < least, 0)
    if not draws.has_cuts:
        return _invert(shares, draws.uniforms)
    return _invert(_cut(shares, draws), draws.uniforms)


def _cut(shares: Tensor, draws: DrawRows) -> Tensor:
    """Set to zero in [C, V] what top_k, then top_p leave out. Equal shares share their fate.

    top_p keeps the smallest set of the likeliest tokens that holds top_p of what top_k left.
    """
    ranked = _falling(shares)
    last = (draws.top_k[:, None] - 1).clamp_(0, ranked.shape[1] - 1)
    floor = torch.where(draws.top_k[:, None] > 0, ranked.gather(1, last), 0)
    if draws.has_top_p:
        mass = ranked.masked_fill(ranked < floor, 0).double()
        reached = mass.cumsum(dim=-1)
        is_kept = reached - mass < draws.top_p[:, None] * reached[:, -1:]
        last = is_kept.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
        nucleus = torch.maximum(floor, ranked.gather(1, last))
        floor = torch.where(draws.top_p[:, None] < 1, nucleus, floor)
    return shares.masked_fill(shares < floor, 0)


def _falling(shares: Tensor) -> Tensor:
    """Every row sorted, the greatest first."""
    if shares.device.type == "cpu":
        # NumPy sorts with vector instructions, thirty times as fast as torch.
        return torch.from_numpy(np.sort(shares.numpy(), axis=-1)).flip(-1)
    return shares.sort(dim=-1, descending=True).values


def _invert(shares: Tensor, uniforms: Tensor) -> Tensor:
    """The token [C] at which the running sum of shares [C, V] passes u times their sum."""
    vocab_size = shares.shape[1]
    if vocab_size <= _SHORT_VOCABULARY:
        running = shares.double().cumsum(dim=-1)
        return _first_beyond(running, _share_of_last(running, uniforms[:, None]))[:, 0]
    # First the block of tokens, then the token: a running sum of all of them is slow to take.
    padded = torch.nn.functional.pad(shares, (0, -vocab_size % _DRAW_BLOCK))
    blocks = padded.unflatten(1, (-1, _DRAW_BLOCK))
    sums = blocks.double().sum(dim=-1)
    running = sums.cumsum(dim=-1)
    target = _share_of_last(running, uniforms[:, None])
    block = _first_beyond(running, target)
    rest = target - (running.gather(1, block) - sums.gather(1, block))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _DRAW_BLOCK))[:, 0]
    within = inside.double().cumsum(dim=-1)
    rest = _share_of_last(within, (rest / within[:, -1:]).clamp_(min=0))
    token = _first_beyond(within, rest)
    return (block * _DRAW_BLOCK + token)[:, 0].clamp_(max=vocab_size - 1)


def _share_of_last(running: Tensor, shares: Tensor) -> Tensor:
    """`shares` [C, 1] of the last of the running sums [C, n]; rounding never makes it the last."""
    last = running[:, -1:]
    return torch.minimum(shares * last, last.nextafter(last.new_zeros(1)))


def _first_beyond(running: Tensor, target: Tensor) -> Tensor:
    """Index [C, 1] of the first running sum [C, n] beyond the target [C, 1]."""
    found = torch.searchsorted(running, target, right=True)
    return found.clamp_(max=running.shape[1] - 1)


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
