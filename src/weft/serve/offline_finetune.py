"""Finetuning in one's own process: what `LLM.finetune` gives back, and how its data is read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from weft.base.errors import ConfigError, WeftError
from weft.engine.batch import AdapterRef
from weft.engine.config import check_whole
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneEvent,
    FinetuneJobSpec,
    JobChanged,
    JobStatus,
    LossNormalization,
    OptimizerSpec,
    StepMetrics,
    TrainingSample,
)
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat
from weft.model.tokenizer import Tokenizer
from weft.serve.finetune_data import (
    Example,
    OverlongSamples,
    encode_examples,
    examples_from,
    read_examples,
)

FinetuneData = str | PathLike[str] | Iterable[Mapping[str, Any] | str]
"""A JSONL file, or its lines as objects; plain strings are texts."""

_numbers = itertools.count()


class JobFailedError(WeftError, RuntimeError):
    """A finetuning job has failed; its last good checkpoint, where it had any, is kept."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a job in one's own process trains.

    Raises:
        ConfigError: a count is below 1, or no whole number.
    """

    lora: AdapterSpec
    optimizer: OptimizerSpec
    num_epochs: int = 3
    batch_size: int = 1
    """Samples of an optimizer step."""
    loss_normalization: LossNormalization = LossNormalization.TOKEN
    seed: int = 0
    max_sample_tokens: int | None = None
    """None: what the model's context holds."""
    overlong_samples: OverlongSamples = OverlongSamples.REFUSE
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; None: 1, or more where writing one costs over 2 %."""
    output_dir: str | None = None
    """Where checkpoints (`step-N`) and the finished adapter (`final`) go; None keeps neither."""
    resume_from: str | None = None
    initial_adapter: str | None = None
    remat: Remat = Remat.PRUNED

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        for name in ("checkpoint_every", "max_sample_tokens"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)

    def spec(
        self,
        name: str,
        samples: tuple[TrainingSample, ...],
        validation: tuple[TrainingSample, ...],
    ) -> FinetuneJobSpec:
        """The job for the engine."""
        return FinetuneJobSpec(
            id=name,
            adapter=self.lora,
            samples=samples,
            validation=validation,
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            loss_normalization=self.loss_normalization,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            checkpoint_dir=self.output_dir,
            resume_from=self.resume_from,
            initial_adapter=self.initial_adapter,
            remat=self.remat,
        )


def load_samples(
    data: FinetuneData,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    overlong: OverlongSamples,
) -> tuple[TrainingSample, ...]:
    """Tokens of a file or of objects.

    Raises:
        InvalidRequestError: a line is refused; the message names it.
        ConfigError: the file cannot be read.
    """
    if isinstance(data, str | PathLike):
        what = str(data)
        try:
            examples: list[Example] = read_examples(Path(data).read_bytes(), what=what)
        except OSError as error:
            raise ConfigError(f"{what} cannot be read: {error.strerror or error}") from error
    else:
        what = "the data"
        examples = examples_from(data)
    return encode_examples(examples, tokenizer, max_tokens=max_tokens, overlong=overlong, what=what)


def new_job_name() -> str:
    """A name that no other job of this process has."""
    return f"finetune-{next(_numbers)}"


class FinetuneJob:
    """A job of an `LLM`; it advances while the LLM's `generate`, `chat` or this `wait` runs."""

    def __init__(
        self, spec: FinetuneJobSpec, *, drive: Callable[[FinetuneJob], None], owner: Any
    ) -> None:
        self.id = spec.id
        self.status = JobStatus.QUEUED
        self.message = ""
        """Why it failed."""
        self.metrics: list[StepMetrics] = []
        """One entry a step that is done."""
        self.adapter: AdapterRef | None = None
        """Once it has succeeded: to be given as `lora_request`."""
        self.num_tokens = 0
        """Trained so far."""
        self.started_s = time.monotonic()
        self._drive = drive
        self._owner = owner

    def wait(self, on_step: Callable[[StepMetrics], None] | None = None) -> Self:
        """Run iterations until the job ends; `on_step` hears of every step as it is done.

        Raises:
            JobFailedError: it failed.
            ConfigError: it is paused, so nothing would ever happen.
        """
        seen = len(self.metrics)
        while not self.status.is_final:
            self._drive(self)
            for metrics in self.metrics[seen:]:
                if on_step is not None:
                    on_step(metrics)
            seen = len(self.metrics)
        if self.status is JobStatus.FAILED:
            raise JobFailedError(f"job {self.id}: {self.message}")
        return self

    def cancel(self) -> None:
        """End it without a result; does nothing to one that has ended."""
        self._owner.cancel_job(self)

    def pause(self) -> None:
        """Let it stand still."""
        self._owner.pause_job(self)

    def resume(self) -> None:
        """Let it go on."""
        self._owner.resume_job(self)

    def hear(self, event: FinetuneEvent) -> None:
        """Take news of it; called by its LLM."""
        match event:
            case StepMetrics():
                self.metrics.append(event)
                self.num_tokens += event.num_tokens
            case JobChanged():
                self.status = event.status
                self.message = event.message
                if event.status is JobStatus.SUCCEEDED and event.adapter_id:
                    self.adapter = AdapterRef(id=event.adapter_id, version=event.adapter_version)
            case CheckpointSaved():
                pass
