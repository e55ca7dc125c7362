"""From the columns of a Batch to the tensors that the decoder reads."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from weft.base.errors import UnsupportedError
from weft.engine.batch import UNKNOWN_TOKEN, Batch, SegmentKind
from weft.model.forward_step import BypassStep, ChunkRow, ForwardStep, GroupStep
from weft.runtime.device_context import DeviceContext
from weft.runtime.transfer import upload

_INFERENCE = (SegmentKind.PREFILL, SegmentKind.DECODE)
_FINETUNING = (SegmentKind.FT_FORWARD, SegmentKind.FT_BACKWARD)


def check_batch(batch: Batch, num_layers: int, *, holds_samples: bool = False) -> None:
    """Refuse what this executor cannot run; `holds_samples` where it runs finetuning rows.

    Raises:
        UnsupportedError: a segment kind, model or layer range that it lacks, by name.
    """
    if batch.kinds.max(initial=0) > SegmentKind.DECODE:
        runnable = {*_INFERENCE, *(_FINETUNING if holds_samples else ())}
        missing = sorted({SegmentKind(k) for k in batch.kinds.tolist()} - runnable)
        if missing:
            raise UnsupportedError(
                f"segments of kind {', '.join(kind.name for kind in missing)} are not supported; "
                f"supported are {', '.join(kind.name for kind in sorted(runnable))}"
            )
    if batch.models.any():
        raise UnsupportedError("rows of a draft model are not supported; only model 0 is loaded")
    is_partial = (batch.layers != (0, num_layers)).any(axis=1)
    if (is_partial & (batch.kinds != SegmentKind.FT_BACKWARD)).any():
        raise UnsupportedError(
            f"rows must pass all layers [0, {num_layers}); partial layer ranges are not supported"
        )
    if batch.layers.min(initial=0) < 0 or batch.layers.max(initial=0) > num_layers:
        raise UnsupportedError(f"rows name layers outside [0, {num_layers})")


def build_step(
    batch: Batch, context: DeviceContext, last_token: Tensor, bypass: BypassStep | None = None
) -> ForwardStep:
    """Upload a batch; tokens that are not known yet come from `last_token` [slots]."""
    device = context.device
    num_decodes = int(np.count_nonzero(batch.kinds == SegmentKind.DECODE))
    groups = tuple(
        GroupStep(
            page_tables=upload(table, device),
            write_slots=upload(write_slots, device),
            page_tokens=group.page_tokens,
            window=group.window,
        )
        for group, table, write_slots in zip(
            context.layout.groups, batch.page_tables, batch.write_slots, strict=True
        )
    )
    return ForwardStep(
        token_ids=_known_tokens(batch, last_token),
        positions=upload(batch.positions, device),
        prefix_lens=upload(batch.prefix_lens, device),
        num_decodes=num_decodes,
        max_decode_context=int(batch.prefix_lens[:num_decodes].max(initial=0)),
        chunks=_chunks(batch, num_decodes),
        groups=groups,
        bypass=bypass,
    )


def _known_tokens(batch: Batch, last_token: Tensor) -> Tensor:
    tokens = upload(batch.token_ids, last_token.device)
    unknown = batch.token_ids == UNKNOWN_TOKEN
    if not unknown.any():
        return tokens
    where = np.flatnonzero(unknown)
    rows = np.searchsorted(batch.row_starts, where, side="right") - 1
    slots = upload(batch.slots[rows], last_token.device)
    return tokens.index_copy(0, upload(where, last_token.device), last_token[slots])


def _chunks(batch: Batch, num_decodes: int) -> tuple[ChunkRow, ...]:
    starts = batch.row_starts
    return tuple(
        ChunkRow(
            row=row,
            begin=int(starts[row]),
            end=int(starts[row + 1]),
            first_prefix=int(batch.prefix_lens[starts[row]]),
            context=int(batch.prefix_lens[starts[row + 1] - 1]),
            is_training=batch.kinds[row] == SegmentKind.FT_FORWARD,
        )
        for row in range(num_decodes, batch.num_rows)
        if starts[row] < starts[row + 1]  # backward rows hold no tokens
    )
