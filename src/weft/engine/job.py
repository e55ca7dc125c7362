"""One finetuning job on its way: which samples run, what comes next, what it has learnt so far."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum

from weft.engine.finetune import (
    CHECKPOINT_SHARE,
    CheckpointSaved,
    FinetuneJobSpec,
    JobStart,
    JobStatus,
    PublishAdapter,
    SaveCheckpoint,
    StepMetrics,
    StepOutcome,
)
from weft.engine.finetune_part import ActiveSample
from weft.engine.job_plan import JobPlan, PlannedSample, steps_of_checkpoint
from weft.graph.adapter_spec import LayerWidths, resolve_targets

_ANY_WIDTHS = LayerWidths(hidden=1, query=1, kv=1, ffn=1)
FIRST_VERSION = 1
"""A job publishes once, under its own id; every restart after a breakdown counts one on."""


class JobPhase(StrEnum):
    """What a job does next."""

    START = "start"
    """The executor does not know it (any more)."""
    TRAIN = "train"
    """Samples of a step, forward and backward."""
    VALIDATE = "validate"
    """Validation samples, forward only."""
    SAVE = "save"
    """Nothing is left but to save the finished adapter, then to publish it."""
    PUBLISH = "publish"
    """It is to be published once all that was to be saved is on disk."""
    ENDED = "ended"
    """Its last commands are under way."""


@dataclass(kw_only=True, slots=True)
class LossSum:
    """A weighted mean in the making."""

    loss_sum: float = 0.0
    weight: float = 0.0

    def add(self, loss_sum: float, weight: float) -> None:
        """Count one window."""
        self.loss_sum += loss_sum
        self.weight += weight

    @property
    def mean(self) -> float:
        """0 where no label counted."""
        return self.loss_sum / self.weight if self.weight else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobProgress:
    """A job that is not ended, from outside."""

    id: str
    tenant: str
    status: JobStatus
    num_steps_done: int
    """Optimizer steps whose results are known."""
    num_steps: int
    num_forward_tokens: int
    """Tokens sent forward since it was added, validation included."""


class Job:
    """The state of one job; the collection owns slots, pages and the order among jobs."""

    def __init__(self, spec: FinetuneJobSpec, *, num_layers: int) -> None:
        self.spec = spec
        self.plan = JobPlan(spec)
        targets = resolve_targets(spec.adapter, num_layers=num_layers, widths=_ANY_WIDTHS)
        self.lowest_layer = min(target.layer for target in targets)
        self.longest = max(s.num_tokens for s in (*spec.samples, *spec.validation))
        self.longest_trained = max(s.num_tokens for s in spec.samples)
        self.fixed_bytes = 0
        """Of adapter, gradients and optimizer, where memory is budgeted."""
        self.longest_bytes = 0
        """Of its longest training sample, likewise."""
        self.checkpoint = spec.resume_from
        self.status = JobStatus.QUEUED
        self.is_paused = False
        self.is_started = False
        self.life = 0
        """Counts restarts, so that a late result of an earlier life is recognised."""
        self.phase = JobPhase.START
        self.step = 0
        """Steps scheduled."""
        self.num_steps_done = 0
        self.num_forward_tokens = 0
        self.waiting: deque[PlannedSample] = deque()
        self.active: list[ActiveSample] = []
        self.saving: set[str] = set()
        """Checkpoints that the executor was told to write and has not told of."""
        self.last_step_s = 0.0
        """When the latest step's result came, or the job started."""
        self._save_s = 0.0
        """Of the latest checkpoint; 0 before the first."""
        self._step_s = math.inf
        """Of the latest step, likewise endless."""
        self._saved_step = 0
        self._losses: dict[int, LossSum] = {}
        self._step_of: dict[int, int] = {}
        self._validation = LossSum()
        self._held_metrics: StepMetrics | None = None
        self.reset()

    def reset(self) -> None:
        """Begin again at the latest checkpoint: the executor is to forget what it had."""
        self.phase = JobPhase.START
        self.is_started = False
        self.step = steps_of_checkpoint(self.checkpoint) if self.checkpoint else 0
        self.step = min(self.step, self.plan.num_steps)
        self.num_steps_done = self._saved_step = self.step
        self.waiting.clear()
        self.active.clear()
        self.saving.clear()
        self._losses.clear()
        self._step_of.clear()
        self._validation = LossSum()
        self._held_metrics = None

    # ---- going on ----

    def start(self) -> JobStart:
        """The command that makes it known; its first samples wait."""
        self.is_started = True
        self._begin_step()
        spec = self.spec
        return JobStart(
            job_id=spec.id,
            adapter=spec.adapter,
            optimizer=spec.optimizer,
            seed=spec.seed,
            remat=spec.remat,
            backward_order=spec.backward_order,
            resume_from=self.checkpoint,
            initial_adapter=None if self.checkpoint else spec.initial_adapter,
        )

    def _begin_step(self) -> None:
        if self.step >= self.plan.num_steps:
            self.phase = JobPhase.SAVE
            return
        self.phase = JobPhase.TRAIN
        self.waiting.extend(self.plan.step_samples(self.step))

    def stepped(self) -> None:
        """An optimizer step is scheduled: what follows it waits now."""
        self.step += 1
        if self.plan.validates_after(self.step):
            self.phase = JobPhase.VALIDATE
            self.waiting.extend(self.plan.validation_samples(self.step))
        else:
            self._begin_step()

    def validated(self) -> None:
        """All validation samples of this pass are scheduled."""
        self._begin_step()

    def enter(self, sample: ActiveSample) -> None:
        """The next waiting sample takes a slot."""
        self.waiting.popleft()
        self.active.append(sample)
        if not sample.planned.is_validation:
            self._step_of[sample.planned.number] = sample.planned.step

    def final_save(self) -> SaveCheckpoint | None:
        """What keeps the adapter of a job that has done all its steps."""
        self.phase = JobPhase.PUBLISH
        spec = self.spec
        if spec.checkpoint_dir is None:
            return None
        path = f"{spec.checkpoint_dir}/final"
        self.saving.add(path)
        return SaveCheckpoint(
            job_id=spec.id, path=path, num_steps=self.plan.num_steps, is_final=True
        )

    def publication(self) -> PublishAdapter:
        """What ends a job whose adapter is kept."""
        self.phase = JobPhase.ENDED
        # A life that broke down may have published already, unheard.
        version = FIRST_VERSION + self.life
        return PublishAdapter(job_id=self.spec.id, id=self.spec.id, version=version)

    def due_checkpoint(self) -> str | None:
        """Where the state after the steps scheduled is to be saved now; None where it is not.

        The distance follows from what the latest checkpoint and the latest step took, unless it was
        given; the last step is always saved.
        """
        path = self.plan.checkpoint_path(self.step)
        if self.spec.checkpoint_every is None and self.step < self.plan.num_steps:
            distance = self._save_s / (CHECKPOINT_SHARE * self._step_s) if self._step_s else 0.0
            if self.step - self._saved_step < distance:
                return None
        self._saved_step = self.step
        if path is not None:
            self.saving.add(path)
        return path

    # ---- what came back ----

    def take_save(self, saved: CheckpointSaved) -> None:
        """A checkpoint, or the finished adapter, is on disk."""
        self.saving.discard(saved.path)
        if saved.path != self.plan.checkpoint_path(saved.num_steps):
            return
        self.checkpoint = saved.path
        self._save_s = saved.elapsed_s

    def take_loss(self, number: int, loss_sum: float, weight: float) -> None:
        """One window's loss."""
        step = self._step_of.get(number)
        if step is None:
            self._validation.add(loss_sum, weight)
        else:
            self._losses.setdefault(step, LossSum()).add(loss_sum, weight)

    def take_step(self, outcome: StepOutcome, now_s: float) -> StepMetrics | None:
        """A step is done; its metrics, unless a pass over the validation samples follows."""
        step, spec, plan = outcome.step, self.spec, self.plan
        self.num_steps_done = step + 1
        self._step_s = now_s - self.last_step_s
        samples = plan.step_samples(step)
        for planned in samples:
            self._step_of.pop(planned.number, None)
        metrics = StepMetrics(
            job_id=spec.id,
            step=step + 1,
            num_steps=plan.num_steps,
            epoch=(step + 1) / plan.steps_per_epoch,
            loss=self._losses.pop(step, LossSum()).mean,
            lr=spec.optimizer.lr_at(step, plan.num_steps),
            grad_norm=outcome.grad_norm,
            num_tokens=sum(planned.sample.num_tokens for planned in samples),
            elapsed_s=now_s - self.last_step_s,
        )
        self.last_step_s = now_s
        if plan.validates_after(step + 1):
            self._held_metrics = metrics
            return None
        return metrics

    def take_validation(self) -> StepMetrics | None:
        """The pass over the validation samples is done: the step's metrics with its loss."""
        held, self._held_metrics = self._held_metrics, None
        mean, self._validation = self._validation.mean, LossSum()
        if held is None:
            return None
        return replace(held, validation_loss=mean)

    def flush(self) -> StepMetrics | None:
        """Metrics that still wait for a validation loss which will not come."""
        held, self._held_metrics = self._held_metrics, None
        return held

    def progress(self) -> JobProgress:
        """Seen from outside."""
        return JobProgress(
            id=self.spec.id,
            tenant=self.spec.tenant,
            status=JobStatus.PAUSED if self.is_paused else self.status,
            num_steps_done=self.num_steps_done,
            num_steps=self.plan.num_steps,
            num_forward_tokens=self.num_forward_tokens,
        )
