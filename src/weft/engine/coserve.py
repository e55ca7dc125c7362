"""Finetuning in the iterations of inference: one policy, several ways to share an iteration.

Inference tokens come first. What finetuning may add is decided by the policy's kind: `coserve`
fills what the latency objectives leave, by predicted time; the others are its baselines.
(FlexLLM, arXiv 2402.18789 §6.2; the sheet's §4 tells what was shipped from what was written.)
"""

from __future__ import annotations

from dataclasses import replace

from weft.base.clock import Clock
from weft.engine.batch import Batch, ExecutorInfo, StepResult
from weft.engine.batch_builder import Span
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.finetune import FinetuneEvent, FinetuneJobSpec
from weft.engine.finetune_limits import FinetuneConfig, FinetuneMemory, FinetunePolicy
from weft.engine.finetune_part import FinetunePart, Room
from weft.engine.job import JobProgress
from weft.engine.jobs import FinetuneJobs, JobSnapshot
from weft.engine.request import SequenceUpdate
from weft.engine.rooms import CountedRoom, NoRoom, WindowRoom


class CoServing(ContinuousBatching):
    """Continuous batching whose iterations also carry finetuning jobs."""

    def __init__(
        self,
        config: PolicyConfig,
        info: ExecutorInfo,
        clock: Clock,
        *,
        finetune: FinetuneConfig | None = None,
        memory: FinetuneMemory | None = None,
    ) -> None:
        self.finetune = finetune or FinetuneConfig()
        if self.finetune.policy is FinetunePolicy.BUDGET:
            most = min(config.max_num_batched_tokens, self.finetune.budget_tokens)
            config = replace(config, max_num_batched_tokens=most)
        super().__init__(config, info, clock)
        longest = self.kv.pages_for(config.max_model_len, config.max_num_batched_tokens)
        self._jobs = FinetuneJobs(
            self.finetune,
            info,
            self.kv,
            clock,
            max_sample_tokens=config.max_model_len,
            max_pages=self.kv.pool.num_total - longest,
            memory=memory,
        )

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
        return self._jobs.has_work and self.finetune.policy is not FinetunePolicy.INFERENCE_ONLY

    # ---- one iteration ----

    def schedule(self) -> Batch | None:
        """The next batch, or None if nothing can run before a result is applied."""
        spans: list[Span] = []
        num_decodes = 0
        waits = self.finetune.policy is FinetunePolicy.FINETUNE_ONLY and self._jobs.has_work
        if not waits:
            spans, num_decodes = self._take_inference(self.config.max_num_batched_tokens)
        part = self._fill(spans)
        if waits and part is None and not self._in_flight:
            # Jobs wait for pages that running requests hold.
            spans, num_decodes = self._take_inference(self.config.max_num_batched_tokens)
        if not spans and part is None:
            self._check_not_stuck()
        batch = self._emit(spans, num_decodes, part)
        self._jobs.emitted()
        return batch

    def _fill(self, spans: list[Span]) -> FinetunePart | None:
        if not self._jobs_have_work:
            return None
        return self._jobs.fill(self._room(spans), self._num_batches)

    def _room(self, spans: list[Span]) -> Room:
        finetune = self.finetune
        if finetune.policy is FinetunePolicy.BUDGET:
            used = sum(span.count for span in spans)
            return CountedRoom(
                num_tokens=self.config.max_num_batched_tokens - used,
                num_layers=finetune.budget_layers,
            )
        if finetune.policy is FinetunePolicy.FINETUNE_ONLY:
            return WindowRoom(
                forward_window=finetune.forward_window,
                backward_window=finetune.backward_window,
                num_layers=self.info.num_layers,
            )
        return NoRoom()

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """Take the result of the oldest batch in flight; returns what its callers should hear.

        Raises:
            IntegrityError: the result is not of that batch.
        """
        updates = super().apply(result)
        self._jobs.apply(result.batch_id, result.finetune)
        return updates

    def abandon(self) -> None:
        """Forget the batches in flight; their sequences start again, jobs at a checkpoint."""
        super().abandon()
        self._jobs.abandon()

    # ---- looking in ----

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
