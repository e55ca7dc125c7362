"""Starts the local ranks of a run through torchrun's elastic agent, and says why they failed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weft.base.durable import write_file
from weft.base.errors import WeftError
from weft.runtime.transport import PeerTimeoutError
from weft.train.run_dir import RunDirectory

_LOG_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
FAILURES = "failures"
"""Directory within a run's logs: one JSON file for each rank that failed."""
_LAUNCHED = "WEFT_LAUNCHED"
"""Set in ranks whose launcher is `weft train`: it reports failures itself."""


class RanksFailedError(WeftError, RuntimeError):
    """A run ended because of these ranks; the message is the first rank's own."""


def is_worker() -> bool:
    """Whether torchrun started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], *, num_ranks: int, max_restarts: int, run_dir: Path) -> None:
    """Run `python -m weft train ARGUMENTS` on every local rank; returns when all are done.

    A rank that dies is restarted with all others, up to `max_restarts` times; they resume from the
    last checkpoint. A failure that would only come again (`is_final`) is not retried.

    Raises:
        RanksFailedError: ranks failed once too often, or for good; the first one says why.
        ConfigError: the run directory cannot be written.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # Its warnings and tracebacks are about processes; ours name the rank and the reason.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    if num_ranks > 1:
        # As many threads as cores in every rank would make them wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Where ranks could not even say why they fail.
    RunDirectory(run_dir).create()
    _clear_failures(run_dir)
    os.environ[_LAUNCHED] = "1"
    command = ("-m", "weft", "train", *arguments)
    try:
        failures = _run_agent(command, num_ranks, max_restarts, run_dir)
    except SignalException as error:
        # The ranks were given the signal and time to write a checkpoint.
        raise SystemExit(128 + int(error.sigval)) from None
    if failures:
        raise RanksFailedError(_why(run_dir, failures))


def _run_agent(
    command: Sequence[str], num_ranks: int, max_restarts: int, run_dir: Path
) -> Mapping[int, Any]:
    """Keep the ranks running through torchrun's agent; returns those that failed, by rank."""
    from torch.distributed.elastic import rendezvous
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    class Agent(LocalElasticAgent):
        """Gives up restarts that a final failure would only use up one by one."""

        def _monitor_workers(self, worker_group: Any) -> Any:  # pyright: ignore
            result: Any = super()._monitor_workers(worker_group)  # pyright: ignore
            if result.is_failed() and final_failure(run_dir):
                self._remaining_restarts = 0
            return result

    parameters = rendezvous.RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=f"weft-{os.getpid()}",
        min_nodes=1,
        max_nodes=1,
    )
    handler = rendezvous.registry.get_rendezvous_handler(parameters)
    spec = WorkerSpec(
        role="weft",
        local_world_size=num_ranks,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        args=tuple(command),
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    try:
        result: Any = Agent(spec=spec, logs_specs=DefaultLogsSpecs()).run()
    finally:
        handler.shutdown()
    return result.failures


def _clear_failures(run_dir: Path) -> None:
    with contextlib.suppress(OSError):
        for file in (run_dir / "logs" / FAILURES).glob("rank-*.json"):
            file.unlink()


def is_final(error: BaseException) -> bool:
    """Whether a rank that starts anew would fail in the same way: ours say so, and wrong code does.

    A peer that is gone or silent is no such failure, nor is whatever a torn connection raises.
    """
    if isinstance(error, WeftError):
        return not isinstance(error, PeerTimeoutError)
    wrong_code = (ImportError, NameError, TypeError, AttributeError, SyntaxError)
    return isinstance(error, (*wrong_code, torch.OutOfMemoryError))


def final_failure(run_dir: Path) -> str:
    """What a rank of this run said when it failed for good; empty where none did."""
    final = [entry for entry in _failures(run_dir) if entry["is_final"]]
    return _said(min(final, key=_order)) if final else ""


def first_failure(run_dir: Path) -> str:
    """What the first rank said in the last attempt; other failures follow from its."""
    found = _failures(run_dir)
    return _said(min(found, key=_order)) if found else ""


def _failures(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in (run_dir / "logs" / FAILURES).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text()))
    return found


def _order(entry: Mapping[str, Any]) -> tuple[float, ...]:
    return (-entry["attempt"], entry["time_s"], entry["rank"])


def _said(entry: Mapping[str, Any]) -> str:
    return f"rank {entry['rank']}: {entry['message']}"


def _why(run_dir: Path, failures: Mapping[int, Any]) -> str:
    said = final_failure(run_dir) or first_failure(run_dir)
    if said:
        return said
    ended = ", ".join(
        f"rank {rank} {_ending(failure.exitcode)}" for rank, failure in sorted(failures.items())
    )
    return f"{ended or 'a rank died'}; see {run_dir / 'logs'}"


def _ending(exit_code: int) -> str:
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with {exit_code}"


def forget_failure(run_dir: Path, rank: int) -> None:
    """Remove what this rank said in an earlier run; called before the first attempt of a run."""
    with contextlib.suppress(OSError):
        (run_dir / "logs" / FAILURES / f"rank-{rank}.json").unlink()


def is_restarted() -> bool:
    """Whether torchrun has started this rank before."""
    return _attempt() > 0


def note_failure(run_dir: Path, rank: int, error: BaseException, time_s: float) -> None:
    """Leave word of why a rank fails, for the launcher and for a restarted rank.

    Ranks that torchrun was told to start by hand have no launcher of ours: they say it themselves.
    """
    name = "" if isinstance(error, WeftError) else f"{type(error).__name__}: "
    message = f"{name}{error}"
    with contextlib.suppress(OSError):
        directory = run_dir / "logs" / FAILURES
        directory.mkdir(parents=True, exist_ok=True)
        entry = {
            "rank": rank,
            "message": message,
            "time_s": time_s,
            "attempt": _attempt(),
            "is_final": is_final(error),
        }
        write_file(directory / f"rank-{rank}.json", json.dumps(entry).encode())
    first = first_failure(run_dir) or f"rank {rank}: {message}"
    if _LAUNCHED not in os.environ and (rank == 0 or first.startswith(f"rank {rank}:")):
        print(f"weft train: {first}", file=sys.stderr, flush=True)


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
