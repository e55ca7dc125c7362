"""Adapters that an executor can run: every version in host memory, the latest used on the device.

Shape legend: R rows, T tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weft.base.errors import ConfigError, IntegrityError
from weft.engine.batch import AdapterRef, Batch
from weft.model.adapters.files import read_adapter
from weft.model.adapters.table import AdapterTable
from weft.model.adapters.weights import AdapterWeights, pack
from weft.model.forward_step import BypassGroup, BypassStep
from weft.model.kernels.select import choose_grouped
from weft.runtime.device_context import DeviceContext
from weft.runtime.transfer import upload

# A longer chunk is a matrix product of its own; shorter ones share a call with the decodes.
_MAX_GROUPED_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Resident:
    adapter: AdapterWeights
    slot: int
    """In the table of the grouped kernels; -1 where they do not take it."""


class AdapterStore:
    """Versions by reference, and the bypass of a batch.

    What the device holds stays within `resident_bytes`, the longest unused leaving first; the
    adapters of one batch are held together even where they are more. On the CPU host memory is the
    device's, and nothing is copied.
    """

    def __init__(self, context: DeviceContext, *, resident_bytes: int = 1 << 62) -> None:
        self._config = context.config
        self._dtype = context.layout.dtype
        self._device = context.device
        self.resident_bytes = resident_bytes
        """Bound of what the device holds."""
        self._host: dict[AdapterRef, AdapterWeights] = {}
        self._residents: OrderedDict[AdapterRef, _Resident] = OrderedDict()
        self._num_host_bytes = 0
        self._num_resident_bytes = 0
        kernels = choose_grouped(self._dtype, self._device)
        self._table = AdapterTable(self._config.num_layers, kernels) if kernels else None
        self.num_evicted = 0
        """Adapters that made room for others on the device."""

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        """All versions."""
        return tuple(self._host)

    @property
    def size_bytes(self) -> int:
        """Bytes in host memory."""
        return self._num_host_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that the device holds at this instant."""
        return self._num_resident_bytes

    def load(self, ref: AdapterRef, path: str | Path) -> None:
        """Read an adapter directory.

        Raises:
            AdapterLoadError, UnsupportedError: as `weft.model.adapters.files.read_adapter`.
            ConfigError: the version is here already.
        """
        self._check_new(ref)
        self._keep(ref, read_adapter(path, self._config, dtype=self._dtype))

    def put(self, ref: AdapterRef, adapter: AdapterWeights) -> None:
        """Take a version whose weights are at hand; they are copied.

        Raises:
            ConfigError: the version is here already.
        """
        self._check_new(ref)
        self._keep(ref, pack(adapter, "cpu"))

    def unload(self, ref: AdapterRef) -> None:
        """Forget a version, if it is here; batches that name it are refused from here on."""
        adapter = self._host.pop(ref, None)
        if adapter is not None:
            self._num_host_bytes -= adapter.size_bytes
        self._evict(ref)

    def bypass(self, batch: Batch) -> BypassStep | None:
        """Which tokens of a batch pass through which adapters; None without any.

        Raises:
            IntegrityError: the batch names a version that is not here.
        """
        refs = batch.adapter_refs
        if not refs:
            return None
        residents = self._fetch(refs)
        counts = np.diff(batch.row_starts)
        slot_of = np.array([resident.slot for resident in residents] + [-1], np.int64)
        slots_R = slot_of[batch.adapters]
        slots_R[counts > _MAX_GROUPED_TOKENS] = -1
        has_own = (batch.adapters >= 0) & (slots_R < 0) & (counts > 0)
        rows = None
        if self._table is not None and (slots_R >= 0).any():
            slots_T = np.repeat(slots_R, counts)
            rows = self._table.rows(slots_T, upload(slots_T, self._device))
        return BypassStep(groups=self._groups(batch, has_own, counts, residents), rows=rows)

    def _groups(
        self,
        batch: Batch,
        has_own: npt.NDArray[np.bool_],
        counts: npt.NDArray[np.int32],
        residents: Sequence[_Resident],
    ) -> tuple[BypassGroup, ...]:
        """Rows that do not go by the table: a chunk is a group, an adapter's decodes are one."""
        groups: list[BypassGroup] = []
        starts = batch.row_starts
        for row in np.flatnonzero(has_own & (counts > 1)).tolist():
            span = slice(int(starts[row]), int(starts[row + 1]))
            groups.append(BypassGroup(rows=span, adapter=residents[batch.adapters[row]].adapter))
        single = has_own & (counts == 1)
        for index in np.unique(batch.adapters[single]).tolist():
            tokens = starts[:-1][single & (batch.adapters == index)].astype(np.int64)
            rows = upload(tokens, self._device)
            if len(tokens) == tokens[-1] - tokens[0] + 1:
                rows = slice(int(tokens[0]), int(tokens[-1]) + 1)
            groups.append(BypassGroup(rows=rows, adapter=residents[index].adapter))
        return tuple(groups)

    # ---- residents ----

    def _fetch(self, refs: Sequence[AdapterRef]) -> list[_Resident]:
        for ref in refs:
            if ref not in self._host:
                raise IntegrityError(
                    f"a batch names adapter {ref.id} version {ref.version}, which is not loaded"
                )
        # First all that are here, so that none of them makes room for another.
        for ref in refs:
            if ref in self._residents:
                self._residents.move_to_end(ref)
        for ref in refs:
            if ref not in self._residents:
                self._make_room(self._host[ref].size_bytes, refs)
                self._admit(ref)
        return [self._residents[ref] for ref in refs]

    def _admit(self, ref: AdapterRef) -> None:
        adapter = self._host[ref]
        if self._device.type != "cpu":
            adapter = pack(adapter, self._device)
        slot = None if self._table is None else self._table.add(adapter)
        self._residents[ref] = _Resident(adapter=adapter, slot=-1 if slot is None else slot)
        self._num_resident_bytes += adapter.size_bytes

    def _make_room(self, size_bytes: int, needed: Sequence[AdapterRef]) -> None:
        for ref in list(self._residents):
            if self._num_resident_bytes + size_bytes <= self.resident_bytes:
                return
            if ref not in needed:
                self._evict(ref)
                self.num_evicted += 1

    def _evict(self, ref: AdapterRef) -> None:
        resident = self._residents.pop(ref, None)
        if resident is None:
            return
        self._num_resident_bytes -= resident.adapter.size_bytes
        if self._table is not None and resident.slot >= 0:
            self._table.remove(resident.slot)

    def _keep(self, ref: AdapterRef, adapter: AdapterWeights) -> None:
        self._host[ref] = adapter
        self._num_host_bytes += adapter.size_bytes

    def _check_new(self, ref: AdapterRef) -> None:
        if ref in self._host:
            raise ConfigError(f"adapter {ref.id} version {ref.version} is loaded already")
