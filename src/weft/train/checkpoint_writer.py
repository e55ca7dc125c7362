"""Writes a rank's tensors to safetensors without copying them, so that training can go on beside.

torch's Hugging Face writer builds each file in memory first, three copies of it with the
interpreter's lock held; this one writes tensor after tensor from where it lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _gen_file_name,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class StreamingWriter(HuggingFaceStorageWriter):
    """torch's writer of safetensors with the copies left out; files are on disk when it is done.

    `staged` holds the copies of what an asynchronous save writes, from one save to the next: new
    memory would cost as much as copying.
    """

    def __init__(
        self, path: Path, *, save_distributed: bool, staged: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(str(path), save_distributed=save_distributed)
        self._staged = staged if staged is not None else {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies of the tensors, in memory that the next save uses again."""
        if any(type(tensor) is not Tensor for tensor in state_dict.values()):
            return super().stage(state_dict)  # torch knows how to copy shards.
        kept = self._staged
        for name in kept.keys() - state_dict.keys():
            del kept[name]
        for name, tensor in state_dict.items():
            found = kept.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                found = kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            found.copy_(tensor)
        return dict(kept)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, named as torch's writer names it."""
        done: Future[list[WriteResult]] = Future()
        found: list[WriteResult] = []
        if plan.items:
            name = _gen_file_name(1, 1, plan.storage_data.get("shard_index"))
            found = _write_file(Path(self.path) / name, name, plan.items, planner)
        done.set_result(found)
        return done


def _write_file(
    path: Path, storage_key: str, items: Sequence[WriteItem], planner: SavePlanner
) -> list[WriteResult]:
    """One safetensors file, flushed: length of the header, the header, the tensors in order."""
    tensors: list[Tensor] = []
    entries: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    results: list[WriteResult] = []
    end = 0
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        assert item.tensor_data is not None
        tensor = tensor.detach().cpu().contiguous()
        start, end = end, end + tensor.nbytes
        name = item.index.fqn
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        offsets[name] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        tensors.append(tensor)
        place = _StorageInfo(relative_path=storage_key, offset=0, length=tensor.nbytes)
        results.append(
            WriteResult(index=item.index, size_in_bytes=tensor.nbytes, storage_data=place)
        )
    metadata = {
        CUSTOM_METADATA_KEY: json.dumps(offsets),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            if tensor.nbytes:
                _write_all(file.fileno(), tensor.reshape(-1).view(torch.uint8).numpy())
        os.fsync(file.fileno())
    return results


def _write_all(handle: int, data: Any) -> None:
    """Write all of a buffer; the system may take it in parts."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
