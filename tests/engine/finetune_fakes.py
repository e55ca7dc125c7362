"""The finetuning side of an executor that computes nothing and forgives nothing.

It keeps what a real executor would keep (jobs, samples, how far each layer's backward has come) and
checks every command against it. Losses are a closed form of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from weft.engine.batch import Batch, ExecutorInfo, SegmentKind
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneOutcome,
    FinetuneWork,
    JobFailure,
    JobStart,
    OptimizerStep,
    SampleStart,
    SegmentLoss,
    StepOutcome,
)

Cells = Callable[[int, int], list[list[int]]]


def token_loss(token: int, label: int) -> float:
    """The loss of one label."""
    return 1.0 + (7 * token + 3 * label) % 11 / 10


@dataclass(kw_only=True)
class SampleRecord:
    start: SampleStart
    forward_end: int = 0
    done_from: list[int] = field(default_factory=list)
    """For each layer: tokens from here on have been backward."""
    begun_at: int = 0


@dataclass(kw_only=True)
class JobRecord:
    start: JobStart
    next_step: int
    grads: set[int] = field(default_factory=set)
    """Samples whose gradients the next step will apply."""
    failed: bool = False


class FinetuneChecker:
    """Takes the commands of batches in order; raises AssertionError on any that is out of order."""

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        self.jobs: dict[str, JobRecord] = {}
        self.samples: dict[tuple[str, int], SampleRecord] = {}
        self.lowest_layer: dict[str, int] = {}
        """Where a test says that a job's backward must end; 0 for others."""
        self.steps: list[tuple[str, int, tuple[int, ...]]] = []
        """(job, step, its samples) as they were taken."""
        self.windows: list[tuple[str, str, int, int, int, int, int]] = []
        """("F" or "B", job, sample, begin, end, first layer, end layer)."""
        self.published: list[str] = []
        self.saved: list[str] = []
        self.fails_at: dict[str, int] = {}
        """Job -> the step at which it fails."""
        self.disk_is_full = False
        self.save_delay = 0
        """Batches after which a checkpoint is on disk."""
        self.num_waits = 0
        """Batches of nothing but waiting for checkpoints."""
        self.num_blocked_steps = 0
        """Steps that a checkpoint under way held up within a batch."""
        self._writing: list[tuple[int, CheckpointSaved]] = []
        self.num_batches = 0

    def take(self, batch: Batch, cells: Cells) -> FinetuneOutcome:
        work = batch.finetune
        assert work is not None
        self.num_batches += 1
        failures: list[JobFailure] = []
        for start in work.job_starts:
            assert start.job_id not in self.jobs, "a job starts twice"
            done = int(start.resume_from.rsplit("-", 1)[1]) if start.resume_from else 0
            self.jobs[start.job_id] = JobRecord(start=start, next_step=done)
        held = [record.start.slot for record in self.samples.values()]
        taken = [start.slot for start in work.sample_starts]
        assert not set(held) & set(taken), "two samples share a slot"
        rows = [segment.row for segment in work.segments]
        assert rows == list(np.flatnonzero(batch.kinds >= SegmentKind.FT_FORWARD))
        forward, backward = (
            [segment for segment in work.segments if batch.kinds[segment.row] == kind]
            for kind in (SegmentKind.FT_FORWARD, SegmentKind.FT_BACKWARD)
        )
        steps: list[StepOutcome] = []
        if work.is_backward_first:
            old = [key for key in work.sample_ends if key in self.samples]
            for segment in backward:
                self._row(batch, segment, cells)
            self._ends(old)
            self._steps(work.steps, steps, failures)
            self._starts(work)
            losses = [loss for segment in forward for loss in self._row(batch, segment, cells)]
            self._ends([key for key in work.sample_ends if key not in old])
        else:
            self._starts(work)
            losses = [
                loss for segment in work.segments for loss in self._row(batch, segment, cells)
            ]
            self._ends(work.sample_ends)
            self._steps(work.steps, steps, failures)
        waits = not (batch.num_rows or work.steps)
        self.num_waits += waits and not work.saves
        saves = self._told(0 if waits else self.save_delay, [step.job_id for step in work.steps])
        self.num_blocked_steps += sum(
            any(saved.job_id == step.job_id for saved in saves) and bool(self.save_delay)
            for step in work.steps
        )
        for save in work.saves:
            job = self.jobs.get(save.job_id)
            if job is None or job.failed:
                continue
            if self.disk_is_full:
                job.failed = True
                failures.append(
                    JobFailure(job_id=save.job_id, message="the disk is full", step=job.next_step)
                )
                continue
            assert save.num_steps == job.next_step
            self.saved.append(save.path)
            saved = CheckpointSaved(
                job_id=save.job_id, path=save.path, num_steps=save.num_steps, elapsed_s=0.1
            )
            if waits or not self.save_delay:
                saves.append(saved)
            else:
                self._writing.append((self.num_batches, saved))
        for publish in work.publishes:
            job = self.jobs.get(publish.job_id)
            if job is not None and not job.failed:
                assert publish.job_id not in [saved.job_id for _, saved in self._writing]
                self.published.append(publish.id)
        for name in work.job_ends:
            self._writing = [entry for entry in self._writing if entry[1].job_id != name]
            self.jobs.pop(name, None)
            for key in [key for key in self.samples if key[0] == name]:
                del self.samples[key]
        return FinetuneOutcome(
            losses=tuple(losses), steps=tuple(steps), saves=tuple(saves), failures=tuple(failures)
        )

    def _told(self, delay: int, jobs: list[str]) -> list[CheckpointSaved]:
        """Checkpoints that are on disk after so many batches, and all of some jobs."""
        told = [
            entry
            for entry in self._writing
            if entry[0] + delay <= self.num_batches or entry[1].job_id in jobs
        ]
        self._writing = [entry for entry in self._writing if entry not in told]
        return [saved for _, saved in told]

    def _starts(self, work: FinetuneWork) -> None:
        for start in work.sample_starts:
            self._begin(start)

    def _ends(self, keys: Iterable[tuple[str, int]]) -> None:
        for key in keys:
            if key[0] in self.jobs and not self.jobs[key[0]].failed:
                self._end(*key)

    def _steps(
        self,
        wanted: Iterable[OptimizerStep],
        steps: list[StepOutcome],
        failures: list[JobFailure],
    ) -> None:
        for step in wanted:
            job = self.jobs.get(step.job_id)
            if job is None or job.failed:
                continue
            if self.fails_at.get(step.job_id) == step.step:
                job.failed = True
                failures.append(
                    JobFailure(job_id=step.job_id, message="the loss is NaN", step=step.step)
                )
                continue
            assert step.step == job.next_step, "steps are out of order"
            assert not any(
                key[0] == step.job_id and not record.start.is_validation
                for key, record in self.samples.items()
            ), "a step is taken while one of its samples is not done"
            job.next_step += 1
            self.steps.append((step.job_id, step.step, tuple(sorted(job.grads))))
            job.grads.clear()
            steps.append(StepOutcome(job_id=step.job_id, step=step.step, grad_norm=0.5))

    def _begin(self, start: SampleStart) -> None:
        if start.job_id not in self.jobs or self.jobs[start.job_id].failed:
            return
        key = (start.job_id, start.sample)
        assert key not in self.samples, "a sample starts twice"
        first = self.info.max_num_seqs
        assert first <= start.slot < first + self.info.max_finetune_samples
        held = [record.start.slot for record in self.samples.values()]
        assert start.slot not in held, "two samples share a slot"
        assert start.is_validation or start.step == self.jobs[start.job_id].next_step
        n = len(start.token_ids)
        self.samples[key] = SampleRecord(
            start=start, done_from=[n] * self.info.num_layers, begun_at=self.num_batches
        )

    def _row(self, batch: Batch, segment, cells: Cells) -> list[SegmentLoss]:
        record = self.samples.get((segment.job_id, segment.sample))
        if record is None or self.jobs[segment.job_id].failed:
            return []
        row, begin, end = segment.row, segment.begin, segment.end
        assert int(batch.slots[row]) == record.start.slot
        tokens = record.start.token_ids
        first, last = batch.row_starts[row], batch.row_starts[row + 1]
        low, high = batch.layers[row].tolist()
        for view in cells(row, end):
            assert view == tokens[:end].tolist(), "the pages hold other tokens"
        if batch.kinds[row] == SegmentKind.FT_FORWARD:
            assert begin == record.forward_end < end <= len(tokens)
            assert (low, high) == (0, self.info.num_layers)
            assert batch.token_ids[first:last].tolist() == tokens[begin:end].tolist()
            record.forward_end = end
            self.windows.append(("F", *_key(segment), begin, end, low, high))
            return [self._loss(segment, record)]
        assert batch.kinds[row] == SegmentKind.FT_BACKWARD
        assert first == last
        assert not record.start.is_validation
        assert record.forward_end == len(tokens), "backward before the forward pass is complete"
        for layer in range(high - 1, low - 1, -1):
            assert record.done_from[layer] == end, "windows of a layer run right to left"
            if layer + 1 < self.info.num_layers:
                assert record.done_from[layer + 1] <= begin, "the layer above is not done"
            record.done_from[layer] = begin
        self.windows.append(("B", *_key(segment), begin, end, low, high))
        return []

    def _loss(self, segment, record: SampleRecord) -> SegmentLoss:
        tokens, weights = record.start.token_ids.tolist(), record.start.label_weights.tolist()
        loss_sum = weight = 0.0
        for position in range(segment.begin, min(segment.end, len(tokens) - 1)):
            w = weights[position + 1]
            loss_sum += w * token_loss(tokens[position], tokens[position + 1])
            weight += w
        return SegmentLoss(
            job_id=segment.job_id, sample=segment.sample, loss_sum=loss_sum, weight=weight
        )

    def _end(self, name: str, sample: int) -> None:
        record = self.samples.pop((name, sample))
        assert record.forward_end == len(record.start.token_ids)
        if record.start.is_validation:
            return
        lowest = self.lowest_layer.get(name, 0)
        for layer, done in enumerate(record.done_from):
            expected = 0 if layer >= lowest else len(record.start.token_ids)
            assert done == expected, f"layer {layer} is done from {done}, not {expected}"
        self.jobs[name].grads.add(sample)


def _key(segment) -> tuple[str, int]:
    return segment.job_id, segment.sample
