"""The serving policy under the virtual clock, against closed forms and by its events."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from weft.base.clock import VirtualClock
from weft.base.errors import ConfigError, IntegrityError, OutOfMemoryError, UnsupportedError
from weft.cost.shapes import ModelShape
from weft.cost.step_time import IterationShape
from weft.engine.batch import Batch, CacheGroup, ExecutorInfo, SegmentKind
from weft.engine.config import PolicyConfig
from weft.engine.iteration_shape import iteration_shape
from weft.sim.batch_executor import SimulatedBatchExecutor, arena_info
from weft.sim.serving import simulate_serving
from weft.sim.serving_report import Percentiles, ServingReport
from weft.sim.workload import LengthRange, Workload, synthetic

INFO = ExecutorInfo(
    num_pages=257,
    page_bytes=4096,
    groups=(CacheGroup(layers=(0, 1), page_tokens=16),),
    num_layers=2,
    vocab_size=100,
    max_num_seqs=8,
)
CONFIG = PolicyConfig(max_model_len=512, max_num_batched_tokens=64)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A step-time model with a closed form."""

    device: float = 0.010
    per_token: float = 0.0
    host: float = 0.0

    def device_s(self, shape: IterationShape) -> float:
        return self.device + self.per_token * shape.num_tokens

    def host_s(self, shape: IterationShape) -> float:
        return self.host


def workload(
    arrival_s: list[float], prompt: list[int], output: list[int], **changes: object
) -> Workload:
    base = Workload(
        name="w",
        arrival_s=np.array(arrival_s),
        num_prompt_tokens=np.array(prompt),
        num_output_tokens=np.array(output),
    )
    return replace(base, **changes)


def simulate(
    requests: Workload,
    steps: Steps | None = None,
    *,
    info: ExecutorInfo = INFO,
    config: PolicyConfig = CONFIG,
    max_in_flight: int = 1,
) -> ServingReport:
    return simulate_serving(
        requests,
        step_time=steps or Steps(),
        info=info,
        config=config,
        max_in_flight=max_in_flight,
    )


# ---- closed forms ----


def test_a_lone_request_takes_its_chunks_then_a_step_a_token() -> None:
    report = simulate(workload([3.0], [150], [5]), Steps(device=0.010, host=0.001))
    # 150 tokens at 64 an iteration: three chunks, the last of which gives the first token.
    assert report.requests.ttft_s.tolist() == pytest.approx([3 * 0.011])
    assert report.requests.tpot_s.tolist() == pytest.approx([0.011])
    assert report.inter_token_s.tolist() == pytest.approx([0.011] * 4)
    assert report.requests.first_scheduled_s.tolist() == [3.0]
    assert [i.shape.num_prefill_tokens for i in report.iterations] == [64, 64, 22, 0, 0, 0, 0]
    assert report.iterations[3].shape.decode_context_tokens == 151
    assert report.iterations[1].shape.prefill_pairs == sum(range(65, 129))
    assert report.duration_s == pytest.approx(7 * 0.011)
    assert report.throughput_tokens_per_s == pytest.approx(5 / (7 * 0.011))
    assert report.busy_share == pytest.approx(10 / 11)
    assert (report.num_finished, report.num_preempted, report.num_truncated) == (1, 0, 0)


def test_two_in_flight_hide_the_host_behind_the_device() -> None:
    steps = Steps(device=0.010, host=0.004)
    one = simulate(workload([0.0], [10], [50]), steps)
    two = simulate(workload([0.0], [10], [50]), steps, max_in_flight=2)
    assert one.requests.tpot_s.tolist() == pytest.approx([0.014])
    assert two.requests.tpot_s.tolist() == pytest.approx([0.010])
    # A host that is slower than the device is the bottleneck, and nothing is lost but that.
    slow = simulate(workload([0.0], [10], [50]), Steps(device=0.003, host=0.004), max_in_flight=2)
    assert slow.duration_s == pytest.approx(50 * 0.004 + 0.003)


def test_an_arrival_waits_for_the_iteration_that_is_running() -> None:
    report = simulate(workload([0.0, 0.005], [10, 10], [20, 1]), Steps(device=0.010))
    # It arrives in the first iteration, joins the second and is answered at its end.
    assert report.requests.first_scheduled_s.tolist() == pytest.approx([0.0, 0.010])
    assert report.requests.ttft_s.tolist() == pytest.approx([0.010, 0.015])
    assert report.iterations[1].shape.num_decode_rows == 1
    assert report.iterations[1].shape.num_prefill_tokens == 10
    assert np.isnan(report.requests.tpot_s[1])


def test_the_engine_sleeps_while_nothing_is_there() -> None:
    report = simulate(workload([0.0, 100.0], [10, 10], [2, 2]), Steps(device=0.010))
    assert report.requests.ttft_s.tolist() == pytest.approx([0.010, 0.010])
    assert report.iterations[2].start_s == 100.0
    assert report.busy_share == pytest.approx(0.04 / 100.02)


# ---- events ----


