"""Gloo ranks of this machine: one process and one thread each, started once for a set of runs."""

from __future__ import annotations

import importlib
import json
import os
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from weft.graph.capture import Capture
from weft.plan.train_plan import TrainPlan
from weft.runtime.batch_source import TensorSource
from weft.runtime.dist_transport import DistWorld
from weft.runtime.executor_config import ExecutorConfig
from weft.runtime.stage_executor import OptimizerFactory, TorchStageExecutor
from weft.runtime.transport import Handle


def on_ranks(num_ranks: int, function: str, **arguments: Any) -> Any:
    """Run `module:function(**arguments)` on every rank; returns what rank 0 returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        mp.spawn(_rank, (num_ranks, port, function, arguments, str(out)), nprocs=num_ranks)
        return json.loads(out.read_text())


def _rank(
    rank: int, num_ranks: int, port: int, function: str, arguments: dict[str, Any], out: str
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    path, _, name = function.partition(":")
    result = getattr(importlib.import_module(path), name)(**arguments)
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def executor(
    module: nn.Module,
    capture: Capture,
    plan: TrainPlan,
    batches: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    *,
    delay_s: float = 0.0,
    optimizer: OptimizerFactory | None = None,
) -> TorchStageExecutor:
    """This rank's executor; step k takes batch k modulo their number; plain SGD by default."""
    world = DistWorld(timeout_s=120)
    if delay_s:
        world._transport = DelayedTransport(inner=world._transport, delay_s=delay_s)  # type: ignore
    return TorchStageExecutor(
        plan=plan,
        capture=capture,
        module=module,
        world=world,
        source=TensorSource(capture, lambda step: batches[step % len(batches)]),
        optimizer=optimizer or (lambda held: torch.optim.SGD(list(held.values()), lr=1e-3)),
        config=ExecutorConfig(),
    )


def timed(run: Any) -> float:
    """Seconds from a barrier before to a barrier after."""
    dist.barrier()
    started_s = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - started_s


@dataclass(kw_only=True)
class _Later:
    event: threading.Event = field(default_factory=threading.Event)
    inner: Handle | None = None

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        self.event.wait()
        assert self.inner is not None
        self.inner.wait()


class DelayedTransport:
    """Messages leave `delay_s` after they were sent, in order, while the sender computes on."""

    def __init__(self, *, inner: Any, delay_s: float) -> None:
        self._inner, self._delay_s = inner, delay_s
        self._queue: deque[tuple[float, _Later, Tensor, int, int]] = deque()
        self._filled = threading.Semaphore(0)
        threading.Thread(target=self._deliver, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, tensor: Tensor, receiver: int, tag: int) -> Handle:
        later = _Later()
        self._queue.append((time.perf_counter() + self._delay_s, later, tensor, receiver, tag))
        self._filled.release()
        return later

    def _deliver(self) -> None:
        while True:
            self._filled.acquire()
            due_s, later, tensor, receiver, tag = self._queue.popleft()
            time.sleep(max(0.0, due_s - time.perf_counter()))
            later.inner = self._inner.send(tensor, receiver, tag)
            later.event.set()
