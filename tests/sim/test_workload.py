"""Trace readers and the transformations of a workload."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weft.base.errors import ConfigError
from weft.sim.trace_readers import TraceFormat, read_trace
from weft.sim.workload import LengthRange, Workload, draw_arrivals, synthetic

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:16:46.6805900,879,0
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 9]}

{"timestamp": 3000, "input_length": 700, "output_length": 9, "hash_ids": [4, 1]}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_azure_rows_are_sorted_start_at_zero_and_leave_out_failures(tmp_path: Path) -> None:
    workload = read_trace(written(tmp_path, AZURE))
    assert workload.arrival_s.tolist() == pytest.approx([0.0, 4.314579], abs=1e-6)
    assert workload.num_prompt_tokens.tolist() == [374, 396]
    assert workload.num_output_tokens.tolist() == [44, 109]
    assert workload.num_skipped == 1
    assert workload.block_ids is None


def test_azure_2024_timestamps_carry_a_zone(tmp_path: Path) -> None:
    text = (
        AZURE.splitlines()[0] + "\n2024-05-10 00:00:00.5+00:00,1,2\n2024-05-10 01:00:02+01:00,3,4\n"
    )
    assert read_trace(written(tmp_path, text)).arrival_s.tolist() == [0.0, 1.5]


def test_burstgpt(tmp_path: Path) -> None:
    workload = read_trace(written(tmp_path, BURSTGPT))
    assert workload.arrival_s.tolist() == [0.0, 40.5]
    assert workload.num_prompt_tokens.tolist() == [472, 1087]
    assert workload.num_output_tokens.tolist() == [18, 230]


def test_mooncake_prompts_share_exactly_the_tokens_of_shared_blocks(tmp_path: Path) -> None:
    workload = read_trace(written(tmp_path, MOONCAKE))
    assert workload.arrival_s.tolist() == [0.0, 3.0, 3.0]
    first, second, third = (workload.prompt_token_ids(i, 50_000) for i in range(3))
    assert [len(first), len(second), len(third)] == [1200, 1100, 700]
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:]
    # Block 1 again, but only the 188 tokens of it that fit.
    assert third[512:] == first[512:700]
    assert third[:512] != first[:512]
    assert max(first) < 50_000
    assert first == workload.prompt_token_ids(0, 50_000)


def test_blocks_scale_with_the_prompts_so_that_sharing_stays(tmp_path: Path) -> None:
    small = read_trace(written(tmp_path, MOONCAKE)).with_lengths_scaled(prompt_factor=1 / 16)
    assert small.block_tokens == 32
    assert small.num_prompt_tokens.tolist() == [75, 69, 44]
    first, second = (small.prompt_token_ids(i, 2048) for i in range(2))
    assert first[:64] == second[:64]
    assert first[64:69] != second[64:]


def test_a_prompt_longer_than_its_blocks_goes_on_with_tokens_of_its_own(tmp_path: Path) -> None:
    workload = read_trace(written(tmp_path, MOONCAKE)).with_lengths_scaled(
        prompt_range=LengthRange(low=1600, high=1600)
    )
    first, second = (workload.prompt_token_ids(i, 2048) for i in range(2))
    assert len(first) == len(second) == 1600
    assert first[:1024] == second[:1024]
    assert first[1536:] != second[1536:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no known trace"),
        ("a,b\n1,2\n", "no known trace"),
        (AZURE.splitlines()[0], "holds no request"),
        (AZURE + "2023-11-16,1\n", "line 5: 2 columns"),
        (AZURE + "yesterday,1,2\n", "line 5: TIMESTAMP is 'yesterday'"),
        (AZURE + "2023-11-16 18:15:46,-3,2\n", "line 5: ContextTokens is '-3'"),
        (AZURE + "2023-11-16 18:15:46,3,2.5\n", "line 5: GeneratedTokens is '2.5'"),
        (AZURE + "2023-11-16 18:15:46,3,nan\n", "line 5: GeneratedTokens is 'nan'"),
        (AZURE + "2023-11-16 18:15:46,3,inf\n", "line 5: GeneratedTokens is 'inf'"),
        (BURSTGPT + "soon,m,1,2,3,log\n", "line 4: timestamp is 'soon'"),
        (BURSTGPT + "7,m,x,2,3,log\n", "line 4: Request tokens is 'x'"),
        (MOONCAKE + "{oops\n", "line 5: not JSON"),
        (MOONCAKE + "[1]\n", "line 5: list where an object"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 5: 'hash_ids' is missing"),
        (
            MOONCAKE + '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": "x"}\n',
            "line 5: hash_ids must be",
        ),
        (
            MOONCAKE + '{"timestamp": 1, "input_length": true, "output_length": 1, "hash_ids": []}',
            "line 5: input_length is True",
        ),
    ],
)
def test_bad_traces_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(written(tmp_path, text))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "binary")


def test_a_format_can_be_forced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        read_trace(written(tmp_path, AZURE), TraceFormat.MOONCAKE)


# ---- transformations ----


def columns(arrival_s: list[float], prompt: list[int], output: list[int]) -> Workload:
    return Workload(
        name="w",
        arrival_s=np.array(arrival_s),
        num_prompt_tokens=np.array(prompt),
        num_output_tokens=np.array(output),
    )


def test_rates_scale_and_bursts_stay() -> None:
    workload = columns([1.0, 1.0, 5.0], [1, 2, 3], [1, 1, 1])
    assert workload.rate_per_s == 0.5
    assert workload.with_rate_scaled(2).arrival_s.tolist() == [0.0, 0.0, 2.0]
    assert workload.with_rate(4).arrival_s.tolist() == [0.0, 0.0, 0.5]
    assert workload.with_rate(4).rate_per_s == pytest.approx(4)
    assert workload.first(2).num_prompt_tokens.tolist() == [1, 2]
    assert len(workload.first(99)) == 3


def test_lengths_scale_round_and_clip() -> None:
    workload = columns([0.0, 1.0, 2.0], [100, 1000, 10], [10, 100, 1])
    scaled = workload.with_mean_prompt(
        37, prompt_range=LengthRange(low=4, high=50), output_range=LengthRange(low=2, high=8)
    )
    assert scaled.num_prompt_tokens.tolist() == [10, 50, 4]
    assert scaled.num_output_tokens.tolist() == [2, 8, 2]
    assert workload.with_lengths_scaled(output_factor=0.01).num_output_tokens.tolist() == [1, 1, 1]


def test_drawn_arrivals_have_their_rate_and_burstiness_and_depend_on_the_seed() -> None:
    poisson = np.diff(draw_arrivals(20_001, 5.0, seed=1))
    assert poisson.mean() == pytest.approx(0.2, rel=0.03)
    assert poisson.std() / poisson.mean() == pytest.approx(1.0, rel=0.05)
    bursty = np.diff(draw_arrivals(20_001, 5.0, burstiness=0.25, seed=1))
    assert bursty.mean() == pytest.approx(0.2, rel=0.05)
    assert bursty.std() / bursty.mean() == pytest.approx(2.0, rel=0.05)
    assert (draw_arrivals(50, 5.0, seed=1) == draw_arrivals(50, 5.0, seed=1)).all()
    assert (draw_arrivals(50, 5.0, seed=1) != draw_arrivals(50, 5.0, seed=2))[1:].all()
    assert len(draw_arrivals(0, 1.0)) == 0


def test_a_request_carries_its_lengths_and_ignores_eos() -> None:
    request = synthetic(3, 1.0, num_prompt_tokens=7, num_output_tokens=9).request(2, 100)
    assert request.id == "2"
    assert len(request.prompt_token_ids) == 7
    assert request.sampling.max_tokens == 9
    assert request.sampling.ignore_eos
    other = synthetic(3, 1.0, num_prompt_tokens=7, num_output_tokens=9).request(1, 100)
    assert other.prompt_token_ids != request.prompt_token_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: columns([1.0, 0.0], [1, 1], [1, 1]), "must not decrease"),
        (lambda: columns([0.0], [1, 1], [1]), "equally long"),
        (lambda: columns([0.0, 1.0], [1, 0], [1, 1]), "num_prompt_tokens of request 1 is 0"),
        (lambda: columns([0.0], [1], [1]).with_rate(3), "no mean rate"),
        (lambda: columns([0.0], [1], [1]).with_rate_scaled(0), "rate scale is 0"),
        (lambda: columns([0.0], [1], [1]).with_lengths_scaled(prompt_factor=-1), "prompt length"),
        (lambda: columns([0.0], [1], [1]).first(0), "num_requests is 0"),
        (lambda: LengthRange(low=5, high=4), "5..4"),
        (lambda: draw_arrivals(3, 0.0), "rate_per_s is 0"),
        (lambda: draw_arrivals(3, 1.0, burstiness=float("nan")), "burstiness is nan"),
    ],
)
def test_impossible_workloads_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
