"""Checkpoints: torch.distributed.checkpoint with safetensors storage, scalars in JSON, no pickle.

A checkpoint is a directory `step-NNNNNNNN`: safetensors files that hold `model.<name>`,
`optimizer.<name>.<key>`, `previous.<name>` (the older weights of PipeDream-2BW) and
`constant.<name>` (what of the module no step changes), and `train.json`. Names are the model's
parameter names, so a run may resume under another plan. It is written as `step-NNNNNNNN.part` and
renamed when all of it is on disk; whatever ends in `.part` is nobody's checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from weft.base.durable import publish_directory
from weft.base.errors import ModelLoadError
from weft.runtime.stage_executor import RankState
from weft.train.checkpoint_writer import StreamingWriter
from weft.train.groups import GroupState

_log = logging.getLogger("weft.train")

SCALARS_FILE = "train.json"
_VERSION = 2
_PART = ".part"
_CONSTANT = "constant."
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What a checkpoint holds beside tensors."""

    num_steps: int
    """Optimizer steps done; with the run's seed it says which samples come next."""
    plan_digest: str
    """Of the plan that wrote it; a run under another plan may read it."""
    seed: int
    samples_per_step: int = 0
    """0 where it is not known."""
    optimizer_name: str = ""
    """The class of the optimizers; empty where nothing is trained."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """The learning-rate scheduler's plain values."""
    groups: tuple[GroupState, ...] = ()
    """Numbers of the optimizers' parameter groups, such as the present learning rate."""
    optimizer: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scalars of the optimizer's state, such as `step`, by parameter name."""
    has_previous: bool = False


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        """`keep` newest checkpoints survive; 0 keeps all."""
        self.directory = directory
        self._keep = keep
        self._writing: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="weft-checkpoint")
        self._staged: dict[str, Tensor] = {}
        self._group: Any = None

    # ---- writing ----

    def save(
        self,
        ranks: Sequence[RankState],
        state: TrainState,
        *,
        constants: Mapping[str, Tensor] | None = None,
        blocking: bool = False,
    ) -> None:
        """Copy all state now; write it while training goes on, unless `blocking`.

        Every rank calls it at the same step; rank 0 writes `constants`. A save that is still under
        way is waited for first.
        """
        self.wait()
        final = self.directory / f"{_PREFIX}{state.num_steps:08d}"
        part = final.with_name(final.name + _PART)
        is_first = _rank() == 0
        if is_first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        is_distributed = dist.is_initialized()
        if is_distributed:
            if self._group is None:
                # gloo: NCCL cannot carry the coordination of a background thread.
                self._group = dist.new_group(backend="gloo")
            dist.barrier(group=self._group)
        tensors = {name: tensor for rank in ranks for name, tensor in owned_tensors(rank)}
        if is_first and constants is not None:
            tensors |= {f"{_CONSTANT}{name}": tensor for name, tensor in constants.items()}
        writer = StreamingWriter(part, save_distributed=is_distributed, staged=self._staged)
        options: dict[str, Any] = {"storage_writer": writer, "no_dist": not is_distributed}
        if is_distributed:
            options["process_group"] = self._group
        with _quiet():
            if blocking:
                state_dict_saver.save(tensors, **options)
                if is_first:
                    self._publish(part, final, state)
                return
            result = state_dict_saver.async_save(tensors, **options)
        written = result if isinstance(result, Future) else result.upload_completion

        def finish() -> None:
            written.result()
            # Rank 0 coordinates: its save ends when every rank's files are written.
            if is_first:
                self._publish(part, final, state)

        # Flushing, and dropping old files, take their time too: not training's.
        self._writing = self._finisher.submit(finish)

    def _publish(self, part: Path, final: Path, state: TrainState) -> None:
        """Give a checkpoint whose tensors are written its name."""
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        _write_json(part / SCALARS_FILE, _state_json(state) | {"files": sizes})
        publish_directory(part, final)
        self._drop_old(final)

    def poll(self) -> None:
        """Forget a save that is on disk by now, or raise what became of it; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way, until it has its name."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _drop_old(self, newest: Path) -> None:
        """Keep `newest` and those before it; later ones are torn, or of a run that was given up."""
        if self._keep:
            kept = [path for path in self._complete() if path.name <= newest.name]
            for old in kept[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)

    # ---- reading ----

    def latest(self) -> Path | None:
        """The newest whole checkpoint; ones that are not are skipped with a warning."""
        for part in sorted(self.directory.glob(f"{_PREFIX}*{_PART}")):
            _log.warning("checkpoint %s was never finished; it is skipped", part.name)
        for path in reversed(self._complete()):
            problem = checkpoint_problem(path)
            if not problem:
                return path
            _log.warning("checkpoint %s is skipped: %s", path.name, problem)
        return None

    def sweep(self) -> None:
        """Remove what an interrupted save has left; called by one rank before training."""
        for part in self.directory.glob(f"{_PREFIX}*{_PART}"):
            shutil.rmtree(part, ignore_errors=True)

    def _complete(self) -> list[Path]:
        found = (path for path in self.directory.glob(f"{_PREFIX}*") if path.suffix != _PART)
        return sorted(path for path in found if path.is_dir())


def owned_tensors(rank: RankState) -> Iterable[tuple[str, Tensor]]:
    """What a rank writes: each tensor of the run is written by one rank."""
    for name in sorted(rank.owned):
        yield f"model.{name}", rank.parameters[name].detach()
        if rank.previous is not None and name in rank.previous:
            yield f"previous.{name}", rank.previous[name].detach()
    for name, values in _optimizer_state(rank).items():
        if name in rank.owned:
            for key, value in values.items():
                if isinstance(value, Tensor) and not _is_scalar(key, value, rank.parameters[name]):
                    yield f"optimizer.{name}.{key}", value


def optimizer_scalars(ranks: Sequence[RankState]) -> dict[str, dict[str, float]]:
    """Numbers in the optimizers' states, by parameter: they go to JSON."""
    found: dict[str, dict[str, float]] = {}
    for rank in ranks:
        for name, values in _optimizer_state(rank).items():
            scalars = {
                key: float(value)
                for key, value in values.items()
                if isinstance(value, (int, float))
                or (isinstance(value, Tensor) and _is_scalar(key, value, rank.parameters[name]))
            }
            if scalars:
                found[name] = scalars
    return found


