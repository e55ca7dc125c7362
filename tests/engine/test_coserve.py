"""Sharing of iterations under the virtual clock: objectives kept, jobs advanced, shares given."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.base.clock import VirtualClock
from weft.cost.step_time import IterationShape
from weft.engine.batch import Batch, CacheGroup, ExecutorInfo, StepResult
from weft.engine.config import PolicyConfig
from weft.engine.coserve import CoServing
from weft.engine.finetune import BackwardOrder, FinetuneJobSpec, TrainingSample
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy, LatencySlo
from weft.engine.head_room import Unused
from weft.engine.iteration_shape import ShapeCounter, iteration_shape
from weft.engine.loop import EngineLoop
from weft.engine.pacing import promised
from weft.engine.request import FinishReason, Request
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterSpec
from weft.sim.batch_executor import SimulatedBatchExecutor
from weft.sim.serving import CoServed, simulate_serving
from weft.sim.workload import Workload

NUM_LAYERS = 4
SLO = LatencySlo(tpot_s=0.05, ttft_s=1.0)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A step-time model with a closed form."""

    constant: float = 0.004
    token: float = 1e-4
    layer_token: float = 1e-4
    step: float = 0.002

    def device_s(self, shape: IterationShape) -> float:
        if shape.is_empty:
            return 0.0
        return (
            self.constant
            + self.token * shape.num_tokens
            + self.layer_token * shape.num_ft_token_layers
            + self.step * shape.num_ft_steps
        )

    def host_s(self, shape: IterationShape) -> float:
        return 0.0


def make_info(window: int | None = None, num_pages: int = 513) -> ExecutorInfo:
    return ExecutorInfo(
        num_pages=num_pages,
        page_bytes=4096,
        groups=(
            CacheGroup(layers=(0, 2), page_tokens=16),
            CacheGroup(layers=(1, 3), page_tokens=16, window=window),
        ),
        num_layers=NUM_LAYERS,
        vocab_size=100,
        max_num_seqs=16,
        max_finetune_samples=4,
    )


CONFIG = PolicyConfig(max_model_len=1024, max_num_batched_tokens=512)


def job(name: str = "j", length: int = 300, count: int = 10_000, **changes) -> FinetuneJobSpec:
    sample = TrainingSample(
        token_ids=np.zeros(length, np.int32), label_weights=np.ones(length, np.float32)
    )
    return FinetuneJobSpec(id=name, adapter=AdapterSpec(), samples=(sample,) * count, **changes)


