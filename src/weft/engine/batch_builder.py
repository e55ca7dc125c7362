"""From scheduled spans of sequences to the columns of a Batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import chain

import msgspec
import numpy as np

from weft.engine.batch import (
    UNKNOWN_TOKEN,
    AdapterRef,
    Batch,
    ExecutorInfo,
    Int32,
    Int64,
    SegmentKind,
    SequenceStart,
)
from weft.engine.finetune_part import FinetunePart
from weft.engine.kv_cache import KvCache
from weft.engine.sequence import Sequence


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [begin, begin + count) of a sequence, scheduled into one batch.

    A msgspec struct, not a dataclass: hundreds are made in every iteration, several times as fast.
    """

    sequence: Sequence
    begin: int
    count: int
    samples: bool
    """The span reaches the last token, so that its logits give the next one."""
    epoch: int
    """The sequence's life in which it was scheduled."""


def _tokens(span: Span) -> Seq[int]:
    known = span.sequence.tokens
    end = span.begin + span.count
    if end <= len(known):
        return known[span.begin : end]
    return [*known[span.begin :], *[UNKNOWN_TOKEN] * (end - max(span.begin, len(known)))]


def _span_tokens(spans: Seq[Span], num_decodes: int) -> Int32:
    """[T] token ids; decodes take the short way, as there may be hundreds of them."""
    first = [
        sequence.tokens[span.begin] if span.begin < len(sequence.tokens) else UNKNOWN_TOKEN
        for span in spans[:num_decodes]
        for sequence in (span.sequence,)
    ]
    rest = chain.from_iterable(_tokens(span) for span in spans[num_decodes:])
    return np.fromiter(chain(first, rest), np.int32)


def build_batch(
    batch_id: int,
    spans: Seq[Span],
    num_decodes: int,
    *,
    kv: KvCache,
    info: ExecutorInfo,
    starts: Seq[SequenceStart],
    freed_slots: Seq[int],
    finetune: FinetunePart | None = None,
) -> Batch:
    """Lay out `spans`, of which the first `num_decodes` carry one token each, as one batch.

    Finetuning rows follow; a batch of finetuning commands alone has no rows.
    """
    num_spans = len(spans)
    slots = np.fromiter((span.sequence.slot for span in spans), np.int32, num_spans)
    begins = np.fromiter((span.begin for span in spans), np.int32, num_spans)
    counts = np.fromiter((span.count for span in spans), np.int32, num_spans)
    longest = int((begins + counts).max()) if num_spans else 0
    num_rows, num_forward = num_spans, 0
    if finetune is not None:
        added = _finetune_columns(finetune)
        slots, begins, counts = (
            np.concatenate([mine, theirs])
            for mine, theirs in zip((slots, begins, counts), added[:3], strict=True)
        )
        num_rows, num_forward = len(slots), len(finetune.forward)
        longest = max(longest, int(added[3].max(initial=0)))
    row_starts = np.zeros(num_rows + 1, np.int32)
    np.cumsum(counts, out=row_starts[1:])
    rows = np.repeat(np.arange(num_rows, dtype=np.int32), counts)
    positions = np.arange(row_starts[-1], dtype=np.int32) + (begins - row_starts[:-1])[rows]

    tables: list[Int32] = []
    write_slots: list[Int64] = []
    for group, table in zip(info.groups, kv.tables, strict=True):
        pages = table[slots, : -(-longest // group.page_tokens)]
        index, offset = np.divmod(positions, group.page_tokens)
        tables.append(pages)
        write_slots.append(pages[rows, index].astype(np.int64) * group.page_tokens + offset)

    kinds = np.full(num_rows, SegmentKind.PREFILL, np.uint8)
    kinds[:num_decodes] = SegmentKind.DECODE
    layers = np.zeros((num_rows, 2), np.int16)
    layers[:, 1] = info.num_layers
    adapters, adapter_refs = _adapters(spans)
    token_ids = _span_tokens(spans, num_decodes)
    if finetune is not None:
        kinds[num_spans:] = SegmentKind.FT_FORWARD
        kinds[num_spans + num_forward :] = SegmentKind.FT_BACKWARD
        for row, backward in enumerate(finetune.backward, start=num_spans + num_forward):
            layers[row] = backward.span.first_layer, backward.span.end_layer
        adapters = np.concatenate([adapters, np.full(num_rows - num_spans, -1, np.int32)])
        token_ids = np.concatenate([token_ids, finetune.tokens()])
    return Batch(
        batch_id=batch_id,
        kinds=kinds,
        slots=slots,
        row_starts=row_starts,
        layers=layers,
        adapters=adapters,
        models=np.zeros(num_rows, np.uint8),
        token_ids=token_ids,
        positions=positions,
        prefix_lens=positions + np.int32(1),
        page_tables=tuple(tables),
        write_slots=tuple(write_slots),
        sample_rows=_rows_where(spans, num_decodes, lambda span: span.samples, decodes=True),
        # What remains of a prompt as one token is its last, and that reports nothing.
        prompt_logprob_rows=_rows_where(spans, num_decodes, _reports_prompt, decodes=False),
        adapter_refs=adapter_refs,
        starts=tuple(starts),
        freed_slots=np.array(freed_slots, np.int32),
        finetune=None if finetune is None else finetune.work(num_spans),
    )


def _finetune_columns(part: FinetunePart) -> tuple[Int32, Int32, Int32, Int32]:
    """Slots, first positions, tokens and last positions of the finetuning rows."""
    rows = [(row.sample.slot, row.begin, row.end - row.begin, row.end) for row in part.forward]
    rows += [(row.sample.slot, row.span.begin, 0, row.span.end) for row in part.backward]
    columns = np.array(rows, np.int32).reshape(len(rows), 4).T
    return columns[0], columns[1], columns[2], columns[3]


def _rows_where(
    spans: Seq[Span], num_decodes: int, test: Callable[[Span], bool], *, decodes: bool
) -> Int32:
    """Rows that pass a test; `decodes` says what is known of all decode rows without asking."""
    first = range(num_decodes) if decodes else ()
    rest = (row for row in range(num_decodes, len(spans)) if test(spans[row]))
    return np.array([*first, *rest], np.int32)


def _reports_prompt(span: Span) -> bool:
    """Whether the span holds a prompt token whose successor's log-probability is still owed."""
    sequence = span.sequence
    if not sequence.wants_prompt_logprobs:
        return False
    # The token at position p reports on p + 1, so that the last prompt token reports nothing.
    last = min(span.begin + span.count, sequence.num_prompt - 1)
    return last > max(span.begin, sequence.num_prompt_logprobs_done)


def _adapters(spans: Seq[Span]) -> tuple[Int32, tuple[AdapterRef, ...]]:
    index: dict[AdapterRef, int] = {}
    column = np.full(len(spans), -1, np.int32)
    for row, span in enumerate(spans):
        adapter = span.sequence.request.adapter
        if adapter is not None:
            column[row] = index.setdefault(adapter, len(index))
    return column, tuple(index)
