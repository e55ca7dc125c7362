"""The serving benchmark's own machinery: a harness that measured wrongly would fail here."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from bench_models import RAND110, BenchModel  # noqa: E402
from peers.client import Worker, WorkerError  # noqa: E402
from peers.contention import CpuReading, num_cores_of_others, read_cpu  # noqa: E402
from peers.roster import ENGINES, find_interpreter  # noqa: E402
from rows import Row, compare  # noqa: E402
from serve_rows import Measured, model_rows, target_ratio  # noqa: E402
from workloads import Kind, draw_prompts, standard_workloads  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # Other tests have a `plan` of their own.

FAKE_WORKER = """
import sys, time
from protocol import serve

class Fake:
    def load(self, spec):
        print("a library that prints to stdout")
        return {"fake": spec["version"]}

    def generate(self, prompts, num_new_tokens):
        if prompts[0][0] == 13:
            raise ValueError("unlucky")
        if prompts[0][0] == 14:
            sys.exit(3)
        if prompts[0][0] == 15:
            time.sleep(60)
        end_s = time.process_time() + 0.4
        while prompts[0][0] == 17 and time.process_time() < end_s:
            pass
        short = prompts[0][0] == 16
        return [[sum(p)] * (n - short) for p, n in zip(prompts, num_new_tokens)]

serve(Fake())
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    module = tmp_path / "fake"
    module.with_suffix(".py").write_text(FAKE_WORKER)
    worker = Worker(
        module=str(module),
        interpreter=sys.executable,
        environment={"PYTHONPATH": str(BENCHMARKS / "peers")},
        log=tmp_path / "fake.log",
    )
    yield worker
    worker.close()


def process_state(worker: Worker) -> str:
    pid = worker._process.pid
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_answers_and_stdout_noise_does_not_break_the_protocol(worker: Worker) -> None:
    assert worker.load({"version": "7"}) == {"fake": "7"}
    generation = worker.generate([[1, 2], [3]], [2, 1])
    assert generation.tokens == [[3, 3], [3]]
    assert generation.num_tokens == 3
    assert generation.wall_s > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_is_stopped_between_requests(worker: Worker) -> None:
    worker.load({"version": "7"})
    deadline_s = time.monotonic() + 5
    while process_state(worker) != "T" and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert process_state(worker) == "T"