def test_too_few_pages_preempt_and_every_request_still_gets_all_its_tokens() -> None:
    small = replace(INFO, num_pages=17)  # 256 tokens for requests of up to 160.
    config = replace(CONFIG, max_model_len=256)
    requests = workload([0.0] * 6, [60] * 6, [100] * 6)
    report = simulate(requests, info=small, config=config)
    assert report.num_preempted > 0
    assert report.requests.num_generated_tokens.tolist() == [100] * 6
    assert 0.9 < report.kv_peak_share <= 1.0
    roomy = simulate(requests, config=config)
    assert roomy.num_preempted == 0
    assert roomy.duration_s < report.duration_s


def test_shared_blocks_are_found_in_the_prefix_cache() -> None:
    requests = workload(
        [0.0, 1.0, 2.0], [70, 70, 70], [2, 2, 2], block_ids=((1, 2), (1, 3), (4,)), block_tokens=32
    )
    report = simulate(requests)
    assert report.requests.num_cached_tokens.tolist() == [0, 32, 0]
    assert report.prefix_cache_hit_share == pytest.approx(32 / 210)
    without = simulate(requests, config=replace(CONFIG, enable_prefix_caching=False))
    assert without.prefix_cache_hit_share == 0


def test_what_does_not_fit_the_context_is_counted_not_hidden() -> None:
    report = simulate(workload([0.0, 0.0, 0.0], [512, 500, 10], [5, 100, 5]))
    assert report.requests.is_rejected.tolist() == [True, False, False]
    assert report.requests.num_generated_tokens.tolist() == [0, 12, 5]
    summary = report.summary()
    assert (summary["num_rejected"], summary["num_truncated"], summary["num_finished"]) == (1, 1, 2)
    full = simulate(workload([0.0] * 4, [9] * 4, [3] * 4), config=replace(CONFIG, max_waiting=2))
    assert full.summary()["num_rejected"] == 2


def test_equal_arguments_give_equal_bits() -> None:
    requests = synthetic(120, 40.0, num_prompt_tokens=90, num_output_tokens=30, burstiness=0.3)
    steps = Steps(device=0.003, per_token=1.7e-5, host=2e-4)
    first, second = (simulate(requests, steps, max_in_flight=2) for _ in range(2))
    assert json.dumps(first.summary()) == json.dumps(second.summary())
    assert first.iterations == second.iterations
    assert first.requests.to_csv() == second.requests.to_csv()
    assert len(first.iterations) > 30
    assert max(i.num_running for i in first.iterations) == 8
    assert max(i.num_waiting for i in first.iterations) > 0


def test_no_iteration_exceeds_the_budget_and_tokens_are_conserved() -> None:
    requests = synthetic(60, 100.0, num_prompt_tokens=77, num_output_tokens=21)
    report = simulate(requests, Steps(per_token=1e-5))
    assert max(i.shape.num_tokens for i in report.iterations) == 64
    # Every token but the last of each request passes the model exactly once.
    assert sum(i.shape.num_tokens for i in report.iterations) == 60 * (77 + 20)
    assert sum(i.shape.num_sampled_rows for i in report.iterations) == 60 * 21
    assert int(report.requests.num_generated_tokens.sum()) == 60 * 21
    ends = [i.end_s for i in report.iterations]
    assert all(i.start_s >= end for i, end in zip(report.iterations[1:], ends, strict=False))


# ---- the executor alone ----


def batch(kinds: list[int], prefix_lens: list[list[int]], batch_id: int = 0) -> Batch:
    counts = [len(row) for row in prefix_lens]
    flat = np.concatenate([np.array(row, np.int32) for row in prefix_lens])
    rows = len(kinds)
    return Batch(
        batch_id=batch_id,
        kinds=np.array(kinds, np.uint8),
        slots=np.arange(rows, dtype=np.int32),
        row_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        layers=np.zeros((rows, 2), np.int16),
        adapters=np.full(rows, -1, np.int32),
        models=np.zeros(rows, np.uint8),
        token_ids=np.zeros(len(flat), np.int32),
        positions=flat - 1,
        prefix_lens=flat,
        page_tables=(),
        write_slots=(),
        sample_rows=np.arange(rows, dtype=np.int32),
        prompt_logprob_rows=np.empty(0, np.int32),
    )


def test_context_is_averaged_over_groups_and_cut_by_windows() -> None:
    info = replace(
        INFO,
        groups=(
            CacheGroup(layers=(0,), page_tokens=16),
            CacheGroup(layers=(1,), page_tokens=16, window=4),
        ),
    )
    mixed = batch([SegmentKind.DECODE, SegmentKind.PREFILL], [[10], [7, 8, 9]])
    shape = iteration_shape(mixed, info)
    assert (shape.num_decode_rows, shape.num_prefill_rows, shape.num_prefill_tokens) == (1, 1, 3)
    assert shape.decode_context_tokens == (10 + 4) / 2
    assert shape.prefill_pairs == (24 + 12) / 2
    # The windowed layer reads the chunk and the three tokens that its first one still sees.
    assert shape.prefill_context_tokens == (9 + 6) / 2


