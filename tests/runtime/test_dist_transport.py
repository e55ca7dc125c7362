"""The same programs over gloo: spawned ranks, one thread each."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from runtime.train_plans import chain_cut, plan_of_cut, zoo_case
from runtime.train_reference import train_plain
from weft.runtime.batch_source import TensorSource
from weft.runtime.dist_transport import DistWorld
from weft.runtime.executor_config import ExecutorConfig
from weft.runtime.stage_executor import TorchStageExecutor
from weft.runtime.transport import PeerTimeoutError


def sgd(held: Any) -> torch.optim.Optimizer:
    values = held.values() if isinstance(held, dict) else held
    return torch.optim.SGD(list(values), lr=0.05, momentum=0.9)


def spawn(work: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` on gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(  # pyright: ignore[reportPrivateImportUsage]
        _start, args=(work, num_ranks, port, arguments), nprocs=num_ranks
    )


def _start(
    rank: int, work: Callable[..., None], num_ranks: int, port: int, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _train(rank: int, schedule: str, model: str) -> None:
    """Train, compare with one process, evaluate, and gather the timeline."""
    case = zoo_case(model, tied=True) if model == "gpt" else zoo_case(model)
    graph = case.capture.graph
    cut = chain_cut(graph, 2, micro_batch=(2, 4), dp=(1, 2))
    if schedule == "2bw":
        cut = chain_cut(graph, 3)
    executor = TorchStageExecutor(
        plan=plan_of_cut(graph, cut, 8, schedule=schedule),
        capture=case.capture,
        module=case.model.module,
        world=DistWorld(timeout_s=60),
        source=TensorSource(case.capture, lambda step: case.batches[step]),
        optimizer=sgd,
        config=ExecutorConfig(record=True, clip_norm=None if schedule == "2bw" else 1.0),
    )
    results = list(executor.steps(3))
    assert all(result.loss > 0 for result in results)
    measured = executor.gather_timeline()
    assert measured.num_steps == 3
    assert set(measured.device.tolist()) == {0, 1, 2}
    found = executor.evaluate(TensorSource(case.capture, lambda step: case.batches[step]), 1)
    assert found.weight == 8
    if schedule == "2bw":
        return
    assert case.model.loss is not None
    wanted = train_plain(case.model.module, case.model.loss, case.batches, sgd, clip_norm=1.0)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=1e-9)
    held = dict(wanted.module.named_parameters())
    for name, p in executor.ranks[0].parameters.items():
        assert torch.allclose(p, held[name], rtol=0, atol=1e-9), name


@pytest.mark.parametrize(("schedule", "model"), [("1f1b", "gpt"), ("2bw", "candle-uno")])
def test_gloo_ranks_equal_one_process(schedule: str, model: str) -> None:
    spawn(_train, 3, schedule, model)


def _shard(rank: int) -> None:
    """FSDP2 inside a stage of two ranks, behind a stage of one."""
    case = zoo_case("candle-uno")
    graph = case.capture.graph
    executor = TorchStageExecutor(
        plan=plan_of_cut(graph, chain_cut(graph, 2, dp=(1, 2)), 8),
        capture=case.capture,
        module=case.model.module,
        world=DistWorld(timeout_s=60),
        source=TensorSource(case.capture, lambda step: case.batches[step]),
        optimizer=sgd,
        config=ExecutorConfig(
            parallelize=lambda module, mesh: (
                module if mesh is None else fully_shard(module, mesh=mesh)
            )
        ),
    )
    results = list(executor.steps(3))
    assert case.model.loss is not None
    wanted = train_plain(case.model.module, case.model.loss, case.batches, sgd)
    assert [r.loss for r in results] == pytest.approx(wanted.losses, abs=1e-9)
    held = dict(wanted.module.named_parameters())
    for name, p in executor.ranks[0].parameters.items():
        assert isinstance(p, DTensor) == (rank > 0)
        value = p.full_tensor() if isinstance(p, DTensor) else p
        assert torch.allclose(value, held[name], rtol=0, atol=1e-9), name


def test_a_stage_can_be_sharded_inside() -> None:
    spawn(_shard, 3)


def _hang(rank: int, path: str) -> None:
    """Rank 1 never sends."""
    case = zoo_case("candle-uno")
    graph = case.capture.graph
    executor = TorchStageExecutor(
        plan=plan_of_cut(graph, chain_cut(graph, 2), 8),
        capture=case.capture,
        module=case.model.module,
        world=DistWorld(timeout_s=2),
        source=TensorSource(case.capture, lambda step: case.batches[step]),
        optimizer=sgd,
    )
    if rank == 0:
        with pytest.raises(PeerTimeoutError) as caught:
            list(executor.steps(1))
        Path(path).write_text(str(caught.value))
    else:
        while not Path(path).exists():
            time.sleep(0.05)


def test_a_rank_that_waits_in_vain_says_where(tmp_path: Path) -> None:
    path = tmp_path / "said"
    spawn(_hang, 2, str(path))
    said = path.read_text()
    assert "rank 0 (device 0) hangs in step 0 at action 0RECV_B0>1 (peer rank 1)" in said
