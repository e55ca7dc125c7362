"""Finetuning in the iterations of inference: one policy, several ways to share an iteration.

Inference tokens come first. What finetuning may add is decided by the policy's kind: `coserve`
fills what the latency objectives leave, by predicted time; the others are its baselines.
(FlexLLM, arXiv 2402.18789 §6.2; the sheet's §4 tells what was shipped from what was written.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from weft.base.clock import Clock
from weft.cost.online_step_time import OnlineStepTime
from weft.cost.step_time import IterationShape, StepTimeModel
from weft.engine.batch import Batch, ExecutorInfo, StepResult
from weft.engine.batch_builder import Span
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.finetune import FinetuneEvent, FinetuneJobSpec
from weft.engine.finetune_limits import (
    FinetuneConfig,
    FinetuneMemory,
    FinetunePolicy,
)
from weft.engine.finetune_part import FinetunePart, Room
from weft.engine.head_room import HeadRoom, Unused
from weft.engine.iteration_shape import ShapeCounter, SpanTerms
from weft.engine.job import JobProgress
from weft.engine.jobs import FinetuneJobs, JobSnapshot
from weft.engine.pacing import Pacer, Pending, decode_shape, promised, waiting_prompts
from weft.engine.request import SequenceUpdate
from weft.engine.rooms import CountedRoom, LeastRoom, TimedRoom, WindowRoom
from weft.engine.sequence import Sequence
from weft.engine.temporal import Turns

_MOST_OVERHEAD_S = 0.02
"""A longer pause between iterations is no overhead of the engine."""
_PACED = (FinetunePolicy.COSERVE, FinetunePolicy.TEMPORAL, FinetunePolicy.INFERENCE_ONLY)


@dataclass(kw_only=True, slots=True)
class Outlook:
    """One iteration as it was foreseen, and as it went."""

    shape: IterationShape
    scheduled_s: float
    predicted_s: float
    """Expected, finetuning included."""
    upper_s: float
    """With the residual that is kept free."""
    inference_s: float
    """Expected, without finetuning."""
    budget_s: float
    """What the objectives allow; the policy's bound where nobody waits."""
    is_share_due: bool = False
    """Whether finetuning got its least share, whatever the objectives allow."""
    actual_s: float = math.nan

    @property
    def head_room_s(self) -> float:
        """What the objectives left beside inference; 0 where no job asked."""
        left_s = self.budget_s - self.inference_s
        return left_s if 0 < left_s < math.inf else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneStats:
    """Counters since the start, and the latest iteration's outlook."""

    num_forward_tokens: int
    num_backward_token_layers: int
    num_steps: int
    latest: Outlook | None
    """Of the latest iteration whose result is known."""
    step_time_residual: float
    """Share that is kept free above predictions."""
    head_room_s: float
    """What the objectives left to finetuning in iterations with inference, summed."""
    unused_head_room_s: Mapping[Unused, float]
    """Of that, what nothing was done with, by cause."""


