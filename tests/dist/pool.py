"""Four gloo ranks that live for a whole test module, one thread each, and run cases by name."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import socket
import traceback
from typing import Any

import torch
import torch.distributed as dist

NUM_RANKS = 4
TIMEOUT_S = 120


class RankPool:
    """Runs `function(rank, *arguments)` of an importable module on every rank."""

    def __init__(self, num_ranks: int = NUM_RANKS) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, num_ranks, port, theirs))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: str, *arguments: Any) -> list[Any]:
        """What each rank returned; AssertionError with the first traceback where one failed."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} did not answer to {function}{arguments}"
            ended, value = pipe.recv()
            assert ended, f"rank {rank}: {value}"
            found.append(value)
        return found

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, num_ranks: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        try:
            path, _, name = function.partition(":")
            pipe.send((True, getattr(importlib.import_module(path), name)(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
