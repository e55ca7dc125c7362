"""What a checkpoint costs while training goes on: asynchronous beside synchronous."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from weft.train.checkpoint import CheckpointStore, TrainState


def cost(num_parameters: int, num_rounds: int, scratch: str | None = None) -> list[list[float]]:
    """(added by an asynchronous save, seconds of a synchronous one) by round.

    One thread trains (products of a fixed size) while the files are written; what a save adds is
    the time until it is on disk, less that of the same products undisturbed, before and after.
    """
    torch.set_num_threads(1)
    width = 1024
    parameters = {
        f"layer{i}.weight": nn.Parameter(torch.randn(width, width))
        for i in range(num_parameters // width**2)
    }
    optimizer = torch.optim.Adam(parameters.values())
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rank: Any = SimpleNamespace(
        parameters=parameters,
        trainable=parameters,
        owned=frozenset(parameters),
        optimizer=optimizer,
        previous=None,
    )
    left, right = torch.randn(2, width, width).unbind()

    def work() -> None:
        torch.mm(left, right)

    found = []
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        store = CheckpointStore(Path(directory), keep=1)
        for index in range(num_rounds + 1):
            started_s = time.perf_counter()
            store.save([rank], _state(2 * index + 1), blocking=True)
            blocking_s = time.perf_counter() - started_s
            before_s = _seconds_each(work)
            started_s = time.perf_counter()
            store.save([rank], _state(2 * index + 2))
            count = 0
            while store._writing is not None:  # pyright: ignore[reportPrivateUsage]
                work()
                count += 1
                store.poll()
            elapsed_s = time.perf_counter() - started_s
            each_s = (before_s + _seconds_each(work)) / 2
            found.append([elapsed_s - count * each_s, blocking_s])
    return found[1:]


def _seconds_each(work: Any, num_runs: int = 40) -> float:
    started_s = time.perf_counter()
    for _ in range(num_runs):
        work()
    return (time.perf_counter() - started_s) / num_runs


def _state(num_steps: int) -> TrainState:
    return TrainState(num_steps=num_steps, plan_digest="benchmark", seed=0)
