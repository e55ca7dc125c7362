"""The real engine in this process, in real time: the 110 M or the embedded model."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from bench_models import open_model
from real_engine import (
    MAX_NUM_SEQS,
    build_engine,
    measure_profile,
    serve_in_real_time,
    warm_up,
)

from coserve_bench.cells import SPATIAL, Objectives, Outcome, outcome
from coserve_bench.simulated import endless_job
from weft.base.clock import WallClock
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.step_time import StepTimeModel
from weft.engine.config import PolicyConfig
from weft.engine.coserve import CoServing
from weft.engine.finetune import FinetuneJobSpec, StepMetrics
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.loop import EngineLoop
from weft.runtime.build import BuiltModel
from weft.sim.serving_report import ServingReport
from weft.sim.workload import Workload

NUM_SAMPLES_ALONE = 8


class RealServer:
    """Implements `cells.Server` on one executor; every run has a fresh policy."""

    simulated = False

    def __init__(
        self, name: str, built: BuiltModel, profile: StepTimeProfile, job: FinetuneJobSpec
    ) -> None:
        self.name = name
        self._built = built
        self._job = job
        self._profile = profile

    @property
    def step_time(self) -> StepTimeModel:
        """The profile that was measured before."""
        return self._profile

    def run(self, workload: Workload, config: FinetuneConfig, *, has_job: bool) -> ServingReport:
        """Serve it once; the job lasts as long as the requests."""
        policy = self._policy(config)
        if has_job:
            policy.add_job(self._job)
        report = serve_in_real_time(self._built, policy, workload)
        if has_job:
            policy.cancel_job(self._job.id)
            EngineLoop(policy, self._built.executor).drain()
        return report

    def warm_up(self, workload: Workload) -> None:
        """Meet what is compiled on first use before anything is timed."""
        config = FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY)
        warm_up(self._built, self._policy(config), workload)

    def finetune_tokens_per_s(self) -> float:
        """Speed of some samples alone, after the first step."""
        config = FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY)
        policy = self._policy(config)
        count = NUM_SAMPLES_ALONE + self._job.batch_size
        policy.add_job(replace(self._job, samples=self._job.samples[: count + 1]))
        loop = EngineLoop(policy, self._built.executor)
        steps: list[tuple[float, int]] = []
        while sum(tokens for _, tokens in steps) < count * self._job.samples[0].num_tokens:
            loop.step()
            steps += [
                (time.perf_counter(), event.num_tokens)
                for event in policy.take_finetune_events()
                if isinstance(event, StepMetrics)
            ]
        policy.cancel_job(self._job.id)
        loop.drain()
        return sum(tokens for _, tokens in steps[1:]) / (steps[-1][0] - steps[0][0])

    def _policy(self, config: FinetuneConfig) -> CoServing:
        resolved = self._built.resolved
        return CoServing(
            PolicyConfig(
                max_model_len=resolved.max_model_len,
                max_num_batched_tokens=resolved.max_num_batched_tokens,
                eos_token_ids=tuple(self._built.generation.eos_token_ids),
            ),
            self._built.executor.info,
            WallClock(),
            finetune=config,
            step_time=self._profile,
        )


def real_server(
    options: argparse.Namespace, job: FinetuneJobSpec, profile_path: Path
) -> RealServer:
    """Build the model, and measure its profile where that file is not there yet."""
    built = _built(options)
    if profile_path.exists():
        profile = StepTimeProfile.read(profile_path)
    else:
        profile = measure_profile(
            built,
            model=options.real_model,
            dtype=options.dtype,
            time_limit_s=options.profile_time_s,
        )
        profile.write(profile_path)
    return RealServer(f"{options.real_model} {options.dtype}", built, profile, job)


def _built(options: argparse.Namespace) -> BuiltModel:
    options.cache.mkdir(parents=True, exist_ok=True)
    return build_engine(
        open_model(options.real_model, options.cache.resolve(), options.embedded_model),
        dtype=options.dtype,
        num_threads=options.threads,
        max_num_seqs=options.max_num_seqs or MAX_NUM_SEQS,
        max_finetune_samples=4,
    )


# ---- spatial sharing: this process serves on one core, another finetunes on the other ----


def run_spatial_real(
    options: argparse.Namespace, job: FinetuneJobSpec, workload: Workload, wanted: Objectives
) -> Outcome:
    """Two processes of one thread and one core each, with the same engine and the same job."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, sys.argv[0], "--finetune-worker", "--core", str(cores[-1])]
    command += ["--threads", "1", "--real-model", options.real_model, "--dtype", options.dtype]
    command += ["--jobs", options.jobs[0], "--cache", str(options.cache)]
    if options.embedded_model is not None:
        command += ["--embedded-model", str(options.embedded_model)]
    os.sched_setaffinity(0, {cores[0]})
    options.threads = 1
    name = f"profile-ft-{options.real_model} {options.dtype}-1-thread.json"
    server = real_server(options, job, options.cache / name)
    server.warm_up(workload)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            raise SystemExit("the process that finetunes did not start")
        config = FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY, slo=wanted.slo)
        report = server.run(workload, config, has_job=False)
        worker.stdin.close()
        tokens_per_s = float(worker.stdout.readline())
    os.sched_setaffinity(0, set(cores))
    served = outcome(SPATIAL, report, wanted, server.step_time)
    return replace(served, finetune_tokens_per_s=tokens_per_s)


def finetune_worker(options: argparse.Namespace) -> None:
    """Finetune alone until stdin is closed; says `ready`, and at the end its tokens per second."""
    batch_size, _, num_tokens = options.jobs[0].partition("x")
    built = _built(options)
    job = endless_job(int(num_tokens), batch_size=int(batch_size))
    policy = CoServing(
        PolicyConfig(
            max_model_len=built.resolved.max_model_len,
            max_num_batched_tokens=built.resolved.max_num_batched_tokens,
        ),
        built.executor.info,
        WallClock(),
        finetune=FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY),
    )
    policy.add_job(job)
    loop = EngineLoop(policy, built.executor)
    while not policy.finetune_stats().num_steps:  # Kernels are compiled when they are first met.
        loop.step()
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    print("ready", flush=True)
    start_s, before = time.perf_counter(), policy.finetune_stats().num_forward_tokens
    while not is_over.is_set():
        loop.step()
    elapsed_s = time.perf_counter() - start_s
    print((policy.finetune_stats().num_forward_tokens - before) / elapsed_s, flush=True)
