"""Iterations of decodes only, run as one recorded launch.

Most iterations carry one token of each of some sequences. Their work is the same every time but for
the numbers, so it is recorded once on fixed buffers: as a list of native calls on the CPU, as CUDA
graphs on CUDA. A replay fills the buffers and launches.

Shape legend: n rows, P pages of a table, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from weft.engine.batch import NULL_PAGE, UNKNOWN_TOKEN, Batch, SegmentKind
from weft.model.forward_step import BypassStep, ForwardStep, GroupStep
from weft.model.kernels.cpu_linear import max_native_rows, storage_of
from weft.model.kernels.cpu_record import CpuReplay, record
from weft.model.kernels.cpu_team import KernelsUnavailableError
from weft.runtime.decode_graphs import DecodeGraphs, cuda_capture, graph_sizes
from weft.runtime.device_context import DeviceContext
from weft.runtime.step_builder import build_step

_log = logging.getLogger(__name__)


class DecodeReplay(Protocol):
    """Runs some batches faster than the decoder's own code would."""

    def covers(self, batch: Batch) -> bool:
        """Whether it can run this one."""
        ...

    def run(self, batch: Batch, last_token: Tensor) -> Tensor:
        """Logits [n, V] of the batch's rows; overwritten by the next run.

        Tokens that are not known yet come from `last_token` [slots].
        """
        ...


def record_decodes(context: DeviceContext, max_num_seqs: int) -> DecodeReplay | None:
    """Record what this device can replay; None where it is nothing."""
    if context.device.type == "cuda":
        return GraphReplay(context, max_num_seqs)
    storage = storage_of(context.layout.dtype)
    if context.device.type != "cpu" or storage is None:
        return None
    try:
        return ListReplay(context, min(max_num_seqs, max_native_rows(storage)))
    except KernelsUnavailableError as reason:
        _log.debug("decodes are not recorded: %s", reason)
        return None


def holds_only_decodes(batch: Batch, max_rows: int, *, takes_backward: bool = False) -> bool:
    """Whether a batch is one token each of a few sequences, all sampled, adapters apart.

    With `takes_backward` backward rows, which hold no tokens, may follow.
    """
    num_decodes = batch.num_tokens
    kinds = batch.kinds
    return (
        0 < num_decodes <= max_rows
        and num_decodes == len(batch.sample_rows)
        and (takes_backward or num_decodes == batch.num_rows)
        and not len(batch.prompt_logprob_rows)
        and bool((kinds[:num_decodes] == SegmentKind.DECODE).all())
        and bool((kinds[num_decodes:] == SegmentKind.FT_BACKWARD).all())
    )


class ListReplay:
    """The CPU's: every native call of a decode step in one parallel region."""

    def __init__(
        self, context: DeviceContext, max_rows: int, bypass: BypassStep | None = None
    ) -> None:
        """Record a step of `max_rows` rows, of which a run uses the first few.

        `bypass` reads the rows' adapters from a fixed tensor, for its owner to fill before a run.

        Raises:
            KernelsUnavailableError: part of the step has no native kernel here.
        """
        self._max_rows = max_rows
        tokens = torch.zeros(max_rows, dtype=torch.int64)
        positions = torch.zeros(max_rows, dtype=torch.int64)
        prefix_lens = torch.ones(max_rows, dtype=torch.int32)
        groups = tuple(
            GroupStep(
                page_tables=torch.full(
                    (max_rows, -(-context.max_model_len // group.page_tokens)),
                    NULL_PAGE,
                    dtype=torch.int32,
                ),
                write_slots=torch.zeros(max_rows, dtype=torch.int64),
                page_tokens=group.page_tokens,
                window=group.window,
            )
            for group in context.layout.groups
        )
        step = ForwardStep(
            token_ids=tokens,
            positions=positions,
            prefix_lens=prefix_lens,
            num_decodes=max_rows,
            max_decode_context=context.max_model_len,
            chunks=(),
            groups=groups,
            bypass=bypass,
        )
        decoder = context.decoder

        def forward() -> Tensor:
            hidden = decoder.embed(step.token_ids)
            return decoder.logits(decoder.forward(hidden, step, context.kv))

        self._replay: CpuReplay = record(forward)
        # The same memory as NumPy sees it: a batch is filled in without a torch call.
        self._tokens = tokens.numpy()
        self._positions = positions.numpy()
        self._prefix_lens = prefix_lens.numpy()
        self._tables = [group.page_tables.numpy() for group in groups]
        self._write_slots = [group.write_slots.numpy() for group in groups]

    def covers(self, batch: Batch) -> bool:
        return not batch.adapter_refs and holds_only_decodes(
            batch, self._max_rows, takes_backward=True
        )

    def run(self, batch: Batch, last_token: Tensor) -> Tensor:
        num_rows = batch.num_tokens
        token_ids = batch.token_ids
        is_unknown = token_ids == UNKNOWN_TOKEN
        if is_unknown.any():
            token_ids = np.where(is_unknown, last_token.numpy()[batch.slots[:num_rows]], token_ids)
        self._tokens[:num_rows] = token_ids
        self._positions[:num_rows] = batch.positions
        self._prefix_lens[:num_rows] = batch.prefix_lens
        for index, table in enumerate(batch.page_tables):
            self._tables[index][:num_rows, : table.shape[1]] = table[:num_rows]
            self._write_slots[index][:num_rows] = batch.write_slots[index]
        return self._replay.run(num_rows)


class GraphReplay:
    """CUDA's: a graph for each of a few row counts."""

    def __init__(self, context: DeviceContext, max_num_seqs: int) -> None:
        self._context = context
        self._max_rows = max_num_seqs
        capture = cuda_capture(torch.cuda.graph_pool_handle())
        with torch.inference_mode():
            self._graphs = DecodeGraphs(context, graph_sizes(max_num_seqs), capture)

    def covers(self, batch: Batch) -> bool:
        return not batch.adapter_refs and holds_only_decodes(batch, self._max_rows)

    def run(self, batch: Batch, last_token: Tensor) -> Tensor:
        return self._graphs.run(build_step(batch, self._context, last_token))
