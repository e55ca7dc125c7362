"""The engine's executor on one real device.

Shape legend: T tokens, S sampled rows, M rows that need logits, K tokens a row, N likeliest tokens.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.base.errors import IntegrityError
from weft.engine.batch import (
    AdapterRef,
    Batch,
    ExecutorInfo,
    PromptLogprobs,
    SampledLogprobs,
    StepResult,
)
from weft.model.forward_step import BypassStep
from weft.runtime.adapter_store import AdapterStore
from weft.runtime.bypass_replay import record_bypasses
from weft.runtime.decode_replay import record_decodes
from weft.runtime.device_context import DeviceContext
from weft.runtime.finetune_jobs import FinetuneJobs, PendingOutcome
from weft.runtime.sampler import RankedLogprobs, rank, sample
from weft.runtime.sampling_plan import plan_sampling
from weft.runtime.slots import SlotTable
from weft.runtime.step_builder import build_step, check_batch
from weft.runtime.transfer import Download, upload

_NOTHING_SAMPLED = {"tokens": np.empty(0, np.int32), "is_ok": np.empty(0, np.bool_)}
_MAX_PROMPT_LOGITS = 1 << 26
"""Elements of prompt logits held at once; longer chunks are ranked piece by piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PromptRanks:
    row: int
    begin: int
    ranked: Download


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    batch_id: int
    num_samples: int
    sampled: Download | None
    logprob_rows: npt.NDArray[np.int64] | None
    prompt_ranks: tuple[_PromptRanks, ...]
    finetune: PendingOutcome | None
    elapsed_s: float


