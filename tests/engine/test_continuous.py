"""The policy over an executor whose tokens depend on every cell that a row sees."""

from __future__ import annotations

import numpy as np
import pytest

from engine.fakes import MemoryExecutor, make_info, next_token
from weft.base.clock import VirtualClock
from weft.base.errors import (
    ConfigError,
    IntegrityError,
    InvalidRequestError,
    OutOfMemoryError,
    QueueFullError,
)
from weft.engine.batch import AdapterRef, Batch, ExecutorInfo, SegmentKind, StepResult
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.loop import EngineLoop
from weft.engine.request import FinishReason, Request, SequenceUpdate
from weft.engine.sampling import SamplingParams
from weft.engine.wire import decode, encode


def make_policy(info: ExecutorInfo, **settings: object) -> ContinuousBatching:
    defaults = {"max_model_len": 48, "max_num_batched_tokens": 16}
    return ContinuousBatching(PolicyConfig(**{**defaults, **settings}), info, VirtualClock())


def expected(
    prompt: list[int], count: int, *, window: int | None = None, choice: int = 0, adapter: int = -1
) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        seen = tokens if window is None else tokens[-window:]
        tokens.append(next_token(seen, adapter, choice, 97))
    return tokens[len(prompt) :]


class Outputs:
    """Collects updates and checks that each choice ends once."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], FinishReason] = {}
        self.updates: list[SequenceUpdate] = []

    def take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            key = (update.request_id, update.choice)
            assert key not in self.reasons, f"{key} goes on after its end"
            self.tokens.setdefault(key, []).extend(update.new_token_ids)
            if update.finish_reason is not None:
                self.reasons[key] = update.finish_reason
            self.updates.append(update)


def run(policy: ContinuousBatching, executor: MemoryExecutor) -> Outputs:
    loop, outputs = EngineLoop(policy, executor), Outputs()
    for _ in range(10_000):
        if not loop.has_work:
            break
        outputs.take(loop.step())
        policy.check_integrity()
    assert not loop.has_work, "the engine does not come to an end"
    assert policy.kv.pool.num_available == policy.kv.pool.num_total
    return outputs


def request(name: str, prompt: list[int], *, max_tokens: int = 6, **more: object) -> Request:
    fields = {key: more.pop(key) for key in ("priority", "adapter", "cache_salt") if key in more}
    sampling = SamplingParams(max_tokens=max_tokens, **more)
    return Request(id=name, prompt_token_ids=tuple(prompt), sampling=sampling, **fields)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("windows", "multiples", "num_pages"),
    [((None,), (1,), 30), ((6,), (1,), 9), ((None, 9), (1, 2), 30), ((5, None), (4, 1), 30)],
)
def test_every_mix_of_rows_sees_exactly_its_own_tokens(depth, windows, multiples, num_pages):
    """Chunks, prefix hits, preemptions and windows change nothing that a request gets."""
    info = make_info(num_pages=num_pages, windows=windows, page_multiples=multiples, max_num_seqs=6)
    executor = MemoryExecutor(info, max_in_flight=depth)
    policy = make_policy(info, max_num_batched_tokens=11)
    random = np.random.default_rng(7)
    shared = random.integers(0, 97, 20).tolist()
    prompts = {}
    for i in range(40):
        tail = random.integers(0, 97, random.integers(1, 14)).tolist()
        prompts[str(i)] = (shared[: random.integers(0, 20)] + tail, int(random.integers(1, 14)))
    for name, (prompt, count) in prompts.items():
        policy.add(request(name, prompt, max_tokens=count))
    outputs = run(policy, executor)
    window = min((w for w in windows if w), default=None) if None not in windows else None
    for name, (prompt, count) in prompts.items():
        assert outputs.tokens[name, 0] == expected(prompt, count, window=window)
        assert outputs.reasons[name, 0] is FinishReason.LENGTH
    stats = policy.stats()
    assert stats.num_preemptions > 0
    assert stats.num_chunked_prefills > 0
    assert stats.prefix_cache_hits > 0
    assert stats.num_finished == 40
    assert stats.num_generated_tokens == sum(count for _, count in prompts.values())


def test_decodes_come_first_and_prompts_fill_the_budget():
    info = make_info()
    executor = MemoryExecutor(info)
    policy = make_policy(info, max_num_batched_tokens=10)
    policy.add(request("a", list(range(4))))
    loop = EngineLoop(policy, executor)
    loop.step()
    policy.add(request("b", list(range(20, 45))))
    loop.step()
    batch = executor.batches[-1]
    assert batch.kinds.tolist() == [SegmentKind.DECODE, SegmentKind.PREFILL]
    assert np.diff(batch.row_starts).tolist() == [1, 9]
    assert batch.sample_rows.tolist() == [0]
    loop.drain()


def test_priority_runs_first_and_the_last_in_order_is_preempted():
    info = make_info(num_pages=9, max_num_seqs=2)
    executor = MemoryExecutor(info)
    policy = make_policy(info, max_model_len=32, admission_reserve=0.0)
    policy.add(request("late", list(range(12)), max_tokens=8, priority=5))
    policy.add(request("early", list(range(30, 42)), max_tokens=8, priority=-1))
    outputs = run(policy, executor)
    assert policy.stats().num_preemptions > 0
    assert list(outputs.reasons) == [("early", 0), ("late", 0)]
    assert outputs.tokens["late", 0] == expected(list(range(12)), 8)


def test_choices_share_the_pages_of_their_prompt():
    info = make_info(num_pages=40, max_num_seqs=8)
    executor = MemoryExecutor(info)
    policy = make_policy(info, enable_prefix_caching=False, max_num_batched_tokens=64)
    prompt = list(range(30))
    policy.add(request("a", prompt, n=4, max_tokens=5))
    loop, outputs = EngineLoop(policy, executor), Outputs()
    held: list[int] = []
    while loop.has_work:
        outputs.take(loop.step())
        policy.check_integrity()
        held.append(policy.kv.pool.num_held)
    assert max(held) <= 7 + 4 * 3  # Seven full pages once, not four times.
    for choice in range(4):
        assert outputs.tokens["a", choice] == expected(prompt, 5, choice=choice)
    prefills = sum(int((b.kinds == SegmentKind.PREFILL).sum()) for b in executor.batches)
    assert sum(b.num_tokens for b in executor.batches) < 30 * 2
    assert prefills == 4


def test_stop_tokens_eos_and_lengths_end_a_choice():
    prompt = [3, 1, 4]
    answer = expected(prompt, 8)
    stop = answer[4]
    first = answer.index(stop) + 1
    cases = {
        "eos": (make_policy(make_info(), eos_token_ids=(stop,)), {}, first, FinishReason.STOP),
        "ignored": (
            make_policy(make_info(), eos_token_ids=(stop,)),
            {"ignore_eos": True},
            8,
            FinishReason.LENGTH,
        ),
        "stop id": (
            make_policy(make_info()),
            {"stop_token_ids": (stop,)},
            first,
            FinishReason.STOP,
        ),
        "context": (make_policy(make_info(), max_model_len=9), {}, 6, FinishReason.LENGTH),
    }
    for name, (policy, sampling, count, reason) in cases.items():
        policy.add(request(name, prompt, max_tokens=8, **sampling))
        outputs = run(policy, MemoryExecutor(make_info()))
        assert outputs.tokens[name, 0] == answer[:count], name
        assert outputs.reasons[name, 0] is reason, name
    assert outputs.updates[-1].stop_token_id is None


def test_max_tokens_zero_computes_the_prompt_and_nothing_else():
    for prompt in ([5], list(range(20))):
        policy = make_policy(make_info())
        policy.add(request("a", prompt, max_tokens=0, prompt_logprobs=1))
        outputs = run(policy, MemoryExecutor(make_info()))
        assert outputs.tokens["a", 0] == []
        assert outputs.reasons["a", 0] is FinishReason.LENGTH
        reported = [p for u in outputs.updates for p in u.prompt_logprobs]
        assert [p.token_id for p in reported] == prompt[1:]


def test_prompt_logprobs_come_once_each_also_after_a_preemption():
    info = make_info(num_pages=9, max_num_seqs=2)
    policy = make_policy(info, max_model_len=32, max_num_batched_tokens=5, admission_reserve=0.0)
    policy.add(request("a", list(range(10)), max_tokens=12))
    policy.add(request("b", list(range(14)), max_tokens=6, prompt_logprobs=2))
    outputs = run(policy, MemoryExecutor(info))
    assert policy.stats().num_preemptions > 0
    reported = [p for u in outputs.updates if u.request_id == "b" for p in u.prompt_logprobs]
    assert [p.token_id for p in reported] == list(range(1, 14))
    assert [p.logprob for p in reported] == [-float(i) for i in range(1, 14)]
    assert all(len(p.top) == 2 for p in reported)


def test_prefix_blocks_are_shared_only_within_adapter_version_and_salt():
    prompt = list(range(24))
    keys = [
        {},
        {"cache_salt": "tenant"},
        {"adapter": AdapterRef(id="x", version=1)},
        {"adapter": AdapterRef(id="x", version=2)},
    ]
    info = make_info()
    policy, executor = make_policy(info), MemoryExecutor(info)
    for i, key in enumerate(keys):
        policy.add(request(f"first {i}", prompt, max_tokens=1, **key))
        run(policy, executor)
    assert policy.stats().prefix_cache_hits == 0
    for i, key in enumerate(keys):
        policy.add(request(f"again {i}", prompt, max_tokens=1, **key))
        outputs = run(policy, executor)
        assert outputs.updates[-1].num_cached_tokens == 20
        adapter = 0 if "adapter" in key else -1
        assert outputs.tokens[f"again {i}", 0] == expected(prompt, 1, adapter=adapter)


def test_a_cancelled_request_frees_its_pages_at_once():
    info = make_info()
    policy, executor = make_policy(info, max_num_batched_tokens=8), MemoryExecutor(info)
    loop, outputs = EngineLoop(policy, executor), Outputs()
    for name in "abc":
        policy.add(request(name, [ord(name) - 8] * 9, n=2, max_tokens=9))
    for _ in range(3):
        outputs.take(loop.step())
    assert policy.cancel("a")
    assert not policy.cancel("a")
    policy.check_integrity()
    assert policy.finish("b", 0)
    outputs.take(loop.drain())
    assert ("a", 0) not in outputs.reasons
    assert outputs.tokens["c", 1] == expected([91] * 9, 9, choice=1)
    assert outputs.tokens["b", 1] == expected([90] * 9, 9, choice=1)
    assert policy.kv.pool.num_held == 0


def test_a_row_without_finite_logits_fails_alone():
    info = make_info()
    policy, executor = make_policy(info), MemoryExecutor(info)
    executor.poisoned = {expected([8, 8], 1)[0]}
    policy.add(request("bad", [8, 8]))
    policy.add(request("good", [9, 9, 9]))
    outputs = run(policy, executor)
    assert outputs.reasons["bad", 0] is FinishReason.ERROR
    assert outputs.reasons["good", 0] is FinishReason.LENGTH
    assert len(outputs.tokens["good", 0]) == 6


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([97], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 48, {}, "prompt"),
        ([1], {"logit_bias": {97: 1.0}}, "logit_bias"),
        ([1], {"priority": None}, "priority"),
        ([1], {"priority": 1.5}, "priority"),
        ([1], {"stop_token_ids": (200,)}, "stop_token_ids"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_by_name(prompt, sampling, param):
    policy = make_policy(make_info())
    with pytest.raises(InvalidRequestError) as caught:
        policy.add(request("a", prompt, **sampling))
    assert caught.value.param == param
    assert not policy.has_work


def test_the_queue_is_bounded_and_ids_are_unique():
    policy = make_policy(make_info(), max_waiting=2)
    policy.add(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        policy.add(request("a", [1]))
    policy.add(request("b", [1]))
    with pytest.raises(QueueFullError, match="holds 2"):
        policy.add(request("c", [1]))


def test_too_few_pages_are_refused_with_the_number_that_would_do():
    with pytest.raises(OutOfMemoryError, match=r"needs 12.*13312"):
        make_policy(make_info(num_pages=12))
    make_policy(make_info(num_pages=13))
    with pytest.raises(ConfigError):
        PolicyConfig(max_model_len=0)


def test_a_snapshot_goes_on_in_another_engine():
    info = make_info()
    policy, executor = make_policy(info), MemoryExecutor(info)
    outputs, loop = Outputs(), EngineLoop(policy, executor)
    policy.add(request("a", [1, 2, 3], n=2, max_tokens=9, logit_bias={3: 1.0}))
    policy.add(request("b", [4, 5], max_tokens=9))
    for _ in range(4):
        outputs.take(loop.step())
    assert outputs.tokens["b", 0]
    other = make_policy(info)
    other.restore(policy.snapshot())
    outputs.take(EngineLoop(other, MemoryExecutor(info)).drain())
    for key, prompt, choice in (
        (("a", 0), [1, 2, 3], 0),
        (("a", 1), [1, 2, 3], 1),
        (("b", 0), [4, 5], 0),
    ):
        assert outputs.tokens[key] == expected(prompt, 9, choice=choice)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("fails", ["fails_next_submit", "fails_next_collect"])
def test_a_failing_step_costs_time_and_no_tokens(depth, fails):
    """Whatever was in flight runs again, on the same engine, to the same end."""
    info = make_info(num_pages=30, max_num_seqs=4)
    policy, executor = make_policy(info), MemoryExecutor(info, max_in_flight=depth)
    prompts = {str(i): list(range(i, i + 5 + 2 * i)) for i in range(7)}
    for name, prompt in prompts.items():
        policy.add(request(name, prompt, max_tokens=8, n=2))
    outputs, loop = Outputs(), EngineLoop(policy, executor)
    failures = 0
    for step in range(200):
        setattr(executor, fails, step % 5 == 3)
        try:
            outputs.take(loop.step())
        except RuntimeError:
            failures += 1
        policy.check_integrity()
        if not loop.has_work:
            break
    assert failures > 2
    for name, prompt in prompts.items():
        for choice in range(2):
            assert outputs.tokens[name, choice] == expected(prompt, 8, choice=choice)
    assert policy.kv.pool.num_held == 0


def test_results_must_come_in_order():
    info = make_info()
    policy = make_policy(info)
    policy.add(request("a", [1]))
    assert policy.schedule() is not None
    wrong = StepResult(
        batch_id=7, tokens=np.zeros((1, 1), np.int32), num_tokens=np.ones(1, np.int32)
    )
    with pytest.raises(IntegrityError, match="batch 7"):
        policy.apply(wrong)


def test_batches_and_results_cross_process_borders():
    info = make_info(windows=(None, 8), page_multiples=(1, 2))
    policy, executor = make_policy(info), MemoryExecutor(info)
    policy.add(request("a", [1, 2, 3], logit_bias={1: 2.0}, stop=("x",), prompt_logprobs=1))
    batch = policy.schedule()
    assert batch is not None
    again = decode(encode(batch), Batch)
    assert again.starts[0].sampling == batch.starts[0].sampling
    for name in ("kinds", "token_ids", "positions", "layers", "sample_rows"):
        ours, theirs = getattr(batch, name), getattr(again, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(batch.page_tables, again.page_tables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    executor.submit(again)
    result = executor.collect()
    back = decode(encode(result), StepResult)
    np.testing.assert_array_equal(back.tokens, result.tokens)
    assert policy.apply(back)[-1].new_token_ids