def workload(
    rate: float, count: int = 60, prompt: int = 100, output: int = 20, seed: int = 0
) -> Workload:
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, count)
    return Workload(
        name="w",
        arrival_s=np.cumsum(gaps) - gaps[0],
        num_prompt_tokens=random.integers(max(1, prompt // 2), prompt * 2, count),
        num_output_tokens=random.integers(2, output * 2, count),
    )


class Watched(CoServing):
    """Keeps every outlook, what the same iteration would have taken with one granule more, and by
    how much a token that was in time so far is foreseen to be late."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.outlooks = []
        self.one_more_s = []
        self.late_s = []

    def _emit_foreseen(self, spans, num_decodes, part, now_s, outlook):
        start_s = max([now_s, *(o.scheduled_s + o.predicted_s for o in self._outlooks)])
        batch = super()._emit_foreseen(spans, num_decodes, part, now_s, outlook)
        if batch is not None and self._outlooks[-1].shape.has_finetuning:
            for span in spans[:num_decodes]:
                # The mean of a request's gaps, this one included, is at most the objective.
                gaps = span.sequence.num_output + span.sequence.num_pending - 1
                due_s = span.sequence.first_token_s + SLO.tpot_s * gaps
                if start_s <= due_s - SLO.tpot_s:
                    self.late_s.append(start_s + self._outlooks[-1].upper_s - due_s)
        if batch is not None:
            shape = self._outlooks[-1].shape
            more = replace(
                shape,
                num_ft_rows=shape.num_ft_rows + 1,
                num_ft_tokens=shape.num_ft_tokens + 16,
                num_ft_token_layers=shape.num_ft_token_layers + 16,
                num_ft_steps=shape.num_ft_steps + 1,
            )
            self.one_more_s.append(self.step_time.upper_s(more))
        return batch

    def apply(self, result: StepResult):
        updates = super().apply(result)
        self.outlooks.append(self._latest)
        return updates


def serve(
    requests: Workload,
    config: FinetuneConfig,
    *,
    jobs: tuple[FinetuneJobSpec, ...] = (),
    steps: Steps | None = None,
    depth: int = 1,
    info: ExecutorInfo | None = None,
) -> tuple[Watched, dict[str, list[int]], list[float]]:
    """Serve with a watched policy; returns it, outputs by request, and waits for first tokens."""
    info = info or make_info()
    clock = VirtualClock()
    steps = steps or Steps()
    policy = Watched(CONFIG, info, clock, finetune=config, step_time=steps)
    executor = SimulatedBatchExecutor(info, steps, clock, max_in_flight=depth, filler_token=7)
    loop = EngineLoop(policy, executor)
    for spec in jobs:
        policy.add_job(spec)
    outputs: dict[str, list[int]] = {}
    waits: list[float] = []
    arrivals, arrived, num_open = requests.arrival_s.tolist(), 0, 0
    while arrived < len(arrivals) or num_open:
        while arrived < len(arrivals) and arrivals[arrived] <= clock.now_s():
            policy.add(requests.request(arrived, info.vocab_size))
            arrived += 1
            num_open += 1
        if not loop.has_work:
            clock.advance_to(arrivals[arrived])
            continue
        for update in loop.step():
            known = outputs.setdefault(update.request_id, [])
            if not known and update.new_token_ids:
                waits.append(clock.now_s() - arrivals[int(update.request_id)])
            known.extend(update.new_token_ids)
            if update.finish_reason is not None:
                assert update.finish_reason is FinishReason.LENGTH
                num_open -= 1
        policy.check_integrity()
    return policy, outputs, waits


# ---- the promises, for any load ----


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rate=st.floats(1.0, 40.0),
    prompt=st.integers(4, 400),
    output=st.integers(2, 40),
    length=st.integers(2, 700),
    order=st.sampled_from(BackwardOrder),
    depth=st.integers(1, 2),
    seed=st.integers(0, 5),
)
def test_no_iteration_with_finetuning_is_predicted_to_break_an_objective(
    rate, prompt, output, length, order, depth, seed
) -> None:
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.08)
    requests = workload(rate, 15, prompt, output, seed)
    spec = job(length=length, backward_order=order, batch_size=1 + seed)
    policy, outputs, _ = serve(requests, config, jobs=(spec,), depth=depth)
    shared = [o for o in policy.outlooks if o.shape.has_finetuning]
    assert shared
    for outlook in shared:
        assert outlook.upper_s <= outlook.budget_s + 1e-9
        assert outlook.budget_s <= 0.08
        if outlook.shape.num_decode_rows:
            # What requests saved may be spent, but answers go on flowing.
            assert outlook.upper_s <= 3 * SLO.tpot_s + 1e-9
    assert policy.late_s
    assert max(policy.late_s) <= 1e-9
    # Requests do not notice: same tokens, none lost.
    alone = serve(requests, replace(config, policy=FinetunePolicy.INFERENCE_ONLY), depth=depth)[1]
    assert outputs == alone


@settings(max_examples=8, deadline=None, derandomize=True)
@given(rate=st.floats(1.0, 60.0), length=st.integers(2, 700), seed=st.integers(0, 5))
def test_a_job_advances_whenever_a_granule_fits(rate, length, seed) -> None:
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.08, granule_tokens=16)
    policy, _, _ = serve(workload(rate, 15, seed=seed), config, jobs=(job(length=length),))
    tight = [
        (outlook, one_more_s)
        for outlook, one_more_s in zip(policy.outlooks, policy.one_more_s, strict=True)
        if not outlook.shape.has_finetuning
    ]
    for outlook, one_more_s in tight:
        assert one_more_s > outlook.budget_s
    assert len(tight) < len(policy.outlooks)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_least_share_is_given_even_where_the_objectives_leave_nothing(share: float) -> None:
    # Decodes alone take longer than the objective allows.
    steps = Steps(constant=0.06)
    requests = workload(20.0, 60, 60, 20)
    starved, _, _ = serve(requests, FinetuneConfig(slo=SLO), jobs=(job(),), steps=steps)
    config = FinetuneConfig(slo=SLO, min_share=share)
    policy, _, _ = serve(requests, config, jobs=(job(),), steps=steps)

    def finetune_share(outlooks: list) -> float:
        busy = [o for o in outlooks if o.shape.num_decode_rows]
        total_s = sum(o.predicted_s for o in busy)
        return sum(o.predicted_s - o.inference_s for o in busy) / total_s

    assert finetune_share(starved.outlooks) < 0.02
    assert finetune_share(policy.outlooks) == pytest.approx(share, abs=0.05)
    assert any(o.is_share_due for o in policy.outlooks)


def test_an_arrival_on_an_idle_engine_waits_for_one_bounded_iteration() -> None:
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.03)
    requests = workload(0.5, 20, 20, 5)
    policy, _, waits = serve(requests, config, jobs=(job(length=900),))
    idle = [o for o in policy.outlooks if not o.shape.num_decode_rows]
    assert sum(o.shape.num_ft_token_layers for o in idle) > 100_000
    assert max(o.actual_s for o in idle) <= 0.03
    assert max(waits) <= 0.03 + 0.03


def test_a_piece_that_never_fits_runs_while_nobody_is_here() -> None:
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.01)
    clock = VirtualClock()
    info, steps = make_info(), Steps(step=0.5)
    policy = CoServing(CONFIG, info, clock, finetune=config, step_time=steps)
    policy.add_job(job(length=20, count=3))
    EngineLoop(policy, SimulatedBatchExecutor(info, steps, clock)).drain()
    assert policy.finetune_stats().num_steps == 3


def long_answer(num_tokens: int = 320) -> Workload:
    """One request; behind its first 160 tokens finetuning's reserve is saved up."""
    return Workload(
        name="w",
        arrival_s=np.array([0.0]),
        num_prompt_tokens=np.array([20]),
        num_output_tokens=np.array([num_tokens]),
    )


def test_finetuning_fills_what_a_decode_leaves() -> None:
    """One long answer: every iteration is stretched to the objective, none beyond."""
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.2)
    policy, _, _ = serve(long_answer(), config, jobs=(job(length=500),))
    shared = [o.actual_s for o in policy.outlooks if o.shape.num_decode_rows]
    assert all(o.shape.has_finetuning for o in policy.outlooks)
    # At first a reserve is kept, for prompts that may come.
    assert shared[1] < 0.95 * SLO.tpot_s
    assert np.mean(shared) <= SLO.tpot_s
    assert np.mean(shared[160:]) >= 0.97 * SLO.tpot_s
    assert max(shared) <= 1.2 * SLO.tpot_s  # What one saved, another takes.
    assert sum(o.shape.num_ft_steps for o in policy.outlooks) > 3


@dataclass(frozen=True, kw_only=True)
class RowSteps(Steps):
    """Steps whose finetuning rows cost something before their first token."""

    row: float = 0.0

    def device_s(self, shape: IterationShape) -> float:
        rows_s = self.row * (shape.num_ft_rows + shape.num_ft_layer_rows)
        return super().device_s(shape) + rows_s


def tokens_a_row(policy: Watched) -> float:
    shared = [o.shape for o in policy.outlooks[160:] if o.shape.num_decode_rows]
    assert any(shape.num_ft_rows for shape in shared)
    return sum(s.num_ft_tokens for s in shared) / sum(s.num_ft_rows for s in shared)


def test_head_room_is_saved_up_where_rows_are_dear() -> None:
    """A row that costs 15 ms is worth it only in a long iteration; the pace is the same."""
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.2)
    sizes: list[float] = []
    for row in (0.0, 0.015):
        policy, _, _ = serve(
            long_answer(), config, jobs=(job(length=1000),), steps=RowSteps(row=row, token=2e-4)
        )
        shared = [o for o in policy.outlooks if o.shape.num_decode_rows]
        late = [o.actual_s for o in shared[160:]]
        assert np.mean([o.actual_s for o in shared]) <= SLO.tpot_s
        # What was saved last may be unspent at the end.
        assert np.mean(late) >= 0.9 * SLO.tpot_s
        assert max(late) <= 3 * SLO.tpot_s
        assert all(o.shape.has_finetuning for o in shared) == (row == 0.0)
        sizes.append(tokens_a_row(policy))
    # Iterations of one objective would hold 50 ms - 4 ms - 15 ms: 155 tokens.
    assert sizes[1] > 300