class TorchExecutor:
    """Runs batches on the weights and pages of a `DeviceContext`.

    On the CPU a batch is done when `submit` returns; on CUDA it is enqueued, and nothing before
    `collect` waits for the device.
    """

    def __init__(
        self,
        context: DeviceContext,
        *,
        max_num_seqs: int,
        max_finetune_samples: int = 0,
        replays_decodes: bool = True,
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
            max_finetune_samples=max_finetune_samples,
        )
        self._adapters = AdapterStore(context)
        self._jobs = FinetuneJobs(context, publish=self._adapters.put)
        self._slots = SlotTable(max_num_seqs, context.config.vocab_size, context.device)
        self._replay = record_decodes(context, max_num_seqs) if replays_decodes else None
        self._bypass_replays = record_bypasses(context, max_num_seqs) if replays_decodes else None
        self._pending: deque[_Pending] = deque()
        self._is_closed = False
        self.num_replayed = 0
        """Iterations that ran as one recorded launch."""

    @property
    def info(self) -> ExecutorInfo:
        return self._info

    @property
    def adapters(self) -> AdapterStore:
        """The adapters that batches may name."""
        return self._adapters

    @property
    def max_in_flight(self) -> int:
        return 1 if self._context.device.type == "cpu" else 2

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        if self._is_closed:
            raise IntegrityError("submit() on a closed executor")
        start_s = time.perf_counter()
        holds_samples = self._info.max_finetune_samples > 0
        check_batch(batch, self._info.num_layers, holds_samples=holds_samples)
        self._slots.apply(batch.freed_slots, batch.starts)
        self._move_pages(batch)
        work = batch.finetune
        if work is not None:
            self._jobs.begin(work)
            if work.is_backward_first:
                self._jobs.backward(batch)
        prompt_ranks: tuple[_PromptRanks, ...] = ()
        bypass = self._adapters.bypass(batch)
        logits = self._run_recorded(batch, bypass)
        if logits is None and batch.num_tokens:  # Else backward rows and commands only.
            hidden = self._forward(batch, bypass)
            prompt_ranks = self._rank_prompts(batch, hidden)
            logits = self._last_logits(batch, hidden)
        sampled, logprob_rows = self._sample(batch, logits)
        finetune = None
        if work is not None:
            if not work.is_backward_first:
                self._jobs.backward(batch)
            finetune = self._jobs.end(work, has_inference=batch.num_tokens > 0)
        self._pending.append(
            _Pending(
                batch_id=batch.batch_id,
                num_samples=len(batch.sample_rows),
                sampled=sampled,
                logprob_rows=logprob_rows,
                prompt_ranks=prompt_ranks,
                finetune=finetune,
                elapsed_s=time.perf_counter() - start_s,
            )
        )

    def collect(self) -> StepResult:
        if not self._pending:
            raise IntegrityError("collect() without a submitted batch")
        start_s = time.perf_counter()
        pending = self._pending.popleft()
        sampled = pending.sampled.wait() if pending.sampled is not None else _NOTHING_SAMPLED
        finetune = None if pending.finetune is None else self._jobs.collect(pending.finetune)
        return StepResult(
            batch_id=pending.batch_id,
            tokens=sampled["tokens"][:, None],
            num_tokens=sampled["is_ok"].astype(np.int32),
            logprobs=_sampled_logprobs(sampled, pending),
            prompt_logprobs=tuple(_prompt_logprobs(ranks) for ranks in pending.prompt_ranks),
            finetune=finetune,
            elapsed_s=pending.elapsed_s + time.perf_counter() - start_s,
        )

    def load_adapter(self, ref: AdapterRef, path: str) -> None:
        """Read an adapter directory; raises as `AdapterStore.load`."""
        self._adapters.load(ref, path)

    def unload_adapter(self, ref: AdapterRef) -> None:
        """Forget a version that no batch will name any more."""
        self._adapters.unload(ref)

    def has_adapter(self, ref: AdapterRef) -> bool:
        """Whether batches may name a version."""
        return ref in self._adapters.refs

    def settle_job(self, job_id: str) -> None:
        """Wait until nothing of a job is being written."""
        self._jobs.settle(job_id)

    def abandon(self) -> None:
        self._pending.clear()

    def close(self) -> None:
        self._pending.clear()
        self._jobs.close()
        self._replay = self._bypass_replays = None
        self._is_closed = True

    def _move_pages(self, batch: Batch) -> None:
        if len(batch.page_moves):
            moves = upload(batch.page_moves, self._context.device)
            self._context.arena[moves[:, 1]] = self._context.arena[moves[:, 0]]

    def _run_recorded(self, batch: Batch, bypass: BypassStep | None) -> Tensor | None:
        """Logits [S, V] by a recorded launch; None where none covers the batch."""
        logits = None
        if bypass is None:
            if self._replay is not None and self._replay.covers(batch):
                logits = self._replay.run(batch, self._slots.last_token)
        elif self._bypass_replays is not None:
            logits = self._bypass_replays.run(batch, bypass, self._slots.last_token)
        self.num_replayed += logits is not None
        return logits

    def _forward(self, batch: Batch, bypass: BypassStep | None) -> Tensor:
        """Hidden states [T, hidden] behind the last layer; writes the tokens' keys and values."""
        decoder = self._context.decoder
        step = build_step(batch, self._context, self._slots.last_token, bypass)
        hidden = decoder.embed(step.token_ids)
        if batch.finetune is None:
            return decoder.forward(hidden, step, self._context.kv)
        part = self._jobs.forward_part(batch)
        if part.groups:
            served = step.bypass or BypassStep(groups=())
            bypass = replace(served, groups=(*served.groups, *part.groups))
            step = replace(step, bypass=bypass)
        hidden = decoder.forward(hidden, step, self._context.kv, taps=part.taps)
        self._jobs.take_hidden(hidden)
        return hidden

    def _last_logits(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """Logits [S, V] behind the last token of every sampled row."""
        if not len(batch.sample_rows):
            return None
        last = batch.row_starts[batch.sample_rows + 1] - 1
        if len(last) != hidden.shape[0]:
            hidden = hidden[upload(last, hidden.device)]
        return self._context.decoder.logits(hidden)

    def _sample(
        self, batch: Batch, logits: Tensor | None
    ) -> tuple[Download | None, npt.NDArray[np.int64] | None]:
        if logits is None:
            return None, None
        device = self._context.device
        plan = plan_sampling(batch, self._slots, device)
        sampled = sample(logits, plan)
        paying = None if plan.edits is None else plan.edits.penalties
        self._slots.record(batch.slots[batch.sample_rows], sampled.tokens, paying)
        found = {"tokens": sampled.tokens, "is_ok": sampled.is_ok}
        if sampled.logprobs is not None:
            found |= sampled.logprobs.columns()
        return Download(found), plan.logprob_rows

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
            wanted = upload(prompt[begin : begin + num], self._context.device)
            num_top = max(0, int(self._slots.num_prompt_logprobs[slot]))
            ranked = self._rank_pieces(hidden[first : first + num], wanted, num_top)
            found.append(_PromptRanks(row=row, begin=begin, ranked=Download(ranked.columns())))
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


def _sampled_logprobs(sampled: dict[str, np.ndarray], pending: _Pending) -> SampledLogprobs | None:
    rows = pending.logprob_rows
    if rows is None:
        return None
    num_rows, num_top = pending.num_samples, sampled["top"].shape[1]
    chosen = np.full((num_rows, 1), np.nan, np.float32)
    ranks = np.zeros((num_rows, 1), np.int32)
    top_ids = np.zeros((num_rows, 1, num_top), np.int32)
    top = np.full((num_rows, 1, num_top), np.nan, np.float32)
    chosen[rows, 0] = sampled["chosen"]
    ranks[rows, 0] = sampled["ranks"]
    top_ids[rows, 0] = sampled["top_ids"]
    top[rows, 0] = sampled["top"]
    return SampledLogprobs(chosen=chosen, ranks=ranks, top_ids=top_ids, top=top)


def _prompt_logprobs(ranks: _PromptRanks) -> PromptLogprobs:
    found = ranks.ranked.wait()
    return PromptLogprobs(
        row=ranks.row,
        begin=ranks.begin,
        chosen=found["chosen"].astype(np.float32),
        ranks=found["ranks"].astype(np.int32),
        top_ids=found["top_ids"].astype(np.int32),
        top=found["top"].astype(np.float32),
    )
