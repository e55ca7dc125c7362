"""The serving executor under the virtual clock: it computes nothing and takes the modelled time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from weft.base.clock import VirtualClock
from weft.base.errors import ConfigError, IntegrityError, OutOfMemoryError
from weft.cost.shapes import ModelShape
from weft.cost.step_time import StepTimeModel
from weft.engine.batch import Batch, CacheGroup, ExecutorInfo, SegmentKind, StepResult
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneOutcome,
    FinetuneWork,
    SegmentLoss,
    StepOutcome,
)
from weft.engine.iteration_shape import ShapeCounter

_FT_FORWARD = int(SegmentKind.FT_FORWARD)


@dataclass(frozen=True, kw_only=True, slots=True)
class _InFlight:
    batch: Batch
    busy_s: float
    end_s: float
    finetune: FinetuneOutcome | None = None


class SimulatedBatchExecutor:
    """Implements `engine.BatchExecutor`: a batch ends when the step-time model says so.

    `submit` advances the clock by the host's share, then queues the batch on the device, which runs
    one batch after another; `collect` advances the clock to the end of the oldest one. With more
    than one in flight the host's share so overlaps the device's. Every sampled token is
    `filler_token`; log-probabilities are not produced. Finetuning takes time and teaches nothing.

    Raises:
        ConfigError: `max_in_flight` below 1, or a filler outside the vocabulary.
    """

    def __init__(
        self,
        info: ExecutorInfo,
        step_time: StepTimeModel,
        clock: VirtualClock,
        *,
        max_in_flight: int = 1,
        filler_token: int = 0,
    ) -> None:
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight is {max_in_flight}; it must be at least 1")
        if not 0 <= filler_token < info.vocab_size:
            raise ConfigError(
                f"filler_token is {filler_token}; it must be below vocab_size ({info.vocab_size})"
            )
        self._info = info
        self._step_time = step_time
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._filler_token = filler_token
        self._in_flight: deque[_InFlight] = deque()
        self._device_free_s = clock.now_s()
        self._counter = ShapeCounter(info)
        self._labels: dict[tuple[str, int], np.ndarray] = {}

    @property
    def info(self) -> ExecutorInfo:
        """As given."""
        return self._info

    @property
    def max_in_flight(self) -> int:
        """As given."""
        return self._max_in_flight

    def submit(self, batch: Batch) -> None:
        """Queue a batch on the device after the host's share of it.

        Raises:
            UnsupportedError: it holds a segment kind that the step-time model cannot price.
            IntegrityError: `max_in_flight` batches are in flight already.
        """
        if len(self._in_flight) >= self._max_in_flight:
            raise IntegrityError(
                f"batch {batch.batch_id} was submitted while {len(self._in_flight)} are in "
                f"flight; the limit is {self._max_in_flight}"
            )
        shape = self._counter.count(batch)
        self._clock.advance_to(self._clock.now_s() + self._step_time.host_s(shape))
        busy_s = self._step_time.device_s(shape)
        self._device_free_s = max(self._device_free_s, self._clock.now_s()) + busy_s
        outcome = None if batch.finetune is None else self._finetune(batch, batch.finetune)
        self._in_flight.append(
            _InFlight(batch=batch, busy_s=busy_s, end_s=self._device_free_s, finetune=outcome)
        )

    def collect(self) -> StepResult:
        """Advance the clock to the end of the oldest batch.

        Raises:
            IntegrityError: none is in flight.
        """
        if not self._in_flight:
            raise IntegrityError("collect was called with no batch in flight")
        flight = self._in_flight.popleft()
        self._clock.advance_to(max(self._clock.now_s(), flight.end_s))
        num_samples = len(flight.batch.sample_rows)
        return StepResult(
            batch_id=flight.batch.batch_id,
            tokens=np.full((num_samples, 1), self._filler_token, np.int32),
            num_tokens=np.ones(num_samples, np.int32),
            elapsed_s=flight.busy_s,
            finetune=flight.finetune,
        )

    def _finetune(self, batch: Batch, work: FinetuneWork) -> FinetuneOutcome:
        """Every label's loss is 1, every gradient's norm is 1, and nothing is written."""
        for start in work.sample_starts:
            self._labels[start.job_id, start.sample] = start.label_weights
        losses: list[SegmentLoss] = []
        for segment in work.segments:
            if batch.kinds[segment.row] != _FT_FORWARD:
                continue
            labels = self._labels[segment.job_id, segment.sample]
            weight = float(labels[segment.begin + 1 : segment.end + 1].sum(dtype=np.float64))
            losses.append(
                SegmentLoss(
                    job_id=segment.job_id, sample=segment.sample, loss_sum=weight, weight=weight
                )
            )
        for key in work.sample_ends:
            self._labels.pop(key, None)
        for key in [key for key in self._labels if key[0] in work.job_ends]:
            del self._labels[key]
        return FinetuneOutcome(
            losses=tuple(losses),
            steps=tuple(
                StepOutcome(job_id=step.job_id, step=step.step, grad_norm=1.0)
                for step in work.steps
            ),
            saves=tuple(
                CheckpointSaved(
                    job_id=save.job_id, path=save.path, num_steps=save.num_steps, elapsed_s=0.0
                )
                for save in work.saves
            ),
        )

    def abandon(self) -> None:
        """Forget batches in flight."""
        self._in_flight.clear()

    def close(self) -> None:
        """Forget batches in flight."""
        self._in_flight.clear()


def arena_info(
    shape: ModelShape,
    *,
    dtype: str,
    kv_cache_bytes: int,
    max_num_seqs: int,
    page_tokens: int = 16,
    max_finetune_samples: int = 0,
) -> ExecutorInfo:
    """The arena of an executor that holds a model of this shape, in one cache group.

    Raises:
        OutOfMemoryError: the bytes hold no page beside the null page.
    """
    page_bytes = shape.kv_bytes_per_token(dtype) * page_tokens
    num_pages = kv_cache_bytes // page_bytes
    if num_pages < 2:
        raise OutOfMemoryError(
            f"{kv_cache_bytes} bytes hold {num_pages} pages of {page_bytes} bytes; at least "
            f"{2 * page_bytes} bytes are needed for {shape.name}"
        )
    group = CacheGroup(
        layers=tuple(range(shape.num_layers)), page_tokens=page_tokens, window=shape.window
    )
    return ExecutorInfo(
        num_pages=num_pages,
        page_bytes=page_bytes,
        groups=(group,),
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        max_num_seqs=max_num_seqs,
        max_finetune_samples=max_finetune_samples,
    )