@pytest.mark.parametrize("rate", [10.0, 40.0])
def test_a_job_advances_also_where_nothing_can_be_saved_up(rate: float) -> None:
    """Answers of two or three tokens never get ahead; pieces stay small, and are taken."""
    requests = replace(
        workload(rate, 40, 30, 3), num_output_tokens=np.random.default_rng(0).integers(2, 4, 40)
    )
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.08)
    policy, _, _ = serve(requests, config, jobs=(job(),), steps=RowSteps(row=0.01))
    left = [o for o in policy.outlooks if o.shape.num_decode_rows]
    has_part = [o.shape.has_finetuning for o in left]
    assert not all(has_part)
    runs = "".join("F" if has else "." for has in has_part).split("F")
    assert max(len(run) for run in runs) <= 8


def test_head_room_is_a_number_also_where_no_job_asks() -> None:
    for jobs in ((), (job(),)):
        policy, _, _ = serve(workload(1.0, 2, 20, 5), FinetuneConfig(slo=SLO), jobs=jobs)
        found = [o.head_room_s for o in policy.outlooks]
        assert np.isfinite(found).all()
        assert (max(found) > 0) == bool(jobs)


def test_what_follows_a_step_joins_its_iteration() -> None:
    """Else half an iteration's room is lost with every step."""
    config = FinetuneConfig(slo=SLO, max_iteration_s=0.2)
    policy, _, _ = serve(long_answer(), config, jobs=(job(length=100),))
    stats = policy.finetune_stats()
    assert stats.num_steps > 10
    shared = [o for o in policy.outlooks if o.shape.num_decode_rows]
    # The step's own sample was forward before: part of another is forward in its iteration.
    assert any(o.shape.num_ft_steps and 0 < o.shape.num_ft_tokens < 100 for o in shared)
    assert np.mean([o.actual_s for o in shared[160:]]) >= 0.97 * SLO.tpot_s
    assert stats.unused_head_room_s[Unused.BEHIND_STEP] <= 0.1 * stats.head_room_s