def _is_scalar(key: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether a state is a number of its own: a moment of a parameter of no axes is none."""
    is_moment = not parameter.dim() and key != "step" and value.dtype == parameter.dtype
    return not value.dim() and not is_moment


def _optimizer_state(rank: RankState) -> dict[str, dict[str, Any]]:
    if rank.optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in rank.trainable.items()}
    return {
        names[id(parameter)]: values
        for parameter, values in rank.optimizer.state.items()
        if id(parameter) in names
    }


def load_checkpoint(path: Path, ranks: Sequence[RankState]) -> TrainState:
    """Fill parameters, optimizer states and older weights of the local ranks from a checkpoint.

    The plan may be another one than that which wrote it.

    Raises:
        ModelLoadError: it is of another model (missing, unexpected and misshapen names are listed)
            or not whole.
    """
    problem = checkpoint_problem(path)
    if problem:
        raise ModelLoadError(f"checkpoint {str(path)!r} cannot be used: {problem}")
    state = _read_state(path)
    reader = HuggingFaceStorageReader(str(path))
    held = reader.read_metadata().state_dict_metadata
    wanted: dict[str, list[Tensor]] = {}
    for rank in ranks:
        _check_names(path, held, rank)
        for name, parameter in rank.parameters.items():
            wanted.setdefault(f"model.{name}", []).append(parameter.data)
        if rank.previous is not None:
            for name, parameter in rank.previous.items():
                key = f"previous.{name}" if state.has_previous else f"model.{name}"
                wanted.setdefault(key, []).append(parameter.data)
        for name in rank.trainable:
            for key, tensor in _make_optimizer_state(rank, name, held, state).items():
                wanted.setdefault(f"optimizer.{name}.{key}", []).append(tensor)
    # Each tensor is read once; further local ranks that hold it get a copy.
    _read_tensors(path, {key: tensors[0] for key, tensors in wanted.items()})
    for tensors in wanted.values():
        for other in tensors[1:]:
            other.copy_(tensors[0])
    return state


def _make_optimizer_state(
    rank: RankState, name: str, held: Mapping[str, Any], state: TrainState
) -> dict[str, Tensor]:
    """Allocate one parameter's optimizer state as the checkpoint has it; returns its tensors."""
    if rank.optimizer is None:
        return {}
    parameter = rank.trainable[name]
    prefix = f"optimizer.{name}."
    tensors = {
        key[len(prefix) :]: torch.empty(
            entry.size, dtype=entry.properties.dtype, device=parameter.device
        )
        for key, entry in held.items()
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    }
    scalars = {
        key: torch.tensor(value, dtype=torch.float32)
        for key, value in state.optimizer.get(name, {}).items()
    }
    if tensors or scalars:
        rank.optimizer.state[parameter] = {**scalars, **tensors}
    return tensors


def _check_names(path: Path, held: Mapping[str, Any], rank: RankState) -> None:
    stored = {
        key.removeprefix("model."): entry for key, entry in held.items() if key.startswith("model.")
    }
    missing = [name for name in rank.parameters if name not in stored]
    if missing:
        raise ModelLoadError(
            f"checkpoint {str(path)!r} is of another model: it lacks {len(missing)} of "
            f"{len(rank.parameters)} parameters ({_few(missing)}) and holds "
            f"{_few(sorted(stored))}"
        )
    for name, parameter in rank.parameters.items():
        if tuple(stored[name].size) != tuple(parameter.shape):
            raise ModelLoadError(
                f"checkpoint {str(path)!r} is of another model: parameter {name!r} has shape "
                f"{tuple(stored[name].size)} there and {tuple(parameter.shape)} here"
            )


def check_model(path: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose parameter names are not exactly the model's.

    Raises:
        ModelLoadError: missing and unexpected names are listed.
    """
    held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    stored = {key.removeprefix("model.") for key in held if key.startswith("model.")}
    expected = set(names)
    missing, unexpected = sorted(expected - stored), sorted(stored - expected)
    if missing or unexpected:
        raise ModelLoadError(
            f"checkpoint {str(path)!r} is of another model: missing {len(missing)} names "
            f"({_few(missing)}), unexpected {len(unexpected)} ({_few(unexpected)})"
        )


def checkpoint_problem(path: Path) -> str:
    """Why a directory is no whole checkpoint; empty if it is one."""
    if not (path / SCALARS_FILE).is_file():
        return f"it has no {SCALARS_FILE}"
    try:
        _read_state(path)
        for name, size in json.loads((path / SCALARS_FILE).read_text()).get("files", {}).items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                return f"file {name} is not there with its {size} bytes"
        held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises types of its own for torn files
        return str(error).splitlines()[0]
    return "" if held else "it holds no tensors"


def model_tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by parameter name, and the buffers that belong to the model."""
    held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in held.items()
        if key.startswith(("model.", _CONSTANT)) and isinstance(entry, TensorStorageMetadata)
    }
    _read_tensors(path, found)
    return {key.partition(".")[2]: tensor for key, tensor in found.items()}


def _read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors from a checkpoint; each process reads for itself."""
    with _quiet():
        state_dict_loader.load(
            dict(into), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True
        )


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without torch's word that a process on its own is on its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _few(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown + (", ..." if len(names) > most else "")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _state_json(state: TrainState) -> dict[str, Any]:
    return {
        "format": "weft-train-checkpoint",
        "version": _VERSION,
        "num_steps": state.num_steps,
        "plan_digest": state.plan_digest,
        "seed": state.seed,
        "samples_per_step": state.samples_per_step,
        "optimizer_name": state.optimizer_name,
        "scheduler": dict(state.scheduler),
        "groups": [asdict(group) for group in state.groups],
        "optimizer": {name: dict(values) for name, values in state.optimizer.items()},
        "has_previous": state.has_previous,
    }


def _read_state(path: Path) -> TrainState:
    data = json.loads((path / SCALARS_FILE).read_text())
    if data.get("format") != "weft-train-checkpoint" or data.get("version") != _VERSION:
        raise ModelLoadError(
            f"{SCALARS_FILE} is not of a training checkpoint of version {_VERSION}"
        )
    return TrainState(
        num_steps=data["num_steps"],
        plan_digest=data["plan_digest"],
        seed=data["seed"],
        samples_per_step=data["samples_per_step"],
        optimizer_name=data["optimizer_name"],
        scheduler=data["scheduler"],
        groups=tuple(
            GroupState(
                names=tuple(group["names"]), values=group["values"], initial=group["initial"]
            )
            for group in data["groups"]
        ),
        optimizer=data["optimizer"],
        has_previous=data["has_previous"],
    )


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
