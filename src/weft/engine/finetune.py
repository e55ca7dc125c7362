"""What a finetuning job is, and what of it crosses between a policy and an executor.

A job is a stream of samples, grouped into optimizer steps. A policy turns it into rows of batches:
forward windows (FT_FORWARD, rows like chunks of a prompt), backward windows (FT_BACKWARD, rows
without tokens of their own), and, between them, the commands of `FinetuneWork`. An executor holds
all state of a job under its id and of a sample under (job, sample). Everything here is plain data.

Shape legend: n tokens of a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from weft.base.errors import ConfigError
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


CHECKPOINT_SHARE = 0.02
"""Of a job's time, what checkpoints may take where their distance is not given."""
_MOST = 1e6
"""No optimizer's number makes sense beyond it, and float32 overflows far beyond it."""


class LossNormalization(StrEnum):
    """What the summed loss of an optimizer step is divided by."""

    TOKEN = "token"
    """The label weight of the whole step (transformers since 4.46)."""
    SAMPLE = "sample"
    """Each sample's own label weight, then the number of samples."""


class BackwardOrder(StrEnum):
    """How backward windows follow each other; both give the same gradients to round-off."""

    LAYER_MAJOR = "layer-major"
    """All windows of a layer, then the layer below: least memory."""
    WINDOW_MAJOR = "window-major"
    """All layers of a window, then the window to its left."""


class OptimizerName(StrEnum):
    """Optimizers of adapters."""

    ADAMW = "adamw"
    SGD = "sgd"


