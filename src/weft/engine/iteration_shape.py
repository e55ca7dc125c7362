"""What a batch carries, counted in the numbers that price it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from weft.base.errors import UnsupportedError
from weft.cost.step_time import IterationShape
from weft.engine.batch import Batch, CacheGroup, ExecutorInfo, SegmentKind
from weft.engine.finetune import FinetuneWork

# NumPy probes an enum member for array protocols on every comparison; a plain int costs nothing.
_DECODE = int(SegmentKind.DECODE)
_FT_FORWARD = int(SegmentKind.FT_FORWARD)
_FT_BACKWARD = int(SegmentKind.FT_BACKWARD)


def iteration_shape(batch: Batch, info: ExecutorInfo) -> IterationShape:
    """Count what a batch carries, context averaged over the layers of all cache groups.

    Every finetuning token counts as one with a label; `ShapeCounter` knows better.

    Raises:
        UnsupportedError: a row is of a kind that has no step-time model.
    """
    # Rows of kind DECODE come first and carry one token each.
    num_decodes = int(np.count_nonzero(batch.kinds == _DECODE))
    num_inference = batch.num_rows
    if num_decodes < batch.num_rows and int(batch.kinds.max()) > _DECODE:
        if (batch.kinds == SegmentKind.VERIFY).any():
            raise UnsupportedError(
                "segment kind VERIFY has no step-time model; all other kinds have one"
            )
        num_inference = int(np.count_nonzero(batch.kinds <= _DECODE))
    num_tokens = int(batch.row_starts[num_inference])
    decode_context = prefill_context = prefill_pairs = 0.0
    for group in info.groups:
        share = len(group.layers) / info.num_layers
        seen = batch.prefix_lens
        if group.window is not None:
            seen = np.minimum(seen, group.window)
        decode_context += share * int(seen[:num_decodes].sum())
        if num_decodes < num_inference:
            prefill_pairs += share * int(seen[num_decodes:num_tokens].sum())
            prefill_context += share * _context_read(batch, group, num_decodes, num_inference)
    shape = IterationShape(
        num_decode_rows=num_decodes,
        num_prefill_rows=num_inference - num_decodes,
        num_prefill_tokens=num_tokens - num_decodes,
        num_sampled_rows=len(batch.sample_rows),
        decode_context_tokens=decode_context,
        prefill_context_tokens=prefill_context,
        prefill_pairs=prefill_pairs,
    )
    if batch.finetune is None:
        return shape
    return _with_finetuning(shape, batch, batch.finetune, SpanTerms(info))


def _context_read(batch: Batch, group: CacheGroup, first: int, end: int) -> int:
    """A chunk reads what its first token sees and all that lies between it and its last."""
    ends = batch.prefix_lens[batch.row_starts[first + 1 : end + 1] - 1]
    if group.window is not None:
        counts = np.diff(batch.row_starts[first : end + 1])
        ends = np.minimum(ends, counts + group.window - 1)
    return int(ends.sum())


def _with_finetuning(
    shape: IterationShape, batch: Batch, work: FinetuneWork, terms: SpanTerms
) -> IterationShape:
    backward: list[tuple[int, int, int, int]] = []
    for segment in work.segments:
        begin, end = segment.begin, segment.end
        if batch.kinds[segment.row] == _FT_FORWARD:
            shape = terms.add_forward(shape, begin, end, end - begin)
        else:
            first, last = batch.layers[segment.row].tolist()
            backward.append((begin, end, first, last))
    if backward:
        shape = terms.add_backward(shape, backward)
    return replace(shape, num_ft_steps=len(work.steps))


class SpanTerms:
    """Adds rows to a shape, one by one."""

    def __init__(self, info: ExecutorInfo) -> None:
        self._num_layers = info.num_layers
        self._windows: list[int | None] = [None] * info.num_layers
        for group in info.groups:
            for layer in group.layers:
                self._windows[layer] = group.window
        self._kinds = sorted(set(self._windows), key=lambda window: window or 0)

    def contexts(self, lengths: Sequence[int]) -> float:
        """Sum of what the last tokens of sequences of these lengths see."""
        total = 0.0
        for window in self._kinds:
            share = self._windows.count(window) / self._num_layers
            if window is None:
                total += share * sum(lengths)
            else:
                total += share * sum(min(length, window) for length in lengths)
        return total

    def add_prefill(
        self, shape: IterationShape, begin: int, count: int, *, samples: bool
    ) -> IterationShape:
        """One more chunk of a prompt: `count` tokens behind `begin` cached ones."""
        context, pairs = self._span(begin, begin + count)
        return replace(
            shape,
            num_prefill_rows=shape.num_prefill_rows + 1,
            num_prefill_tokens=shape.num_prefill_tokens + count,
            num_sampled_rows=shape.num_sampled_rows + samples,
            prefill_context_tokens=shape.prefill_context_tokens + context,
            prefill_pairs=shape.prefill_pairs + pairs,
        )

    def _span(self, begin: int, end: int) -> tuple[float, float]:
        """Tokens read and query-key pairs of a span, averaged over the layers."""
        context = pairs = 0.0
        for window in self._kinds:
            share = self._windows.count(window) / self._num_layers
            pairs += share * _pairs(begin, end, window)
            context += share * (end if window is None else min(end, end - begin + window - 1))
        return context, pairs

    def add_forward(
        self,
        shape: IterationShape,
        begin: int,
        end: int,
        num_labels: int,
        *,
        row_begin: int | None = None,
    ) -> IterationShape:
        """One more forward row, of the tokens [begin, end) of a sample.

        With `row_begin` below `begin` the row is there already and grows by those tokens.
        """
        context, pairs = self._span(begin, end)
        is_new = row_begin is None or row_begin == begin
        if row_begin is not None and not is_new:
            context = self._span(row_begin, end)[0] - self._span(row_begin, begin)[0]
        return _grown(
            shape,
            rows=int(is_new),
            tokens=end - begin,
            context=context,
            pairs=pairs,
            loss_tokens=num_labels,
        )

    def add_backward(
        self, shape: IterationShape, spans: Iterable[tuple[int, int, int, int]]
    ) -> IterationShape:
        """Further backward rows, each (begin, end, first layer, end layer)."""
        layer_rows = token_layers = pair_layers = 0
        for begin, end, first_layer, end_layer in spans:
            num_layers = end_layer - first_layer
            layer_rows += num_layers
            token_layers += (end - begin) * num_layers
            for window in self._kinds:
                count = self._windows[first_layer:end_layer].count(window)
                pair_layers += count * _pairs(begin, end, window) if count else 0
        return _grown(
            shape, layer_rows=layer_rows, token_layers=token_layers, pair_layers=pair_layers
        )


def _grown(
    shape: IterationShape,
    *,
    rows: int = 0,
    tokens: int = 0,
    context: float = 0.0,
    pairs: float = 0.0,
    loss_tokens: int = 0,
    layer_rows: int = 0,
    token_layers: int = 0,
    pair_layers: int = 0,
) -> IterationShape:
    """`shape` with more finetuning rows.

    Spelt out: a policy asks dozens of times an iteration, and `replace` looks up every field.
    """
    return IterationShape(
        num_decode_rows=shape.num_decode_rows,
        num_prefill_rows=shape.num_prefill_rows,
        num_prefill_tokens=shape.num_prefill_tokens,
        num_sampled_rows=shape.num_sampled_rows,
        decode_context_tokens=shape.decode_context_tokens,
        prefill_context_tokens=shape.prefill_context_tokens,
        prefill_pairs=shape.prefill_pairs,
        num_ft_rows=shape.num_ft_rows + rows,
        num_ft_tokens=shape.num_ft_tokens + tokens,
        ft_context_tokens=shape.ft_context_tokens + context,
        ft_pairs=shape.ft_pairs + pairs,
        num_ft_loss_tokens=shape.num_ft_loss_tokens + loss_tokens,
        num_ft_layer_rows=shape.num_ft_layer_rows + layer_rows,
        num_ft_token_layers=shape.num_ft_token_layers + token_layers,
        ft_pair_layers=shape.ft_pair_layers + pair_layers,
        num_ft_steps=shape.num_ft_steps,
    )


def _pairs(begin: int, end: int, window: int | None) -> int:
    """Sum over the tokens at [begin, end) of the tokens that each sees, itself included."""
    if window is None or end <= window:
        return (end * (end + 1) - begin * (begin + 1)) // 2
    if begin >= window:
        return (end - begin) * window
    return _pairs(begin, window, None) + (end - window) * window


class ShapeCounter:
    """Counts the batches of one executor, and knows which of a sample's tokens have labels."""

    def __init__(self, info: ExecutorInfo) -> None:
        self._info = info
        self._labels: dict[tuple[str, int], np.ndarray] = {}

    def count(self, batch: Batch) -> IterationShape:
        """The shape of a batch; call once for each, in order."""
        shape = iteration_shape(batch, self._info)
        work = batch.finetune
        if work is None:
            return shape
        for start in work.sample_starts:
            self._labels[start.job_id, start.sample] = start.label_weights[1:] != 0
        num_labels = 0
        for segment in work.segments:
            if batch.kinds[segment.row] == _FT_FORWARD:
                labels = self._labels[segment.job_id, segment.sample]
                num_labels += int(np.count_nonzero(labels[segment.begin : segment.end]))
        for key in work.sample_ends:
            self._labels.pop(key, None)
        for name in work.job_ends:
            for key in [key for key in self._labels if key[0] == name]:
                del self._labels[key]
        return replace(shape, num_ft_loss_tokens=num_labels)
