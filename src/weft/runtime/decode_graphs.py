"""Decode iterations replayed from CUDA graphs: one launch instead of hundreds.

A graph is recorded for each of a few row counts; an iteration runs in the smallest that holds it,
the rows beyond its own reading and writing the null page. Whatever varies (tokens, positions,
lengths, tables, slots) is copied into fixed buffers first.

Shape legend: n rows, P pages of a table, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.engine.batch import NULL_PAGE
from weft.model.forward_step import ForwardStep, GroupStep
from weft.runtime.device_context import DeviceContext

Forward = Callable[[], Tensor]
"""Runs the recorded step on the fixed buffers; returns logits [n, V]."""
Capture = Callable[[Forward], Forward]
"""Turns a forward pass into its replay; both give the same fixed output."""


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Row counts to record: 1, 2, 4, then every 8 up to 256, then every 64."""
    sizes = [1, 2, 4, *range(8, min(max_rows, 256) + 1, 8), *range(320, max_rows + 1, 64)]
    kept = [size for size in sizes if size < max_rows]
    return (*kept, max_rows)


def cuda_capture(pool: Any) -> Capture:
    """Record into CUDA graphs that share the memory of `pool` (`torch.cuda.graph_pool_handle`)."""

    def capture(forward: Forward) -> Forward:
        # Kernels compile and libraries choose algorithms on the first calls, outside the graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = forward()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


def eager_capture(forward: Forward) -> Forward:
    """The twin without graphs: runs the padded step anew each time."""
    return forward


class DecodeGraphs:
    """Runs iterations of decodes only, in one replay each."""

    def __init__(self, context: DeviceContext, sizes: Sequence[int], capture: Capture) -> None:
        """Record a graph for each of `sizes`, which ascend; the largest first, as it needs most."""
        self._context = context
        self._sizes = tuple(sizes)
        most, device = self._sizes[-1], context.device
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._prefix_lens = torch.ones(most, dtype=torch.int32, device=device)
        self._tables = [
            torch.full(
                (most, -(-context.max_model_len // group.page_tokens)),
                NULL_PAGE,
                dtype=torch.int32,
                device=device,
            )
            for group in context.layout.groups
        ]
        self._slots = [
            torch.zeros(most, dtype=torch.int64, device=device) for _ in context.layout.groups
        ]
        self._replays: dict[int, Forward] = {}
        for size in reversed(self._sizes):
            self._replays[size] = capture(self._forward(size))

    def covers(self, step: ForwardStep) -> bool:
        """Whether the iteration holds decodes only, and not too many."""
        return not step.chunks and 0 < step.num_decodes <= self._sizes[-1]

    def run(self, step: ForwardStep) -> Tensor:
        """Logits [n, V] of an iteration of n decodes; overwritten by the next call."""
        num_rows = step.num_decodes
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        self._fill(step, num_rows, size)
        return self._replays[size]()[:num_rows]

    def _fill(self, step: ForwardStep, num_rows: int, size: int) -> None:
        self._tokens[:num_rows].copy_(step.token_ids, non_blocking=True)
        self._positions[:num_rows].copy_(step.positions, non_blocking=True)
        self._prefix_lens[:num_rows].copy_(step.prefix_lens, non_blocking=True)
        self._prefix_lens[num_rows:size] = 1
        for group, tables, slots in zip(step.groups, self._tables, self._slots, strict=True):
            tables[:num_rows, : group.page_tables.shape[1]].copy_(
                group.page_tables, non_blocking=True
            )
            tables[num_rows:size, 0] = NULL_PAGE
            slots[:num_rows].copy_(group.write_slots, non_blocking=True)
            slots[num_rows:size] = 0

    def _forward(self, size: int) -> Forward:
        context = self._context
        groups = tuple(
            GroupStep(
                page_tables=tables[:size],
                write_slots=slots[:size],
                page_tokens=group.page_tokens,
                window=group.window,
            )
            for group, tables, slots in zip(
                context.layout.groups, self._tables, self._slots, strict=True
            )
        )
        step = ForwardStep(
            token_ids=self._tokens[:size],
            positions=self._positions[:size],
            prefix_lens=self._prefix_lens[:size],
            num_decodes=size,
            max_decode_context=context.max_model_len,
            chunks=(),
            groups=groups,
        )

        def forward() -> Tensor:
            for group in groups:
                group.scratch.clear()
            decoder = context.decoder
            hidden = decoder.embed(step.token_ids)
            return decoder.logits(decoder.forward(hidden, step, context.kv))

        return forward
