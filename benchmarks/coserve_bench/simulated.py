"""A server under the virtual clock, and its halves for spatial sharing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from weft.base.clock import VirtualClock
from weft.cluster.device import DeviceType
from weft.cost.step_time import StepTimeModel
from weft.engine.coserve import CoServing
from weft.engine.finetune import FinetuneJobSpec, TrainingSample
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.loop import EngineLoop
from weft.graph.adapter_spec import AdapterSpec
from weft.sim.batch_executor import SimulatedBatchExecutor
from weft.sim.serving import CoServed
from weft.sim.serving_report import ServingReport
from weft.sim.serving_setup import DEFAULT_MAX_FINETUNE_SAMPLES, ServingSetup
from weft.sim.workload import Workload


def endless_job(
    num_tokens: int, *, num_samples: int = 2000, batch_size: int = 1
) -> FinetuneJobSpec:
    """Samples of one length, more than any run trains."""
    sample = TrainingSample(
        token_ids=np.ones(num_tokens, np.int32), label_weights=np.ones(num_tokens, np.float32)
    )
    return FinetuneJobSpec(
        id="bench",
        adapter=AdapterSpec(rank=16),
        samples=(sample,) * num_samples,
        batch_size=batch_size,
        shuffles=False,
    )


class SimulatedServer:
    """Implements `cells.Server`."""

    simulated = True

    def __init__(
        self, name: str, setup: ServingSetup, job: FinetuneJobSpec, *, window: int = 512
    ) -> None:
        self.name = name
        self._setup = setup
        self._job = job
        self._window = window

    @property
    def step_time(self) -> StepTimeModel:
        """Of the setup."""
        return self._setup.step_time

    def run(self, workload: Workload, config: FinetuneConfig, *, has_job: bool) -> ServingReport:
        """Serve it once; the job lasts as long as the requests."""
        jobs = (self._job,) if has_job else ()
        return self._setup.run(workload, CoServed(config=config, jobs=jobs))

    def finetune_tokens_per_s(self) -> float:
        """Speed of 20 samples alone."""
        clock = VirtualClock()
        info = replace(self._setup.info, max_finetune_samples=DEFAULT_MAX_FINETUNE_SAMPLES)
        config = FinetuneConfig(
            policy=FinetunePolicy.FINETUNE_ONLY,
            forward_window=self._window,
            backward_window=self._window,
        )
        policy = CoServing(self._setup.config, info, clock, finetune=config)
        samples = self._job.samples[:20]
        policy.add_job(replace(self._job, samples=samples))
        EngineLoop(policy, SimulatedBatchExecutor(info, self.step_time, clock)).drain()
        return sum(sample.num_tokens for sample in samples) / clock.now_s()


def half_device(device: DeviceType) -> DeviceType:
    """Half of a device's arithmetic and bandwidth, for one of two processes that share it."""
    return replace(
        device,
        name=f"half {device.name}",
        peak_flops={dtype: peak / 2 for dtype, peak in device.peak_flops.items()},
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s / 2,
    )
