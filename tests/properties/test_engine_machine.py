"""Any order of adding, stepping, cancelling and finishing keeps every invariant and every token."""

from __future__ import annotations

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
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.loop import EngineLoop
from weft.engine.request import FinishReason, Request
from weft.engine.sampling import SamplingParams

PREFIX = list(range(40, 64))


class EngineMachine(RuleBasedStateMachine):
    """Drives the production policy; the executor's tokens prove what each row saw."""

    alive = Bundle("alive")

    @initialize(
        num_pages=st.integers(13, 30),
        depth=st.integers(1, 3),
        budget=st.integers(1, 20),
        caching=st.booleans(),
        layout=st.sampled_from(
            [((None,), (1,)), ((7,), (1,)), ((None, 6), (1, 2)), ((None, None), (2, 1))]
        ),
    )
    def build(self, num_pages, depth, budget, caching, layout):
        windows, multiples = layout
        info = make_info(
            num_pages=num_pages * len(windows),
            windows=windows,
            page_multiples=multiples,
            max_num_seqs=5,
        )
        self.window = windows[0] if windows == (7,) else None
        self.executor = MemoryExecutor(info, max_in_flight=depth)
        self.policy = ContinuousBatching(
            PolicyConfig(
                max_model_len=40,
                max_num_batched_tokens=budget,
                enable_prefix_caching=caching,
                eos_token_ids=(11,),
            ),
            info,
            VirtualClock(),
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
            self._take(self.loop.step())

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
        self._take(self.loop.drain())
        assert self.policy.kv.pool.num_available == self.policy.kv.pool.num_total
        assert all(key in self.ended for key in self.tokens)

    @invariant()
    def integrity(self):
        if hasattr(self, "policy"):
            self.policy.check_integrity()

    def teardown(self):
        if hasattr(self, "policy"):
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
