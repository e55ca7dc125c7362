"""The iterations that a serving profile is measured on, and the batches that carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.base.errors import ConfigError
from weft.engine.batch import NULL_PAGE, Batch, ExecutorInfo, SegmentKind, SequenceStart
from weft.engine.sampling import SamplingParams

_LONGEST_SWEPT = 4096
"""Tokens of context up to which whole batches are measured; beyond, attention is linear in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sequence's part of an iteration: `count` tokens behind `before` cached ones."""

    before: int
    count: int = 1
    samples: bool = True
    is_decode: bool = False


def decodes(num_rows: int, context: int) -> tuple[Row, ...]:
    """`num_rows` decodes of sequences that are `context` tokens long, the new one included."""
    return (Row(before=context - 1, is_decode=True),) * num_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepLimits:
    """What an executor can be asked for."""

    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int


def default_sweep(limits: SweepLimits) -> tuple[tuple[Row, ...], ...]:
    """Iterations that span what the limits allow: decodes, chunks of prompts, and mixtures.

    Row counts follow powers of two and the midpoints between them, since GEMM libraries change
    their kernels in steps; every count is measured at several contexts.
    """
    longest = min(limits.max_model_len, _LONGEST_SWEPT)
    counts = _ladder(min(limits.max_num_seqs, limits.max_num_batched_tokens))
    points = [decodes(n, max(1, longest // 16)) for n in counts]
    points += [decodes(n, longest) for n in counts[::2]]
    points += [decodes(n, max(1, longest // 3)) for n in counts[::3]]
    points += [decodes(n, limits.max_model_len) for n in counts[:3]]
    budget = min(limits.max_num_batched_tokens, longest)
    for count in _ladder(budget):
        if count >= 8:
            points.append((Row(before=0, count=count),))
    for count in (16, 64, 256, 1024):
        if count < budget:
            points.append((Row(before=longest - count, count=count),))
            points.append((Row(before=(longest - count) // 3, count=count, samples=False),))
    for num_rows in (2, 4, 8):
        if num_rows <= limits.max_num_seqs:
            for count in (16, 64):
                if num_rows * count <= budget:
                    points.append((Row(before=0, count=count),) * num_rows)
    for num_decodes in (2, 8, 32):
        for count in (16, 64, 256, 512):
            if num_decodes < limits.max_num_seqs and num_decodes + count <= budget:
                points.append((*decodes(num_decodes, longest // 2), Row(before=0, count=count)))
    return tuple(dict.fromkeys(points))


def _ladder(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to and with `most`."""
    steps = {most}
    power = 1
    while power <= most:
        steps |= {power, power + power // 2} if power > 1 else {power}
        power *= 2
    return sorted(step for step in steps if step <= most)


class SweepBatches:
    """Makes batches by hand, for an executor that serves nobody else meanwhile.

    Rows get pages of their own, so that attention reads as much memory as it would in service;
    their contents do not matter. The sequences of one point keep their slots over its repetitions.
    """

    def __init__(self, info: ExecutorInfo, *, sampling: SamplingParams | None = None) -> None:
        self._info = info
        self._sampling = sampling or SamplingParams(temperature=0.0, max_tokens=None)
        self._random = np.random.default_rng(0)
        self._num_batches = 0
        self._started: list[int] = []

    def num_pages(self, rows: Sequence[Row]) -> int:
        """Pages that the rows' sequences need together."""
        return sum(
            len(self._visible(row, group))
            for row in rows
            for group in range(len(self._info.groups))
        )

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether the executor has pages and slots for the rows."""
        enough_pages = self.num_pages(rows) <= self._info.num_pages - 1
        return enough_pages and len(rows) <= self._info.max_num_seqs

    def fill_arena(self) -> list[Batch]:
        """Batches that write every page once, so that no later read meets untouched memory.

        One page is written by a real prompt, then copied over all others.
        """
        tokens = min(group.page_tokens for group in self._info.groups)
        batches = [self.make([Row(before=0, count=tokens)], starts=True)]
        pages = np.arange(2, self._info.num_pages, dtype=np.int32)
        for part in np.array_split(pages, -(-len(pages) // 256) if len(pages) else 0):
            moves = np.stack([np.ones_like(part), part], axis=1)
            batches.append(self.make([Row(before=0, count=tokens)], starts=False, moves=moves))
        return batches

    def make(self, rows: Sequence[Row], *, starts: bool, moves: np.ndarray | None = None) -> Batch:
        """The batch of these rows; `starts` frees what earlier points held and takes the slots.

        Raises:
            ConfigError: pages or slots do not suffice for the rows, or a decode follows a chunk.
        """
        if not self.fits(rows):
            raise ConfigError(
                f"{len(rows)} rows need {self.num_pages(rows)} pages; the executor has "
                f"{self._info.num_pages - 1} and {self._info.max_num_seqs} slots"
            )
        if sorted(rows, key=lambda row: not row.is_decode) != list(rows):
            raise ConfigError("decodes come before chunks in a batch")
        info, num_rows = self._info, len(rows)
        counts = np.array([row.count for row in rows], np.int32)
        row_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = np.concatenate(
            [np.arange(row.before, row.before + row.count, dtype=np.int32) for row in rows]
        )
        tables, write_slots = self._pages(rows, row_starts, positions)
        batch = Batch(
            batch_id=self._num_batches,
            kinds=np.array(
                [SegmentKind.DECODE if row.is_decode else SegmentKind.PREFILL for row in rows],
                np.uint8,
            ),
            slots=np.arange(num_rows, dtype=np.int32),
            row_starts=row_starts,
            layers=np.tile(np.array([0, info.num_layers], np.int16), (num_rows, 1)),
            adapters=np.full(num_rows, -1, np.int32),
            models=np.zeros(num_rows, np.uint8),
            token_ids=self._random.integers(0, info.vocab_size, len(positions)).astype(np.int32),
            positions=positions,
            prefix_lens=positions + np.int32(1),
            page_tables=tables,
            write_slots=write_slots,
            sample_rows=np.flatnonzero([row.samples for row in rows]).astype(np.int32),
            prompt_logprob_rows=np.empty(0, np.int32),
            starts=self._starts(num_rows) if starts else (),
            freed_slots=np.array(self._started if starts else [], np.int32),
            page_moves=np.empty((0, 2), np.int32) if moves is None else moves,
        )
        if starts:
            self._started = list(range(num_rows))
        self._num_batches += 1
        return batch

    def _starts(self, num_rows: int) -> tuple[SequenceStart, ...]:
        return tuple(
            SequenceStart(
                slot=slot,
                sequence_id=slot,
                token_ids=np.zeros(1, np.int32),
                num_prompt_tokens=1,
                sampling=self._sampling,
                seed=slot,
            )
            for slot in range(num_rows)
        )

    def _visible(self, row: Row, group: int) -> range:
        """Indices of the pages of a row's sequence that the row still sees or writes."""
        spec = self._info.groups[group]
        first = 0 if spec.window is None else max(0, row.before + 1 - spec.window)
        return range(first // spec.page_tokens, -(-(row.before + row.count) // spec.page_tokens))

    def _pages(
        self, rows: Sequence[Row], row_starts: np.ndarray, positions: np.ndarray
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        next_page = 1
        tables: list[np.ndarray] = []
        write_slots: list[np.ndarray] = []
        row_of_token = np.repeat(np.arange(len(rows)), np.diff(row_starts))
        for index, group in enumerate(self._info.groups):
            spans = [self._visible(row, index) for row in rows]
            table = np.full((len(rows), max(span.stop for span in spans)), NULL_PAGE, np.int32)
            for row, span in enumerate(spans):
                table[row, span.start : span.stop] = np.arange(next_page, next_page + len(span))
                next_page += len(span)
            tables.append(table)
            page, offset = np.divmod(positions, group.page_tokens)
            pages = table[row_of_token, page].astype(np.int64)
            write_slots.append(pages * group.page_tokens + offset)
        return tuple(tables), tuple(write_slots)
