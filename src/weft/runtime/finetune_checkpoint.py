"""A job's state on disk: weights and optimizer state in safetensors, the rest in JSON.

A checkpoint is written to a directory of another name, flushed to the disk and renamed in, so that
whatever has its final name is whole.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.base.durable import write_directory
from weft.base.errors import AdapterLoadError
from weft.runtime.finetune_state import JobState

_STATE = "state.json"
_TENSORS = "state.safetensors"
_FORMAT = "weft-finetune-checkpoint-1"


def save_checkpoint(job: JobState, path: Path, num_steps: int) -> None:
    """Write weights, optimizer state and `num_steps` to `path`, replacing what is there.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """

    def write(directory: Path) -> None:
        tensors = {f"weight.{key}": value for key, value in job.trained.tensors().items()}
        tensors |= {f"optimizer.{key}": value for key, value in job.optimizer.state.items()}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, directory / _TENSORS)
        state = {"format": _FORMAT, "num_steps": num_steps, **_identity(job)}
        (directory / _STATE).write_text(json.dumps(state, indent=1))

    write_directory(path, write)


def load_checkpoint(job: JobState, path: Path) -> int:
    """Fill a fresh job's weights and optimizer state; returns the number of steps done.

    Raises:
        AdapterLoadError: there is no whole checkpoint, or it is of another job.
    """
    try:
        state = json.loads((path / _STATE).read_text())
        tensors = load_file(path / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterLoadError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise AdapterLoadError(f"{path / _STATE} is not of format {_FORMAT}")
    for key, value in _identity(job).items():
        if state.get(key) != value:
            raise AdapterLoadError(
                f"{path} is a checkpoint of another job: {key} is {state.get(key)!r} there and "
                f"{value!r} here"
            )
    weights = _take(tensors, "weight.", job.trained.tensors(), path)
    kept = _take(tensors, "optimizer.", dict(job.optimizer.state), path)
    num_steps = state.get("num_steps")
    if not isinstance(num_steps, int) or num_steps < 0:
        raise AdapterLoadError(f"{path / _STATE}: num_steps is {num_steps!r}")
    job.trained.load(weights)
    for key, value in job.optimizer.state.items():
        value.copy_(kept[key])
    return num_steps


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


def _take(
    tensors: dict[str, Tensor], prefix: str, wanted: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    shapes = {key: tuple(value.shape) for key, value in wanted.items()}
    if {key: tuple(value.shape) for key, value in found.items()} != shapes:
        raise AdapterLoadError(f"{path / _TENSORS}: tensors are missing or of another shape")
    return found
