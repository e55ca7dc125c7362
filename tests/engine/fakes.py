"""Executors with closed-form behaviour: what a token should be is known without a model."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from engine.finetune_fakes import FinetuneChecker
from weft.engine.batch import (
    NULL_PAGE,
    UNKNOWN_TOKEN,
    Batch,
    CacheGroup,
    ExecutorInfo,
    PromptLogprobs,
    SampledLogprobs,
    StepResult,
)


def next_token(prefix: list[int], adapter: int, choice: int, vocab_size: int) -> int:
    """The token that follows `prefix`: depends on every token before it."""
    state = 0x9E3779B9 + 131 * adapter + 7919 * choice
    for token in prefix:
        state = (state * 6364136223846793005 + token + 1442695040888963407) % 2**64
    return (state >> 33) % vocab_size


def make_info(
    *,
    num_pages: int = 64,
    page_tokens: int = 4,
    windows: tuple[int | None, ...] = (None,),
    page_multiples: tuple[int, ...] = (1,),
    max_num_seqs: int = 8,
    vocab_size: int = 97,
    max_finetune_samples: int = 0,
    layers_per_group: int = 1,
) -> ExecutorInfo:
    """An executor's numbers, by default one group without a window."""
    groups = tuple(
        CacheGroup(
            layers=tuple(range(g * layers_per_group, (g + 1) * layers_per_group)),
            page_tokens=page_tokens * multiple,
            window=window,
        )
        for g, (window, multiple) in enumerate(zip(windows, page_multiples, strict=True))
    )
    return ExecutorInfo(
        num_pages=num_pages,
        page_bytes=1024,
        groups=groups,
        num_layers=len(groups) * layers_per_group,
        vocab_size=vocab_size,
        max_num_seqs=max_num_seqs,
        max_finetune_samples=max_finetune_samples,
    )