def test_long_prompts_do_not_hold_up_running_answers() -> None:
    steps = Steps(constant=0.04)  # Little is saved before the prompt comes.
    requests = Workload(
        name="w",
        arrival_s=np.array([0.0, 0.1]),
        num_prompt_tokens=np.array([10, 900]),
        num_output_tokens=np.array([100, 5]),
    )
    paced = FinetuneConfig(slo=SLO, policy=FinetunePolicy.INFERENCE_ONLY)
    for config in (paced, replace(paced, paces_prompts=False)):
        policy, _, waits = serve(requests, config, steps=steps)
        mixed = [
            o for o in policy.outlooks if o.shape.num_decode_rows and o.shape.num_prefill_tokens
        ]
        assert mixed
        slowest = max(o.actual_s for o in mixed)
        assert max(waits) <= SLO.ttft_s
        assert (slowest <= 1.3 * SLO.tpot_s) == config.paces_prompts


def test_what_is_asked_for_wins_over_what_step_times_say() -> None:
    slow = Steps(constant=0.1, token=0.0)
    assert promised(FinetuneConfig(), None) == LatencySlo()
    assert promised(FinetuneConfig(), slow) == LatencySlo(tpot_s=0.4, ttft_s=1.0)
    assert promised(FinetuneConfig(), Steps(constant=1e-3)).tpot_s == 0.02
    asked = promised(FinetuneConfig(slo_tpot_s=0.3), slow)
    assert asked == LatencySlo(tpot_s=0.3, ttft_s=1.0)
    # A time to first token that was asked for holds for long prompts too.
    asked = promised(FinetuneConfig(slo_ttft_s=2.0), slow)
    assert asked == LatencySlo(tpot_s=0.4, ttft_s=2.0, ttft_prefills=0.0)


# ---- prediction ----


@pytest.mark.parametrize("window", [None, 64])
def test_what_is_foreseen_is_what_the_batch_holds(window: int | None) -> None:
    info = make_info(window)
    clock = VirtualClock()
    config = FinetuneConfig(slo=SLO)
    policy = CoServing(CONFIG, info, clock, finetune=config, step_time=Steps())
    executor = SimulatedBatchExecutor(info, Steps(), clock)
    labels = np.ones(300, np.float32)
    labels[:120] = 0
    spec = FinetuneJobSpec(
        id="j",
        adapter=AdapterSpec(),
        samples=(TrainingSample(token_ids=np.zeros(300, np.int32), label_weights=labels),) * 4,
    )
    policy.add_job(spec)
    for i in range(6):
        prompt = tuple([1] * (30 + 40 * i))
        policy.add(
            Request(id=str(i), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=9))
        )
    counter, foreseen = ShapeCounter(info), []
    original = policy._room

    def spy(*args):
        room, outlook = original(*args)
        foreseen.append(room)
        return room, outlook

    policy._room = spy
    num_labels = num_mixed = 0
    while policy.has_work:
        batch = policy.schedule()
        assert batch is not None
        shape = counter.count(batch)
        if foreseen:
            assert asdict(shape) == pytest.approx(asdict(foreseen.pop().shape))
        num_labels += shape.num_ft_loss_tokens
        num_mixed += bool(shape.num_decode_rows and shape.has_finetuning)
        executor.submit(batch)
        policy.apply(executor.collect())
    assert num_labels == 4 * 180
    assert num_mixed


