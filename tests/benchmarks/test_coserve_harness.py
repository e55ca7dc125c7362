"""The co-serving benchmark's own machinery: what it remembers, resumes, merges and computes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from coserve import (  # noqa: E402
    capacity_search,
    cell_workload,
    earlier_cells,
    merged,
    run_before,
)
from coserve_bench.cells import COSERVE, INFERENCE, Outcome, as_data, cell_rows  # noqa: E402
from coserve_bench.state import ServerState  # noqa: E402
from rows import single  # noqa: E402

from weft.sim.workload import synthetic  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # Other tests have a `plan` of their own.


def outcome(policy: str, *, tokens_per_s: float = 0.0, busy_share: float = 0.5) -> Outcome:
    return Outcome(
        policy=policy,
        attainment=1.0,
        finetune_tokens_per_s=tokens_per_s,
        busy_share=busy_share,
        tpot_p50_s=None,
        tpot_p99_s=None,
        itl_p99_s=None,
        ttft_p99_s=None,
        throughput_tokens_per_s=1.0,
        num_requests=100,
    )


def cell(*outcomes: Outcome, rate_per_s: float = 2.0) -> dict[str, Any]:
    return {
        "server": "s",
        "simulated": False,
        "dtype": "float32",
        "load": "light",
        "rate_per_s": rate_per_s,
        "capacity_per_s": rate_per_s / 0.3,
        "finetune_only_tokens_per_s": 100.0,
        "outcomes": as_data(outcomes),
    }


def write(path: Path, *cells: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"rows": [], "cells": cells}))
    return path


def test_a_row_of_one_round_favours_the_better_side_whichever_way_it_counts() -> None:
    faster = single("c", "tokens/s", 3.0, 2.0, target=1.5)
    assert (faster.ratio_low, faster.ratio, faster.ratio_high) == (1.5, 1.5, 1.5)
    assert faster.is_met
    smaller = single("c", "MB", 2.0, 3.0, lower_is_better=True, tolerance=0.1)
    assert smaller.ratio == 1.5
    assert smaller.is_met is False


def test_state_keeps_every_capacity_by_how_it_was_found_until_the_profile_changes(
    tmp_path: Path,
) -> None:
    profile, path = tmp_path / "profile.json", tmp_path / "state.json"
    profile.write_text("one")
    state = ServerState.read(path, "s", profile)
    state.capacities_per_s |= {"real, 200 requests": 3.0, "simulated": 2.0}
    state.finetune_only_tokens_per_s = 7.0
    state.write()
    ServerState.read(path, "another", profile).write()
    again = ServerState.read(path, "s", profile)
    assert again.capacities_per_s == {"real, 200 requests": 3.0, "simulated": 2.0}
    assert again.finetune_only_tokens_per_s == 7.0
    profile.write_text("two")
    assert ServerState.read(path, "s", profile).capacities_per_s == {}


def test_ways_to_find_a_capacity_are_told_apart() -> None:
    def how(**changed: Any) -> str:
        options = {"capacity": None, "capacity_search": "simulated", "capacity_requests": 1000}
        return capacity_search(argparse.Namespace(**options | changed))

    ways = {
        how(),
        how(capacity=2.0),
        how(capacity_search="real"),
        how(capacity_requests=200),
    }
    assert len(ways) == 4


def test_a_cell_takes_the_first_requests_that_there_is_time_for() -> None:
    whole = synthetic(100, 1.0, num_prompt_tokens=8, num_output_tokens=4)

    def count(cell_time_s: float | None) -> int:
        workload = cell_workload(argparse.Namespace(cell_time_s=cell_time_s), whole, 2.0)
        assert workload.rate_per_s == pytest.approx(2.0)
        return len(workload)

    assert (count(None), count(10.0), count(1000.0)) == (100, 20, 100)


def test_an_interrupted_command_goes_on_behind_what_it_wrote(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", cell(outcome(INFERENCE)))
    options = argparse.Namespace(resume=True, json=path)
    earlier = earlier_cells(options)
    assert run_before(earlier, cell(), INFERENCE, 100) == outcome(INFERENCE)
    assert run_before(earlier, cell(), COSERVE, 100) is None
    assert run_before(earlier, cell(), INFERENCE, 1000) is None
    assert run_before(earlier, cell(rate_per_s=3.0), INFERENCE, 100) is None
    assert earlier_cells(argparse.Namespace(resume=False, json=path)) == []


def test_merging_joins_the_outcomes_of_one_rate_only(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", cell(outcome(INFERENCE)))
    second = write(tmp_path / "b.json", cell(outcome(COSERVE, tokens_per_s=40.0)))
    _, (whole,) = merged([first, second])
    assert [o["policy"] for o in whole["outcomes"]] == [INFERENCE, COSERVE]
    kept = cell_rows(whole)[0]
    assert (kept.ours, kept.peer) == (40.0, 50.0)
    other = write(tmp_path / "c.json", cell(outcome(COSERVE), rate_per_s=3.0))
    with pytest.raises(SystemExit, match="share a rate"):
        merged([first, other])
