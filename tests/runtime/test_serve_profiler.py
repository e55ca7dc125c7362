"""The sweep behind serving profiles: its batches, its medians, and a real executor under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest

from weft.base.clock import VirtualClock
from weft.base.errors import ConfigError
from weft.cli.profile_serve import main
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.step_time import IterationShape
from weft.engine.batch import Batch, CacheGroup, ExecutorInfo, StepResult
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.iteration_shape import ShapeCounter, iteration_shape
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.runtime import serve_profiler
from weft.runtime.serve_profiler import (
    ProfileConfig,
    profile_serving,
    quick_profile,
    warm_up_finetuning,
)
from weft.runtime.serve_sweep import Row, SweepBatches, SweepLimits, decodes, default_sweep
from weft.sim.batch_executor import SimulatedBatchExecutor
from weft.sim.serving_setup import setup_from_profile
from weft.sim.workload import synthetic

INFO = ExecutorInfo(
    num_pages=600,
    page_bytes=4096,
    groups=(CacheGroup(layers=(0, 1), page_tokens=16),),
    num_layers=2,
    vocab_size=100,
    max_num_seqs=16,
)
LIMITS = SweepLimits(max_num_seqs=16, max_model_len=512, max_num_batched_tokens=128)
CONFIG = ProfileConfig(max_model_len=512, max_num_batched_tokens=128, num_rounds=2)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the profiled machine takes: 2 ms, then 50 us a token beyond 4, 1 us per context KiB."""

    host: float = 0.0

    def device_s(self, shape: IterationShape) -> float:
        return (
            2e-3
            + 5e-5 * max(0, shape.num_tokens - 4)
            + 1e-6 * shape.decode_context_tokens
            + 2e-8 * shape.prefill_pairs
        )

    def host_s(self, shape: IterationShape) -> float:
        return self.host


class Ticking(VirtualClock):
    """A clock on which every look costs a microsecond, so that the policy takes time."""

    def now_s(self) -> float:
        self.time_s += 1e-6
        return self.time_s


