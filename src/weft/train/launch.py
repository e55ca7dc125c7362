"""Starts the local ranks of a run through torchrun's elastic agent, and says why they failed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from weft.base.durable import write_file
from weft.base.errors import WeftError

_LOG_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
FAILURES = "failures"
"""Directory within a run's logs: one JSON file for each rank that failed."""


class RanksFailedError(WeftError, RuntimeError):
    """A run ended because of these ranks; the message is the first rank's own."""


def is_worker() -> bool:
    """Whether torchrun started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], *, num_ranks: int, max_restarts: int, run_dir: Path) -> None:
    """Run `python -m weft train ARGUMENTS` on every local rank; returns when all are done.

    A rank that dies is restarted with all others, up to `max_restarts` times; they resume from the
    last checkpoint.

    Raises:
        RanksFailedError: ranks failed once too often; the message is that of the first.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its warnings and tracebacks are about processes; ours name the rank and the reason.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    if num_ranks > 1:
        # As many threads as cores in every rank would make them wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    _clear_failures(run_dir)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"weft-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
    )
    command = ("-m", "weft", "train", *arguments)
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        raise RanksFailedError(_why(run_dir, error)) from None
    except SignalException as error:
        # The ranks were given the signal and time to write a checkpoint.
        raise SystemExit(128 + int(error.sigval)) from None


def _clear_failures(run_dir: Path) -> None:
    with contextlib.suppress(OSError):
        for file in (run_dir / "logs" / FAILURES).glob("rank-*.json"):
            file.unlink()


def _why(run_dir: Path, error: BaseException) -> str:
    """What the first rank said in the last attempt; other failures follow from its."""
    said: list[tuple[int, float, int, str]] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        for file in (run_dir / "logs" / FAILURES).glob("rank-*.json"):
            entry = json.loads(file.read_text())
            said.append((-entry["attempt"], entry["time_s"], entry["rank"], entry["message"]))
    if said:
        _, _, rank, message = min(said)
        return f"rank {rank}: {message}"
    failures = getattr(error, "failures", {})
    ended = ", ".join(
        f"rank {rank} {_ending(failure.exitcode)}" for rank, failure in sorted(failures.items())
    )
    return f"{ended or 'a rank died'}; see {run_dir / 'logs'}"


def _ending(exit_code: int) -> str:
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with {exit_code}"


def note_failure(run_dir: Path, rank: int, message: str, time_s: float) -> None:
    """Leave word for the launcher: a rank's own account of why it fails."""
    with contextlib.suppress(OSError):
        directory = run_dir / "logs" / FAILURES
        directory.mkdir(parents=True, exist_ok=True)
        entry = {"rank": rank, "message": message, "time_s": time_s, "attempt": _attempt()}
        write_file(directory / f"rank-{rank}.json", json.dumps(entry).encode())


@contextlib.contextmanager
def process_group(device: str, timeout_s: float) -> Generator[int]:
    """torch.distributed for a rank that torchrun started; yields the rank."""
    from datetime import timedelta

    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "nccl" if device.startswith("cuda") else "gloo"
    if device == "cuda":  # Ranks of one machine take a device each.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=timeout_s)
    store, rank, num_ranks = next(iter(rendezvous("env://", timeout=timeout)))
    # A restarted rank must not find the address of a dead one in the agent's store.
    store = PrefixStore(f"weft-{_attempt()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        yield dist.get_rank()
    finally:
        # A rank that failed must not wait for others here.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _attempt() -> int:
    """How often torchrun has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def log_to(run_dir: Path, rank: int) -> None:
    """Write this rank's log to `logs/rank-N.log` of the run."""
    directory = run_dir / "logs"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(directory / f"rank-{rank}.log")
        handler.setFormatter(logging.Formatter(_LOG_FORMAT.format(rank=rank)))
        logging.getLogger("weft").addHandler(handler)
        logging.getLogger("weft").setLevel(logging.INFO)
