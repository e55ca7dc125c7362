"""What the executor remembers of each running sequence, as columns indexed by slot.

Shape legend: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.engine.batch import Int32, Int64, SequenceStart
from weft.engine.sampling import uniforms
from weft.runtime.transfer import upload

_NO_LOGPROBS = -1
_DRAWS_AHEAD = 64
_NOT_DRAWN = -(1 << 40)


class PenaltyPool:
    """How often each token stands in a sequence, for the sequences that pay penalties.

    A row is [V] counts of the output and [V] marks of the prompt; rows are made on demand, as
    few sequences ask for penalties and a vocabulary is long.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._free: list[int] = []
        self.output_counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)

    def take(self, prompt: Int32, output: Int32) -> int:
        """Claim a row and fill it."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        counts = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        marks = np.bincount(prompt, minlength=self._vocab_size) > 0
        self.output_counts[row] = upload(counts, self._device)
        self.in_prompt[row] = upload(marks, self._device)
        return row

    def give_back(self, row: int) -> None:
        """Release a row."""
        self._free.append(row)

    def _grow(self) -> None:
        have = self.output_counts.shape[0]
        more = max(4, have)
        self.output_counts = torch.cat(
            (self.output_counts, self.output_counts.new_zeros((more, self._vocab_size)))
        )
        self.in_prompt = torch.cat(
            (self.in_prompt, self.in_prompt.new_zeros((more, self._vocab_size)))
        )
        self._free.extend(range(have, have + more))


class PenalisedRows(Protocol):
    """The sampled rows whose sequences pay penalties."""

    @property
    def rows(self) -> Tensor:
        """[p] int64 rows of the sample."""
        ...

    @property
    def pool_rows(self) -> Tensor:
        """[p] int64 rows of the penalty pool."""
        ...


class SlotTable:
    """Sampling parameters by slot on the host; the last token of each slot on the device."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.last_token = torch.zeros(num_slots, dtype=torch.int32, device=device)
        """[slots] what the latest batch sampled."""
        self.penalty_pool = PenaltyPool(vocab_size, device)
        self.temperature = np.ones(num_slots)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots)
        self.min_p = np.zeros(num_slots)
        self.repetition = np.ones(num_slots)
        self.presence = np.zeros(num_slots)
        self.frequency = np.zeros(num_slots)
        self.seed = np.zeros(num_slots, np.uint64)
        self.choice = np.zeros(num_slots, np.int64)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.min_tokens = np.zeros(num_slots, np.int64)
        self.num_logprobs = np.full(num_slots, _NO_LOGPROBS, np.int64)
        """-1 where the sequence did not ask."""
        self.num_prompt_logprobs = np.full(num_slots, _NO_LOGPROBS, np.int64)
        self.penalty_row = np.full(num_slots, -1, np.int64)
        self.edits_scores = np.zeros(num_slots, np.bool_)
        """Whether anything changes the sequence's scores before a token is chosen."""
        self.is_special = np.zeros(num_slots, np.bool_)
        """Whether sampling takes more than the likeliest token of the raw logits."""
        self._draws = np.zeros((num_slots, _DRAWS_AHEAD))
        self._draws_begin = np.full(num_slots, _NOT_DRAWN, np.int64)
        self.prompt: list[Int32] = [np.empty(0, np.int32)] * num_slots
        self.bans: list[npt.NDArray[np.int64] | None] = [None] * num_slots
        self.bias: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None]
        self.bias = [None] * num_slots

    def apply(self, freed: Int32, starts: Sequence[SequenceStart]) -> None:
        """Forget freed slots, then take the sequences that start."""
        for slot in freed.tolist():
            self._free(slot)
        for start in starts:
            self._start(start)

    def uniforms_at(self, slots: Int32, positions: Int64) -> npt.NDArray[np.float64]:
        """The random number [C] of each sequence's token at its position.

        Many positions cost as much to draw as one, so a few are drawn ahead; being a function of
        (seed, choice, position) alone, they are the same whenever they are drawn.
        """
        index = positions - self._draws_begin[slots]
        stale = np.flatnonzero((index < 0) | (index >= _DRAWS_AHEAD))
        if len(stale):
            late = slots[stale]
            ahead = (positions[stale, None] + np.arange(_DRAWS_AHEAD)).ravel()
            drawn = uniforms(
                np.repeat(self.seed[late], _DRAWS_AHEAD),
                np.repeat(self.choice[late], _DRAWS_AHEAD),
                ahead,
            )
            self._draws[late] = drawn.reshape(-1, _DRAWS_AHEAD)
            self._draws_begin[late] = positions[stale]
            index[stale] = 0
        return self._draws[slots, index]

    def _free(self, slot: int) -> None:
        row = int(self.penalty_row[slot])
        if row >= 0:
            self.penalty_pool.give_back(row)
            self.penalty_row[slot] = -1

    def _start(self, start: SequenceStart) -> None:
        slot, params = start.slot, start.sampling
        self._free(slot)
        self.temperature[slot] = 0.0 if params.is_greedy else params.temperature
        self.top_k[slot] = max(params.top_k, 0)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.seed[slot] = start.seed
        self.choice[slot] = start.choice
        self.num_prompt[slot] = start.num_prompt_tokens
        self.num_logprobs[slot] = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        wanted = params.prompt_logprobs
        self.num_prompt_logprobs[slot] = _NO_LOGPROBS if wanted is None else wanted
        prompt = start.token_ids[: start.num_prompt_tokens]
        self.prompt[slot] = prompt
        has_bans = params.min_tokens > 0 and bool(start.banned_until_min_tokens)
        self.min_tokens[slot] = params.min_tokens if has_bans else 0
        self.bans[slot] = np.array(start.banned_until_min_tokens, np.int64) if has_bans else None
        self.bias[slot] = None
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int64)
            self.bias[slot] = (ids, np.fromiter(params.logit_bias.values(), np.float64))
        if params.has_penalties:
            output = start.token_ids[start.num_prompt_tokens :]
            self.penalty_row[slot] = self.penalty_pool.take(prompt, output)
        edits = params.has_penalties or has_bans or bool(params.logit_bias)
        self.edits_scores[slot] = edits
        self.is_special[slot] = edits or not params.is_greedy or params.logprobs is not None
        self._draws_begin[slot] = _NOT_DRAWN

    def record(self, slots: Int32, tokens: Tensor, paying: PenalisedRows | None) -> None:
        """Remember what was sampled: tokens [S] int32 of slots [S]."""
        if tokens.device.type == "cpu":
            self.last_token.numpy()[slots] = tokens.numpy()
        else:
            self.last_token[upload(slots, tokens.device)] = tokens
        if paying is not None:
            picked = tokens[paying.rows].long()
            ones = torch.ones_like(picked, dtype=torch.int32)
            counts = self.penalty_pool.output_counts
            counts.index_put_((paying.pool_rows, picked), ones, accumulate=True)