class Jittery(SimulatedBatchExecutor):
    """Every fifth batch takes ten times as long: somebody else used the machine."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(INFO, Machine(), clock)
        self.clock = clock
        self.count = 0

    def collect(self) -> StepResult:
        result = super().collect()
        self.count += 1
        if self.count % 5 == 0:
            self.clock.advance_to(self.clock.now_s() + 9 * result.elapsed_s)
        return result


SWEEP_ONLY = replace(CONFIG, measures_service=False)


def profiled(
    config: ProfileConfig = SWEEP_ONLY, clock: VirtualClock | None = None, max_in_flight: int = 1
) -> StepTimeProfile:
    clock = clock or VirtualClock()
    executor = SimulatedBatchExecutor(INFO, Machine(), clock, max_in_flight=max_in_flight)
    return profile_serving(executor, config, model="m", dtype="float32", device="t", clock=clock)


# ---- batches ----


def test_the_default_sweep_covers_the_limits_and_respects_them() -> None:
    sweep = default_sweep(LIMITS)
    assert len(set(sweep)) == len(sweep)
    assert {len(rows) for rows in sweep if all(row.is_decode for row in rows)} >= {1, 2, 3, 8, 16}
    assert max(row.before + row.count for rows in sweep for row in rows) == 512
    assert max(sum(row.count for row in rows) for rows in sweep) == 128
    assert any(len({row.is_decode for row in rows}) == 2 for rows in sweep)
    tiny = default_sweep(SweepLimits(max_num_seqs=1, max_model_len=1, max_num_batched_tokens=1))
    assert tiny == (decodes(1, 1),)


def policy_batches(info: ExecutorInfo) -> Iterator[Batch]:
    """Batches of the production policy, while it serves four requests."""
    clock = VirtualClock()
    policy = ContinuousBatching(
        PolicyConfig(max_model_len=512, max_num_batched_tokens=128), info, clock
    )
    executor = SimulatedBatchExecutor(info, Machine(), clock)
    for number in range(4):
        policy.add(
            Request(
                id=str(number),
                prompt_token_ids=tuple(range(number, 50 + number)),
                sampling=SamplingParams(max_tokens=4, ignore_eos=True),
            )
        )
    while policy.has_work:
        batch = policy.schedule()
        assert batch is not None
        yield batch
        executor.submit(batch)
        policy.apply(executor.collect())


TWO_GROUPS = replace(
    INFO,
    groups=(
        CacheGroup(layers=(0,), page_tokens=16),
        CacheGroup(layers=(1,), page_tokens=32, window=40),
    ),
)


@pytest.mark.parametrize("info", [INFO, TWO_GROUPS])
def test_batches_made_by_hand_look_like_those_of_the_policy(info: ExecutorInfo) -> None:
    batches = SweepBatches(info)
    seen = 0
    for real in policy_batches(info):
        rows = [
            Row(
                before=int(real.positions[begin]),
                count=int(end - begin),
                samples=row in real.sample_rows,
                is_decode=bool(real.kinds[row]),
            )
            for row, (begin, end) in enumerate(
                zip(real.row_starts[:-1], real.row_starts[1:], strict=True)
            )
        ]
        made = batches.make(rows, starts=bool(real.starts))
        assert iteration_shape(made, info) == iteration_shape(real, info)
        for name in ("kinds", "row_starts", "layers", "positions", "prefix_lens", "sample_rows"):
            assert getattr(made, name).tolist() == getattr(real, name).tolist()
        for field in fields(Batch):
            ours, theirs = getattr(made, field.name), getattr(real, field.name)
            if isinstance(theirs, np.ndarray):
                assert ours.dtype == theirs.dtype, field.name
        for ours, theirs in zip(made.page_tables, real.page_tables, strict=True):
            assert ours.dtype == theirs.dtype
            # A page where the policy has one, and nowhere else.
            assert ((ours > 0) >= (theirs > 0)).all()
        seen += 1
    assert seen > 4


def test_rows_own_their_pages_and_write_where_their_tokens_stand() -> None:
    batches = SweepBatches(TWO_GROUPS)
    rows = [*decodes(3, 100), Row(before=10, count=30), Row(before=0, count=7)]
    batch = batches.make(rows, starts=True)
    used = np.concatenate([table[table > 0] for table in batch.page_tables])
    assert len(set(used.tolist())) == len(used) == batches.num_pages(rows)
    for group, table, slots in zip(
        TWO_GROUPS.groups, batch.page_tables, batch.write_slots, strict=True
    ):
        assert len(set(slots.tolist())) == batch.num_tokens
        row_of = np.repeat(np.arange(5), np.diff(batch.row_starts))
        pages = table[row_of, batch.positions // group.page_tokens]
        assert (slots // group.page_tokens).tolist() == pages.tolist()
        assert (slots % group.page_tokens).tolist() == (
            batch.positions % group.page_tokens
        ).tolist()
        assert (pages > 0).all()
    # The window of 40 ends before page 1 of the decodes at position 99.
    assert batch.page_tables[1][0].tolist()[0] == 0
    assert [start.slot for start in batch.starts] == [0, 1, 2, 3, 4]
    following = batches.make(decodes(1, 5), starts=True)
    assert following.freed_slots.tolist() == [0, 1, 2, 3, 4]
    assert following.batch_id == batch.batch_id + 1


def test_filling_the_arena_writes_every_page_once() -> None:
    batches = SweepBatches(INFO).fill_arena()
    assert batches[0].write_slots[0].tolist() == list(range(16, 32))
    moves = np.concatenate([batch.page_moves for batch in batches])
    assert (moves[:, 0] == 1).all()
    assert sorted(moves[:, 1].tolist()) == list(range(2, INFO.num_pages))


def test_rows_that_do_not_fit_are_refused() -> None:
    batches = SweepBatches(INFO)
    with pytest.raises(ConfigError, match="17 rows"):
        batches.make(decodes(17, 1), starts=True)
    with pytest.raises(ConfigError, match="need 640 pages"):
        batches.make([Row(before=0, count=10240)], starts=True)
    with pytest.raises(ConfigError, match="come before"):
        batches.make([Row(before=0, count=2), *decodes(1, 4)], starts=True)


# ---- measuring ----


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_the_sweep_recovers_the_machine_that_it_ran_on(max_in_flight: int) -> None:
    profile = profiled(max_in_flight=max_in_flight)
    assert profile.device_fit.residuals.max < 0.02
    machine = Machine()
    for point in profile.device_points:
        assert point.seconds == pytest.approx(machine.device_s(point.shape), rel=1e-6)
        assert point.num_repeats == 4
    unseen = IterationShape(num_decode_rows=5, num_sampled_rows=5, decode_context_tokens=1234.0)
    assert profile.device_s(unseen) == pytest.approx(machine.device_s(unseen), rel=0.03)
    assert profile.settings["max_in_flight"] == max_in_flight


def test_medians_forgive_a_machine_that_is_sometimes_busy() -> None:
    clock = VirtualClock()
    config = replace(CONFIG, num_rounds=5, measures_service=False)
    jittery = Jittery(clock)
    profile = profile_serving(jittery, config, model="m", dtype="d", device="t", clock=clock)
    assert jittery.count % 5 != jittery.count
    assert profile.device_fit.residuals.median < 0.02
    machine = Machine()
    off = [
        abs(point.seconds / machine.device_s(point.shape) - 1) for point in profile.device_points
    ]
    assert max(off) < 1e-6


def test_a_spent_time_limit_still_ends_the_first_pass() -> None:
    clock = VirtualClock()
    executor = SimulatedBatchExecutor(INFO, Machine(), clock)
    seen: list[float] = []
    profile = profile_serving(
        executor,
        replace(SWEEP_ONLY, time_limit_s=0.0),
        model="m",
        dtype="d",
        device="t",
        clock=clock,
        progress=lambda text, done: seen.append(done),
    )
    assert {point.num_repeats for point in profile.device_points} == {2}
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.5)


def test_serving_adds_iterations_as_they_come_and_the_time_of_the_policy() -> None:
    alone, served = profiled(), profiled(CONFIG, Ticking())
    assert alone.host_fit is None
    assert served.host_fit is not None
    added = served.device_points[len(alone.device_points) :]
    decode_rows = {point.shape.num_decode_rows for point in served.host_points}
    assert decode_rows >= set(range(1, 13))
    assert [p.shape for p in added] == [p.shape for p in served.host_points]
    machine = Machine()
    for point in added:
        assert point.seconds == pytest.approx(machine.device_s(point.shape), rel=0.02)
    # The policy looks at this clock once for each of schedule and apply, and at admissions.
    assert 1e-6 < served.host_s(IterationShape(num_decode_rows=4)) < 1e-4
    # With batches in flight, iterations that follow each other overlap and are not measured.
    deep = profiled(CONFIG, Ticking(), max_in_flight=2)
    assert len(deep.device_points) == len(alone.device_points)
    assert deep.host_points


def test_a_profile_simulates_the_machine_that_it_was_made_on() -> None:
    profile = profiled()
    report = setup_from_profile(profile).run(
        synthetic(1, 1.0, num_prompt_tokens=100, num_output_tokens=11)
    )
    expected = np.mean([2e-3 + 1e-6 * (100 + k) for k in range(1, 11)])
    assert report.requests.tpot_s.tolist() == pytest.approx([expected], rel=0.02)


def test_points_that_fit_nowhere_are_an_error() -> None:
    clock = VirtualClock()
    executor = SimulatedBatchExecutor(replace(INFO, num_pages=4), Machine(), clock)
    config = replace(CONFIG, points=((Row(before=0, count=100),),))
    with pytest.raises(ConfigError, match="raise kv_cache_memory_bytes"):
        profile_serving(executor, config, model="m", dtype="d", device="t", clock=clock)
    with pytest.raises(ConfigError, match="num_rounds is 0"):
        replace(CONFIG, num_rounds=0)


def test_the_verb_measures_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    options = ["--serve", "--out", str(out), "--dtype", "float32", "--device", "cpu", "--json"]
    options += ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    options += ["--num-rounds", "1", "--kv-cache-memory-bytes", "4000000"]
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    profile = StepTimeProfile.read(out)
    assert summary["num_points"] == len(profile.device_points) > 10
    assert summary["median_spread"] >= 0
    assert set(summary["decode_step_s"]) == {"1", "2", "3", "4"}
    assert profile.settings["info"]["max_num_seqs"] == 4
    report = setup_from_profile(profile).run(
        synthetic(5, 10.0, num_prompt_tokens=20, num_output_tokens=5)
    )
    assert report.num_finished == 5


def test_the_verb_warns_where_the_machine_was_busy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = profiled()
    disturbed = tuple(replace(point, spread=0.3) for point in quiet.device_points)
    busy = replace(quiet, device_points=disturbed)
    for profile, warns in ((busy, True), (quiet, False)):
        monkeypatch.setattr(serve_profiler, "profile_serving", lambda *a, p=profile, **k: p)
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "p.json"), "--max-num-seqs", "2", "--device", "cpu"])
        assert ("measure again when it is quiet" in capsys.readouterr().err) is warns


@dataclass(frozen=True, kw_only=True)
class FinetuningMachine(Machine):
    """The same, with 30 us a token of a layer backward, 0.1 ms a layer of a row, 5 ms a step."""

    def device_s(self, shape: IterationShape) -> float:
        backward_s = 3e-5 * shape.num_ft_token_layers + 1e-4 * shape.num_ft_layer_rows
        return super().device_s(shape) + backward_s + 5e-3 * shape.num_ft_steps


def test_finetuning_is_measured_where_the_executor_holds_samples() -> None:
    clock = VirtualClock()
    info = replace(INFO, max_finetune_samples=2)
    executor = SimulatedBatchExecutor(info, FinetuningMachine(), clock)
    profile = profile_serving(executor, CONFIG, model="m", dtype="float32", device="t", clock=clock)
    points = [point.shape for point in profile.device_points]
    assert any(shape.num_ft_tokens and shape.num_decode_rows for shape in points)
    assert any(shape.num_ft_layer_rows and not shape.num_tokens for shape in points)
    assert any(shape.num_ft_steps for shape in points)
    read = StepTimeProfile.from_json(profile.to_json())
    assert (read.device_points, read.device_fit) == (profile.device_points, profile.device_fit)
    assert setup_from_profile(read).info.max_finetune_samples == 2
    for shape in (
        IterationShape(num_ft_layer_rows=2, num_ft_token_layers=200, ft_pair_layers=10_000.0),
        IterationShape(
            num_decode_rows=4,
            num_sampled_rows=4,
            decode_context_tokens=400.0,
            num_ft_rows=1,
            num_ft_tokens=64,
            ft_context_tokens=64.0,
            ft_pairs=2080.0,
            num_ft_loss_tokens=64,
            num_ft_steps=1,
        ),
    ):
        assert profile.device_s(shape) == pytest.approx(executor_s(shape), rel=0.1)
    # An executor without room for samples is measured as before.
    plain = profiled(CONFIG)
    assert not any(point.shape.has_finetuning for point in plain.device_points)


def executor_s(shape: IterationShape) -> float:
    return FinetuningMachine().device_s(shape)


def test_a_quick_sweep_tells_rows_from_tokens_and_ends_in_time() -> None:
    clock = VirtualClock()
    info = replace(INFO, max_finetune_samples=2)
    machine = TrainingMachine()
    executor = SimulatedBatchExecutor(info, machine, clock)
    begin_s = clock.now_s()
    found = quick_profile(
        executor,
        max_model_len=512,
        max_num_batched_tokens=512,
        model="m",
        dtype="float32",
        device="cpu",
        time_limit_s=3.0,
        clock=clock,
    )
    assert clock.now_s() - begin_s <= 3.0
    for shape in (
        IterationShape(num_decode_rows=2, num_sampled_rows=2, decode_context_tokens=200.0),
        IterationShape(num_ft_rows=1, num_ft_tokens=300, num_ft_loss_tokens=300),
        IterationShape(num_ft_layer_rows=2, num_ft_token_layers=600),
    ):
        assert found.device_s(shape) == pytest.approx(machine.device_s(shape), rel=0.25)
    assert any(point.shape.num_ft_steps for point in found.device_points)


@pytest.mark.parametrize("num_samples", [0, 2])
def test_warming_up_takes_one_step_forward_and_backward(
    num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = replace(INFO, max_finetune_samples=num_samples)
    executor = SimulatedBatchExecutor(info, TrainingMachine(), VirtualClock())
    shapes: list[IterationShape] = []
    counter, submit = ShapeCounter(info), executor.submit

    def noted(batch: Batch) -> None:
        shapes.append(counter.count(batch))
        submit(batch)

    monkeypatch.setattr(executor, "submit", noted)
    warm_up_finetuning(executor, max_model_len=512, max_num_batched_tokens=512)
    assert any(shape.num_ft_tokens for shape in shapes) == bool(num_samples)
    assert any(shape.num_ft_token_layers for shape in shapes) == bool(num_samples)
    assert any(shape.num_ft_steps for shape in shapes) == bool(num_samples)


@dataclass(frozen=True, kw_only=True)
class TrainingMachine(Machine):
    """The same machine, which also trains: 80 us a token and layer backward, 1 ms a step."""

    def device_s(self, shape: IterationShape) -> float:
        backward_s = 8e-5 * shape.num_ft_token_layers + 1e-3 * shape.num_ft_steps
        return Machine.device_s(self, shape) + backward_s