@pytest.mark.parametrize(
    ("first_token", "message"),
    [(13, "ValueError: unlucky"), (14, "died"), (15, "no answer within"), (16, "got")],
)
def test_what_goes_wrong_in_a_worker_is_an_error_here(
    worker: Worker, first_token: int, message: str
) -> None:
    worker.load({"version": "7"})
    with pytest.raises(WorkerError, match=message):
        worker.generate([[first_token]], [2], timeout_s=1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_of_others_is_seen_and_own_work_is_not(worker: Worker) -> None:
    worker.load({"version": "7"})
    before = read_cpu(worker.session)
    worker.generate([[17]], [1])
    after = read_cpu(worker.session)
    assert before is not None
    assert after is not None
    assert after.session_s - before.session_s >= 0.2
    assert after.busy_s - before.busy_s >= 0.2

    def reading(wall_s: float, busy_s: float, session_s: float) -> CpuReading:
        return CpuReading(wall_s=wall_s, busy_s=busy_s, session_s=session_s)

    quiet = num_cores_of_others(reading(0, 10, 1), reading(2, 14, 5))
    disturbed = num_cores_of_others(reading(0, 10, 1), reading(2, 14, 2))
    assert (quiet, disturbed) == (0.0, 1.5)


def test_ratios_above_one_are_in_our_favour() -> None:
    rate = compare("rate", "tokens/s", [20.0, 30.0, 40.0], [10.0, 10.0, 10.0], target=2.5)
    assert (rate.ratio, rate.ratio_low, rate.ratio_high) == (3.0, 2.0, 4.0)
    assert rate.is_met
    latency = compare("latency", "s", [2.0], [1.0], lower_is_better=True, target=1.0)
    assert latency.ratio == 0.5
    assert latency.is_met is False


def test_a_tolerance_has_two_sides() -> None:
    def row(ratio: float) -> Row:
        return Row(
            claim="",
            unit="s",
            ours=ratio,
            peer=1.0,
            ratio=ratio,
            ratio_low=ratio,
            ratio_high=ratio,
            tolerance=0.1,
        )

    assert [row(ratio).is_met for ratio in (0.89, 0.91, 1.09, 1.11)] == [False, True, True, False]


def test_mixed_workloads_have_the_same_means_as_uniform_ones() -> None:
    workloads = standard_workloads(
        batches=[1, 8, 32], kinds=[str(kind) for kind in Kind], max_len=4096, quick=False
    )
    by_name = {workload.name: workload for workload in workloads}
    assert set(by_name) == {
        *("batch 1", "batch 8", "batch 32", "mixed 8", "mixed 32", "ttft", "prefill 2048")
    }
    for batch in (8, 32):
        mixed = by_name[f"mixed {batch}"]
        assert np.mean(mixed.prompt_lens) == pytest.approx(256, abs=0.5)
        assert np.mean(mixed.num_new_tokens) == pytest.approx(128, abs=0.5)
        assert len(set(mixed.prompt_lens)) == batch


def test_prompts_are_fresh_in_every_round_and_equal_for_every_engine() -> None:
    workload = standard_workloads(batches=[8], kinds=["uniform"], max_len=1024, quick=False)[0]
    first, counts = draw_prompts(workload, {"vocab_size": 2048}, 0, 0)
    again, _ = draw_prompts(workload, {"vocab_size": 2048}, 0, 0)
    later, _ = draw_prompts(workload, {"vocab_size": 2048}, 1, 0)
    assert first == again
    assert all(a[:16] != b[:16] for a, b in zip(first, later, strict=True))
    assert counts == [128] * 8
    assert min(map(min, first)) >= 3


def test_the_arithmetic_of_the_110m_shape() -> None:
    model = BenchModel(name="rand110", path=Path(), config=RAND110)
    per_layer = 4 * 768 * 768 + 3 * 768 * 2048
    assert model.num_linear_params == 12 * per_layer
    assert model.num_linear_params + model.num_head_params == 109_510_656
    assert model.kv_bytes_per_token("float32") == 2 * 12 * 768 * 4
    # One token attends to itself: 2 products of 768 multiply-adds in each layer.
    assert model.prefill_flop(1) == model.linear_flop(1) + 12 * 4 * 768
    assert model.decode_bytes(10, "bfloat16") == 2 * 109_510_656 + 10 * 36_864


def test_lost_points_and_rounds_that_only_one_side_has() -> None:
    measured = Measured()
    workloads = standard_workloads(batches=[1], kinds=["uniform"], max_len=4096, quick=False)
    measured.values["weft", "float32", "batch 1"] = {0: 10.0, 1: 20.0}
    measured.values["llama.cpp", "float32", "batch 1"] = {1: 40.0, 2: 1.0}
    model = BenchModel(name="rand110", path=Path(), config=RAND110)
    (row,) = model_rows(model, measured, workloads)
    assert row.ratio == 0.5
    assert row.is_met is False


def test_decode_share_counts_steps_after_the_first_token() -> None:
    measured = Measured()
    workloads = standard_workloads(batches=[1], kinds=["uniform", "ttft"], max_len=4096, quick=True)
    model = BenchModel(name="rand110", path=Path(), config=RAND110)
    step_s, ttft_s = 0.02, 0.5
    measured.values["weft", "float32", "batch 1"] = {0: 128 / (ttft_s + 127 * step_s)}
    measured.values["weft", "float32", "ttft"] = {0: ttft_s}
    measured.read_bytes_per_s[0] = 40e9
    rows = model_rows(model, measured, workloads)
    (share,) = [row for row in rows if "read bandwidth" in row.claim]
    assert share.ratio == pytest.approx(model.decode_bytes(320, "float32") / step_s / 40e9)


def test_a_peer_without_an_interpreter_is_named_with_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = next(engine for engine in ENGINES if engine.name == "vllm")
    monkeypatch.delenv("WEFT_PEER_VLLM", raising=False)
    with pytest.raises(LookupError, match="WEFT_PEER_VLLM"):
        find_interpreter(engine, {})
    with pytest.raises(LookupError, match="does not exist"):
        find_interpreter(engine, {"vllm": "/nowhere/python"})


def test_targets_are_those_of_the_project() -> None:
    workloads = standard_workloads(
        batches=[1, 8], kinds=["uniform", "mixed", "ttft"], max_len=1024, quick=False
    )
    by_name = {workload.name: workload for workload in workloads}
    assert target_ratio("embedded", "vllm", by_name["batch 1"]) == 2.0
    assert target_ratio("rand110", "vllm", by_name["ttft"]) == 1.0
    assert target_ratio("rand110", "transformers-cb", by_name["mixed 8"]) == 2.0
    assert target_ratio("rand110", "llama.cpp", by_name["batch 1"]) == 1.0
    assert target_ratio("rand110", "weft-nocompiler", by_name["batch 1"]) is None
    assert target_ratio("embedded", "onnxruntime-genai", by_name["batch 8"]) is None
