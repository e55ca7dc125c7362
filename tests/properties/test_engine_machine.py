"""Any order of adding, stepping, cancelling and finishing keeps every invariant and every token.

Jobs come, pause, end and break down beside the requests, under every way to share an iteration; the
executor checks each of their windows, steps and pages.
"""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from engine.fakes import MemoryExecutor, make_info, next_token
from weft.base.clock import VirtualClock
from weft.base.errors import OutOfMemoryError
from weft.cost.step_time import IterationShape
from weft.engine.config import PolicyConfig
from weft.engine.coserve import CoServing
from weft.engine.finetune import (
    BackwardOrder,
    FinetuneJobSpec,
    JobChanged,
    JobStatus,
    TrainingSample,
)
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy, LatencySlo
from weft.engine.loop import EngineLoop
from weft.engine.request import FinishReason, Request
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterSpec

PREFIX = list(range(40, 64))
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class Steps:
    """A millisecond a token, and a tenth for a token of a layer backward."""

    def device_s(self, shape: IterationShape) -> float:
        steps_s = 2e-3 * shape.num_ft_steps
        return 1e-3 * shape.num_tokens + 1e-4 * shape.num_ft_token_layers + steps_s

    def host_s(self, shape: IterationShape) -> float:
        return 0.0


class EngineMachine(RuleBasedStateMachine):
    """Drives the production policy; the executor's tokens prove what each row saw."""

    alive = Bundle("alive")
    jobs = Bundle("jobs")

    @initialize(
        num_pages=st.integers(13, 30),
        depth=st.integers(1, 3),
        budget=st.integers(1, 20),
        caching=st.booleans(),
        layout=st.sampled_from(
            [((None,), (1,)), ((7,), (1,)), ((None, 6), (1, 2)), ((None, None), (2, 1))]
        ),
        kind=st.sampled_from(FinetunePolicy),
        iteration_s=st.sampled_from([0.004, 0.02, 0.1]),
        share=st.sampled_from([0.0, 0.3]),
        window=st.integers(1, 12),
        save_delay=st.integers(0, 4),
    )
    def build(
        self,
        num_pages,
        depth,
        budget,
        caching,
        layout,
        kind,
        iteration_s,
        share,
        window,
        save_delay,
    ):
        windows, multiples = layout
        info = make_info(
            num_pages=num_pages * len(windows),
            windows=windows,
            page_multiples=multiples,
            max_num_seqs=5,
            max_finetune_samples=3,
            layers_per_group=2,
        )
        self.window = windows[0] if windows == (7,) else None
        self.executor = MemoryExecutor(info, max_in_flight=depth)
        self.executor.finetune.save_delay = save_delay
        self.clock = VirtualClock()
        self.job_ends: dict[str, JobStatus] = {}
        self.num_jobs = 0
        self.policy = CoServing(
            PolicyConfig(
                max_model_len=40,
                max_num_batched_tokens=budget,
                enable_prefix_caching=caching,
                eos_token_ids=(11,),
            ),
            info,
            self.clock,
            finetune=FinetuneConfig(
                policy=kind,
                slo=LatencySlo(tpot_s=0.02, ttft_s=0.5),
                max_iteration_s=iteration_s,
                min_share=share,
                granule_tokens=1 + window // 3,
                max_window_tokens=window,
                budget_tokens=max(2, budget),
                budget_layers=2,
                temporal_iterations=window if window % 2 else None,
                forward_window=window,
                backward_window=window,
            ),
            step_time=Steps(),
        )
        self.loop = EngineLoop(self.policy, self.executor)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()

    @rule(
        target=alive,
        shared=st.integers(0, 24),
        tail=st.lists(st.integers(0, 96), min_size=1, max_size=10),
        n=st.integers(1, 3),
        max_tokens=st.integers(0, 12),
        priority=st.integers(-1, 1),
    )
    def add(self, shared, tail, n, max_tokens, priority):
        name = f"r{len(self.requests)}"
        request = Request(
            id=name,
            prompt_token_ids=tuple(PREFIX[:shared] + tail),
            sampling=SamplingParams(n=n, max_tokens=max_tokens),
            priority=priority,
        )
        self.policy.add(request)
        self.requests[name] = request
        self.tokens.update({(name, choice): [] for choice in range(n)})
        return multiple(name)

    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            self._step()

    def _step(self):
        self.clock.advance_to(self.clock.now_s() + 0.01)
        self._take(self.loop.step())
        self._take_events()

    def _take_events(self):
        for event in self.policy.take_finetune_events():
            name = event.job_id
            assert name not in self.job_ends, f"{name} speaks after its end"
            if isinstance(event, JobChanged) and event.status in _ENDED:
                self.job_ends[name] = event.status

    @rule(
        target=jobs,
        lengths=st.lists(st.integers(2, 14), min_size=1, max_size=4),
        batch_size=st.integers(1, 3),
        order=st.sampled_from(BackwardOrder),
        validates=st.booleans(),
        saves=st.booleans(),
        fails=st.booleans(),
        lowest=st.integers(0, 1),
        tenant=st.sampled_from(["", "a"]),
    )
    def add_job(self, lengths, batch_size, order, validates, saves, fails, lowest, tenant):
        name = f"j{self.num_jobs}"
        self.num_jobs += 1
        samples = tuple(
            TrainingSample(
                token_ids=np.arange(n, dtype=np.int32), label_weights=np.ones(n, np.float32)
            )
            for n in lengths
        )
        last = self.policy.info.num_layers - 1
        spec = FinetuneJobSpec(
            id=name,
            adapter=AdapterSpec(layers_to_transform=(lowest, last)),
            samples=samples,
            validation=samples[:1] if validates else (),
            batch_size=batch_size,
            num_epochs=2,
            backward_order=order,
            checkpoint_dir=name if saves else None,
            tenant=tenant,
        )
        try:
            self.policy.add_job(spec)
        except OutOfMemoryError:
            return multiple()
        self.executor.finetune.lowest_layer[name] = lowest
        if fails:
            self.executor.finetune.fails_at[name] = 1
        return multiple(name)

    @rule(name=jobs)
    def cancel_job(self, name):
        self._take_events()
        assert self.policy.cancel_job(name) == (name not in self.job_ends)

    @rule(name=jobs)
    def pause_job(self, name):
        self._take_events()
        assert self.policy.pause_job(name) == (name not in self.job_ends)

    @rule(name=jobs)
    def resume_job(self, name):
        self.policy.resume_job(name)

    @precondition(lambda self: self.policy.num_in_flight or self.policy.has_work)
    @rule()
    def break_down(self):
        self.executor.fails_next_collect = True
        try:
            self.loop.step()
        except RuntimeError:
            assert self.policy.num_in_flight == 0
        self.executor.fails_next_collect = False

    @rule(name=consumes(alive))
    def cancel(self, name):
        self.policy.cancel(name)
        self._end(name, range(self.requests[name].sampling.n))

    @rule(name=alive, choice=st.integers(0, 2))
    def finish(self, name, choice):
        self.policy.finish(name, choice)
        self._end(name, [choice])

    @precondition(lambda self: self.policy.has_work)
    @rule()
    def drain(self):
        for _ in range(10_000):
            if not self.loop.has_work:
                break
            self._step()
        assert not self.loop.has_work
        if not self.policy.jobs():
            assert self.policy.kv.pool.num_available == self.policy.kv.pool.num_total
            assert not self.executor.finetune.samples
        for job in self.policy.jobs():
            # What is left is paused, or waits for the memory of one that is, or may never run.
            kind = self.policy.finetune.policy
            paused = any(j.status is JobStatus.PAUSED for j in self.policy.jobs())
            assert paused or kind is FinetunePolicy.INFERENCE_ONLY, job
        assert all(key in self.ended for key in self.tokens)

    @invariant()
    def integrity(self):
        if hasattr(self, "policy"):
            self.policy.check_integrity()

    def teardown(self):
        if hasattr(self, "policy"):
            for job in self.policy.jobs():
                self.policy.resume_job(job.id)
            self.drain()
            self.policy.check_integrity()

    def _end(self, name, choices):
        self.ended.update((name, choice) for choice in choices)

    def _take(self, updates):
        for update in updates:
            key = (update.request_id, update.choice)
            assert key not in self.ended, f"{key} speaks after its end"
            request = self.requests[update.request_id]
            prompt = list(request.prompt_token_ids)
            for token in update.new_token_ids:
                known = prompt + self.tokens[key]
                seen = known if self.window is None else known[-self.window :]
                assert token == next_token(seen, -1, update.choice, 97)
                self.tokens[key].append(token)
            if update.finish_reason is not None:
                self.ended.add(key)
                self._check_end(request, self.tokens[key], update.finish_reason)

    def _check_end(self, request, output, reason):
        if reason is FinishReason.STOP:
            assert output[-1] == 11
        else:
            assert reason is FinishReason.LENGTH
            assert len(output) == min(
                request.sampling.max_tokens, 40 - len(request.prompt_token_ids)
            )


EngineMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)
TestEngineMachine = EngineMachine.TestCase
