"""Finetuning jobs of an engine: their samples become rows of batches, results become events.

A job is epochs of optimizer steps of samples; a sample goes forward in windows, then backward in
windows. `fill` asks a `Room` how much of the next window an iteration can carry, job by job, in
the order of their fair shares. All state advances when a batch is decided, since an executor runs
batches in order; results bring losses, events and failures. (FlexLLM, arXiv 2402.18789 §6.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weft.base.clock import Clock
from weft.base.errors import ConfigError, IntegrityError, OutOfMemoryError, UnsupportedError
from weft.engine.backward_cursor import BackwardCursor
from weft.engine.batch import ExecutorInfo
from weft.engine.fair_share import FairShare
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneEvent,
    FinetuneJobSpec,
    FinetuneOutcome,
    JobChanged,
    JobFailure,
    JobStatus,
    OptimizerStep,
    PublishAdapter,
    SampleStart,
    SaveCheckpoint,
)
from weft.engine.finetune_limits import FinetuneConfig, FinetuneMemory
from weft.engine.finetune_part import ActiveSample, BackwardRow, FinetunePart, ForwardRow, Room
from weft.engine.job import Job, JobPhase, JobProgress
from weft.engine.kv_cache import KvCache
from weft.engine.window_log import WindowObserver

_BACKWARD_PRICE = 2.0
"""Of a token through all layers backward; forward costs 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSnapshot:
    """What a restarted engine needs of a job."""

    spec: FinetuneJobSpec
    """With `resume_from` at its latest checkpoint."""
    is_paused: bool


