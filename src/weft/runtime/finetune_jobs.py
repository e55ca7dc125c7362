"""Executes the finetuning side of batches: jobs, samples, windows, optimizer steps, checkpoints.

Shape legend: T tokens of the iteration, h hidden, w labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weft.base.errors import IntegrityError, WeftError
from weft.engine.batch import AdapterRef, Batch, SegmentKind
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneOutcome,
    FinetuneSegment,
    FinetuneWork,
    JobFailure,
    JobStart,
    OptimizerStep,
    PublishAdapter,
    SampleStart,
    SegmentLoss,
    StepOutcome,
)
from weft.model.adapters.files import read_adapter
from weft.model.adapters.weights import AdapterWeights
from weft.model.finetune.attention import gather_kv
from weft.model.finetune.layer_backward import layer_backward
from weft.model.finetune.layer_tensors import LayerTensors
from weft.model.finetune.loss import window_loss
from weft.model.finetune.optimizer import clip_
from weft.model.finetune.taps import SampleTaps, TappedRow
from weft.model.forward_step import BypassGroup
from weft.model.kernels.held_tokens import HeldTokens, TokenGather
from weft.runtime.checkpoint_writer import CheckpointWriter, Written
from weft.runtime.device_context import DeviceContext
from weft.runtime.finetune_checkpoint import checkpoint_of, load_checkpoint, load_weights
from weft.runtime.finetune_state import JobState, SampleState
from weft.runtime.transfer import Download, upload

Publish = Callable[[AdapterRef, AdapterWeights], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _ForwardRow:
    segment: FinetuneSegment
    sample: SampleState
    rows: slice
    """Its tokens within the iteration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardPart:
    """What the decoder must know of a batch's finetuning rows."""

    groups: tuple[BypassGroup, ...]
    taps: SampleTaps | None


@dataclass(kw_only=True, slots=True)
class PendingOutcome:
    """What a batch did for its jobs; losses may still be on the device."""

    loss_rows: list[FinetuneSegment] = field(default_factory=list[FinetuneSegment])
    weights: list[float] = field(default_factory=list[float])
    loss_sums: Download | None = None
    steps: list[StepOutcome] = field(default_factory=list[StepOutcome])
    saves: list[CheckpointSaved] = field(default_factory=list[CheckpointSaved])
    failures: list[JobFailure] = field(default_factory=list[JobFailure])


