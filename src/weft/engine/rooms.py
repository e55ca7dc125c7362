"""How much finetuning an iteration can carry: by a fixed count, by fixed windows, or by time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from weft.cost.step_time import IterationShape
from weft.engine.backward_cursor import BackwardCursor, BackwardSpan
from weft.engine.finetune_part import ActiveSample
from weft.engine.iteration_shape import SpanTerms

_Backward = tuple[tuple[BackwardSpan, ...], BackwardCursor]


@dataclass(kw_only=True, slots=True)
class LeastRoom:
    """One piece, as small as can be."""

    granule: int
    is_taken: bool = False

    def forward(self, sample: ActiveSample) -> int:
        """A granule."""
        return min(self.granule, sample.num_forward_left) if self._take() else 0

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """A granule of one layer; in window-major order, of the open window's next layer."""
        if not self._take():
            return (), cursor
        least = max(self.granule, cursor.end - cursor.begin)
        return cursor.take(least, granule=self.granule)

    def step(self) -> bool:
        """It is one."""
        return self._take()

    def _take(self) -> bool:
        was_taken, self.is_taken = self.is_taken, True
        return not was_taken


@dataclass(kw_only=True, slots=True)
class CountedRoom:
    """So many tokens forward, or so many layers of whole samples backward.

    An iteration does one or the other. (FlexLLM as shipped: sheet §4.2.)
    """

    num_tokens: int
    num_layers: int

    def forward(self, sample: ActiveSample) -> int:
        """What is left of the tokens."""
        count = min(self.num_tokens, sample.num_forward_left)
        self.num_tokens -= count
        if count:
            self.num_layers = 0
        return count

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """What is left of the layers."""
        spans, behind = cursor.take(self.num_layers * sample.num_tokens)
        done = sum(span.num_token_layers for span in spans)
        self.num_layers -= -(-done // sample.num_tokens)
        if spans:
            self.num_tokens = 0
        return spans, behind

    def step(self) -> bool:
        """Always: it is part of the last layer's backward."""
        return True


@dataclass(kw_only=True, slots=True)
class WindowRoom:
    """Fixed windows, aligned to the sample's start, so that runs repeat bit for bit."""

    forward_window: int
    """Tokens of one row forward, and of all of them together."""
    backward_window: int
    num_layers: int
    """Of the model: an iteration's backward is a window times these."""
    num_forward: int = 0
    num_backward: int = 0

    def forward(self, sample: ActiveSample) -> int:
        """The whole next window, or nothing."""
        begin, window = sample.forward_end, self.forward_window
        count = min(sample.num_forward_left, window - begin % window)
        if self.num_forward and self.num_forward + count > window:
            return 0
        self.num_forward += count
        return count

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """Whole windows; the first of an iteration always."""
        limit = self.backward_window * self.num_layers
        window = replace(cursor, max_window=self.backward_window)
        spans, behind = window.take(limit - self.num_backward, granule=self.backward_window)
        self.num_backward += sum(span.num_token_layers for span in spans)
        return spans, replace(behind, max_window=cursor.max_window)

    def step(self) -> bool:
        """Always."""
        return True


@dataclass(kw_only=True, slots=True)
class SampleRoom:
    """One whole sample, forward and backward, and the step if it is the last of one.

    (Temporal sharing: FlexLLM sheet §5.2.)
    """

    max_window: int
    sample: ActiveSample | None = None

    @property
    def is_done(self) -> bool:
        """Whether the sample needs no further iteration."""
        sample = self.sample
        if sample is None or sample.num_forward_left:
            return False
        return sample.planned.is_validation or (sample.cursor is not None and sample.cursor.is_done)

    def forward(self, sample: ActiveSample) -> int:
        """All of the sample that came first."""
        if self.sample is None:
            self.sample = sample
        return min(sample.num_forward_left, self.max_window) if sample is self.sample else 0

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """All layers."""
        if self.sample is None:
            self.sample = sample
        if sample is not self.sample:
            return (), cursor
        return cursor.take(cursor.num_left)

    def step(self) -> bool:
        """Always."""
        return True


class TimedRoom:
    """As much as a prediction says will end in time.

    `shape` is the iteration as decided so far; it grows with what is granted.
    """

    def __init__(
        self,
        shape: IterationShape,
        terms: SpanTerms,
        predict: Callable[[IterationShape], float],
        *,
        budget_s: float,
        granule: int,
        max_window: int,
    ) -> None:
        self.shape = shape
        self.budget_s = budget_s
        self._terms = terms
        self._predict = predict
        self._granule = granule
        self._max_window = max_window

    def forward(self, sample: ActiveSample) -> int:
        """The longest window that ends in time: whole granules, or all that is left."""
        begin = sample.forward_end

        def shape_of(count: int) -> IterationShape:
            labels = sample.num_labels(begin, begin + count)
            return self._terms.add_forward(self.shape, begin, begin + count, labels)

        most = min(sample.num_forward_left, self._max_window)
        count = self._largest(most, shape_of)
        if count:
            self.shape = shape_of(count)
        return count

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """The most token-layers that end in time."""

        def shape_of(count: int) -> IterationShape:
            spans = cursor.take(count, granule=self._granule)[0]
            return self._terms.add_backward(
                self.shape, [(s.begin, s.end, s.first_layer, s.end_layer) for s in spans]
            )

        count = self._largest(cursor.num_left, shape_of)
        spans, behind = cursor.take(count, granule=self._granule)
        if spans:
            self.shape = shape_of(count)
        return spans, behind

    def step(self) -> bool:
        """Whether it ends in time."""
        shape = replace(self.shape, num_ft_steps=self.shape.num_ft_steps + 1)
        if not self._fits(shape):
            return False
        self.shape = shape
        return True

    def _fits(self, shape: IterationShape) -> bool:
        return self._predict(shape) <= self.budget_s

    def _largest(self, most: int, shape_of: Callable[[int], IterationShape]) -> int:
        """The largest count that fits: `most`, or a number of granules; 0 if none does."""
        if most <= 0:
            return 0
        if self._fits(shape_of(most)):
            return most
        low, high = 0, (most - 1) // self._granule
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high)
                if self._fits(shape_of(middle * self._granule))
                else (low, middle - 1)
            )
        return low * self._granule