def test_kinds_without_a_model_are_refused_by_name() -> None:
    executor = SimulatedBatchExecutor(INFO, Steps(), VirtualClock())
    with pytest.raises(UnsupportedError, match="VERIFY"):
        executor.submit(batch([SegmentKind.VERIFY], [[1]]))


def test_the_executor_keeps_its_depth_and_its_order() -> None:
    clock = VirtualClock()
    executor = SimulatedBatchExecutor(INFO, Steps(), clock, max_in_flight=2, filler_token=7)
    executor.submit(batch([0], [[1]], batch_id=4))
    executor.submit(batch([0, 0], [[1], [1]], batch_id=5))
    with pytest.raises(IntegrityError, match="limit is 2"):
        executor.submit(batch([0], [[1]]))
    results = [executor.collect(), executor.collect()]
    assert [result.batch_id for result in results] == [4, 5]
    assert results[1].tokens.tolist() == [[7], [7]]
    assert clock.now_s() == pytest.approx(0.020)
    with pytest.raises(IntegrityError, match="no batch in flight"):
        executor.collect()


def test_fillers_are_never_eos() -> None:
    report = simulate(
        workload([0.0], [5], [4]), config=replace(CONFIG, eos_token_ids=tuple(range(99)))
    )
    assert report.requests.num_generated_tokens.tolist() == [4]
    with pytest.raises(ConfigError, match="vocab_size"):
        SimulatedBatchExecutor(INFO, Steps(), VirtualClock(), filler_token=100)


def test_an_arena_is_sized_by_bytes_and_too_small_a_one_is_refused() -> None:
    shape = ModelShape(
        name="m",
        num_layers=2,
        hidden_size=8,
        ffn_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=10,
        max_model_len=64,
    )
    page = 2 * 2 * 1 * 4 * 4 * 16
    info = arena_info(shape, dtype="float32", kv_cache_bytes=10 * page + 5, max_num_seqs=2)
    assert (info.num_pages, info.page_bytes) == (10, page)
    with pytest.raises(OutOfMemoryError, match=f"{2 * page} bytes are needed"):
        arena_info(shape, dtype="float32", kv_cache_bytes=page, max_num_seqs=2)
    with pytest.raises(OutOfMemoryError, match="raise kv_cache_memory_bytes"):
        simulate(workload([0.0], [5], [4]), info=replace(INFO, num_pages=9))


# ---- the report ----


def test_percentiles_interpolate_and_leave_out_what_is_unknown() -> None:
    values = np.array([4.0, np.nan, 0.0, 1.0, 2.0, 3.0])
    assert Percentiles.of(values).to_dict() == pytest.approx({"p50": 2.0, "p90": 3.6, "p99": 3.96})
    assert Percentiles.of(np.array([np.nan])).to_dict() == {"p50": None, "p90": None, "p99": None}


def test_attainment_counts_rejected_requests_as_missed() -> None:
    report = simulate(workload([0.0, 0.0, 0.005], [10, 512, 10], [20, 5, 1]), Steps(device=0.010))
    assert report.attainment(ttft_s=0.0151, tpot_s=0.011) == pytest.approx(2 / 3)
    assert report.attainment(ttft_s=0.0149, tpot_s=0.011) == pytest.approx(1 / 3)
    assert report.attainment(ttft_s=0.0151, tpot_s=0.009) == pytest.approx(1 / 3)


def test_the_trace_shows_every_iteration_and_request_without_overlap(tmp_path: Path) -> None:
    requests = synthetic(20, 50.0, num_prompt_tokens=40, num_output_tokens=5)
    report = simulate(requests)
    report.trace().write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len([s for s in slices if s["cat"] == "iteration"]) == len(report.iterations)
    for kind in ("queued", "prefill", "decode"):
        assert len([s for s in slices if s["cat"] == kind]) == 20
    lanes: dict[tuple[int, int], float] = {}
    for event in slices:
        track = (event["pid"], event["tid"])
        assert event["ts"] >= lanes.get(track, 0.0) - 1e-3
        lanes[track] = event["ts"] + event["dur"]
    assert {e["name"] for e in events if e["ph"] == "C"} == {"KV pages held", "requests"}


def test_requests_export_as_csv() -> None:
    report = simulate(workload([0.0, 0.0], [512, 10], [5, 1]))
    header, rejected, served = report.requests.to_csv().splitlines()
    assert header.startswith("arrival_s,first_scheduled_s,first_token_s")
    assert rejected == "0.0,,,,,,512,0,0,True"
    assert served.endswith(",10,0,1,False")


def test_time_has_no_source_but_arrivals_and_the_model() -> None:
    """Twice the rate on a device twice as fast halves every latency."""
    requests = synthetic(40, 30.0, num_prompt_tokens=50, num_output_tokens=10)
    clipped = requests.with_lengths_scaled(prompt_range=LengthRange(low=50, high=50))
    fast = simulate(clipped.with_rate_scaled(2.0), Steps(device=0.005))
    slow = simulate(requests, Steps(device=0.010))
    assert fast.requests.ttft_s * 2 == pytest.approx(slow.requests.ttft_s)
