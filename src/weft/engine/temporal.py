"""Temporal sharing: so many inference iterations, then one whole step of a job, alone.

(FlexLLM sheet §5.2. The rule of the dynamic form was not published: here the number of inference
iterations is what their spare time under the objective needs to pay for a step, and none is begun
while a request waits.)
"""

from __future__ import annotations

import math

from weft.cost.step_time import IterationShape
from weft.engine.finetune_limits import FinetuneConfig
from weft.engine.rooms import StepRoom

_FIRST_GUESS = 64
_MOST_ITERATIONS = 512
_SMOOTHING = 0.1


class Turns:
    """Whose turn it is; and, for the dynamic form, what turns take."""

    def __init__(self, config: FinetuneConfig, *, tpot_s: float) -> None:
        self._config = config
        self._tpot_s = tpot_s
        self._room: StepRoom | None = None
        self._num_since = 0
        self._step_s = math.nan
        self._step_so_far_s = 0.0
        self._inference_s = math.nan

    def is_jobs_turn(self, *, num_waiting: int, has_requests: bool) -> bool:
        """Whether a step is under way, or is due."""
        if self._room is not None or not has_requests:
            return True
        if self._config.temporal_iterations is not None:
            return self._num_since >= self._config.temporal_iterations
        return num_waiting == 0 and self._num_since >= self._dynamic()

    def room(self) -> StepRoom:
        """Of the step that is under way, or of the next."""
        if self._room is None:
            self._room = StepRoom(max_window=self._config.max_window_tokens)
        return self._room

    def took_jobs(self, *, is_empty: bool) -> None:
        """A batch of the job's was decided, or none was possible."""
        if is_empty or (self._room is not None and self._room.is_done):
            self._room = None
            self._num_since = 0

    def took_inference(self, has_rows: bool) -> None:
        """An inference iteration was decided."""
        self._num_since += has_rows

    def observed(self, shape: IterationShape, seconds: float) -> None:
        """An iteration ended."""
        if not shape.has_finetuning:
            self._inference_s = _smooth(self._inference_s, seconds)
            if self._step_so_far_s:
                self._step_s = _smooth(self._step_s, self._step_so_far_s)
                self._step_so_far_s = 0.0
        elif not shape.num_decode_rows and not shape.num_prefill_rows:
            self._step_so_far_s += seconds

    def abandon(self) -> None:
        """Batches in flight have no result."""
        self._room = None

    def _dynamic(self) -> int:
        if math.isnan(self._step_s) or math.isnan(self._inference_s):
            return _FIRST_GUESS
        spare_s = self._tpot_s - self._inference_s
        if spare_s <= 0:
            return _MOST_ITERATIONS
        return min(max(1, math.ceil(self._step_s / spare_s)), _MOST_ITERATIONS)


def _smooth(mean: float, value: float) -> float:
    return value if math.isnan(mean) else mean + _SMOOTHING * (value - mean)
