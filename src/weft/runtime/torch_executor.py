"""The engine's executor on one real device.

Shape legend: T tokens, S sampled rows, M rows that need logits, K tokens a row, N likeliest tokens.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.base.errors import IntegrityError
from weft.engine.batch import (
    Batch,
    ExecutorInfo,
    PromptLogprobs,
    SampledLogprobs,
    StepResult,
)
from weft.runtime.decode_replay import record_decodes
from weft.runtime.device_context import DeviceContext
from weft.runtime.sampler import RankedLogprobs, Sampled, rank, sample
from weft.runtime.sampling_plan import plan_sampling
from weft.runtime.slots import SlotTable
from weft.runtime.step_builder import build_step, check_batch

_MAX_PROMPT_LOGITS = 1 << 26
"""Elements of prompt logits held at once; longer chunks are ranked piece by piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PromptRanks:
    row: int
    begin: int
    ranked: RankedLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    batch: Batch
    sampled: Sampled | None
    logprob_rows: Tensor | None
    prompt_ranks: tuple[_PromptRanks, ...]
    elapsed_s: float


class TorchExecutor:
    """Runs batches on the weights and pages of a `DeviceContext`.

    On the CPU a batch is done when `submit` returns; on CUDA it is enqueued, and nothing before
    `collect` waits for the device.
    """

    def __init__(
        self, context: DeviceContext, *, max_num_seqs: int, replays_decodes: bool = True
    ) -> None:
        """`replays_decodes` records iterations of decodes only where the device can."""
        self._context = context
        self._info = ExecutorInfo(
            num_pages=context.num_pages,
            page_bytes=context.layout.page_bytes,
            groups=context.layout.groups,
            num_layers=context.config.num_layers,
            vocab_size=context.config.vocab_size,
            max_num_seqs=max_num_seqs,
        )
        self._slots = SlotTable(max_num_seqs, context.config.vocab_size, context.device)
        self._replay = record_decodes(context, max_num_seqs) if replays_decodes else None
        self._pending: deque[_Pending] = deque()
        self._is_closed = False
        self.num_replayed = 0
        """Iterations that ran as one recorded launch."""

    @property
    def info(self) -> ExecutorInfo:
        return self._info

    @property
    def max_in_flight(self) -> int:
        return 1 if self._context.device.type == "cpu" else 2

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        if self._is_closed:
            raise IntegrityError("submit() on a closed executor")
        start_s = time.perf_counter()
        check_batch(batch, self._info.num_layers)
        self._slots.apply(batch.freed_slots, batch.starts)
        self._move_pages(batch)
        prompt_ranks: tuple[_PromptRanks, ...] = ()
        if self._replay is not None and self._replay.covers(batch):
            logits = self._replay.run(batch, self._slots.last_token)
            self.num_replayed += 1
        else:
            hidden = self._forward(batch)
            prompt_ranks = self._rank_prompts(batch, hidden)
            logits = self._last_logits(batch, hidden)
        sampled, logprob_rows = self._sample(batch, logits)
        self._pending.append(
            _Pending(
                batch=batch,
                sampled=sampled,
                logprob_rows=logprob_rows,
                prompt_ranks=prompt_ranks,
                elapsed_s=time.perf_counter() - start_s,
            )
        )

    def collect(self) -> StepResult:
        if not self._pending:
            raise IntegrityError("collect() without a submitted batch")
        start_s = time.perf_counter()
        pending = self._pending.popleft()
        tokens, num_tokens = _host_tokens(pending.sampled)
        logprobs = _host_logprobs(pending, len(tokens))
        prompt_logprobs = tuple(_host_prompt_logprobs(ranks) for ranks in pending.prompt_ranks)
        return StepResult(
            batch_id=pending.batch.batch_id,
            tokens=tokens,
            num_tokens=num_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            elapsed_s=pending.elapsed_s + time.perf_counter() - start_s,
        )

    def close(self) -> None:
        self._pending.clear()
        self._is_closed = True

    def _move_pages(self, batch: Batch) -> None:
        if len(batch.page_moves):
            moves = torch.from_numpy(batch.page_moves).to(self._context.device)
            self._context.arena[moves[:, 1]] = self._context.arena[moves[:, 0]]

    def _forward(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden] behind the last layer; writes the tokens' keys and values."""
        decoder = self._context.decoder
        step = build_step(batch, self._context, self._slots.last_token)
        return decoder.forward(decoder.embed(step.token_ids), step, self._context.kv)

    def _last_logits(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """Logits [S, V] behind the last token of every sampled row."""
        if not len(batch.sample_rows):
            return None
        last = batch.row_starts[batch.sample_rows + 1] - 1
        if len(last) != hidden.shape[0]:
            hidden = hidden[torch.from_numpy(last).to(hidden.device)]
        return self._context.decoder.logits(hidden)

    def _sample(self, batch: Batch, logits: Tensor | None) -> tuple[Sampled | None, Tensor | None]:
        if logits is None:
            return None, None
        device = self._context.device
        plan = plan_sampling(batch, self._slots, device)
        sampled = sample(logits, plan)
        slots = torch.from_numpy(batch.slots[batch.sample_rows]).to(device)
        penalties = plan.edits.penalties if plan.edits is not None else None
        self._slots.record(slots, sampled.tokens, None if penalties is None else penalties.rows)
        return sampled, plan.logprob_rows

    def _rank_prompts(self, batch: Batch, hidden: Tensor) -> tuple[_PromptRanks, ...]:
        """Log-probabilities of each asked row's successors within its prompt."""
        found: list[_PromptRanks] = []
        for row in batch.prompt_logprob_rows.tolist():
            slot = int(batch.slots[row])
            prompt = self._slots.prompt[slot]
            first, end = int(batch.row_starts[row]), int(batch.row_starts[row + 1])
            begin = int(batch.positions[first]) + 1
            num = min(end - first, len(prompt) - begin)
            if num <= 0:
                continue
            wanted = torch.from_numpy(prompt[begin : begin + num]).to(self._context.device)
            num_top = max(0, int(self._slots.num_prompt_logprobs[slot]))
            ranked = self._rank_pieces(hidden[first : first + num], wanted, num_top)
            found.append(_PromptRanks(row=row, begin=begin, ranked=ranked))
        return tuple(found)

    def _rank_pieces(self, hidden: Tensor, wanted: Tensor, num_top: int) -> RankedLogprobs:
        size = max(1, _MAX_PROMPT_LOGITS // self._info.vocab_size)
        pieces = [
            rank(self._context.decoder.logits(part), tokens, num_top)
            for part, tokens in zip(hidden.split(size), wanted.split(size), strict=True)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return RankedLogprobs(
            chosen=torch.cat([piece.chosen for piece in pieces]),
            ranks=torch.cat([piece.ranks for piece in pieces]),
            top_ids=torch.cat([piece.top_ids for piece in pieces]),
            top=torch.cat([piece.top for piece in pieces]),
        )


def _host_tokens(sampled: Sampled | None) -> tuple[np.ndarray, np.ndarray]:
    if sampled is None:
        return np.empty((0, 1), np.int32), np.empty(0, np.int32)
    tokens = sampled.tokens.cpu().numpy()[:, None]
    return tokens, sampled.is_ok.cpu().numpy().astype(np.int32)


def _host_logprobs(pending: _Pending, num_rows: int) -> SampledLogprobs | None:
    ranked = pending.sampled.logprobs if pending.sampled is not None else None
    if ranked is None or pending.logprob_rows is None:
        return None
    rows = pending.logprob_rows.cpu().numpy()
    num_top = ranked.top.shape[1]
    chosen = np.full((num_rows, 1), np.nan, np.float32)
    ranks = np.zeros((num_rows, 1), np.int32)
    top_ids = np.zeros((num_rows, 1, num_top), np.int32)
    top = np.full((num_rows, 1, num_top), np.nan, np.float32)
    chosen[rows, 0] = ranked.chosen.cpu().numpy()
    ranks[rows, 0] = ranked.ranks.cpu().numpy()
    top_ids[rows, 0] = ranked.top_ids.cpu().numpy()
    top[rows, 0] = ranked.top.cpu().numpy()
    return SampledLogprobs(chosen=chosen, ranks=ranks, top_ids=top_ids, top=top)


def _host_prompt_logprobs(ranks: _PromptRanks) -> PromptLogprobs:
    ranked = ranks.ranked
    return PromptLogprobs(
        row=ranks.row,
        begin=ranks.begin,
        chosen=ranked.chosen.float().cpu().numpy(),
        ranks=ranked.ranks.int().cpu().numpy(),
        top_ids=ranked.top_ids.int().cpu().numpy(),
        top=ranked.top.float().cpu().numpy(),
    )