def test_pairs_of_backward_rows_are_those_of_forward_rows() -> None:
    info = make_info(window=64)
    batches: list[Batch] = []
    clock = VirtualClock()
    policy = CoServing(
        CONFIG,
        info,
        clock,
        finetune=FinetuneConfig(
            policy=FinetunePolicy.FINETUNE_ONLY, forward_window=48, backward_window=48
        ),
    )
    executor = SimulatedBatchExecutor(info, Steps(), clock)
    policy.add_job(job(length=200, count=1))
    while policy.has_work:
        batch = policy.schedule()
        assert batch is not None
        batches.append(batch)
        executor.submit(batch)
        policy.apply(executor.collect())
    shapes = [iteration_shape(batch, info) for batch in batches]
    # Token p sees p + 1 tokens in two layers, min(p + 1, 64) in the others.
    pairs = sum(2 * (p + 1) + 2 * min(p + 1, 64) for p in range(200))
    assert sum(s.ft_pairs for s in shapes) * NUM_LAYERS == pytest.approx(pairs)
    assert sum(s.ft_pair_layers for s in shapes) == pytest.approx(pairs)
    assert sum(s.num_ft_token_layers for s in shapes) == 200 * NUM_LAYERS


def test_a_wrong_start_is_learnt_away() -> None:
    """The policy believes that iterations take a quarter of what they do."""
    requests = workload(4.0, 80, 60, 30)
    true = Steps()
    wrong = Steps(constant=0.001, token=2.5e-5, layer_token=2.5e-5, step=5e-4)
    report = simulate_serving(
        requests,
        step_time=true,
        info=make_info(),
        config=CONFIG,
        finetune=CoServed(config=FinetuneConfig(slo=SLO), jobs=(job(),), predictor=wrong),
    )
    late = [i for i in report.iterations[-300:] if i.shape.num_decode_rows]
    # Of three objectives, what was saved included, as predicted.
    assert max(i.end_s - i.start_s for i in late) <= 3 * SLO.tpot_s * 1.01
    assert np.nanmax(report.requests.tpot_s[-40:]) <= SLO.tpot_s * 1.01
    assert report.finetune_tokens_per_s > 100


# ---- temporal ----


@pytest.mark.parametrize("frequency", [1, 4, None])
def test_temporal_runs_a_sample_alone_after_so_many_iterations(frequency: int | None) -> None:
    config = FinetuneConfig(slo=SLO, policy=FinetunePolicy.TEMPORAL, temporal_iterations=frequency)
    requests = workload(6.0, 40, 60, 30)
    policy, outputs, _ = serve(requests, config, jobs=(job(length=100),))
    kinds = ["F" if o.shape.has_finetuning else "I" for o in policy.outlooks]
    assert not any(o.shape.has_finetuning and o.shape.num_decode_rows for o in policy.outlooks)
    runs = "".join(kinds).split("F")
    if frequency is not None:
        assert max(len(run) for run in runs) == frequency
    else:
        lengths = [len(run) for run in runs if run]
        assert max(lengths) > 1
    alone = serve(requests, replace(config, policy=FinetunePolicy.INFERENCE_ONLY))[1]
    assert outputs == alone


def test_a_cancelled_sample_does_not_hold_the_turn() -> None:
    config = FinetuneConfig(slo=SLO, policy=FinetunePolicy.TEMPORAL, max_window_tokens=64)
    clock, info = VirtualClock(), make_info()
    policy = CoServing(CONFIG, info, clock, finetune=config, step_time=Steps())
    loop = EngineLoop(policy, SimulatedBatchExecutor(info, Steps(), clock))
    policy.add_job(job(length=900, count=2))
    loop.step()
    policy.cancel_job("j")
    policy.add(Request(id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=3)))
    updates = loop.drain()
    assert updates[-1].finish_reason is FinishReason.LENGTH


# ---- what is gained ----


def test_coserving_keeps_what_temporal_sharing_loses() -> None:
    """At equal attainment co-serving gets more done than any temporal sharing."""
    requests = workload(5.0, 150, 80, 30)
    slo = LatencySlo(tpot_s=0.02, ttft_s=0.3)

    def run(config: FinetuneConfig) -> tuple[float, float]:
        report = simulate_serving(
            requests,
            step_time=Steps(),
            info=make_info(),
            config=CONFIG,
            finetune=CoServed(config=config, jobs=(job(length=400),)),
        )
        return (
            report.attainment(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s),
            report.finetune_tokens_per_s,
        )

    attained, speed = run(FinetuneConfig(slo=slo))
    assert attained >= 0.99
    for frequency in (1, 16, 128):
        other, other_speed = run(
            FinetuneConfig(slo=slo, policy=FinetunePolicy.TEMPORAL, temporal_iterations=frequency)
        )
        assert other < attained or other_speed < speed / 1.2
