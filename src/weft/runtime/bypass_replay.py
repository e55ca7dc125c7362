"""Decodes through adapters as one recorded launch, on the CPU.

What a step with adapters submits depends on which modules have any, not on which rows have which:
the kernels find that in the table. So a recording serves every batch whose adapters touch no other
modules than those it was made for.

Shape legend: n rows, V vocabulary, L layers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.engine.batch import Batch
from weft.model.adapters.table import Field, GroupedRows
from weft.model.forward_step import BypassStep
from weft.model.kernels.cpu_linear import max_native_rows, storage_of
from weft.model.kernels.cpu_team import KernelsUnavailableError
from weft.runtime.decode_replay import ListReplay, holds_only_decodes
from weft.runtime.device_context import DeviceContext

_log = logging.getLogger(__name__)

_MAX_RECORDINGS = 4
_FIELDS = (Field.RANK, Field.SCALE_INPUT, Field.SCALE_OUTPUT)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recording:
    needs: npt.NDArray[np.int64]
    """[L, modules, fields] ranks that it has room for, and whether it scales."""
    words_at: int
    """Address of the table that it reads."""
    replay: ListReplay | None
    """None where such a step cannot be recorded."""

    def serves(self, needs: npt.NDArray[np.int64], words_at: int) -> bool:
        is_same = self.replay is not None or bool((self.needs == needs).all())
        return is_same and self.words_at == words_at and bool((self.needs >= needs).all())


class BypassReplays:
    """The latest recordings, made as batches call for them."""

    def __init__(self, context: DeviceContext, max_rows: int) -> None:
        self._context = context
        self._max_rows = max_rows
        self._slots = torch.full((max_rows,), -1, dtype=torch.int64)
        self._recordings: list[_Recording] = []

    def run(self, batch: Batch, bypass: BypassStep, last_token: Tensor) -> Tensor | None:
        """Logits [n, V] of a batch, overwritten by the next run; None where it is not covered."""
        rows = bypass.rows
        if rows is None or bypass.groups:
            return None
        if not holds_only_decodes(batch, self._max_rows, takes_backward=True):
            return None
        replay = self._find(rows)
        if replay is None:
            return None
        self._slots[: batch.num_tokens] = rows.slots
        return replay.run(batch, last_token)

    def _find(self, rows: GroupedRows) -> ListReplay | None:
        needs = _needs(rows)
        words_at = rows.table.words.ctypes.data
        for index, recording in enumerate(self._recordings):
            if recording.serves(needs, words_at):
                self._recordings.insert(0, self._recordings.pop(index))
                return recording.replay
        replay = self._record(rows, needs)
        self._recordings.insert(0, _Recording(needs=needs, words_at=words_at, replay=replay))
        del self._recordings[_MAX_RECORDINGS:]
        return replay

    def _record(self, rows: GroupedRows, needs: npt.NDArray[np.int64]) -> ListReplay | None:
        present = np.zeros_like(rows.present)
        present[:, :, list(_FIELDS)] = needs
        fixed = GroupedRows(
            slots=self._slots, table=rows.table, present=present, activations=rows.activations
        )
        try:
            return ListReplay(self._context, self._max_rows, BypassStep(groups=(), rows=fixed))
        except KernelsUnavailableError as reason:
            _log.debug("decodes through these adapters are not recorded: %s", reason)
            return None


def record_bypasses(context: DeviceContext, max_num_seqs: int) -> BypassReplays | None:
    """What replays decodes through adapters; None where this device cannot."""
    storage = storage_of(context.layout.dtype)
    if context.device.type != "cpu" or storage is None:
        return None
    return BypassReplays(context, min(max_num_seqs, max_native_rows(storage)))


def _needs(rows: GroupedRows) -> npt.NDArray[np.int64]:
    """[L, modules, fields]: ranks, rounded up so that few recordings serve many mixes; 0 or 1."""
    needs = rows.present[:, :, list(_FIELDS)]
    ranks = needs[:, :, 0]
    most = int(ranks.max(initial=0))
    rounded = 1 << max(0, most - 1).bit_length() if most else 0
    return np.stack([(ranks > 0) * rounded, needs[:, :, 1] > 0, needs[:, :, 2] > 0], axis=2).astype(
        np.int64
    )
