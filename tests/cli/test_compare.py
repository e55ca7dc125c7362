"""`weft compare`: rows of every method, and what it refuses."""

from __future__ import annotations

import json

import pytest

from weft.base.errors import ConfigError
from weft.cli import compare

SMALL = (
    *("case-study", "--option", "num_layers=2", "--option", "hidden=256"),
    *("--cluster", "summit-4", "--batch-size", "16", "--micro-batches", "2,4"),
)
FIELDS = {
    "method",
    "search_time_s",
    "step_time_s",
    "bottleneck_s",
    "throughput_per_s",
    "bubble_fraction",
    "peak_memory_bytes",
    "num_stages",
    "depth",
    "micro_batch",
    "reason",
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        compare.main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict]:
    found = json.loads(run(capsys, *arguments, "--json"))
    assert found["simulated"] is True
    assert all(set(row) == FIELDS for row in found["rows"])
    return {row["method"]: row for row in found["rows"]}


def test_every_method_gets_a_row_and_graphpipe_is_never_slower(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = rows(capsys, *SMALL, "--methods", "graphpipe,spp,pipedream,data-parallel")
    assert list(found) == ["graphpipe", "spp", "pipedream", "data-parallel"]
    times = {name: row["step_time_s"] for name, row in found.items() if row["step_time_s"]}
    assert times["graphpipe"] <= min(times.values()) * (1 + 1e-12)
    row = found["graphpipe"]
    assert row["throughput_per_s"] == pytest.approx(16 / row["step_time_s"])
    assert row["micro_batch"] in (2, 4)
    assert 0 <= row["bubble_fraction"] < 1
    assert row["peak_memory_bytes"] <= 16 * 2**30


def test_a_method_without_a_plan_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(
        capsys,
        *("candle-uno", "--cluster", "summit-4", "--batch-size", "16"),
        *("--methods", "piper,spp", "--objective", "bottleneck", "--micro-batches", "4"),
    )
    assert found["piper"]["step_time_s"] is None
    assert "40,000" in found["piper"]["reason"]
    assert found["spp"]["reason"] == ""


def test_the_table_names_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(run(capsys, *SMALL, "--methods", "spp").split())
    assert "batch 16, on summit-4" in out
    assert "(simulated)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", ""), "--methods names no method; known: "),
        (("--methods", "magic"), "method 'magic' is unknown; known: "),
        (("--training", "none"), "--training is 'none'; known: sgd-fp32"),
        (("--micro-batches", "a,b"), "whole numbers separated by commas"),
    ],
)
def test_bad_options_are_refused_with_the_valid_ones(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.main(["case-study", "--cluster", "summit-4", *arguments])