class ScheduleName(StrEnum):
    """Learning-rate schedules, with linear warm-up; transformers' definitions."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


def lr_factor(schedule: ScheduleName, step: int, *, num_warmup_steps: int, num_steps: int) -> float:
    """The share of the peak learning rate at optimizer step `step`, counted from 0."""
    if step < num_warmup_steps:
        return step / max(1, num_warmup_steps)
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    match schedule:
        case ScheduleName.CONSTANT:
            return 1.0
        case ScheduleName.LINEAR:
            return max(0.0, 1.0 - progress)
        case ScheduleName.COSINE:
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """An optimizer and its learning rate's course.

    Raises:
        ConfigError: a number is out of its range.
    """

    name: OptimizerName = OptimizerName.ADAMW
    lr: float = 2e-4
    """Peak."""
    weight_decay: float = 0.0
    """Decoupled for AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    """SGD's."""
    schedule: ScheduleName = ScheduleName.CONSTANT
    num_warmup_steps: int = 0
    max_grad_norm: float | None = None
    """Clip by the norm over all of the adapter's gradients."""

    def __post_init__(self) -> None:
        # A name written by hand: executors ask for the member itself.
        for field_name, kind in (("name", OptimizerName), ("schedule", ScheduleName)):
            given = getattr(self, field_name)
            if given not in list(kind):
                known = ", ".join(kind)
                raise ConfigError(f"optimizer {field_name} is {given!r}; it must be one of {known}")
            object.__setattr__(self, field_name, kind(given))
        if not 0 < self.lr <= _MOST:
            raise ConfigError(
                f"the learning rate is {self.lr}; it must be a positive number, {_MOST:g} at most"
            )
        for field_name in ("weight_decay", "eps"):
            given = getattr(self, field_name)
            if not 0 <= given <= _MOST:
                raise ConfigError(f"{field_name} is {given}; it must be in [0, {_MOST:g}]")
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 <= self.momentum < 1:
            raise ConfigError(f"betas {self.betas} and momentum {self.momentum} must be in [0, 1)")
        if self.num_warmup_steps < 0:
            raise ConfigError(f"num_warmup_steps is {self.num_warmup_steps}; it must be >= 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm is {self.max_grad_norm}; it must be positive or None")

    def lr_at(self, step: int, num_steps: int) -> float:
        """The rate of optimizer step `step`, counted from 0, of `num_steps`."""
        return self.lr * lr_factor(
            self.schedule, step, num_warmup_steps=self.num_warmup_steps, num_steps=num_steps
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One tokenized example."""

    token_ids: Int32
    """[n], n >= 2."""
    label_weights: Float32
    """[n] weight of the token as a label of the one before it; [0] counts for nothing."""
    line: int = 0
    """Of its file, counted from 1; 0 where it is of none."""

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.token_ids)

    @property
    def weight(self) -> float:
        """Sum of the weights of all labels."""
        return float(self.label_weights[1:].sum(dtype=np.float64))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneJobSpec:
    """All that decides what a job computes; the same spec gives the same adapter."""

    id: str
    adapter: AdapterSpec
    samples: tuple[TrainingSample, ...]
    validation: tuple[TrainingSample, ...] = ()
    num_epochs: int = 1
    batch_size: int = 1
    """Samples of one optimizer step; the last step of an epoch may hold fewer."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    loss_normalization: LossNormalization = LossNormalization.TOKEN
    seed: int = 0
    """Of initial weights, order of samples and dropout."""
    shuffles: bool = True
    remat: Remat = Remat.PRUNED
    backward_order: BackwardOrder = BackwardOrder.LAYER_MAJOR
    tenant: str = ""
    tenant_weight: float = 1.0
    validate_every: int = 0
    """Optimizer steps between passes over `validation`; 0 means at the end of each epoch."""
    checkpoint_every: int | None = 1
    """Optimizer steps between checkpoints, where `checkpoint_dir` is set; None: as few as keep
    writing below `CHECKPOINT_SHARE` of the time of the steps between."""
    checkpoint_dir: str | None = None
    """Checkpoints are written to `checkpoint_dir/step-N`, renamed in when they are whole."""
    resume_from: str | None = None
    """A checkpoint of this job: weights, optimizer state and the number of steps done."""
    initial_adapter: str | None = None
    """An adapter directory whose weights the job starts from; its optimizer starts fresh."""


# ---- commands to an executor: `Batch.finetune` ----


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStart:
    """Allocate an adapter, its gradients and optimizer state, or load them."""

    job_id: str
    adapter: AdapterSpec
    optimizer: OptimizerSpec
    seed: int
    remat: Remat
    backward_order: BackwardOrder
    resume_from: str | None = None
    initial_adapter: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleStart:
    """A sample takes a slot; its tokens and labels are known from here on."""

    job_id: str
    sample: int
    """Number within the job: counts samples over all steps, validation apart; names its state."""
    slot: int
    """Row of the page tables; at least `ExecutorInfo.max_num_seqs`."""
    token_ids: Int32
    label_weights: Float32
    loss_scale: float
    """What a label's weighted loss is multiplied by before the backward: the step's normalizer."""
    step: int
    """Optimizer step that it belongs to; with (job seed, layer, target, position, index within the
    step) it seeds dropout."""
    index: int
    """Its place among the samples of the step."""
    is_validation: bool = False
    """Forward only: nothing is kept, no dropout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSegment:
    """The finetuning side of a row whose kind is FT_FORWARD or FT_BACKWARD.

    The tokens [begin, end) of the sample are also the row's tokens in an FT_FORWARD row; an
    FT_BACKWARD row has none (its `row_starts` are equal) and passes the row's layers [a, b) from
    the top down.
    """

    row: int
    job_id: str
    sample: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerStep:
    """Apply the gradients that the samples of a step have left, then clear them."""

    job_id: str
    step: int
    """Counted from 0."""
    lr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveCheckpoint:
    """Write weights, optimizer state and `num_steps` to a directory, atomically."""

    job_id: str
    path: str
    num_steps: int
    """Optimizer steps done."""
    is_final: bool = False
    """The adapter alone, in PEFT's format where it has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishAdapter:
    """Keep the adapter's present weights as a servable version."""

    job_id: str
    id: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneWork:
    """The finetuning side of a batch.

    Order: `job_starts`, `sample_starts`, the batch's rows (forward rows together with inference
    rows, then backward rows in their order), `sample_ends`, `steps`, `saves`, `publishes`,
    `job_ends`. What is said of an unknown or failed job is skipped. With `is_backward_first` the
    backward rows and then `steps` come before the forward rows, whose samples may so belong to the
    next step.
    """

    job_starts: tuple[JobStart, ...] = ()
    sample_starts: tuple[SampleStart, ...] = ()
    segments: tuple[FinetuneSegment, ...] = ()
    sample_ends: tuple[tuple[str, int], ...] = ()
    """(job, sample): free its state."""
    steps: tuple[OptimizerStep, ...] = ()
    saves: tuple[SaveCheckpoint, ...] = ()
    publishes: tuple[PublishAdapter, ...] = ()
    job_ends: tuple[str, ...] = ()
    """Free everything of the job."""
    is_backward_first: bool = False


# ---- what comes back: `StepResult.finetune` ----


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentLoss:
    """Of one FT_FORWARD row: the weighted sum of its labels' losses, not normalized."""

    job_id: str
    sample: int
    loss_sum: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """Of one optimizer step."""

    job_id: str
    step: int
    grad_norm: float
    """Before clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint is on disk, under its final name."""

    job_id: str
    path: str
    num_steps: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFailure:
    """A job cannot go on: a loss or gradient that is not finite, a disk that is full."""

    job_id: str
    message: str
    step: int
    sample: int | None = None
    """Whose loss it was; None where no single one is to blame."""
    is_of_step: bool = False
    """All samples of the step are to blame: its gradient."""
    path: str | None = None
    """The checkpoint that could not be written, be it of an earlier batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOutcome:
    """What a batch did for its jobs.

    A checkpoint may be written while later batches run: the outcome of one of these tells of it. An
    executor tells of it before it takes the job's next optimizer step, and waits for it where a
    batch has a finetuning side and nothing else to do.
    """

    losses: tuple[SegmentLoss, ...] = ()
    steps: tuple[StepOutcome, ...] = ()
    saves: tuple[CheckpointSaved, ...] = ()
    failures: tuple[JobFailure, ...] = ()


# ---- what a job's owner hears ----


class JobStatus(StrEnum):
    """Where a job is; the API shows and the store keeps the same words."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing comes after it."""
        return self in FINAL_STATUSES


FINAL_STATUSES = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """An optimizer step is done."""

    job_id: str
    step: int
    """Steps done."""
    num_steps: int
    """Of the whole job."""
    epoch: float
    loss: float
    """Mean over the label weight of the step."""
    lr: float
    grad_norm: float
    num_tokens: int
    """Tokens of the step's samples."""
    elapsed_s: float
    """Since the previous step's end, pauses included."""
    validation_loss: float | None = None
    """Where this step was followed by a pass over the validation samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobChanged:
    """A job's status is new; a failure says why."""

    job_id: str
    status: JobStatus
    message: str = ""
    adapter_id: str = ""
    """Of a success: the adapter that is served from now on, and its version."""
    adapter_version: int = 0


FinetuneEvent = StepMetrics | JobChanged | CheckpointSaved