class FinetuneJobs:
    """Owns jobs, their slots and pages; computes nothing.

    Slots are those behind the sequences', pages come from the shared cache. Every started job has
    the pages, the slot and the bytes of one sample promised, so that it can always go on.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        info: ExecutorInfo,
        kv: KvCache,
        clock: Clock,
        *,
        max_sample_tokens: int,
        max_pages: int,
        memory: FinetuneMemory | None = None,
    ) -> None:
        self._config = config
        self._info = info
        self._kv = kv
        self._clock = clock
        self._max_sample_tokens = max_sample_tokens
        self._max_pages = max_pages
        """Most that samples may hold: the rest is enough for the longest sequence."""
        self._memory = memory
        self._jobs: dict[str, Job] = {}
        first, count = info.max_num_seqs, info.max_finetune_samples
        self._free_slots = list(range(first + count - 1, first - 1, -1))
        self._max_samples = min(count, config.max_samples or count)
        self._tenants = FairShare()
        self._shares: dict[str, FairShare] = {}
        self._ending: set[str] = set()
        """Jobs that the executor must still be told to forget."""
        self._parked_slots: list[int] = []
        """Of jobs that the executor must still be told to forget."""
        self._leaving: list[ActiveSample] = []
        """Their last rows are in the batch being decided, which still needs their page tables."""
        self._flights: dict[int, FinetunePart] = {}
        self._holds_steps = False
        """Whether a step that must wait for a checkpoint waits before it is in a batch."""
        self._events: list[FinetuneEvent] = []
        self.windows: WindowObserver | None = None
        """Records what jobs are granted, or decides it."""

    # ---- jobs in ----

    def add(self, spec: FinetuneJobSpec) -> None:
        """Queue a job; the order of its work among others follows from its tenant.

        Raises:
            ConfigError: its id is in use, or its settings, samples or target modules cannot be.
            OutOfMemoryError: it would not fit even alone; the message says what would do.
            UnsupportedError: the executor holds no samples.
        """
        if self._max_samples < 1:
            raise UnsupportedError(
                "this executor holds no finetuning samples; start it with max_finetune_samples >= 1"
            )
        if spec.id in self._jobs:
            raise ConfigError(f"job id {spec.id!r} is in use")
        job = Job(spec, num_layers=self._info.num_layers)
        self._check_lengths(job)
        self._check_memory(job)
        self._tenants.join(spec.tenant, spec.tenant_weight)
        self._shares.setdefault(spec.tenant, FairShare()).join(spec.id)
        self._jobs[spec.id] = job

    def cancel(self, job_id: str) -> bool:
        """End a job now, without publishing; False if it is not here."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        self._end(job, JobStatus.CANCELLED)
        return True

    def pause(self, job_id: str) -> bool:
        """Let a job stand still with all that it has; False if it is not here."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        if not job.is_paused:
            job.is_paused = True
            self._change(job, JobStatus.PAUSED)
        return True

    def resume(self, job_id: str) -> bool:
        """Let a paused job go on; False if it is not here."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        if job.is_paused:
            job.is_paused = False
            self._change(job, job.status)
        return True

    def progress(self) -> list[JobProgress]:
        """Jobs that are not ended, in the order in which they came."""
        return [job.progress() for job in self._jobs.values()]

    def take_events(self) -> list[FinetuneEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---- looking in ----

    @property
    def has_work(self) -> bool:
        """Whether another `fill` with room could yield anything."""
        if self._ending:
            return True
        if self._is_saving:
            return True
        jobs = [job for job in self._jobs.values() if not job.is_paused]
        if any(job.is_started and job.phase is not JobPhase.ENDED for job in jobs):
            return True
        head = self._next_to_start(())
        return head is not None and self._can_start(head)

    @property
    def _is_saving(self) -> bool:
        """Whether the executor has yet to tell of a checkpoint."""
        return any(job.saving for job in self._jobs.values())

    @property
    def held_slots(self) -> list[int]:
        """Slots of the samples in flight."""
        return [sample.slot for job in self._jobs.values() for sample in job.active]

    @property
    def num_promised_pages(self) -> int:
        """Pages that started jobs may claim and do not hold."""
        return sum(
            max(0, self._kv.pages_whole(job.longest) - self._pages_held(job))
            for job in self._jobs.values()
            if job.is_started and not job.is_paused
        )

    # ---- one iteration: out ----

    def fill(self, room: Room, batch_id: int) -> FinetunePart | None:
        """Decide the finetuning side of a batch, within `room`; None if there is nothing.

        Call `emitted` once the batch is laid out.
        """
        # Beside requests no iteration waits for a disk: the job does, here. Alone, the executor.
        self._holds_steps = room.is_timed
        if self.windows is not None:
            room = self.windows.begin(room)
        part = FinetunePart()
        part.job_ends.extend(sorted(self._ending))
        self._ending.clear()
        self._start_jobs(part)
        stuck: set[str] = set()
        while True:
            job = self._next_job(stuck)
            if job is None:
                break
            if not self._advance(job, part, room):
                stuck.add(job.spec.id)
        part.awaits_saves = part.is_empty and self._is_saving
        if self.windows is not None:
            self.windows.end(None if part.is_empty else part)
        if part.is_empty:
            return None
        self._flights[batch_id] = part
        return part

    def _start_jobs(self, part: FinetunePart) -> None:
        while (job := self._next_to_start(part.job_ends)) is not None:
            if not self._can_start(job):
                break  # A small job does not pass a large one, or that would wait for ever.
            part.job_starts.append(job.start())
            part.lives[job.spec.id] = job.life
            job.last_step_s = self._clock.now_s()
            if job.status is JobStatus.QUEUED:
                job.status = JobStatus.RUNNING
                self._change(job, JobStatus.RUNNING)

    def _next_to_start(self, ending: Sequence[str]) -> Job | None:
        """The first that came of the tenant that has least under way, and then was served least:
        many jobs of one tenant do not keep another's waiting."""
        num_started = Counter(job.spec.tenant for job in self._jobs.values() if job.is_started)

        def served(job: Job) -> tuple[float, float]:
            tenant, weight = job.spec.tenant, job.spec.tenant_weight
            return num_started[tenant] / weight, self._tenants.counter(tenant)

        queued = (
            job
            for name, job in self._jobs.items()
            if not (job.is_started or job.is_paused or name in ending)
        )
        return min(queued, key=served, default=None)

    def _next_job(self, stuck: set[str]) -> Job | None:
        ready: dict[str, list[str]] = {}
        for name, job in self._jobs.items():
            is_ready = job.is_started and not job.is_paused and job.phase is not JobPhase.ENDED
            if is_ready:
                ready.setdefault(job.spec.tenant, []).append(name)
        for tenant in self._tenants.order(ready) if ready else ():
            for name in self._shares[tenant].order(ready[tenant]):
                if name not in stuck:
                    return self._jobs[name]
        return None

    def _advance(self, job: Job, part: FinetunePart, room: Room) -> bool:
        """Take the job's next piece of work into the part; False if none is possible now."""
        if job.phase in (JobPhase.SAVE, JobPhase.PUBLISH):
            return self._finish(job, part)
        has_stepped = any(step.job_id == job.spec.id for step in part.steps)
        if has_stepped and (not room.is_timed or part.is_backward_first is False):
            return False  # Samples start before a batch's steps are taken.
        forward = [sample for sample in job.active if sample.num_forward_left]
        backward = [sample for sample in job.active if sample.cursor is not None]
        # Beside a backward pass, forward rows are worth while that ride along in other rows' work.
        only_cheap = room.is_timed and bool(backward)
        for sample in forward:
            if self._forward(job, sample, part, room, only_cheap=only_cheap):
                return True
        for sample in backward:
            if self._backward(job, sample, part, room):
                return True
        if only_cheap:
            for sample in forward:
                if self._forward(job, sample, part, room):
                    return True
        if job.waiting:
            return self._enter(job, part)
        if job.active or job.phase is not JobPhase.TRAIN:
            return False
        if (self._holds_steps and job.saving) or not room.step():
            return False
        self._step(job, part)
        return True

    def _enter(self, job: Job, part: FinetunePart) -> bool:
        planned = job.waiting[0]
        num_tokens = planned.sample.num_tokens
        if any(sample.num_forward_left for sample in job.active):
            return False  # One more would only share the room that this one lacks.
        if not self._has_place(job, num_tokens):
            return False
        slot = self._free_slots[-1]
        if not self._kv.extend(slot, num_tokens):
            return False
        self._free_slots.pop()
        num_bytes = self._sample_bytes(job, num_tokens)
        job.enter(ActiveSample(job_id=job.spec.id, planned=planned, slot=slot, num_bytes=num_bytes))
        part.lives[job.spec.id] = job.life
        part.sample_starts.append(
            SampleStart(
                job_id=job.spec.id,
                sample=planned.number,
                slot=slot,
                token_ids=planned.sample.token_ids,
                label_weights=planned.sample.label_weights,
                loss_scale=planned.loss_scale,
                step=planned.step,
                index=planned.index,
                is_validation=planned.is_validation,
            )
        )
        return True

    def _forward(
        self,
        job: Job,
        sample: ActiveSample,
        part: FinetunePart,
        room: Room,
        *,
        only_cheap: bool = False,
    ) -> bool:
        name = job.spec.id
        # One row a sample: its next tokens see those of this row.
        index = next((i for i, row in enumerate(part.forward) if row.sample is sample), None)
        if index is not None and (only_cheap or not room.is_timed):
            return False
        begin = sample.forward_end
        row_begin = None if index is None else part.forward[index].begin
        count = room.forward(sample, row_begin=row_begin, only_cheap=only_cheap)
        if count == 0:
            return False
        end = begin + count
        if index is None:
            part.forward.append(ForwardRow(job_id=name, sample=sample, begin=begin, end=end))
        else:
            part.forward[index] = replace(part.forward[index], end=end)
        if any(step.job_id == name for step in part.steps):
            part.is_backward_first = True  # It is of the next step.
        part.lives[name] = job.life
        sample.forward_end = end
        job.num_forward_tokens += count
        self._charge(job, count)
        if end < sample.num_tokens:
            return True
        if sample.planned.is_validation:
            self._leave(job, sample, part)
            if not job.waiting and not job.active:
                part.validated[name] = job.step
                job.validated()
        else:
            sample.cursor = BackwardCursor.at_top(
                order=job.spec.backward_order,
                num_tokens=sample.num_tokens,
                lowest_layer=job.lowest_layer,
                num_layers=self._info.num_layers,
                max_window=self._config.max_window_tokens,
            )
        return True

    def _backward(self, job: Job, sample: ActiveSample, part: FinetunePart, room: Room) -> bool:
        assert sample.cursor is not None
        is_fresh = any(row.sample is sample for row in part.forward)
        if is_fresh and part.is_backward_first:
            return False
        spans, cursor = room.backward(sample, sample.cursor)
        if not spans:
            return False
        if is_fresh:
            part.is_backward_first = False
        name = job.spec.id
        part.backward.extend(BackwardRow(job_id=name, sample=sample, span=span) for span in spans)
        part.lives[name] = job.life
        sample.cursor = cursor
        done = sum(span.num_token_layers for span in spans)
        self._charge(job, _BACKWARD_PRICE * done / self._info.num_layers)
        if cursor.is_done:
            self._leave(job, sample, part)
        return True

    def _step(self, job: Job, part: FinetunePart) -> None:
        name = job.spec.id
        lr = job.spec.optimizer.lr_at(job.step, job.plan.num_steps)
        part.steps.append(OptimizerStep(job_id=name, step=job.step, lr=lr))
        part.lives[name] = job.life
        job.stepped()
        path = job.due_checkpoint()
        if path is not None:
            part.saves.append(SaveCheckpoint(job_id=name, path=path, num_steps=job.step))

    def _finish(self, job: Job, part: FinetunePart) -> bool:
        if job.spec.id in part.validated:
            return False  # A loss that is no number would come too late.
        if job.phase is JobPhase.SAVE and (save := job.final_save()) is not None:
            part.saves.append(save)
            part.lives[job.spec.id] = job.life
            return True
        if job.saving:
            return False  # What is published is on disk, so that it is there after a crash too.
        part.publishes.append(job.publication())
        part.job_ends.append(job.spec.id)
        part.lives[job.spec.id] = job.life
        return True

    def _leave(self, job: Job, sample: ActiveSample, part: FinetunePart) -> None:
        part.sample_ends.append((job.spec.id, sample.planned.number))
        job.active.remove(sample)
        self._leaving.append(sample)

    def emitted(self) -> None:
        """The batch of the latest `fill` is laid out: what it used last may go to others."""
        for sample in self._leaving:
            self._kv.release(sample.slot)
            self._free_slots.append(sample.slot)
        self._leaving.clear()
        if not self._ending:
            self._free_slots += self._parked_slots
            self._parked_slots.clear()

    def _park(self, job: Job) -> None:
        """Take everything from a job's samples; slots are free once the executor forgets them."""
        for sample in job.active:
            self._kv.release(sample.slot)
            self._parked_slots.append(sample.slot)

    def _charge(self, job: Job, amount: float) -> None:
        self._tenants.charge(job.spec.tenant, amount)
        self._shares[job.spec.tenant].charge(job.spec.id, amount)

    # ---- one iteration: back ----

    def apply(self, batch_id: int, outcome: FinetuneOutcome | None) -> None:
        """Take what a batch did for its jobs."""
        part = self._flights.pop(batch_id, None)
        if part is None:
            return
        outcome = outcome or FinetuneOutcome()
        now_s = self._clock.now_s()
        here = {save.path for save in part.saves}
        for saved in outcome.saves:
            if saved.path not in here:  # Of an earlier batch: it comes before what this one did.
                self._take_save(saved)
        for loss in outcome.losses:
            if job := self._current(loss.job_id, part):
                job.take_loss(loss.sample, loss.loss_sum, loss.weight)
        validated = dict(part.validated)
        for step in outcome.steps:
            if job := self._current(step.job_id, part):
                if validated.get(step.job_id, math.inf) <= step.step:
                    # Of the step before: this one, of the same batch, came after the pass.
                    del validated[step.job_id]
                    metrics = job.take_validation()
                    self._events.extend([metrics] if metrics else [])
                metrics = job.take_step(step, now_s)
                self._events.extend([metrics] if metrics else [])
        for failure in outcome.failures:
            job = self._current(failure.job_id, part) or self._saving(failure.job_id, failure.path)
            if job is not None:
                self._fail(job, failure)
        for saved in outcome.saves:
            if saved.path in here:
                self._take_save(saved)
        for name in validated:
            if job := self._current(name, part):
                metrics = job.take_validation()
                self._events.extend([metrics] if metrics else [])
        for publish in part.publishes:
            if job := self._current(publish.job_id, part):
                self._succeed(job, publish)

    def _current(self, name: str, part: FinetunePart) -> Job | None:
        """The job that a result is about, if it is still the one that the batch was made for."""
        job = self._jobs.get(name)
        return job if job is not None and part.lives.get(name) == job.life else None

    def _saving(self, name: str, path: str | None) -> Job | None:
        """The job that has a checkpoint under way; one that began anew since has not."""
        job = self._jobs.get(name)
        return job if job is not None and path in job.saving else None

    def _take_save(self, saved: CheckpointSaved) -> None:
        if job := self._saving(saved.job_id, saved.path):
            job.take_save(saved)
            self._events.append(saved)

    def abandon(self) -> None:
        """Forget the batches in flight: every job that was in one starts at its last checkpoint.

        Part of a batch may have run, so gradients and weights of its jobs are not to be trusted.
        """
        for part in self._flights.values():
            self._ending.update(part.job_ends)
            for name, life in part.lives.items():
                job = self._jobs.get(name)
                if job is None or job.life != life:
                    continue
                self._park(job)
                job.reset()
                job.life += 1
                self._ending.add(name)
                step = job.step
                self._change(job, job.status, f"the engine failed; it goes on at step {step}")
        self._flights.clear()

    def snapshot(self) -> list[JobSnapshot]:
        """Every job that is not ended, as plain data."""
        return [
            JobSnapshot(spec=replace(job.spec, resume_from=job.checkpoint), is_paused=job.is_paused)
            for job in self._jobs.values()
        ]

    def restore(self, snapshot: list[JobSnapshot]) -> None:
        """Queue the jobs of a snapshot; each goes on at its latest checkpoint."""
        for entry in snapshot:
            self.add(entry.spec)
            self._jobs[entry.spec.id].is_paused = entry.is_paused

    # ---- endings ----

    def _succeed(self, job: Job, published: PublishAdapter) -> None:
        self._drop(job)
        self._events.append(
            JobChanged(
                job_id=job.spec.id,
                status=JobStatus.SUCCEEDED,
                adapter_id=published.id,
                adapter_version=published.version,
            )
        )

    def _fail(self, job: Job, failure: JobFailure) -> None:
        where = ""
        if failure.sample is not None:
            where = job.plan.lines_of(failure.sample)
        elif failure.is_of_step:
            where = job.plan.lines_of_step(failure.step)
        message = f"{failure.message} ({where})" if where else failure.message
        self._end(job, JobStatus.FAILED, message)

    def _end(self, job: Job, status: JobStatus, message: str = "") -> None:
        self._park(job)
        metrics = job.flush()
        self._events.extend([metrics] if metrics else [])
        if job.is_started:
            self._ending.add(job.spec.id)
        self._drop(job)
        self._change(job, status, message)

    def _drop(self, job: Job) -> None:
        del self._jobs[job.spec.id]
        self._shares[job.spec.tenant].leave(job.spec.id)
        if not any(other.spec.tenant == job.spec.tenant for other in self._jobs.values()):
            # The tenant keeps its counter: a new job owes what the last one was served.
            del self._shares[job.spec.tenant]

    def _change(self, job: Job, status: JobStatus, message: str = "") -> None:
        self._events.append(JobChanged(job_id=job.spec.id, status=status, message=message))

    # ---- memory ----

    def _pages_held(self, job: Job) -> int:
        return sum(self._kv.pages_whole(sample.num_tokens) for sample in job.active)

    def _sample_bytes(self, job: Job, num_tokens: int) -> int:
        if self._memory is None or job.phase is JobPhase.VALIDATE:
            return 0
        return self._memory.sample_bytes(job.spec, num_tokens)

    def _others(self, job: Job) -> list[Job]:
        return [other for other in self._jobs.values() if other is not job and other.is_started]

    def _claims(self, job: Job) -> tuple[int, int, int]:
        """Slots, pages and bytes that a started job holds or was promised."""
        held = sum(sample.num_bytes for sample in job.active)
        pages = max(self._pages_held(job), self._kv.pages_whole(job.longest))
        return max(1, len(job.active)), pages, job.fixed_bytes + max(held, job.longest_bytes)

    @property
    def promised_bytes(self) -> int:
        """Of the memory budget: what started jobs hold or may claim, and enough for each of the
        others to start once it is alone."""
        jobs = self._jobs.values()
        started = sum(self._claims(job)[2] for job in jobs if job.is_started)
        queued = [job.fixed_bytes + job.longest_bytes for job in jobs if not job.is_started]
        return max(started, *queued, 0)

    def _fits_beside(self, job: Job, slots: int, pages: int, num_bytes: int) -> bool:
        claims = [self._claims(other) for other in self._others(job)]
        budget = None if self._memory is None else self._memory.left_bytes
        return (
            slots + sum(claim[0] for claim in claims) <= self._max_samples
            and pages + sum(claim[1] for claim in claims) <= self._max_pages
            and (budget is None or num_bytes + sum(claim[2] for claim in claims) <= budget)
        )

    def _can_start(self, job: Job) -> bool:
        pages = self._kv.pages_whole(job.longest)
        return self._fits_beside(job, 1, pages, job.fixed_bytes + job.longest_bytes)

    def _has_place(self, job: Job, num_tokens: int) -> bool:
        """Whether one more sample of the job leaves to all others what they were promised."""
        if not self._free_slots:
            return False
        if not job.active:
            return True  # Promised.
        pages = self._pages_held(job) + self._kv.pages_whole(num_tokens)
        held = sum(sample.num_bytes for sample in job.active)
        num_bytes = job.fixed_bytes + held + self._sample_bytes(job, num_tokens)
        return self._fits_beside(job, len(job.active) + 1, pages, num_bytes)

    def _check_lengths(self, job: Job) -> None:
        shortest = min(s.num_tokens for s in (*job.spec.samples, *job.spec.validation))
        if shortest < 2:
            raise ConfigError(
                f"job {job.spec.id} has a sample of {shortest} tokens; it needs at least 2"
            )
        if job.longest > self._max_sample_tokens:
            raise ConfigError(
                f"job {job.spec.id} has a sample of {job.longest} tokens; the context holds "
                f"{self._max_sample_tokens}: truncate it"
            )

    def _check_memory(self, job: Job) -> None:
        pages = self._kv.pages_whole(job.longest)
        if pages > self._max_pages:
            more = (pages - self._max_pages) * self._info.page_bytes
            raise OutOfMemoryError(
                f"job {job.spec.id} needs {pages} pages of KV cache for its longest sample "
                f"({job.longest} tokens) and {self._max_pages} are left beside the longest "
                f"request: raise kv_cache_memory_bytes by {more}, or shorten the sample"
            )
        if self._memory is None:
            return
        job.fixed_bytes = self._memory.job_bytes(job.spec)
        job.longest_bytes = self._memory.sample_bytes(job.spec, job.longest_trained)
        need, budget = job.fixed_bytes + job.longest_bytes, self._memory.left_bytes
        if need > budget:
            served = self._memory.budget_bytes - budget
            raise OutOfMemoryError(
                f"job {job.spec.id} needs {need} bytes ({job.fixed_bytes} for its adapter and "
                f"optimizer, {job.longest_bytes} for its longest sample of {job.longest_trained} "
                f"tokens) and jobs may use {budget}"
                + (f" beside the {served} of served adapters" if served else "")
                + f": raise the memory budget by {need - budget} bytes, or lower the rank or the "
                "sample length"
            )

    def check_integrity(self) -> None:
        """Verify slots and the samples' progress.

        Raises:
            IntegrityError: one is broken.
        """
        first = self._info.max_num_seqs
        slots = range(first, first + self._info.max_finetune_samples)
        if sorted(self.held_slots + self._free_slots + self._parked_slots) != list(slots):
            raise IntegrityError("finetuning slots are not exactly the held and the free ones")
        if sum(self._pages_held(job) for job in self._jobs.values()) > self._max_pages:
            raise IntegrityError("finetuning samples hold more pages than they may")
        for name, job in self._jobs.items():
            for sample in job.active:
                if not 0 <= sample.forward_end <= sample.num_tokens:
                    raise IntegrityError(f"a sample of job {name} is forward beyond its end")
                if sample.cursor is not None and sample.cursor.is_done:
                    raise IntegrityError(f"a sample of job {name} is done and still here")
            if (job.active or job.waiting) and job.phase not in (
                JobPhase.TRAIN,
                JobPhase.VALIDATE,
            ):
                raise IntegrityError(f"job {name} has samples in phase {job.phase}")
