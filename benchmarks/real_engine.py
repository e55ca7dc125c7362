"""The engine in this process, on the CPU: built, profiled and warmed up alike by all benchmarks."""

from __future__ import annotations

import time

import torch
from bench_models import BenchModel
from rows import describe_machine

from weft.base.clock import WallClock
from weft.cost.fitted_step_time import StepTimeProfile
from weft.engine.continuous import ContinuousBatching
from weft.runtime.build import BuiltModel, ExecutorConfig, build_executor
from weft.runtime.serve_profiler import ProfileConfig, profile_serving
from weft.sim.serving import replay
from weft.sim.serving_report import ServingReport
from weft.sim.workload import Workload

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 32


def build_engine(
    model: BenchModel,
    *,
    dtype: str,
    num_threads: int,
    max_num_seqs: int = MAX_NUM_SEQS,
    max_finetune_samples: int = 0,
) -> BuiltModel:
    """An executor of a benchmark's model for sequences of at most 1,024 tokens."""
    torch.set_num_threads(num_threads)
    return build_executor(
        ExecutorConfig(
            model=str(model.path),
            dtype=dtype,
            device="cpu",
            max_model_len=min(MAX_MODEL_LEN, model.config["max_position_embeddings"]),
            max_num_seqs=max_num_seqs,
            num_threads=num_threads,
            max_finetune_samples=max_finetune_samples,
        )
    )


def measure_profile(
    built: BuiltModel, *, model: str, dtype: str, time_limit_s: float
) -> StepTimeProfile:
    """What `weft profile --serve` does, on the very executor that then serves."""
    return profile_serving(
        built.executor,
        ProfileConfig(
            max_model_len=built.resolved.max_model_len,
            max_num_batched_tokens=built.resolved.max_num_batched_tokens,
            time_limit_s=time_limit_s,
        ),
        model=model,
        dtype=dtype,
        device=describe_machine()["processor"],
    )


def serve_in_real_time(
    built: BuiltModel, policy: ContinuousBatching, workload: Workload
) -> ServingReport:
    """Serve a workload open loop under the machine's clock, with a fresh policy."""
    clock, executor = WallClock(), built.executor
    return replay(
        workload,
        policy,
        executor,
        clock=clock,
        wait_until=lambda time_s: time.sleep(max(0.0, time_s - clock.now_s())),
        # Made beforehand: in the server they are made in another process.
        requests=[
            workload.request(index, executor.info.vocab_size) for index in range(len(workload))
        ],
    )


def warm_up(built: BuiltModel, policy: ContinuousBatching, workload: Workload) -> None:
    """A few requests at once, so that what is compiled or packed on first use is ready."""
    serve_in_real_time(built, policy, workload.first(8).with_rate(1e6))
