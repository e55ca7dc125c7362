"""A checkpoint as a Hugging Face directory: what `weft serve` and transformers load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.base.errors import ConfigError
from weft.train.checkpoint import model_tensors

MAX_FILE_BYTES = 5 * 10**9
"""Weights beyond this go to further files, as transformers writes them."""


def export_directory(
    checkpoint: Path,
    out: Path,
    *,
    config: Mapping[str, Any],
    files: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights and buffers of a checkpoint by name, with `config` as config.json.

    The names are those of the trained module, so a transformers module gives a directory that
    transformers reads. `files` (a tokenizer's, say) are copied beside; `dtype` converts floating
    weights. The weights go back into training by `SafetensorsWeights(out)`.

    Raises:
        ConfigError: `out` is a directory that is not empty.
        ModelLoadError: the checkpoint is not whole.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} is not empty; name a directory that is new or empty")
    tensors = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in model_tensors(checkpoint).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    parts = _parts(tensors, max_file_bytes)
    names = [
        "model.safetensors" if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        for i in range(1, len(parts) + 1)
    ]
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensors[key].contiguous() for key in part}, out / name, {"format": "pt"})
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {
                key: name for name, part in zip(names, parts, strict=True) for key in part
            },
        }
        _write(out / "model.safetensors.index.json", index)
    for file in files:
        shutil.copy(file, out / file.name)
    # Last: a directory without it is no model yet.
    _write(out / "config.json", config)


def _parts(tensors: Mapping[str, Tensor], max_file_bytes: int) -> list[list[str]]:
    """Names by file, in order."""
    parts: list[list[str]] = [[]]
    used_bytes = 0
    for name, tensor in tensors.items():
        if parts[-1] and used_bytes + tensor.nbytes > max_file_bytes:
            parts.append([])
            used_bytes = 0
        parts[-1].append(name)
        used_bytes += tensor.nbytes
    return parts


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")
