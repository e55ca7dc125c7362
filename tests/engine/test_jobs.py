"""Jobs over an executor that checks every window, step and page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.fakes import MemoryExecutor, make_info
from engine.finetune_fakes import token_loss
from weft.base.clock import VirtualClock
from weft.base.errors import ConfigError, OutOfMemoryError, UnsupportedError
from weft.engine.backward_cursor import BackwardCursor
from weft.engine.batch import Batch
from weft.engine.config import PolicyConfig
from weft.engine.coserve import CoServing
from weft.engine.fair_share import FairShare
from weft.engine.finetune import (
    BackwardOrder,
    CheckpointSaved,
    FinetuneJobSpec,
    JobChanged,
    JobStatus,
    LossNormalization,
    StepMetrics,
    StepOutcome,
    TrainingSample,
)
from weft.engine.finetune_limits import FinetuneConfig, FinetuneMemory, FinetunePolicy
from weft.engine.job import Job
from weft.engine.job_plan import JobPlan, sample_order
from weft.engine.loop import EngineLoop
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.engine.wire import decode, encode
from weft.graph.adapter_spec import AdapterSpec

FIXED = FinetuneConfig(
    policy=FinetunePolicy.FINETUNE_ONLY, forward_window=8, backward_window=8, granule_tokens=4
)


def sample(n: int, seed: int = 0, first_label: int = 1) -> TrainingSample:
    weights = np.ones(n, np.float32)
    weights[:first_label] = 0
    tokens = np.random.default_rng(seed).integers(0, 97, n).astype(np.int32)
    return TrainingSample(token_ids=tokens, label_weights=weights)


def job(name: str = "j", lengths: tuple[int, ...] = (10, 7, 13), **changes) -> FinetuneJobSpec:
    return FinetuneJobSpec(
        id=name,
        adapter=changes.pop("adapter", AdapterSpec()),
        samples=tuple(sample(n, seed) for seed, n in enumerate(lengths)),
        **changes,
    )


def make(
    config: FinetuneConfig = FIXED, *, depth: int = 1, memory=None, **info
) -> tuple[CoServing, MemoryExecutor]:
    numbers = make_info(
        **{"num_pages": 64, "max_finetune_samples": 3, "layers_per_group": 3, **info}
    )
    policy = CoServing(
        PolicyConfig(max_model_len=40, max_num_batched_tokens=16),
        numbers,
        VirtualClock(),
        finetune=config,
        memory=memory,
    )
    return policy, MemoryExecutor(numbers, max_in_flight=depth)


def drain(policy: CoServing, executor: MemoryExecutor) -> list:
    loop = EngineLoop(policy, executor)
    events = []
    for _ in range(10_000):
        if not loop.has_work:
            break
        loop.step()
        policy.check_integrity()
        events += policy.take_finetune_events()
    assert not loop.has_work
    return events


def statuses(events: list, name: str = "j") -> list[JobStatus]:
    return [e.status for e in events if isinstance(e, JobChanged) and e.job_id == name]


# ---- the plan ----


def test_the_order_of_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    orders = [sample_order(20, seed=3, epoch=e, shuffles=True) for e in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(orders)) == 3
    assert orders[1] == sample_order(20, seed=3, epoch=1, shuffles=True)
    assert orders[0] != sample_order(20, seed=4, epoch=0, shuffles=True)
    assert sample_order(4, seed=3, epoch=1, shuffles=False) == (0, 1, 2, 3)


@pytest.mark.parametrize("normalization", list(LossNormalization))
def test_loss_scales_of_a_step_follow_its_normalization(normalization: LossNormalization) -> None:
    spec = job(lengths=(10, 7, 13), batch_size=2, loss_normalization=normalization, shuffles=False)
    plan = JobPlan(spec)
    assert (plan.steps_per_epoch, plan.num_steps) == (2, 2)
    first, second = plan.step_samples(0), plan.step_samples(1)
    assert [s.number for s in (*first, *second)] == [0, 1, 2]
    if normalization is LossNormalization.TOKEN:
        assert [s.loss_scale for s in first] == pytest.approx([1 / 15, 1 / 15])
    else:
        assert [s.loss_scale for s in first] == pytest.approx([1 / 18, 1 / 12])
    assert second[0].loss_scale == pytest.approx(1 / 12)


def test_a_step_without_labels_has_no_gradient() -> None:
    spec = FinetuneJobSpec(id="j", adapter=AdapterSpec(), samples=(sample(5, first_label=5),))
    assert JobPlan(spec).step_samples(0)[0].loss_scale == 0.0


# ---- backward ----


@pytest.mark.parametrize("order", list(BackwardOrder))
@pytest.mark.parametrize("granule", [1, 4, 16])
def test_rows_of_any_budget_cover_every_layer_of_every_token_once(
    order: BackwardOrder, granule: int
) -> None:
    for n, lowest, max_window, seed in [(13, 0, 64, 0), (13, 2, 5, 1), (1, 0, 4, 2), (30, 1, 8, 3)]:
        random = np.random.default_rng(seed)
        cursor = BackwardCursor.at_top(
            order=order, num_tokens=n, lowest_layer=lowest, num_layers=4, max_window=max_window
        )
        done = np.zeros((4, n), int)
        while not cursor.is_done:
            most = int(random.integers(4, 60))
            left = cursor.num_left
            assert left == (4 - lowest) * n - done.sum()
            spans, cursor = cursor.take(most, granule=granule)
            assert sum(span.num_token_layers for span in spans) == left - cursor.num_left <= most
            for span in spans:
                assert span.end - span.begin <= max_window
                done[span.first_layer : span.end_layer, span.begin : span.end] += 1
        assert (done[lowest:] == 1).all()
        assert not done[:lowest].any()


def test_a_budget_below_a_granule_gives_no_row() -> None:
    cursor = BackwardCursor.at_top(
        order=BackwardOrder.LAYER_MAJOR, num_tokens=20, lowest_layer=0, num_layers=2, max_window=64
    )
    assert cursor.take(7, granule=8) == ((), cursor)
    assert len(cursor.take(8, granule=8)[0]) == 1


# ---- a whole job ----


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("order", list(BackwardOrder))
def test_a_job_runs_to_its_end(depth: int, order: BackwardOrder) -> None:
    policy, executor = make(depth=depth)
    policy.add_job(job(num_epochs=2, batch_size=2, backward_order=order))
    events = drain(policy, executor)
    assert statuses(events) == [JobStatus.RUNNING, JobStatus.SUCCEEDED]
    assert events[-1].adapter_id == "j"
    assert events[-1].adapter_version == 1
    checker = executor.finetune
    assert [(step, len(samples)) for _, step, samples in checker.steps] == [
        (0, 2),
        (1, 1),
        (2, 2),
        (3, 1),
    ]
    assert checker.published == ["j"]
    assert not checker.jobs
    assert not checker.samples
    metrics = [e for e in events if isinstance(e, StepMetrics)]
    assert [m.step for m in metrics] == [1, 2, 3, 4]
    assert [m.epoch for m in metrics] == [0.5, 1.0, 1.5, 2.0]
    assert policy.kv.pool.num_held == 0


def test_a_steps_loss_is_the_mean_over_its_labels() -> None:
    policy, executor = make()
    spec = job(lengths=(10, 7), batch_size=2)
    policy.add_job(spec)
    (metrics,) = [e for e in drain(policy, executor) if isinstance(e, StepMetrics)]
    losses = [
        token_loss(int(a), int(b))
        for s in spec.samples
        for a, b in zip(s.token_ids[:-1], s.token_ids[1:], strict=True)
    ]
    assert metrics.loss == pytest.approx(np.mean(losses))
    assert metrics.num_tokens == 17
    assert metrics.grad_norm == 0.5


def test_backward_ends_at_the_lowest_bypass() -> None:
    policy, executor = make()
    executor.finetune.lowest_layer["j"] = 1
    policy.add_job(job(adapter=AdapterSpec(layers_to_transform=(1, 2))))
    assert statuses(drain(policy, executor))[-1] is JobStatus.SUCCEEDED
    assert {w[5] for w in executor.finetune.windows if w[0] == "B"} <= {1, 2}


def test_short_samples_of_a_step_share_an_iteration() -> None:
    policy, executor = make()
    policy.add_job(job(lengths=(3, 3, 2), batch_size=3))
    drain(policy, executor)
    first = executor.batches[0]
    assert first.finetune is not None
    assert [s.sample for s in first.finetune.segments if s.end and first.kinds[s.row] == 3] == [
        0,
        1,
        2,
    ]
    assert decode(encode(first), Batch).finetune is not None


def test_fixed_windows_repeat_bit_for_bit() -> None:
    logs = []
    for _ in range(2):
        policy, executor = make()
        policy.add_job(job(lengths=(30, 11, 17), num_epochs=2, batch_size=2))
        drain(policy, executor)
        logs.append(executor.finetune.windows)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 20


def test_validation_gives_its_loss_to_the_step_before_it() -> None:
    policy, executor = make()
    spec = job(lengths=(10, 7, 9, 8), validation=(sample(12, 9), sample(5, 8)), validate_every=2)
    policy.add_job(spec)
    metrics = [e for e in drain(policy, executor) if isinstance(e, StepMetrics)]
    assert [m.step for m in metrics] == [1, 2, 3, 4]
    assert [m.validation_loss is not None for m in metrics] == [False, True, False, True]
    losses = [
        token_loss(int(a), int(b))
        for s in spec.validation
        for a, b in zip(s.token_ids[:-1], s.token_ids[1:], strict=True)
    ]
    assert metrics[1].validation_loss == pytest.approx(np.mean(losses))
    assert metrics[3].validation_loss == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_step_in_the_batch_that_ends_the_pass_before_it_comes_after_it(batch_size: int) -> None:
    """With windows that hold everything, one batch ends the pass and does the next step too."""
    config = FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY)
    policy, executor = make(config=config)
    spec = job(
        lengths=(10, 7, 9, 8), validation=(sample(12, 9),), num_epochs=4, batch_size=batch_size
    )
    policy.add_job(spec)
    metrics = [e for e in drain(policy, executor) if isinstance(e, StepMetrics)]
    num_steps, per_epoch = 16 // batch_size, 4 // batch_size
    assert [m.step for m in metrics] == list(range(1, num_steps + 1))
    checked = [m.step for m in metrics if m.validation_loss is not None]
    assert checked == list(range(per_epoch, num_steps + 1, per_epoch))


def test_checkpoints_are_saved_and_a_resumed_job_does_the_rest(tmp_path) -> None:
    policy, executor = make()
    spec = job(lengths=(5,) * 5, checkpoint_every=2, checkpoint_dir="d")
    policy.add_job(spec)
    events = drain(policy, executor)
    saved = [e.path for e in events if isinstance(e, CheckpointSaved)]
    assert saved == ["d/step-2", "d/step-4", "d/step-5", "d/final"]
    whole = executor.finetune.steps

    policy, executor = make()
    policy.add_job(job(lengths=(5,) * 5, checkpoint_dir="d", resume_from="d/step-2"))
    events = drain(policy, executor)
    assert executor.finetune.steps == whole[2:]
    assert [e.step for e in events if isinstance(e, StepMetrics)] == [3, 4, 5]

    policy, executor = make()
    policy.add_job(job(lengths=(5,) * 5, checkpoint_dir="d", resume_from="d/step-5"))
    assert statuses(drain(policy, executor)) == [JobStatus.RUNNING, JobStatus.SUCCEEDED]
    assert executor.finetune.steps == []


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy_kind", [FinetunePolicy.COSERVE, FinetunePolicy.FINETUNE_ONLY])
def test_checkpoints_are_written_while_batches_go_on(
    policy_kind: FinetunePolicy, depth: int
) -> None:
    config = replace(FIXED, policy=policy_kind)
    policy, executor = make(config, depth=depth)
    checker = executor.finetune
    checker.save_delay = 3
    policy.add_job(job(lengths=(9,) * 5, checkpoint_dir="d", validation=(sample(5),)))
    events = drain(policy, executor)
    assert statuses(events) == [JobStatus.RUNNING, JobStatus.SUCCEEDED]
    assert checker.saved == [*(f"d/step-{step}" for step in range(1, 6)), "d/final"]
    assert [e.path for e in events if isinstance(e, CheckpointSaved)] == checker.saved
    assert checker.num_waits > 0
    # No more than one step is ever done beyond what is on disk.
    num_saved = 0
    for event in events:
        if isinstance(event, CheckpointSaved):
            num_saved = event.num_steps
        elif isinstance(event, StepMetrics):
            assert event.step <= num_saved + 1
    # Beside requests it is the job that waits for the disk, not an iteration.
    if policy_kind is FinetunePolicy.COSERVE:
        assert checker.num_blocked_steps == 0
    else:
        assert checker.num_blocked_steps > 0


def test_a_paused_job_hears_of_its_checkpoint() -> None:
    policy, executor = make()
    executor.finetune.save_delay = 100
    policy.add_job(job(lengths=(5,) * 5, checkpoint_dir="d"))
    loop = EngineLoop(policy, executor)
    while not executor.finetune.saved:
        loop.step()
    policy.pause_job("j")
    events = drain(policy, executor)
    assert [e.path for e in events if isinstance(e, CheckpointSaved)] == ["d/step-1"]
    assert not policy.has_work
    policy.resume_job("j")
    assert statuses(drain(policy, executor))[-1] is JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("save_s", "saved"),
    [(0.01, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (0.07, [1, 5, 9]), (9.0, [1, 9])],
)
def test_checkpoints_are_as_far_apart_as_they_cost(save_s: float, saved: list[int]) -> None:
    """A step takes a second here, of which writing may take 2 %."""
    running = Job(job(lengths=(5,) * 9, checkpoint_every=None, checkpoint_dir="d"), num_layers=2)
    running.start()
    found: list[str] = []
    for number in range(9):
        running.stepped()
        path = running.due_checkpoint()
        running.take_step(
            StepOutcome(job_id="j", step=number, grad_norm=1.0), now_s=float(number + 1)
        )
        if path is not None:
            found.append(path)
            running.take_save(
                CheckpointSaved(job_id="j", path=path, num_steps=number + 1, elapsed_s=save_s)
            )
    assert found == [f"d/step-{step}" for step in saved]


# ---- pausing, cancelling, failing ----


def test_a_paused_job_stands_still_and_goes_on() -> None:
    policy, executor = make()
    policy.add_job(job())
    loop = EngineLoop(policy, executor)
    for _ in range(2):
        loop.step()
    assert policy.pause_job("j")
    before = len(executor.batches)
    assert not policy.has_work
    assert [p.status for p in policy.jobs()] == [JobStatus.PAUSED]
    assert len(executor.batches) == before
    assert policy.resume_job("j")
    events = drain(policy, executor)
    assert statuses(events) == [
        JobStatus.RUNNING,
        JobStatus.PAUSED,
        JobStatus.RUNNING,
        JobStatus.SUCCEEDED,
    ]


def test_a_cancelled_job_leaves_nothing_behind() -> None:
    policy, executor = make(depth=2)
    policy.add_job(job())
    loop = EngineLoop(policy, executor)
    for _ in range(3):
        loop.step()
    assert policy.cancel_job("j")
    assert policy.kv.pool.num_held == 0
    policy.add_job(job())  # The same id, while the executor still knows the first one.
    events = drain(policy, executor)
    assert statuses(events) == [
        JobStatus.RUNNING,
        JobStatus.CANCELLED,
        JobStatus.RUNNING,
        JobStatus.SUCCEEDED,
    ]
    assert not policy.cancel_job("j")


def test_a_failure_ends_its_job_alone() -> None:
    policy, executor = make(depth=2)
    executor.finetune.fails_at["bad"] = 1
    policy.add_job(job("bad"))
    policy.add_job(job("good"))
    events = drain(policy, executor)
    assert statuses(events, "bad") == [JobStatus.RUNNING, JobStatus.FAILED]
    assert statuses(events, "good") == [JobStatus.RUNNING, JobStatus.SUCCEEDED]
    (failed,) = [e for e in events if isinstance(e, JobChanged) and e.message]
    assert failed.message == "the loss is NaN"
    assert executor.finetune.published == ["good"]
    assert not executor.finetune.jobs


def test_a_full_disk_at_the_end_publishes_nothing() -> None:
    policy, executor = make()
    executor.finetune.disk_is_full = True
    policy.add_job(job(lengths=(5,), checkpoint_dir="d"))
    assert statuses(drain(policy, executor))[-1] is JobStatus.FAILED
    assert executor.finetune.published == []


@pytest.mark.parametrize("checkpointed", [True, False])
def test_after_a_failed_batch_a_job_goes_on_at_its_checkpoint(checkpointed: bool) -> None:
    policy, executor = make(depth=2)
    policy.add_job(job(lengths=(9,) * 6, checkpoint_dir="d" if checkpointed else None))
    loop = EngineLoop(policy, executor)
    for _ in range(6):
        loop.step()
    done = len(executor.finetune.steps)
    assert done >= 2
    executor.fails_next_collect = True
    with pytest.raises(RuntimeError, match="unwell"):
        loop.step()
    policy.check_integrity()
    events = policy.take_finetune_events() + drain(policy, executor)
    assert statuses(events)[-1] is JobStatus.SUCCEEDED
    steps = [step for _, step, _ in executor.finetune.steps]
    again = steps[len(steps) - 6 :] if not checkpointed else steps
    assert again[-1] == 5
    if checkpointed:
        assert len(steps) < 6 + done
    else:
        assert again == list(range(6))
    assert any(isinstance(e, JobChanged) and "the engine failed" in e.message for e in events)


def test_jobs_survive_in_a_snapshot() -> None:
    policy, executor = make()
    policy.add_job(job("a", lengths=(9,) * 4, checkpoint_dir="d"))
    policy.add_job(job("b"))
    policy.pause_job("b")
    loop = EngineLoop(policy, executor)
    while len(executor.finetune.steps) < 2:
        loop.step()
    restored, second = make()
    restored.restore_jobs(policy.snapshot_jobs())
    assert [(p.id, p.status) for p in restored.jobs()] == [
        ("a", JobStatus.QUEUED),
        ("b", JobStatus.PAUSED),
    ]
    drain(restored, second)
    assert [step for _, step, _ in second.finetune.steps] == [2, 3]


# ---- several jobs and tenants ----


def test_jobs_of_one_tenant_advance_together() -> None:
    policy, executor = make()
    for name in "ab":
        policy.add_job(job(name, lengths=(16,) * 6))
    drain(policy, executor)
    order = [name for name, *_ in executor.finetune.steps]
    assert order != sorted(order)
    assert max(abs(order[:i].count("a") - order[:i].count("b")) for i in range(12)) <= 1


def test_tenants_share_by_weight() -> None:
    policy, executor = make()
    policy.add_job(job("a", lengths=(16,) * 12, tenant="one", tenant_weight=3.0))
    policy.add_job(job("b", lengths=(16,) * 12, tenant="two"))
    drain(policy, executor)
    order = [name for name, *_ in executor.finetune.steps]
    half = order[: order.index("a", 11)]
    assert 2.0 <= half.count("a") / half.count("b") <= 4.5


@pytest.mark.parametrize("num_slots", [1, 2])
def test_many_jobs_of_a_tenant_do_not_keep_anothers_waiting(num_slots: int) -> None:
    policy, executor = make(max_finetune_samples=num_slots)
    for i in range(6):
        policy.add_job(job(f"a{i}", tenant="many"))
    EngineLoop(policy, executor).step()
    for i in range(2):
        policy.add_job(job(f"b{i}", tenant="few"))
    events = drain(policy, executor)
    started = [
        event.job_id
        for event in events
        if isinstance(event, JobChanged) and event.status is JobStatus.RUNNING
    ]
    assert sorted(started) == sorted(["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1"])
    # Of those that start once both tenants have jobs, the first two are not of one tenant alone.
    assert {name[0] for name in started[num_slots : num_slots + 2]} == {"a", "b"}
    assert started.index("b1") < started.index("a4")
    assert [name for name in started if name[0] == "a"] == [f"a{i}" for i in range(6)]


def test_idling_saves_up_no_claim() -> None:
    share = FairShare()
    share.join("busy")
    share.join("late")
    for _ in range(10):
        assert share.order(["busy"]) == ["busy"]
        share.charge("busy", 1.0)
    assert share.order(["busy", "late"])[0] in ("busy", "late")
    assert share.counter("late") == share.counter("busy") == 10.0
    with pytest.raises(ConfigError, match="positive"):
        share.join("x", 0.0)


# ---- memory ----


def test_jobs_queue_for_slots() -> None:
    policy, executor = make(max_finetune_samples=1)
    policy.add_job(job("a"))
    policy.add_job(job("b"))
    EngineLoop(policy, executor).step()
    assert [p.status for p in policy.jobs()] == [JobStatus.RUNNING, JobStatus.QUEUED]
    events = drain(policy, executor)
    assert statuses(events, "b") == [JobStatus.RUNNING, JobStatus.SUCCEEDED]


def test_the_memory_budget_bounds_what_is_in_flight() -> None:
    memory = FinetuneMemory(
        budget_bytes=150, job_bytes=lambda spec: 50, sample_bytes=lambda spec, n: 5 * n
    )
    policy, executor = make(memory=memory)
    with pytest.raises(OutOfMemoryError, match="raise the memory budget by 25 bytes"):
        policy.add_job(job("big", lengths=(25,)))
    policy.add_job(job("a", lengths=(10,) * 4, batch_size=4))
    loop, most = EngineLoop(policy, executor), 0
    while policy.has_work:
        loop.step()
        most = max(most, len(executor.finetune.samples))
    assert most == 2
    assert len(executor.finetune.steps) == 1


def test_a_sample_that_no_page_is_left_for_is_refused_with_the_bytes() -> None:
    policy, _ = make(num_pages=15)  # 14 pages, 10 of them for the longest request.
    with pytest.raises(OutOfMemoryError, match="raise kv_cache_memory_bytes by 2048"):
        policy.add_job(job(lengths=(24,)))
    policy.add_job(job(lengths=(16,)))


def test_bad_jobs_are_refused_by_name() -> None:
    policy, _ = make()
    policy.add_job(job())
    for bad, message in [
        (job(), "in use"),
        (job("k", lengths=()), "no samples"),
        (job("k", lengths=(1,)), "at least 2"),
        (job("k", lengths=(41,)), "truncate"),
        (job("k", batch_size=0), "batch_size"),
        (job("k", resume_from="x/last"), "step-N"),
        (job("k", adapter=AdapterSpec(target_modules=("nothing",))), "no module"),
    ]:
        with pytest.raises(ConfigError, match=message):
            policy.add_job(bad)
    assert [p.id for p in policy.jobs()] == ["j"]
    with pytest.raises(UnsupportedError, match="max_finetune_samples"):
        make(max_finetune_samples=0)[0].add_job(job())


# ---- beside requests ----


def requests(count: int) -> list[Request]:
    random = np.random.default_rng(5)
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple(random.integers(0, 97, int(random.integers(3, 20))).tolist()),
            sampling=SamplingParams(max_tokens=int(random.integers(2, 12))),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("num_pages", [18, 64])
@pytest.mark.parametrize("depth", [1, 2])
def test_requests_get_the_same_tokens_beside_a_job(num_pages: int, depth: int) -> None:
    outputs = []
    for has_job in (False, True):
        config = FinetuneConfig(policy=FinetunePolicy.BUDGET, budget_tokens=16)
        policy, executor = make(config, depth=depth, num_pages=num_pages)
        loop = EngineLoop(policy, executor)
        if has_job:
            policy.add_job(job(lengths=(20, 9, 13), num_epochs=3))
        for request in requests(12):
            policy.add(request)
        tokens: dict[str, list[int]] = {}
        while loop.has_work:
            for update in loop.step():
                assert update.finish_reason is None or update.finish_reason.value == "length"
                tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            policy.check_integrity()
        outputs.append(tokens)
        if has_job:
            shared = [
                b for b in executor.batches if b.finetune and (b.kinds <= 1).any() and b.num_tokens
            ]
            assert shared
            assert len(executor.finetune.steps) == 9
    assert outputs[0] == outputs[1]


def test_finetune_only_lets_requests_wait_for_the_job() -> None:
    policy, executor = make()
    for request in requests(3):
        policy.add(request)
    policy.add_job(job())
    loop = EngineLoop(policy, executor)
    while loop.has_work:
        loop.step()
    kinds = [bool((b.kinds <= 1).any()) for b in executor.batches]
    assert kinds == sorted(kinds)
    assert any(kinds)


def test_inference_only_lets_jobs_wait() -> None:
    policy, executor = make(FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY))
    policy.add_job(job())
    assert not policy.has_work
    for request in requests(2):
        policy.add(request)
    EngineLoop(policy, executor).drain()
    assert all(batch.finetune is None for batch in executor.batches)
    assert [p.status for p in policy.jobs()] == [JobStatus.QUEUED]
