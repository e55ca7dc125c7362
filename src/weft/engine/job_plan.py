"""What a finetuning job does, step by step, before anything runs: a pure function of its spec."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.base.errors import ConfigError
from weft.engine.finetune import FinetuneJobSpec, LossNormalization, TrainingSample
from weft.engine.sampling import uniforms

_MOST_LINES = 8
"""Named in one message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSample:
    """One sample's place in a job."""

    number: int
    """Names its state in the executor: counts training samples over all steps, and goes on behind
    the last one for validation, so that no two of a job are equal."""
    sample: TrainingSample
    step: int
    index: int
    """Its place within the step, or within the validation samples."""
    loss_scale: float
    is_validation: bool = False


def sample_order(num_samples: int, *, seed: int, epoch: int, shuffles: bool) -> tuple[int, ...]:
    """The order of an epoch's samples: a pure function of its arguments, on every machine."""
    if not shuffles:
        return tuple(range(num_samples))
    # Sorting counter-based keys, since a generator's permutation may change between versions.
    keys = uniforms(
        np.full(num_samples, seed % 2**64, np.uint64),
        np.full(num_samples, epoch, np.int64),
        np.arange(num_samples, dtype=np.int64),
    )
    return tuple(int(i) for i in np.argsort(keys, kind="stable"))


def steps_of_checkpoint(path: str) -> int:
    """The number of steps done that a checkpoint's name `.../step-N` says.

    Raises:
        ConfigError: it is named otherwise.
    """
    found = re.search(r"step-(\d+)/*$", path)
    if found is None:
        raise ConfigError(f"checkpoint {path!r} does not say its steps; its name must be step-N")
    return int(found.group(1))


class JobPlan:
    """Samples of each step, and what follows a step.

    Raises:
        ConfigError: the job has no samples, or a count is below 1.
    """

    def __init__(self, spec: FinetuneJobSpec) -> None:
        for name in ("num_epochs", "batch_size"):
            value: int = getattr(spec, name)
            if value < 1:
                raise ConfigError(f"job {spec.id}: {name} is {value}; it must be at least 1")
        if not spec.samples:
            raise ConfigError(f"job {spec.id} has no samples; it needs at least one")
        self._spec = spec
        self._epoch = -1
        self._order: tuple[int, ...] = ()
        self.steps_per_epoch = -(-len(spec.samples) // spec.batch_size)
        self.num_steps = self.steps_per_epoch * spec.num_epochs

    def step_samples(self, step: int) -> tuple[PlannedSample, ...]:
        """The samples of optimizer step `step`, counted from 0, each with its loss scale."""
        spec = self._spec
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * spec.batch_size
        order = self._order_of(epoch)[first : first + spec.batch_size]
        samples = [spec.samples[i] for i in order]
        weights = [sample.weight for sample in samples]
        return tuple(
            PlannedSample(
                number=epoch * len(spec.samples) + first + index,
                sample=sample,
                step=step,
                index=index,
                loss_scale=self._loss_scale(weights, index),
            )
            for index, sample in enumerate(samples)
        )

    def validation_samples(self, num_steps_done: int) -> tuple[PlannedSample, ...]:
        """The validation samples, as they follow `num_steps_done` steps."""
        spec = self._spec
        base = len(spec.samples) * spec.num_epochs + len(spec.validation) * num_steps_done
        return tuple(
            PlannedSample(
                number=base + index,
                sample=sample,
                step=num_steps_done,
                index=index,
                loss_scale=0.0,
                is_validation=True,
            )
            for index, sample in enumerate(spec.validation)
        )

    def lines_of(self, number: int) -> str:
        """Where in the user's files a sample lies, by its number; empty where that is not known."""
        samples = self._spec.samples
        epoch, place = divmod(number, len(samples))
        if epoch >= self._spec.num_epochs:
            rest = number - len(samples) * self._spec.num_epochs
            return _lines([self._spec.validation[rest % len(self._spec.validation)]], "validation")
        return _lines([samples[self._order_of(epoch)[place]]], "training")

    def lines_of_step(self, step: int) -> str:
        """Likewise of all samples of an optimizer step."""
        return _lines([planned.sample for planned in self.step_samples(step)], "training")

    def _order_of(self, epoch: int) -> tuple[int, ...]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = sample_order(
                len(self._spec.samples),
                seed=self._spec.seed,
                epoch=epoch,
                shuffles=self._spec.shuffles,
            )
        return self._order

    def validates_after(self, num_steps_done: int) -> bool:
        """Whether a pass over the validation samples follows."""
        every = self._spec.validate_every or self.steps_per_epoch
        is_due = num_steps_done % every == 0 or num_steps_done == self.num_steps
        return bool(self._spec.validation) and num_steps_done > 0 and is_due

    def checkpoint_path(self, num_steps_done: int) -> str | None:
        """Where the state after so many steps is saved; None where it is not.

        Where the distance of checkpoints is left open, this is where each would be.
        """
        spec = self._spec
        if spec.checkpoint_dir is None or num_steps_done == 0:
            return None
        is_due = num_steps_done % max(1, spec.checkpoint_every or 1) == 0
        if not is_due and num_steps_done != self.num_steps:
            return None
        return f"{spec.checkpoint_dir}/step-{num_steps_done}"

    def _loss_scale(self, weights: list[float], index: int) -> float:
        if self._spec.loss_normalization is LossNormalization.TOKEN:
            total = sum(weights)
        else:
            total = weights[index] * len(weights)
        # A sample (or a step) without labels teaches nothing; its gradient is 0, not NaN.
        return 1.0 / total if total > 0 else 0.0


def _lines(samples: Sequence[TrainingSample], file: str) -> str:
    """`lines 3, 8 of the training file`."""
    numbers = sorted({sample.line for sample in samples if sample.line > 0})
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:_MOST_LINES]))
    more = len(numbers) - _MOST_LINES
    shown += f" and {more} more" if more > 0 else ""
    return f"line{'s' * (len(numbers) > 1)} {shown} of the {file} file"
