"""A job's state on disk: its weights as an adapter directory, and what only training needs beside.

The weights are the float32 (or float64) masters, in the files that `weft.model.adapters.files`
writes, so a checkpoint is served, exported or started from like any adapter. `state.safetensors`
holds the optimizer's state and, in its header, the number of steps done and whose job it is.

A checkpoint is written to a directory of another name, flushed to the disk and renamed in, so that
whatever has its final name is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.base.durable import write_directory
from weft.base.errors import AdapterLoadError
from weft.engine.finetune import SaveCheckpoint
from weft.model.adapters.files import read_adapter, write_adapter
from weft.model.adapters.weights import AdapterWeights
from weft.model.config import ModelConfig
from weft.runtime.finetune_state import JobState
from weft.runtime.transfer import Download

_STATE = "state.safetensors"
_HEADER = "weft"
_MASTER = "master"
"""No optimizer's tensor has this name."""
_FORMAT = "weft-finetune-checkpoint-2"


def checkpoint_of(job: JobState, save: SaveCheckpoint) -> Callable[[], None]:
    """What writes a job's weights, and its optimizer state and steps unless the save is final.

    It replaces what is there. On the CPU it reads the job's own tensors: they must not change until
    it has run. From another device their copies to the host are enqueued here.

    It raises:
        OSError: the disk is full, or the place cannot be written.
        SafetensorError: the same, as safetensors says it.
    """
    state = {} if save.is_final else dict(job.optimizer.state)
    header = json.dumps({"format": _FORMAT, "num_steps": save.num_steps, **_identity(job)})
    download = Download({_MASTER: job.trained.master, **state})

    def write(directory: Path) -> None:
        arrays = download.wait()
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        master = tensors.pop(_MASTER)
        write_adapter(directory, job.start.adapter, job.adapter_of(master))
        if not save.is_final:
            save_file(tensors, directory / _STATE, metadata={_HEADER: header})

    return lambda: write_directory(Path(save.path), write)


def load_checkpoint(job: JobState, path: Path, config: ModelConfig) -> int:
    """Fill a fresh job's weights and optimizer state; returns the number of steps done.

    Raises:
        AdapterLoadError: there is no whole checkpoint, or it is of another job.
    """
    header, kept = _read_state(path / _STATE)
    for key, value in _identity(job).items():
        if header.get(key) != value:
            raise AdapterLoadError(
                f"{path} is a checkpoint of another job: {key} is {header.get(key)!r} there and "
                f"{value!r} here"
            )
    num_steps = header.get("num_steps")
    if not isinstance(num_steps, int) or num_steps < 0:
        raise AdapterLoadError(f"{path / _STATE}: num_steps is {num_steps!r}")
    if _shapes(kept) != _shapes(job.optimizer.state):
        raise AdapterLoadError(f"{path / _STATE}: tensors are missing or of another shape")
    master = job.trained.master
    load_weights(job, read_adapter(path, config, dtype=master.dtype, device=master.device), path)
    for key, value in job.optimizer.state.items():
        value.copy_(kept[key])
    return num_steps


def load_weights(job: JobState, adapter: AdapterWeights, path: Path) -> None:
    """Fill a fresh job's weights; `path` names their source in messages.

    Raises:
        AdapterLoadError: they are of other targets, ranks or scales.
    """
    found = {
        f"{bypass.target.layer}.{bypass.target.module}.{name}": (bypass.target.scale, weight)
        for bypass in adapter
        for name, weight in bypass.weights.items()
    }
    wanted = {s.key: (s.target.scale, s.shape) for s in job.trained.slots}
    if {k: (scale, tuple(w.shape)) for k, (scale, w) in found.items()} != wanted:
        raise AdapterLoadError(f"{path} holds an adapter of other targets, ranks or scales")
    job.trained.load({key: weight for key, (_, weight) in found.items()})


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise AdapterLoadError(f"{path} is not of format {_FORMAT}")
    return header, tensors


def _identity(job: JobState) -> dict[str, object]:
    """What must agree for a job to go on from a checkpoint."""
    return {
        "seed": job.start.seed,
        "kind": str(job.start.adapter.kind),
        "optimizer": str(job.start.optimizer.name),
        "targets": [
            [target.layer, str(target.module), target.rank, target.scale]
            for target in job.trained.targets
        ],
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}
