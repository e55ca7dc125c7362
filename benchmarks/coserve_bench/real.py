"""The real engine in this process, in real time: the 110 M or the embedded model."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from bench_models import open_model
from rows import describe_machine

from coserve_bench.simulated import endless_job
from weft.base.clock import WallClock
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.step_time import StepTimeModel
from weft.engine.config import PolicyConfig
from weft.engine.coserve import CoServing
from weft.engine.finetune import FinetuneJobSpec, StepMetrics
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.loop import EngineLoop
from weft.runtime.build import BuiltModel, ExecutorConfig, build_executor
from weft.runtime.serve_profiler import ProfileConfig, profile_serving
from weft.sim.serving import replay
from weft.sim.serving_report import ServingReport
from weft.sim.workload import Workload

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 32
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
        clock, executor = WallClock(), self._built.executor
        policy = self._policy(config)
        if has_job:
            policy.add_job(self._job)
        vocab_size = executor.info.vocab_size
        report = replay(
            workload,
            policy,
            executor,
            clock=clock,
            wait_until=lambda time_s: time.sleep(max(0.0, time_s - clock.now_s())),
            # Made beforehand: in the server they are made in another process.
            requests=[workload.request(index, vocab_size) for index in range(len(workload))],
        )
        if has_job:
            policy.cancel_job(self._job.id)
            EngineLoop(policy, executor).drain()
        return report

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


def real_server(options: argparse.Namespace) -> RealServer:
    """Build the model, and measure its profile where `--profile` names none."""
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    model = open_model(options.real_model, options.cache.resolve(), options.embedded_model)
    built = build_executor(
        ExecutorConfig(
            model=str(model.path),
            dtype=options.dtype,
            device="cpu",
            max_model_len=min(MAX_MODEL_LEN, model.config["max_position_embeddings"]),
            max_num_seqs=options.max_num_seqs or MAX_NUM_SEQS,
            num_threads=options.threads,
            max_finetune_samples=2,
        )
    )
    if options.profile is not None:
        profile = StepTimeProfile.read(options.profile)
    else:
        profile = profile_serving(
            built.executor,
            ProfileConfig(
                max_model_len=built.resolved.max_model_len,
                max_num_batched_tokens=built.resolved.max_num_batched_tokens,
                time_limit_s=options.profile_time_s,
            ),
            model=options.real_model,
            dtype=options.dtype,
            device=describe_machine()["processor"],
        )
        profile.write(options.cache / f"profile-ft-{options.real_model}-{options.dtype}.json")
    job = endless_job(options.sample_tokens, batch_size=options.batch_size)
    return RealServer(f"{options.real_model} {options.dtype}", built, profile, job)
