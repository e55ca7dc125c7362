"""The finetuning side of an iteration while it is being decided: rows, and commands around them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np

from weft.engine.backward_cursor import BackwardCursor, BackwardSpan
from weft.engine.finetune import (
    FinetuneSegment,
    FinetuneWork,
    JobStart,
    OptimizerStep,
    PublishAdapter,
    SampleStart,
    SaveCheckpoint,
)
from weft.engine.job_plan import PlannedSample


@dataclass(kw_only=True, slots=True, eq=False)
class ActiveSample:
    """A sample that holds a slot, its pages and its state in the executor."""

    job_id: str
    planned: PlannedSample
    slot: int
    num_bytes: int = 0
    """Of the memory budget."""
    forward_end: int = 0
    """Tokens [0, forward_end) are in submitted batches."""
    cursor: BackwardCursor | None = None
    """None for validation, and before the forward pass is complete."""
    labels_before: list[int] = field(default_factory=lambda: [])
    """[n+1] labelled positions before each."""

    def __post_init__(self) -> None:
        # The label of position p is the token after it.
        is_label = (self.planned.sample.label_weights[1:] != 0).tolist()
        self.labels_before = [0, *accumulate(is_label), sum(is_label)]

    @property
    def num_tokens(self) -> int:
        """n."""
        return self.planned.sample.num_tokens

    @property
    def num_forward_left(self) -> int:
        """Tokens that the forward pass has yet to take."""
        return self.num_tokens - self.forward_end

    def num_labels(self, begin: int, end: int) -> int:
        """Positions in [begin, end) whose loss counts."""
        return self.labels_before[end] - self.labels_before[begin]


class Room(Protocol):
    """What an iteration can still carry; each grant takes what it gives."""

    @property
    def is_timed(self) -> bool:
        """Whether it prices rows, so that it is worth while to mix them: forward rows then go
        beside the backward of other samples, and behind a step."""
        ...

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
        """How many of the sample's next tokens go forward; 0 for none.

        A row of the sample that stands in the batch already begins at `row_begin`. `only_cheap`
        asks for tokens that ride along in what the batch does anyway.
        """
        ...

    def backward(
        self, sample: ActiveSample, cursor: BackwardCursor
    ) -> tuple[tuple[BackwardSpan, ...], BackwardCursor]:
        """The sample's next backward rows, none if they do not fit, and the cursor behind them."""
        ...

    def step(self) -> bool:
        """Whether an optimizer step fits."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardRow:
    """One FT_FORWARD row."""

    job_id: str
    sample: ActiveSample
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardRow:
    """One FT_BACKWARD row."""

    job_id: str
    sample: ActiveSample
    span: BackwardSpan


@dataclass(kw_only=True, slots=True)
class FinetunePart:
    """Rows and commands of one batch, in the order in which they were decided."""

    forward: list[ForwardRow] = field(default_factory=lambda: [])
    backward: list[BackwardRow] = field(default_factory=lambda: [])
    job_starts: list[JobStart] = field(default_factory=lambda: [])
    sample_starts: list[SampleStart] = field(default_factory=lambda: [])
    sample_ends: list[tuple[str, int]] = field(default_factory=lambda: [])
    steps: list[OptimizerStep] = field(default_factory=lambda: [])
    saves: list[SaveCheckpoint] = field(default_factory=lambda: [])
    publishes: list[PublishAdapter] = field(default_factory=lambda: [])
    job_ends: list[str] = field(default_factory=lambda: [])
    validated: dict[str, int] = field(default_factory=lambda: {})
    """Jobs whose pass over the validation samples ends here -> steps done before it."""
    is_backward_first: bool | None = None
    """As `FinetuneWork.is_backward_first`; None while either order would do."""
    lives: dict[str, int] = field(default_factory=lambda: {})
    """Jobs that have anything in here, and which of their lives it was."""
    awaits_saves: bool = False
    """Nothing is in here but the question what became of checkpoints that are being written."""

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a row nor a command."""
        return not (self.lives or self.job_ends or self.awaits_saves)

    @property
    def num_forward_tokens(self) -> int:
        """Tokens of all forward rows."""
        return sum(row.end - row.begin for row in self.forward)

    @property
    def num_backward_token_layers(self) -> int:
        """Tokens times layers of all backward rows."""
        return sum(row.span.num_token_layers for row in self.backward)

    def work(self, first_row: int) -> FinetuneWork:
        """The commands, with segments for rows that begin at `first_row` of the batch."""
        rows = [(row.job_id, row.sample, row.begin, row.end) for row in self.forward]
        rows += [(row.job_id, row.sample, row.span.begin, row.span.end) for row in self.backward]
        return FinetuneWork(
            job_starts=tuple(self.job_starts),
            sample_starts=tuple(self.sample_starts),
            segments=tuple(
                FinetuneSegment(
                    row=first_row + i,
                    job_id=job_id,
                    sample=sample.planned.number,
                    begin=begin,
                    end=end,
                )
                for i, (job_id, sample, begin, end) in enumerate(rows)
            ),
            sample_ends=tuple(self.sample_ends),
            steps=tuple(self.steps),
            saves=tuple(self.saves),
            publishes=tuple(self.publishes),
            job_ends=tuple(self.job_ends),
            is_backward_first=bool(self.is_backward_first),
        )

    def tokens(self) -> np.ndarray:
        """[T] token ids of the forward rows."""
        parts = [row.sample.planned.sample.token_ids[row.begin : row.end] for row in self.forward]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)
