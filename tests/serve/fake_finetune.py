"""The finetuning side of the closed-form model: losses, steps and files without any arithmetic.

A job's "weights" are a digest of every sample that was trained on, in order, so two runs end with
equal adapters exactly if they did the same steps on the same samples.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from weft.base.errors import AdapterLoadError
from weft.engine.batch import AdapterRef, Batch, SegmentKind
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneOutcome,
    JobFailure,
    SampleStart,
    SaveCheckpoint,
    SegmentLoss,
    StepOutcome,
)

NAN = 3
"""A sample that holds this byte has a loss that is not finite."""
FULL_DISK = 4
"""After a step on a sample that holds this byte, the checkpoint meets a full disk."""
ADAPTER_FILE = "adapter_config.json"
UNFORESEEN = "unforeseen"
"""An adapter directory that holds a file of this name raises what nobody expects."""


def loss_of(step: int) -> float:
    """Mean loss of a label in optimizer step `step`, counted from 0."""
    return 2.0 / (1 + step)


class FakeTrainer:
    """Jobs' states between batches."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[int, str]] = {}
        """Job -> (steps done, digest)."""
        self._pending: dict[str, list[SampleStart]] = {}
        self._samples: dict[tuple[str, int], SampleStart] = {}
        self._disk_is_full: set[str] = set()
        self.adapters: set[AdapterRef] = set()

    def run(self, batch: Batch) -> FinetuneOutcome | None:
        """Do what a batch says of jobs."""
        work = batch.finetune
        if work is None:
            return None
        failures: list[JobFailure] = []
        for start in work.job_starts:
            self._states[start.job_id] = (0, "")
            self._pending[start.job_id] = []
            source = start.resume_from or start.initial_adapter
            if source is not None:
                state = json.loads((Path(source) / ADAPTER_FILE).read_text())
                done = state["num_steps"] if start.resume_from else 0
                self._states[start.job_id] = (done, state["digest"])
        for start in work.sample_starts:
            self._samples[start.job_id, start.sample] = start
            if not start.is_validation:
                self._pending[start.job_id].append(start)
        losses = [self._loss(batch, segment, failures) for segment in work.segments]
        failed = {failure.job_id for failure in failures}
        for key in work.sample_ends:
            del self._samples[key]
        steps = tuple(
            self._step(step.job_id, step.step)
            for step in work.steps
            if step.job_id not in failed and step.job_id in self._states
        )
        saves = [save for item in work.saves if (save := self._save(item, failures))]
        for item in work.publishes:
            self.adapters.add(AdapterRef(id=item.id, version=item.version))
        for job_id in work.job_ends:
            self._states.pop(job_id, None)
        return FinetuneOutcome(
            losses=tuple(loss for loss in losses if loss is not None),
            steps=steps,
            saves=tuple(saves),
            failures=tuple(failures),
        )

    def load_adapter(self, ref: AdapterRef, path: str) -> None:
        """Take an adapter from disk."""
        if not (Path(path) / ADAPTER_FILE).is_file():
            raise AdapterLoadError(f"{path}: {ADAPTER_FILE} is missing")
        if (Path(path) / UNFORESEEN).exists():
            raise RuntimeError(UNFORESEEN)
        self.adapters.add(ref)

    def unload_adapter(self, ref: AdapterRef) -> None:
        """Forget one."""
        self.adapters.discard(ref)

    def _loss(
        self, batch: Batch, segment: object, failures: list[JobFailure]
    ) -> SegmentLoss | None:
        job_id, row = segment.job_id, segment.row  # type: ignore[attr-defined]
        begin, end, number = segment.begin, segment.end, segment.sample  # type: ignore[attr-defined]
        if batch.kinds[row] != SegmentKind.FT_FORWARD or job_id not in self._states:
            return None
        sample = self._samples[job_id, number]
        step = self._states[job_id][0]
        if NAN in sample.token_ids[begin:end]:
            message = f"the loss is nan in step {step}, sample {number}"
            failures.append(JobFailure(job_id=job_id, message=message, step=step, sample=number))
            del self._states[job_id]
            return None
        # The label of a position is the token after it.
        weight = float(np.append(sample.label_weights[1:], 0)[begin:end].sum())
        value = loss_of(step) * (0.5 if sample.is_validation else 1.0)
        return SegmentLoss(job_id=job_id, sample=number, loss_sum=weight * value, weight=weight)

    def _step(self, job_id: str, step: int) -> StepOutcome:
        done, digest = self._states[job_id]
        assert done == step, f"step {step} came after {done} steps"
        hashed = hashlib.sha256(digest.encode())
        for sample in sorted(self._pending[job_id], key=lambda s: s.index):
            hashed.update(sample.token_ids.tobytes())
            if FULL_DISK in sample.token_ids:
                self._disk_is_full.add(job_id)
        self._pending[job_id].clear()
        self._states[job_id] = (done + 1, hashed.hexdigest())
        return StepOutcome(job_id=job_id, step=step, grad_norm=1.0)

    def _save(self, save: SaveCheckpoint, failures: list[JobFailure]) -> CheckpointSaved | None:
        if save.job_id not in self._states:
            return None
        if save.job_id in self._disk_is_full:
            message = f"the checkpoint {save.path} could not be written: No space left on device"
            failures.append(JobFailure(job_id=save.job_id, message=message, step=save.num_steps))
            return None
        done, digest = self._states[save.job_id]
        target = Path(save.path)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / ADAPTER_FILE).write_text(json.dumps({"num_steps": done, "digest": digest}))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        return CheckpointSaved(
            job_id=save.job_id, path=save.path, num_steps=save.num_steps, elapsed_s=0.0
        )