class FinetuneJobs:
    """All jobs of an executor. Call, for each batch: `begin`, `forward_part`, `take_hidden`,
    `backward` (before `forward_part` where the work says so), `end`; then `collect`."""

    def __init__(self, context: DeviceContext, *, publish: Publish | None) -> None:
        """`publish` makes a version servable."""
        self._context = context
        self._publish = publish
        self._jobs: dict[str, JobState] = {}
        self._samples: dict[tuple[str, int], SampleState] = {}
        self._forward_rows: list[_ForwardRow] = []
        self._outcome = PendingOutcome()
        self._writer = CheckpointWriter()
        self._settled: list[Written] = []
        """On disk, or failed, and not told of."""

    @property
    def size_bytes(self) -> int:
        """Bytes held for jobs and samples, pages apart."""
        return sum(state.size_bytes for state in (*self._jobs.values(), *self._samples.values()))

    # ---- before the rows ----

    def begin(self, work: FinetuneWork) -> None:
        """Take the jobs and samples that start."""
        self._outcome = PendingOutcome()
        self._forward_rows = []
        for start in work.job_starts:
            self._start_job(start)
        for start in work.sample_starts:
            self._start_sample(start)

    def _start_job(self, start: JobStart) -> None:
        try:
            job = JobState(start, self._context)
            if start.resume_from is not None:
                job.num_steps = load_checkpoint(job, Path(start.resume_from), self._context.config)
            elif start.initial_adapter is not None:
                self._load_adapter(job, start.initial_adapter)
        except (WeftError, OSError, RuntimeError) as error:
            # A RuntimeError is how torch says that memory is out.
            self._fail(start.job_id, f"the job cannot start: {error}", 0)
            return
        self._jobs[start.job_id] = job

    def _load_adapter(self, job: JobState, path: str) -> None:
        master = job.trained.master
        adapter = read_adapter(
            path, self._context.config, dtype=master.dtype, device=self._context.device
        )
        load_weights(job, adapter, Path(path))

    def _start_sample(self, start: SampleStart) -> None:
        job = self._jobs.get(start.job_id)
        if job is not None:
            self._samples[start.job_id, start.sample] = SampleState(job, start, self._context)

    # ---- forward rows ----

    def forward_part(self, batch: Batch) -> ForwardPart:
        """Adapters and taps of the batch's forward rows."""
        for segment, sample in self._rows(batch, SegmentKind.FT_FORWARD):
            sample.went_forward(segment)
            first, last = batch.row_starts[segment.row], batch.row_starts[segment.row + 1]
            self._forward_rows.append(
                _ForwardRow(segment=segment, sample=sample, rows=slice(int(first), int(last)))
            )
        groups = tuple(
            BypassGroup(rows=row.rows, adapter=row.sample.job.adapter, dropout=row.sample.dropout)
            for row in self._forward_rows
        )
        tapped = [_tapped(row) for row in self._forward_rows if not _is_validation(row)]
        taps = SampleTaps(tapped, batch.num_tokens) if tapped else None
        return ForwardPart(groups=groups, taps=taps)

    def _rows(
        self, batch: Batch, kind: SegmentKind
    ) -> Iterator[tuple[FinetuneSegment, SampleState]]:
        segments = () if batch.finetune is None else batch.finetune.segments
        for segment in segments:
            sample = self._samples.get((segment.job_id, segment.sample))
            if batch.kinds[segment.row] == kind and sample is not None:
                yield segment, sample

    def take_hidden(self, hidden: Tensor) -> None:
        """Losses and their gradients from the hidden states [T, h] behind the last layer."""
        for row in self._forward_rows:
            if not _is_validation(row):
                self._check_saved(row.sample)
        self._losses([row for row in self._forward_rows if not _is_validation(row)], hidden, True)
        self._losses([row for row in self._forward_rows if _is_validation(row)], hidden, False)

    def _check_saved(self, sample: SampleState) -> None:
        """What is kept is what the pruned backward reads, nothing less and nothing else.

        Raises:
            IntegrityError: it is not.
        """
        for plan in sample.job.plans:
            kept, needed = sample.saved.names(plan.index), plan.needs.saved.keys()
            if kept != needed:
                raise IntegrityError(
                    f"layer {plan.index} keeps {sorted(kept)} for its backward, which reads "
                    f"{sorted(needed)}"
                )

    def _losses(self, rows: list[_ForwardRow], hidden: Tensor, wants_gradient: bool) -> None:
        if not rows:
            return
        device = hidden.device
        spans = [row.sample.labelled(row.segment.begin, row.segment.end) for row in rows]
        starts = [row.sample.start for row in rows]
        weights = [s.label_weights[p + 1] for s, p in zip(starts, spans, strict=True)]
        counts = [len(span) for span in spans]
        at = [r.rows.start + p - r.segment.begin for r, p in zip(rows, spans, strict=True)]
        labels = [s.token_ids[p + 1] for s, p in zip(starts, spans, strict=True)]
        scaled = [w * np.float64(s.loss_scale) for s, w in zip(starts, weights, strict=True)]
        decoder = self._context.decoder
        found = window_loss(
            hidden[upload(np.concatenate(at), device)],
            upload(np.concatenate(labels).astype(np.int64), device),
            upload(np.concatenate(scaled), device) if wants_gradient else None,
            weights=decoder.weights,
            kernels=decoder.kernels,
            norm_eps=decoder.config.rms_norm_eps,
        )
        weighted = found.losses.double() * upload(np.concatenate(weights), device)
        sums = torch.stack([part.sum() for part in weighted.split(counts)])
        pending = self._outcome
        before = pending.loss_sums
        if before is not None:
            sums = torch.cat([torch.from_numpy(before.wait()["sums"]).to(device), sums])
        pending.loss_sums = Download({"sums": sums})
        pending.loss_rows += [row.segment for row in rows]
        pending.weights += [float(w.sum(dtype=np.float64)) for w in weights]
        if found.d_hidden is None:
            return
        for row, span, part in zip(rows, spans, found.d_hidden.split(counts), strict=True):
            target = row.sample.d_hidden
            if target is not None and len(span):
                target[upload(span, device)] = part

    # ---- backward rows ----

    def backward(self, batch: Batch) -> None:
        """Pass the batch's backward rows, in their order, then take its optimizer steps."""
        for segment, sample in self._rows(batch, SegmentKind.FT_BACKWARD):
            first, end = batch.layers[segment.row].tolist()
            window = _BackwardWindow(batch, segment, sample, self._context)
            for layer in range(end - 1, first - 1, -1):
                sample.check_backward(segment, layer)
                window.run(layer)
                sample.went_backward(layer, segment.begin)
        for step in () if batch.finetune is None else batch.finetune.steps:
            self._step(step)

    # ---- behind the rows ----

    def end(self, work: FinetuneWork, *, has_inference: bool = False) -> PendingOutcome:
        """Sample ends, checkpoints, publications and job ends, in this order.

        Checkpoints are written while later batches run, whose outcomes tell of them; a batch that
        holds nothing that anybody waits for tells of its own.
        """
        for key in work.sample_ends:
            self._samples.pop(key, None)
        for save in work.saves:
            if (job := self._jobs.get(save.job_id)) is not None:
                self._writer.submit(save, checkpoint_of(job, save))
        for publish in work.publishes:
            self._publish_adapter(publish)
        for job_id in work.job_ends:
            self.settle(job_id)  # Of a job that ends nobody will hear any more.
            self._settled = [done for done in self._settled if done.save.job_id != job_id]
            self._forget(job_id)
        is_idle = not (work.segments or work.steps or has_inference)
        self._take_written(self._writer.wait() if is_idle else self._writer.take_done())
        self._forward_rows = []
        return self._outcome

    def settle(self, job_id: str) -> None:
        """Wait until nothing of a job is being written; later outcomes tell of it."""
        self._settled += self._writer.wait(job_id)

    def close(self) -> None:
        """Let checkpoints that are being written reach the disk; idempotent."""
        self._writer.close()

    def _take_written(self, found: list[Written]) -> None:
        """Tell of checkpoints that are on disk; a job whose checkpoint is not has failed."""
        found, self._settled = self._settled + found, []
        for written in found:
            save = written.save
            if written.problem:
                message = f"checkpoint {save.path} cannot be written: {written.problem}"
                if save.job_id in self._jobs:
                    self._fail(save.job_id, message, save.num_steps, path=save.path)
                continue
            self._outcome.saves.append(written.told)

    def _step(self, step: OptimizerStep) -> None:
        # What is being written is what this step changes.
        self._take_written(self._writer.wait(step.job_id))
        job = self._jobs.get(step.job_id)
        if job is None:
            return
        trained = job.trained
        norm = clip_(trained.grads, job.start.optimizer.max_grad_norm)
        if not np.isfinite(norm):
            message = f"the gradient of step {step.step + 1} is not finite (its norm is {norm})"
            self._fail(step.job_id, message, step.step, is_of_step=True)
            return
        try:
            job.optimizer.update(trained.master, trained.grads, lr=step.lr, num_done=step.step)
            trained.grads.zero_()
            trained.refresh()
            # Found here and not by the next loss: nothing of it may be saved or served.
            problem = "" if trained.is_finite else f"weights not finite in {trained.working.dtype}"
        except RuntimeError as error:  # A rate beyond the dtype's numbers, or no memory.
            problem = str(error)
        if problem:
            message = f"step {step.step + 1} at learning rate {step.lr:g} failed: {problem}"
            self._fail(step.job_id, message, step.step, is_of_step=True)
            return
        job.num_steps = step.step + 1
        self._outcome.steps.append(StepOutcome(job_id=step.job_id, step=step.step, grad_norm=norm))

    def _publish_adapter(self, publish: PublishAdapter) -> None:
        job = self._jobs.get(publish.job_id)
        if job is None or self._publish is None:
            return
        ref = AdapterRef(id=publish.id, version=publish.version)
        try:
            self._publish(ref, job.adapter_of(job.trained.working.clone()))
        except (WeftError, RuntimeError) as error:
            # The others of the batch are not to blame. A RuntimeError: memory is out.
            message = f"the finished adapter cannot be served: {error}"
            self._fail(publish.job_id, message, job.num_steps)

    def _fail(
        self,
        job_id: str,
        message: str,
        step: int,
        *,
        is_of_step: bool = False,
        path: str | None = None,
    ) -> None:
        """Report a job, free what it holds, and ignore it from here on."""
        self._outcome.failures.append(
            JobFailure(job_id=job_id, message=message, step=step, is_of_step=is_of_step, path=path)
        )
        self._forget(job_id)

    def _forget(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        for key in [key for key in self._samples if key[0] == job_id]:
            del self._samples[key]

    # ---- results ----

    def collect(self, pending: PendingOutcome) -> FinetuneOutcome:
        """What a batch did; a job whose loss is not finite fails here."""
        sums = [] if pending.loss_sums is None else pending.loss_sums.wait()["sums"].tolist()
        losses: list[SegmentLoss] = []
        saves = list(pending.saves)
        failures = {failure.job_id: failure for failure in pending.failures}
        for segment, loss_sum, weight in zip(pending.loss_rows, sums, pending.weights, strict=True):
            job_id = segment.job_id
            if np.isfinite(loss_sum):
                losses.append(
                    SegmentLoss(
                        job_id=job_id, sample=segment.sample, loss_sum=loss_sum, weight=weight
                    )
                )
                continue
            known, job = failures.get(job_id), self._jobs.get(job_id)
            if known is not None and known.is_of_step:
                step = known.step  # The loss says more than the gradient that it has spoilt.
            elif job is not None:
                step = job.num_steps
            else:
                continue
            failures[job_id] = JobFailure(
                job_id=job_id,
                message=f"the loss of a sample in step {step + 1} is {loss_sum}",
                step=step,
                sample=segment.sample,
            )
            # Its last good checkpoint is kept, so it is to be heard of.
            self.settle(job_id)
            own = [done for done in self._settled if done.save.job_id == job_id]
            self._settled = [done for done in self._settled if done not in own]
            saves += [done.told for done in own if not done.problem]
            self._forget(job_id)
        return FinetuneOutcome(
            losses=tuple(losses),
            steps=tuple(pending.steps),
            saves=tuple(saves),
            failures=tuple(failures.values()),
        )


class _BackwardWindow:
    """One backward row, layer by layer."""

    def __init__(
        self, batch: Batch, segment: FinetuneSegment, sample: SampleState, context: DeviceContext
    ) -> None:
        self._batch = batch
        self._segment = segment
        self._sample = sample
        self._context = context
        self._place = sample.place(segment.begin, segment.end)
        self._gathers: dict[int, TokenGather] = {}
        """By cache group."""

    def run(self, layer: int) -> None:
        """Sum the layer's gradients, and bring the sample's `d_hidden` to the layer's input."""
        sample, begin, end = self._sample, self._segment.begin, self._segment.end
        plan, d_hidden = sample.job.plans[layer], sample.d_hidden
        if plan.needs.is_empty or d_hidden is None:
            return
        kv = self._seen(layer) if plan.needs.reads_pages else None
        tensors = LayerTensors(plan, sample.saved.window(layer, begin, end), self._place, kv)
        d_output = d_hidden[begin:end]
        d_input = layer_backward(plan, tensors, self._place, d_output, sample.kv_grads(layer))
        if d_input is not None:
            d_output.copy_(d_input)

    def _seen(self, layer: int) -> HeldTokens:
        """Keys and values of a layer that the window sees; those of the layer before are gone."""
        layout, kv = self._context.layout, self._context.kv[layer]
        group = layout.layer_groups[layer]
        gather = self._gathers.get(group)
        if gather is None:
            gather = self._gathers[group] = gather_kv(
                kv,
                upload(self._batch.page_tables[group][self._segment.row], kv.keys.device),
                page_tokens=layout.groups[group].page_tokens,
                begin=self._segment.begin,
                end=self._segment.end,
                window=layout.groups[group].window,
            )
        return gather.of(kv)


def _is_validation(row: _ForwardRow) -> bool:
    return row.sample.start.is_validation


def _tapped(row: _ForwardRow) -> TappedRow:
    sample, begin = row.sample, row.segment.begin
    place = sample.place(begin, row.segment.end)
    return TappedRow(
        rows=row.rows,
        begin=begin,
        plans=sample.job.plans,
        saved=sample.saved,
        cos=place.cos,
        sin=place.sin,
    )