class MemoryExecutor:
    """Keeps the arena as (token, position) cells and draws tokens from what rows really see there.

    Whoever hands out a wrong page, slot or table changes the tokens, or reads a cell of another
    position, which raises.
    """

    def __init__(self, info: ExecutorInfo, *, max_in_flight: int = 1) -> None:
        self.info = info
        self.max_in_flight = max_in_flight
        self.batches: list[Batch] = []
        self.poisoned: set[int] = set()
        """Token ids that make logits non-finite when they are last."""
        self.fails_next_submit = False
        self.fails_next_collect = False
        self._cells: list[dict[int, tuple[int, int]]] = [{} for _ in info.groups]
        self._last: dict[int, int] = {}
        self._starts = {}
        self._results: deque[StepResult] = deque()
        self._num_unseen = 0
        self.finetune = FinetuneChecker(info)

    def submit(self, batch: Batch) -> None:
        assert len(self._results) < self.max_in_flight
        if self.fails_next_submit:
            self.fails_next_submit = False
            raise RuntimeError("the device is unwell")
        self.batches.append(batch)
        self._num_unseen += 1
        for slot in batch.freed_slots.tolist():
            self._starts.pop(slot, None)
        for start in batch.starts:
            assert start.slot not in self._starts, "a slot is taken twice"
            self._starts[start.slot] = start
        tokens = batch.token_ids.copy()
        for row in range(batch.num_rows):
            begin, end = batch.row_starts[row], batch.row_starts[row + 1]
            if begin == end:
                continue
            if tokens[end - 1] == UNKNOWN_TOKEN:
                tokens[end - 1] = self._last[int(batch.slots[row])]
            assert (tokens[begin:end] >= 0).all()
        for g in range(len(self.info.groups)):
            for slot, token, position in zip(
                batch.write_slots[g].tolist(),
                tokens.tolist(),
                batch.positions.tolist(),
                strict=True,
            ):
                assert slot // self.info.groups[g].page_tokens != NULL_PAGE
                self._cells[g][slot] = (token, position)
        outcome = None
        if batch.finetune is not None:
            outcome = self.finetune.take(batch, lambda row, end: self._row_cells(batch, row, end))
        self._results.append(replace(self._result(batch, tokens), finetune=outcome))

    def collect(self) -> StepResult:
        if self.fails_next_collect:
            self.fails_next_collect = False
            raise RuntimeError("the device is unwell")
        self._num_unseen -= 1
        return self._results.popleft()

    def abandon(self) -> None:
        self._results.clear()
        for batch in self.batches[-self._num_unseen :] if self._num_unseen else ():
            for slot in batch.slots.tolist():
                self._starts.pop(slot, None)
        self._num_unseen = 0

    def close(self) -> None:
        self._results.clear()

    def _row_cells(self, batch: Batch, row: int, end: int) -> list[list[int]]:
        """For each group, the tokens [0, end) that a row's pages hold."""
        found: list[list[int]] = []
        for g, group in enumerate(self.info.groups):
            view: list[int] = []
            for position in range(end):
                page = int(batch.page_tables[g][row, position // group.page_tokens])
                assert page != NULL_PAGE, f"position {position} has no page in group {g}"
                token, at = self._cells[g][page * group.page_tokens + position % group.page_tokens]
                assert at == position, f"position {position} reads a cell of position {at}"
                view.append(token)
            found.append(view)
        return found

    def _visible(self, batch: Batch, row: int, index: int) -> list[int]:
        """The tokens that token `index` of the batch sees in its row's pages."""
        length = int(batch.prefix_lens[index])
        seen: list[int] | None = None
        full: list[int] | None = None
        for g, group in enumerate(self.info.groups):
            first = 0 if group.window is None else max(0, length - group.window)
            view: list[int] = []
            for position in range(first, length):
                page = int(batch.page_tables[g][row, position // group.page_tokens])
                assert page != NULL_PAGE, f"position {position} has no page in group {g}"
                slot = page * group.page_tokens + position % group.page_tokens
                token, at = self._cells[g][slot]
                assert at == position, f"position {position} reads a cell of position {at}"
                view.append(token)
            if group.window is None:
                full = view
            seen = view if seen is None or len(view) < len(seen) else seen
        assert seen is not None
        if full is not None:
            assert full[len(full) - len(seen) :] == seen, "groups disagree"
            return full
        return seen

    def _result(self, batch: Batch, tokens: np.ndarray) -> StepResult:
        samples: list[int] = []
        counts: list[int] = []
        for row in batch.sample_rows.tolist():
            last = int(batch.row_starts[row + 1]) - 1
            start = self._starts[int(batch.slots[row])]
            seen = self._visible(batch, row, last)
            token = next_token(seen, int(batch.adapters[row]), start.choice, self.info.vocab_size)
            self._last[int(batch.slots[row])] = token
            samples.append(token)
            counts.append(0 if int(tokens[last]) in self.poisoned else 1)
        reports = []
        for row in batch.prompt_logprob_rows.tolist():
            begin = int(batch.positions[batch.row_starts[row]])
            count = int(batch.row_starts[row + 1] - batch.row_starts[row])
            values = -np.arange(begin + 1, begin + 1 + count, dtype=np.float32)
            reports.append(
                PromptLogprobs(
                    row=row,
                    begin=begin + 1,
                    chosen=values,
                    ranks=np.ones(count, np.int32),
                    top_ids=np.zeros((count, 2), np.int32),
                    top=np.zeros((count, 2), np.float32),
                )
            )
        size = len(samples)
        return StepResult(
            batch_id=batch.batch_id,
            tokens=np.array(samples, np.int32).reshape(size, 1),
            num_tokens=np.array(counts, np.int32),
            logprobs=SampledLogprobs(
                chosen=np.full((size, 1), -1.5, np.float32),
                ranks=np.ones((size, 1), np.int32),
                top_ids=np.zeros((size, 1, 3), np.int32),
                top=np.zeros((size, 1, 3), np.float32),
            ),
            prompt_logprobs=tuple(reports),
        )