class CoServing(ContinuousBatching):
    """Continuous batching whose iterations also carry finetuning jobs."""

    def __init__(
        self,
        config: PolicyConfig,
        info: ExecutorInfo,
        clock: Clock,
        *,
        finetune: FinetuneConfig | None = None,
        step_time: StepTimeModel | None = None,
        memory: FinetuneMemory | None = None,
    ) -> None:
        """`step_time` is where predictions start; they are refitted to what iterations take.

        Raises:
            OutOfMemoryError: the pages cannot hold one sequence of `max_model_len` tokens.
        """
        self.finetune = finetune = finetune or FinetuneConfig()
        if finetune.policy is FinetunePolicy.BUDGET:
            most = min(config.max_num_batched_tokens, finetune.budget_tokens)
            config = replace(config, max_num_batched_tokens=most)
        super().__init__(config, info, clock)
        longest = self.kv.pages_for(config.max_model_len, config.max_num_batched_tokens)
        self._jobs = FinetuneJobs(
            finetune,
            info,
            self.kv,
            clock,
            max_sample_tokens=config.max_model_len,
            max_pages=self.kv.pool.num_total - longest,
            memory=memory,
        )
        self.slo = slo = promised(finetune, step_time)
        self.step_time = OnlineStepTime(step_time, num_layers=info.num_layers)
        self._terms = SpanTerms(info)
        self._pacer = Pacer(slo, self.step_time, self._terms)
        self._paces = finetune.paces_prompts and finetune.policy in _PACED
        self._counter = ShapeCounter(info)
        self._turns = Turns(finetune, tpot_s=slo.tpot_s)
        self._outlooks: deque[Outlook] = deque()
        self._latest: Outlook | None = None
        self._last_apply_s = math.nan
        self._overhead_s = 0.0
        self._share_debt_s = 0.0
        self._saves_from_s = -math.inf
        """What the running requests left to the latest iteration, if finetuning left it be."""
        self._head_room = HeadRoom()
        self._num_forward_tokens = 0
        self._num_backward_token_layers = 0
        self._num_steps = 0

    # ---- jobs in ----

    def add_job(self, spec: FinetuneJobSpec) -> None:
        """Queue a finetuning job.

        Raises:
            ConfigError: its id is in use, or its settings, samples or target modules cannot be.
            OutOfMemoryError: it would not fit even alone; the message says what would do.
            UnsupportedError: the executor holds no samples.
        """
        self._jobs.add(spec)

    def cancel_job(self, job_id: str) -> bool:
        """End a job now, without publishing; False if it is not here."""
        return self._jobs.cancel(job_id)

    def pause_job(self, job_id: str) -> bool:
        """Let a job stand still with all that it has; False if it is not here."""
        return self._jobs.pause(job_id)

    def resume_job(self, job_id: str) -> bool:
        """Let a paused job go on; False if it is not here."""
        return self._jobs.resume(job_id)

    def jobs(self) -> list[JobProgress]:
        """Jobs that are not ended, in the order in which they came."""
        return self._jobs.progress()

    def take_finetune_events(self) -> list[FinetuneEvent]:
        """What happened to jobs since the last call, in order."""
        return self._jobs.take_events()

    @property
    def has_work(self) -> bool:
        """Whether a request is not finished, a job can advance, or a batch is not collected."""
        return super().has_work or self._jobs_have_work

    @property
    def _jobs_have_work(self) -> bool:
        return self.finetune.policy is not FinetunePolicy.INFERENCE_ONLY and self._jobs.has_work

    # ---- one iteration: out ----

    def schedule(self) -> Batch | None:
        """The next batch, or None if nothing can run before a result is applied."""
        now_s = self._clock.now_s()
        self._measure_overhead(now_s)
        if self._jobs_have_work and self._is_jobs_turn():
            batch = self._schedule_jobs_alone(now_s)
            if batch is not None or self._in_flight:
                return batch
        start_s = max([now_s, *(o.scheduled_s + o.predicted_s for o in self._outlooks)])
        decodes = [s for s in self._running if s.num_remaining == 1]
        pace = self._pacer.pace(decodes, start_s)
        most = self._most_tokens(decodes, pace.prompt_s - self._overhead_s, start_s)
        spans, num_decodes = self._take_inference(most)
        part, outlook = None, None
        if self._jobs_have_work and self.finetune.policy in (
            FinetunePolicy.COSERVE,
            FinetunePolicy.BUDGET,
        ):
            room, outlook = self._room(spans, num_decodes, pace.finetune_s, now_s, start_s)
            part = self._jobs.fill(room, self._num_batches)
            self._saves_from_s = pace.finetune_s if part is None and num_decodes else -math.inf
            if part is None and not (self._by_request or self._in_flight):
                # The least piece is too long for an iteration, and nobody is here to wait for it.
                least = LeastRoom(granule=self.finetune.granule_tokens)
                part = self._jobs.fill(least, self._num_batches)
        if not spans and part is None:
            self._check_not_stuck()
        self._turns.took_inference(bool(spans))
        return self._emit_foreseen(spans, num_decodes, part, now_s, outlook)

    def _is_jobs_turn(self) -> bool:
        """Whether the next iteration is a job's alone."""
        if self.finetune.policy is FinetunePolicy.FINETUNE_ONLY:
            return True
        if self.finetune.policy is not FinetunePolicy.TEMPORAL:
            return False
        return self._turns.is_jobs_turn(
            num_waiting=self._num_waiting, has_requests=bool(self._by_request)
        )

    def _schedule_jobs_alone(self, now_s: float) -> Batch | None:
        """A batch without inference; None where jobs wait for a result, or for pages."""
        finetune = self.finetune
        if finetune.policy is FinetunePolicy.TEMPORAL:
            room = self._turns.room()
        else:
            room = WindowRoom(
                forward_window=finetune.forward_window,
                backward_window=finetune.backward_window,
                num_layers=self.info.num_layers,
            )
        part = self._jobs.fill(room, self._num_batches)
        self._turns.took_jobs(is_empty=part is None)
        return self._emit_foreseen([], 0, part, now_s, None)

    def _emit_foreseen(
        self,
        spans: list[Span],
        num_decodes: int,
        part: FinetunePart | None,
        now_s: float,
        outlook: Outlook | None,
    ) -> Batch | None:
        batch = self._emit(spans, num_decodes, part)
        self._jobs.emitted()
        if batch is None:
            return None
        shape = self._counter.count(batch)
        predicted_s = self.step_time.seconds(shape)
        if outlook is None:
            outlook = Outlook(
                shape=shape,
                scheduled_s=now_s,
                predicted_s=0.0,
                upper_s=0.0,
                inference_s=predicted_s,
                budget_s=math.inf,
            )
        outlook.shape = shape
        outlook.predicted_s = predicted_s
        outlook.upper_s = self.step_time.upper_s(shape)
        self._outlooks.append(outlook)
        self._owe_share(outlook)
        if spans and self._jobs_have_work and math.isfinite(outlook.budget_s):
            self._head_room.count(
                budget_s=outlook.budget_s,
                inference_s=outlook.inference_s,
                upper_s=outlook.upper_s,
                has_part=part is not None,
                ends=part is not None and bool(part.steps) and not part.is_backward_first,
            )
        if part is not None:
            self._num_forward_tokens += part.num_forward_tokens
            self._num_backward_token_layers += part.num_backward_token_layers
            self._num_steps += len(part.steps)
        return batch

    # ---- how much an iteration carries ----

    def _most_tokens(self, decodes: list[Sequence], limit_s: float, start_s: float) -> int:
        """The token budget of inference: prompts are split where they would hold up decodes."""
        most = self.config.max_num_batched_tokens
        if not (self._paces and decodes) or len(decodes) >= most:
            return most
        pending = self._pending_prompts()
        if not pending:
            return most
        tokens = self._pacer.chunk_tokens(
            decode_shape(decodes, self._terms),
            pending,
            start_s=start_s,
            limit_s=limit_s,
            granule=self.finetune.granule_tokens,
            most=most - len(decodes),
        )
        return len(decodes) + tokens

    def _pending_prompts(self) -> list[Pending]:
        running = [
            Pending(sequence=s, begin=s.num_computed, count=s.num_remaining)
            for s in self._running
            if s.num_remaining > 1
        ]
        return running + waiting_prompts(self._waiting)

    def _room(
        self, spans: list[Span], num_decodes: int, limit_s: float, now_s: float, start_s: float
    ) -> tuple[Room, Outlook | None]:
        finetune = self.finetune
        if finetune.policy is FinetunePolicy.BUDGET:
            used = sum(span.count for span in spans)
            left = self.config.max_num_batched_tokens - used
            return CountedRoom(num_tokens=left, num_layers=finetune.budget_layers), None
        shape = self._inference_shape(spans, num_decodes)
        inference_s = self.step_time.seconds(shape)
        budget_s = min(finetune.max_iteration_s, limit_s)
        # First tokens of this iteration, and prompts that remain after it.
        for span in spans[num_decodes:]:
            if span.samples and math.isnan(span.sequence.first_token_s):
                budget_s = min(budget_s, self._pacer.deadline_s(span.sequence) - start_s)
        pending = self._pending_prompts()
        if pending:
            budget_s = min(budget_s, self._pacer.first_tokens_s(pending, start_s))
        budget_s -= self._overhead_s
        outlook = Outlook(
            shape=shape,
            scheduled_s=now_s,
            predicted_s=inference_s,
            upper_s=0.0,
            inference_s=inference_s,
            budget_s=budget_s,
        )
        allowed_s = budget_s
        full_s = 0.0
        # Left alone, head-room grows, until a piece is taken or somebody new stops it.
        if num_decodes and limit_s > self._saves_from_s:
            full_s = min(finetune.max_iteration_s, self._pacer.most_s)
        if finetune.min_share > 0 and self._share_debt_s > 0:
            upper_s = self.step_time.upper_s(shape)
            due_s = upper_s + self._share_debt_s * (1.0 + self.step_time.residual)
            outlook.is_share_due = due_s > budget_s
            if outlook.is_share_due:
                allowed_s, full_s = due_s, 0.0
        room = TimedRoom(
            shape,
            self._terms,
            self.step_time.upper_s,
            budget_s=allowed_s,
            granule=finetune.granule_tokens,
            max_window=finetune.max_window_tokens,
            full_s=full_s,
        )
        return room, outlook

    def _inference_shape(self, spans: list[Span], num_decodes: int) -> IterationShape:
        lengths = [span.begin + 1 for span in spans[:num_decodes]]
        shape = IterationShape(
            num_decode_rows=num_decodes,
            num_sampled_rows=num_decodes,
            decode_context_tokens=self._terms.contexts(lengths),
        )
        for span in spans[num_decodes:]:
            shape = self._terms.add_prefill(shape, span.begin, span.count, samples=span.samples)
        return shape

    def _owe_share(self, outlook: Outlook) -> None:
        """Count how far finetuning is behind its least share of the time."""
        share = self.finetune.min_share
        if share <= 0 or not self._jobs_have_work:
            self._share_debt_s = 0.0
            return
        inference_s = min(outlook.inference_s, outlook.predicted_s)
        finetune_s = outlook.predicted_s - inference_s
        debt_s = self._share_debt_s + share * outlook.predicted_s - finetune_s
        # Neither thrift nor want is saved up for ever.
        most_s = self.finetune.max_iteration_s
        self._share_debt_s = min(max(debt_s, -most_s), most_s)

    # ---- one iteration: back ----

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """Take the result of the oldest batch in flight; returns what its callers should hear.

        Raises:
            IntegrityError: the result is not of that batch.
        """
        now_s = self._clock.now_s()
        flight = self._in_flight[0] if self._in_flight else None
        updates = super().apply(result)
        if flight is not None:
            for span in flight.spans:
                sequence = span.sequence
                if span.samples and math.isnan(sequence.first_token_s) and sequence.num_output:
                    sequence.first_token_s = now_s
        self._jobs.apply(result.batch_id, result.finetune)
        outlook = self._outlooks.popleft()
        # With several in flight an iteration begins when the one before it ends.
        begin_s = outlook.scheduled_s
        if not math.isnan(self._last_apply_s):
            begin_s = max(begin_s, self._last_apply_s)
        outlook.actual_s = now_s - begin_s
        self._last_apply_s = now_s
        self.step_time.observe(outlook.shape, outlook.actual_s)
        self._turns.observed(outlook.shape, outlook.actual_s)
        self._latest = outlook
        return updates

    def _measure_overhead(self, now_s: float) -> None:
        """What passes between a result and the next batch, when iterations follow each other."""
        if self._outlooks or math.isnan(self._last_apply_s):
            return
        pause_s = now_s - self._last_apply_s
        if 0 <= pause_s < _MOST_OVERHEAD_S:
            self._overhead_s += 0.1 * (pause_s - self._overhead_s)

    def abandon(self) -> None:
        """Forget the batches in flight; their sequences start again, jobs at a checkpoint."""
        super().abandon()
        self._outlooks.clear()
        self._last_apply_s = math.nan
        self._turns.abandon()
        self._jobs.abandon()

    # ---- looking in ----

    def finetune_stats(self) -> FinetuneStats:
        """Counters and the latest outlook."""
        return FinetuneStats(
            num_forward_tokens=self._num_forward_tokens,
            num_backward_token_layers=self._num_backward_token_layers,
            num_steps=self._num_steps,
            latest=self._latest,
            step_time_residual=self.step_time.residual,
            head_room_s=self._head_room.granted_s,
            unused_head_room_s=dict(self._head_room.unused_s),
        )

    @property
    def promised_job_bytes(self) -> int:
        """What jobs hold of the memory budget, or were promised."""
        return self._jobs.promised_bytes

    def snapshot_jobs(self) -> list[JobSnapshot]:
        """Every job that is not ended: what a restarted engine needs to go on."""
        return self._jobs.snapshot()

    def restore_jobs(self, snapshot: list[JobSnapshot]) -> None:
        """Queue the jobs of a snapshot; each goes on at its latest checkpoint."""
        self._jobs.restore(snapshot)

    def check_integrity(self) -> None:
        """Verify every invariant of pages, slots, sequences and jobs.

        Raises:
            IntegrityError: one is broken.
        """
        super().check_integrity()
        self._jobs.check_integrity()

    @property
    def _num_promised_elsewhere(self) -> int:
        return self._jobs.num_promised_pages

    @property
    def _slots_held_elsewhere(self) -> list[int]:
        return self._jobs.held_slots
