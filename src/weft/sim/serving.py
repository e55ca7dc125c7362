"""Replay a workload through the production policy: under the virtual clock, or on a real executor.

`replay` is the one driver. `simulate_serving` calls it with a virtual clock and a simulated
executor; `benchmarks/replay_trace.py` calls it with the machine's clock and the real one.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weft.base.clock import Clock, VirtualClock
from weft.base.errors import InvalidRequestError, QueueFullError
from weft.cost.step_time import IterationShape, StepTimeModel
from weft.engine.batch import Batch, ExecutorInfo, StepResult
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.coserve import CoServing
from weft.engine.executor import BatchExecutor
from weft.engine.finetune import FinetuneEvent, FinetuneJobSpec
from weft.engine.finetune_limits import FinetuneConfig, FinetuneMemory
from weft.engine.iteration_shape import ShapeCounter
from weft.engine.loop import EngineLoop
from weft.engine.request import Request, SequenceUpdate
from weft.engine.sampling import SamplingParams
from weft.sim.batch_executor import SimulatedBatchExecutor
from weft.sim.serving_report import IterationRecord, RequestColumns, ServingReport
from weft.sim.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class CoServed:
    """Finetuning beside a workload."""

    config: FinetuneConfig
    jobs: tuple[FinetuneJobSpec, ...]
    predictor: StepTimeModel | None = None
    """Where the policy's predictions start; None means at the simulated executor's own times."""
    memory: FinetuneMemory | None = None


def simulate_serving(
    workload: Workload,
    *,
    step_time: StepTimeModel,
    info: ExecutorInfo,
    config: PolicyConfig,
    max_in_flight: int = 1,
    sampling: SamplingParams | None = None,
    finetune: CoServed | None = None,
) -> ServingReport:
    """Serve `workload` under the virtual clock; equal arguments give equal reports, bit for bit.

    The policy, its KV pages, its prefix cache and the loop are those that serve; only the executor
    is modelled: `info` says what it holds and `step_time` how long its batches take. With
    `finetune`, its jobs share the iterations until the last request is answered.

    Raises:
        OutOfMemoryError: the pages of `info` cannot hold one sequence of `config.max_model_len`.
    """
    clock = VirtualClock()
    fillers = (t for t in range(info.vocab_size) if t not in config.eos_token_ids)
    executor = SimulatedBatchExecutor(
        info, step_time, clock, max_in_flight=max_in_flight, filler_token=next(fillers, 0)
    )
    if finetune is None:
        policy = ContinuousBatching(config, info, clock)
    else:
        policy = CoServing(
            config,
            info,
            clock,
            finetune=finetune.config,
            step_time=finetune.predictor or step_time,
            memory=finetune.memory,
        )
        for job in finetune.jobs:
            policy.add_job(job)
    return replay(
        workload,
        policy,
        executor,
        clock=clock,
        wait_until=clock.advance_to,
        sampling=sampling,
        simulated=True,
    )


def replay(
    workload: Workload,
    policy: ContinuousBatching,
    executor: BatchExecutor,
    *,
    clock: Clock,
    wait_until: Callable[[float], None],
    sampling: SamplingParams | None = None,
    requests: Sequence[Request] | None = None,
    simulated: bool = False,
) -> ServingReport:
    """Submit every request at its arrival (open loop) and step the engine until all are answered.

    Requests join between iterations, as they do in the server; jobs of the policy run meanwhile,
    and stop with the last answer. `wait_until` passes the time while the engine has nothing to do.
    `sampling` is as in `Workload.request`; `requests` gives the requests ready-made (then making
    them costs no time of a real replay).
    """
    watched = _WatchedExecutor(executor, policy, clock)
    loop = EngineLoop(policy, watched)
    recorder = _Recorder(workload)
    start_s = clock.now_s()
    watched.origin_s = start_s
    arrivals = workload.arrival_s.tolist()
    arrived = 0
    while arrived < len(arrivals) or recorder.num_open:
        now_s = clock.now_s() - start_s
        while arrived < len(arrivals) and arrivals[arrived] <= now_s:
            request = (
                requests[arrived]
                if requests is not None
                else workload.request(arrived, executor.info.vocab_size, sampling)
            )
            try:
                # The policy's clock need not begin at 0.
                policy.add(dataclasses.replace(request, arrival_s=start_s + arrivals[arrived]))
                recorder.num_open += request.sampling.n
            except (InvalidRequestError, QueueFullError):
                recorder.is_rejected[arrived] = True
            arrived += 1
        if loop.has_work:
            updates = loop.step()
            recorder.take(updates, clock.now_s() - start_s)
        elif arrived < len(arrivals):
            wait_until(start_s + arrivals[arrived])
        if isinstance(policy, CoServing):
            recorder.events.extend(policy.take_finetune_events())
    return recorder.report(policy, tuple(watched.records), simulated=simulated, origin_s=start_s)


class _WatchedExecutor:
    """Passes everything on; notes when each batch ran, what it carried, what the policy held."""

    def __init__(self, executor: BatchExecutor, policy: ContinuousBatching, clock: Clock) -> None:
        self._executor = executor
        self._policy = policy
        self._clock = clock
        self._submitted: deque[tuple[float, IterationShape, float, int, int]] = deque()
        self._last_end_s = 0.0
        self.origin_s = 0.0
        self.records: list[IterationRecord] = []
        self._counter = ShapeCounter(executor.info)

    @property
    def info(self) -> ExecutorInfo:
        return self._executor.info

    @property
    def max_in_flight(self) -> int:
        return self._executor.max_in_flight

    def submit(self, batch: Batch) -> None:
        stats = self._policy.stats()
        shape = self._counter.count(batch)
        before_s = self._clock.now_s() - self.origin_s
        self._executor.submit(batch)
        self._submitted.append(
            (before_s, shape, stats.kv_cache_usage, stats.num_running, stats.num_waiting)
        )

    def collect(self) -> StepResult:
        result = self._executor.collect()
        end_s = self._clock.now_s() - self.origin_s
        submitted_s, shape, kv_share, num_running, num_waiting = self._submitted.popleft()
        # The device runs one batch after another, and was busy for `elapsed_s` of the wait.
        start_s = max(submitted_s, self._last_end_s, end_s - result.elapsed_s)
        self._last_end_s = end_s
        self.records.append(
            IterationRecord(
                start_s=start_s,
                end_s=end_s,
                shape=shape,
                kv_share=kv_share,
                num_running=num_running,
                num_waiting=num_waiting,
            )
        )
        return result

    def abandon(self) -> None:
        self._submitted.clear()
        self._executor.abandon()

    def close(self) -> None:
        self._executor.close()


class _Recorder:
    """Collects updates into columns."""

    def __init__(self, workload: Workload) -> None:
        size = len(workload)
        self._workload = workload
        self._scheduled_s = [float("nan")] * size
        self._first_s = [float("nan")] * size
        self._last_s = [float("nan")] * size
        self._num_cached = [0] * size
        self._num_generated = [0] * size
        self._gaps_s = array("d")
        self._num_finished = 0
        self.is_rejected = np.zeros(size, np.bool_)
        self.num_open = 0
        """Choices that are not answered."""
        self.events: list[FinetuneEvent] = []

    def take(self, updates: Sequence[SequenceUpdate], now_s: float) -> None:
        first_s, last_s, generated = self._first_s, self._last_s, self._num_generated
        for update in updates:
            index = int(update.request_id)
            count = len(update.new_token_ids)
            if count:
                if generated[index] == 0:
                    first_s[index] = now_s
                    self._scheduled_s[index] = update.first_scheduled_s
                    self._num_cached[index] = update.num_cached_tokens
                else:
                    self._gaps_s.append(now_s - last_s[index])
                last_s[index] = now_s
                generated[index] += count
            if update.finish_reason is not None:
                self._num_finished += 1
                self.num_open -= 1

    def report(
        self,
        policy: ContinuousBatching,
        iterations: tuple[IterationRecord, ...],
        *,
        simulated: bool,
        origin_s: float,
    ) -> ServingReport:
        stats = policy.stats()
        workload = self._workload
        generated = np.array(self._num_generated, np.int64)
        served = ~self.is_rejected
        return ServingReport(
            simulated=simulated,
            requests=RequestColumns(
                arrival_s=workload.arrival_s,
                first_scheduled_s=np.array(self._scheduled_s) - origin_s,
                first_token_s=np.array(self._first_s),
                last_token_s=np.array(self._last_s),
                num_prompt_tokens=workload.num_prompt_tokens,
                num_cached_tokens=np.array(self._num_cached, np.int64),
                num_generated_tokens=generated,
                is_rejected=self.is_rejected,
            ),
            iterations=iterations,
            finetune_events=tuple(self.events),
            finetune_stats=policy.finetune_stats() if isinstance(policy, CoServing) else None,
            inter_token_s=np.array(self._gaps_s, np.float64),
            num_finished=self._num_finished,
            num_preempted=stats.num_preemptions,
            num_truncated=int((served & (generated < workload.num_output_tokens)).sum()),
            num_skipped=workload.num_skipped,
            prefix_cache_hit_share=(
                stats.prefix_cache_hits / stats.prefix_cache_queries
                if stats.prefix_cache_queries
                else 0.0
            ),
        )
