"""Measures a model's blocks forward and backward on the device at hand."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.base.errors import ConfigError, OutOfMemoryError, UnsupportedError
from weft.cost.profiled import BlockProfile, BlockTimes
from weft.graph.capture import Capture
from weft.graph.coarsen import coarsen
from weft.graph.graph import Graph, Op
from weft.runtime.block_program import BlockProgram, check_dynamic_batch, cut_block, run_block


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerConfig:
    """How to measure: sizes, repetitions, and when a block has grown slow enough to stop.

    Batch sizes rise; after the first run longer than `slow_s` a block's larger sizes are left out,
    since its time is then proportional to the batch.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    num_repeats: int = 5
    max_blocks: int = 150
    slow_s: float = 2.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.batch_sizes or self.batch_sizes[0] < 1:
            raise ConfigError(f"batch sizes {self.batch_sizes} must be at least 1; give one")
        if list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise ConfigError(f"batch sizes {self.batch_sizes} must rise, each given once")
        if self.num_repeats < 1:
            raise ConfigError(f"num_repeats is {self.num_repeats}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """A profile with the graph of blocks that it is about."""

    graph: Graph
    profile: BlockProfile
    num_uses: Counter[str]


def profile_blocks(
    capture: Capture,
    config: ProfilerConfig,
    *,
    device_name: str,
    progress: Callable[[int, int, str], None] | None = None,
) -> ModelProfile:
    """Coarsen `capture`'s graph and measure one block of each signature at each batch size.

    Times are medians of `num_repeats` runs after one warm-up, synchronised with the device; weight
    gradients accumulate, as over micro-batches. `progress(done, total, block id)` is called before
    each block. Raises UnsupportedError for a program of fixed batch, OutOfMemoryError where a block
    does not fit at the smallest size.
    """
    check_dynamic_batch(capture, config.batch_sizes)
    device = torch.device(config.device)
    graph = coarsen(capture.graph, config.max_blocks)
    distinct: dict[str, Op] = {}
    for op in graph.ops:
        distinct.setdefault(op.signature, op)
    blocks: dict[str, BlockTimes] = {}
    for done, (signature, op) in enumerate(distinct.items()):
        if progress is not None:
            progress(done, len(distinct), op.id)
        blocks[signature] = _measure_block(capture, op, config, device)
    profile = BlockProfile(
        model=graph.name,
        device=device_name,
        dtype=graph.dtype,
        blocks=blocks,
        graph_digest=graph.digest,
        update_s=_measure_updates(config, device),
        environment={
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "num_threads": str(torch.get_num_threads()),
            "num_repeats": str(config.num_repeats),
        },
    )
    return ModelProfile(
        graph=graph, profile=profile, num_uses=Counter(op.signature for op in graph.ops)
    )


def _measure_block(
    capture: Capture, op: Op, config: ProfilerConfig, device: torch.device
) -> BlockTimes:
    program = cut_block(capture, op, device)
    torch.manual_seed(0)
    sizes: list[int] = []
    forward_s: list[float] = []
    backward_s: list[float] = []
    weights = {
        i: description.make(capture.batch, capture.batch, device)
        for i, description in enumerate(program.inputs)
        if description.is_weight
    }
    for size in config.batch_sizes:
        try:
            runs = [
                _run_once(program, weights, size, device) for _ in range(config.num_repeats + 1)
            ][1:]
        except torch.OutOfMemoryError:
            if not sizes:
                raise OutOfMemoryError(
                    f"block {op.id!r} does not fit on {config.device} at batch size {size}; "
                    "profile smaller sizes, or raise --max-blocks for smaller blocks"
                ) from None
            break
        except RuntimeError as error:
            if size == capture.batch:
                raise
            raise UnsupportedError(
                f"block {op.id!r} runs at batch {capture.batch} but not at {size}: "
                f"{str(error).splitlines()[0]}; profile with --batch-sizes {capture.batch}"
            ) from error
        sizes.append(size)
        forward_s.append(statistics.median(run.forward_s for run in runs))
        backward_s.append(statistics.median(run.backward_s for run in runs))
        if forward_s[-1] + backward_s[-1] > config.slow_s:
            break
    return BlockTimes(
        op_id=op.id,
        batch_sizes=tuple(sizes),
        forward_s=tuple(forward_s),
        backward_s=tuple(backward_s),
    )


_UPDATED_PARAMS = 2**20
"""Parameters of the tensor that updates are measured on: more than caches hold, with its state."""


def _measure_updates(config: ProfilerConfig, device: torch.device) -> dict[str, float]:
    """Seconds per parameter of an update, by optimizer."""
    found: dict[str, float] = {}
    for name, make in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        held = [torch.nn.Parameter(torch.zeros(_UPDATED_PARAMS, device=device)) for _ in range(4)]
        optimizer = make(held, lr=1e-3)
        times_s: list[float] = []
        for _ in range(config.num_repeats + 1):
            for p in held:
                p.grad = torch.ones_like(p)
            started_s = _now(device)
            optimizer.step()
            times_s.append(_now(device) - started_s)
        found[name] = statistics.median(times_s[1:]) / (len(held) * _UPDATED_PARAMS)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    forward_s: float
    backward_s: float


def _run_once(
    program: BlockProgram, weights: dict[int, Tensor], size: int, device: torch.device
) -> _Run:
    tensors = [
        weights[i] if i in weights else description.make(size, program.example_batch, device)
        for i, description in enumerate(program.inputs)
    ]
    started = _now(device)
    outputs = run_block(program, tensors)
    forward = _now(device)
    differentiable = [t for t in outputs if t.requires_grad]
    gradients: Sequence[Tensor] = [torch.ones_like(t) for t in differentiable]
    before_backward = _now(device)
    if differentiable:
        torch.autograd.backward(differentiable, gradients)
    finished = _now(device)
    return _Run(forward_s=forward - started, backward_s=finished - before_backward)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
