"""How much finetuning an iteration can carry: by a fixed count, by fixed windows, or by time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from weft.cost.step_time import IterationShape
from weft.engine.backward_cursor import BackwardCursor, BackwardSpan
from weft.engine.finetune_part import ActiveSample
from weft.engine.iteration_shape import SpanTerms

_CHEAP = 0.3
"""Share of a forward token's usual price up to which one rides along."""
_FULL = 1024
"""Tokens with which an iteration is bound by arithmetic."""
_MOST_GUESSES = 6
_WORTH = 1.05
"""A piece costs at most so much more than one that had the room of a whole iteration."""
_Backward = tuple[tuple[BackwardSpan, ...], BackwardCursor]


class _Untimed:
    """Rooms that go by counts: rows of one kind follow each other."""

    __slots__ = ()

    @property
    def is_timed(self) -> bool:
        """No."""
        return False


@dataclass(kw_only=True, slots=True)
class LeastRoom(_Untimed):
    """One piece, as small as can be."""

    granule: int
    is_taken: bool = False

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
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
class CountedRoom(_Untimed):
    """So many tokens forward, or so many layers of whole samples backward.

    An iteration does one or the other. (FlexLLM as shipped: sheet §4.2.)
    """

    num_tokens: int
    num_layers: int

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
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
class WindowRoom(_Untimed):
    """Fixed windows, aligned to the sample's start, so that runs repeat bit for bit."""

    forward_window: int
    """Tokens of one row forward, and of all of them together."""
    backward_window: int
    num_layers: int
    """Of the model: an iteration's backward is a window times these."""
    num_forward: int = 0
    num_backward: int = 0

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
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
class StepRoom(_Untimed):
    """One whole optimizer step of one job, or one of its validation samples.

    (Temporal sharing: FlexLLM sheet §5.2, where a step is one sample.)
    """

    max_window: int
    sample: ActiveSample | None = None
    """Of the job whose turn it is."""
    has_stepped: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the turn needs no further iteration."""
        sample = self.sample
        if self.has_stepped or sample is None:
            return self.has_stepped
        return sample.planned.is_validation and not sample.num_forward_left

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
        """All of the samples of the step that came first."""
        if not self._is_of_turn(sample):
            return 0
        return min(sample.num_forward_left, self.max_window)

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """All layers."""
        if not self._is_of_turn(sample):
            return (), cursor
        return cursor.take(cursor.num_left)

    def step(self) -> bool:
        """Once."""
        was, self.has_stepped = self.has_stepped, True
        return not was

    def _is_of_turn(self, sample: ActiveSample) -> bool:
        if self.sample is None:
            self.sample = sample
        mine = self.sample
        if mine.planned.is_validation:
            return sample is mine
        return (sample.job_id, sample.planned.step) == (mine.job_id, mine.planned.step)


class TimedRoom:
    """As much as a prediction says will end in time, and is worth its price.

    Every row costs something before its first token, so that a large piece is cheaper by the token.
    Where head-room that is left now comes back as a larger one (`full_s` above `budget_s`), a piece
    is granted only if waiting would hardly make it cheaper.

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
        full_s: float = 0.0,
    ) -> None:
        """`full_s`: the budget that an iteration gets later if this one leaves its own."""
        self.shape = shape
        self.budget_s = budget_s
        self._spare_s = max(full_s, budget_s) - predict(shape)
        self._terms = terms
        self._predict = predict
        self._granule = granule
        self._max_window = max_window

    @property
    def is_timed(self) -> bool:
        """Yes."""
        return True

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
        """The longest window that ends in time: whole granules, or all that is left."""
        begin = sample.forward_end
        row_begin = begin if row_begin is None else row_begin

        def shape_of(count: int) -> IterationShape:
            labels = sample.num_labels(begin, begin + count)
            return self._terms.add_forward(
                self.shape, begin, begin + count, labels, row_begin=row_begin
            )

        most = min(sample.num_forward_left, self._max_window - (begin - row_begin))
        if only_cheap:
            most = self._num_cheap(most, shape_of)
        count, shape = self._largest(most, shape_of)
        if not (only_cheap or self._is_worth(count, shape, lambda n: shape_of(min(n, most)))):
            return 0
        self.shape = shape
        return count

    def _is_worth(
        self, count: int, shape: IterationShape, shape_of: Callable[[int], IterationShape]
    ) -> bool:
        """Whether `count` is about as cheap, by the token, as what would fill all room to spare."""
        left_s = self.budget_s - self._predict(self.shape)
        if left_s <= 0 or self._spare_s <= left_s:
            return True
        fuller = shape_of(int(count * self._spare_s / left_s))
        return self._price_s(shape) <= _WORTH * self._price_s(fuller)

    def _price_s(self, shape: IterationShape) -> float:
        """Seconds of what `shape` has more than the iteration so far, by token or token-layer."""
        now = self.shape
        count = shape.num_ft_tokens - now.num_ft_tokens
        count += shape.num_ft_token_layers - now.num_ft_token_layers
        return (self._predict(shape) - self._predict(now)) / max(1, count)

    def _num_cheap(self, most: int, shape_of: Callable[[int], IterationShape]) -> int:
        """Tokens that cost less than a share of what tokens cost where they fill an iteration.

        An iteration that is bound by reading weights carries some for nothing.
        """
        if most <= 0:
            return 0
        before_s = self._predict(self.shape)
        full = replace(self.shape, num_ft_tokens=self.shape.num_ft_tokens + _FULL)
        fuller = replace(full, num_ft_tokens=full.num_ft_tokens + _FULL)
        limit_s = _CHEAP * (self._predict(fuller) - self._predict(full)) / _FULL

        def is_cheap(count: int) -> bool:
            return self._predict(shape_of(count)) - before_s <= limit_s * count

        if is_cheap(most):
            return most
        low, high = 0, (most - 1) // self._granule
        if high and not is_cheap(self._granule):
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if is_cheap(middle * self._granule) else (low, middle - 1)
        return low * self._granule

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        """The most token-layers that end in time."""

        def shape_of(count: int) -> IterationShape:
            spans = cursor.take(count, granule=self._granule)[0]
            return self._terms.add_backward(
                self.shape, [(s.begin, s.end, s.first_layer, s.end_layer) for s in spans]
            )

        count, shape = self._largest(cursor.num_left, shape_of)
        spans = cursor.take(count, granule=self._granule)[0]
        if len(spans) > 1:
            # A short last row is left to another iteration, which may take more of it.
            fewer = sum(span.num_token_layers for span in spans[:-1])
            without = shape_of(fewer)
            if self._price_s(without) < self._price_s(shape):
                count, shape = fewer, without
        if not spans or not self._is_worth(count, shape, shape_of):
            return (), cursor
        self.shape = shape
        return cursor.take(count, granule=self._granule)

    def step(self) -> bool:
        """Whether it ends in time."""
        shape = replace(self.shape, num_ft_steps=self.shape.num_ft_steps + 1)
        if not self._fits(shape):
            return False
        self.shape = shape
        return True

    def _fits(self, shape: IterationShape) -> bool:
        return self._predict(shape) <= self.budget_s

    def _largest(
        self, most: int, shape_of: Callable[[int], IterationShape]
    ) -> tuple[int, IterationShape]:
        """The largest count that fits, with its shape: `most`, a number of granules, or 0.

        Predictions are pieces of straight lines, so that the count is guessed along a line between
        one that fits and one that does not; bisection ends what guesses do not.
        """
        if most <= 0:
            return 0, self.shape
        granule, found = self._granule, self.shape
        shape = shape_of(most)
        high_s = self._predict(shape)
        if high_s <= self.budget_s:
            return most, shape
        low, high = 0, -(-most // granule)  # Granules: `low` fits, `high` does not.
        low_s = self._predict(found)
        if low_s >= self.budget_s:
            return 0, found
        num_guesses = 0
        while high - low > 1:
            middle = (low + high) // 2
            if num_guesses < _MOST_GUESSES and high_s > low_s:
                share = (self.budget_s - low_s) / (high_s - low_s)
                middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
            num_guesses += 1
            shape = shape_of(middle * granule)
            seconds = self._predict(shape)
            if seconds <= self.budget_s:
                low, low_s, found = middle, seconds, shape
            else:
                high, high_s = middle, seconds
        return low * granule, found
