"""A Perfetto trace of a running engine: the segments of every iteration."""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.base.clock import Clock
from weft.base.trace import TraceWriter
from weft.engine.batch import Batch, ExecutorInfo, SegmentKind, StepResult
from weft.engine.executor import BatchExecutor

MAX_EVENTS = 1_000_000
"""Events kept in memory, about 600 MB; later iterations are not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Submitted:
    batch_id: int
    start_s: float
    rows: dict[str, int]
    tokens: dict[str, int]


class TracedExecutor:
    """Passes everything through to another executor and records what each iteration carried."""

    def __init__(self, executor: BatchExecutor, *, path: str | Path, clock: Clock) -> None:
        self._executor = executor
        self._path = Path(path)
        self._clock = clock
        self._writer = TraceWriter()
        self._submitted: deque[_Submitted] = deque()
        self._idle_from_s = 0.0
        self._is_closed = False

    @property
    def info(self) -> ExecutorInfo:
        """The executor's own."""
        return self._executor.info

    @property
    def max_in_flight(self) -> int:
        """The executor's own."""
        return self._executor.max_in_flight

    def submit(self, batch: Batch) -> None:
        """Submit and remember how many rows and tokens of each kind."""
        lengths = np.diff(batch.row_starts)
        rows: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for kind in np.unique(batch.kinds).tolist():
            chosen = batch.kinds == kind
            name = SegmentKind(kind).name.lower()
            rows[name] = int(chosen.sum())
            tokens[name] = int(lengths[chosen].sum())
        if batch.finetune is not None:
            # Backward rows hold no tokens of their own, but pass those of a span.
            spans = [
                segment.end - segment.begin
                for segment in batch.finetune.segments
                if batch.kinds[segment.row] == SegmentKind.FT_BACKWARD
            ]
            if spans:
                tokens[SegmentKind.FT_BACKWARD.name.lower()] = sum(spans)
            for kind in ("steps", "saves"):
                if count := len(getattr(batch.finetune, kind)):
                    name = {"steps": "optimizer", "saves": "checkpoint"}[kind]
                    rows[name], tokens[name] = count, 0
        self._submitted.append(
            _Submitted(
                batch_id=batch.batch_id, start_s=self._clock.now_s(), rows=rows, tokens=tokens
            )
        )
        self._executor.submit(batch)

    def collect(self) -> StepResult:
        """Collect and record the iteration; a batch that waited for another starts after it."""
        result = self._executor.collect()
        submitted = self._submitted.popleft()
        end_s = self._clock.now_s()
        start_s = max(submitted.start_s, self._idle_from_s)
        self._idle_from_s = end_s
        if len(self._writer) < MAX_EVENTS:
            self._record(submitted, start_s, end_s)
            if len(self._writer) >= MAX_EVENTS:
                warnings.warn(
                    f"the trace holds {MAX_EVENTS} events; later iterations are not recorded",
                    stacklevel=2,
                )
        return result

    def abandon(self) -> None:
        """Forget the batches in flight; they are not recorded."""
        self._submitted.clear()
        self._executor.abandon()

    def close(self) -> None:
        """Close the executor and write the file."""
        self._executor.close()
        if not self._is_closed:
            self._is_closed = True
            try:
                self._writer.write(self._path)
            except OSError as error:
                warnings.warn(f"the trace is lost: {self._path}: {error}", stacklevel=2)

    def _record(self, submitted: _Submitted, start_s: float, end_s: float) -> None:
        duration_s = end_s - start_s
        self._writer.slice(
            "engine",
            "iterations",
            f"batch {submitted.batch_id}",
            start_s=start_s,
            duration_s=duration_s,
            category="iteration",
            args={"rows": sum(submitted.rows.values()), "tokens": sum(submitted.tokens.values())},
        )
        for kind, num_tokens in submitted.tokens.items():
            self._writer.slice(
                "engine",
                kind,
                f"{num_tokens} tokens",
                start_s=start_s,
                duration_s=duration_s,
                category="segments",
                args={"rows": submitted.rows[kind], "tokens": num_tokens},
            )
        self._writer.counter(
            "engine",
            "tokens",
            time_s=start_s,
            values={kind: float(number) for kind, number in submitted.tokens.items()},
        )
