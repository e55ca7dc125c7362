"""Ranks killed in the middle of everything: the loss curve is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.kills import KINDS
from train.small import chain_plan, model
from weft.train.run_dir import read_metrics

TESTS = Path(__file__).resolve().parents[1]
EVERY = 3
"""Steps between checkpoints."""
NUM_KILLS = 15
"""Of each plan; two plans make thirty."""
PLANS: dict[str, dict[str, int]] = {
    "chain": {"num_stages": 2},
    "replicas": {"num_stages": 1, "dp": 2},
}


def kills_of(num_kills: int, first_kind: int) -> list[dict[str, Any]]:
    """Kinds in turn, on either rank, two steps further each time."""
    found: list[dict[str, Any]] = []
    for i in range(num_kills):
        kind = KINDS[(i + first_kind) % len(KINDS)]
        # Rank 0 alone gives a checkpoint its name.
        rank = 0 if kind == "publish" else (i // 2) % 2
        found.append({"kind": kind, "rank": rank, "step": EVERY + 1 + 2 * i})
    return found


def train(directory: Path, plan: Path, kills: list[dict[str, Any]], num_steps: int) -> None:
    """One launch; torchrun's agent brings the ranks back after every kill."""
    directory.mkdir()
    (directory / "kills.json").write_text(json.dumps(kills))
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "weft", "train", str(plan), "--module", "train.kills:model"),
            *("--data", "train.kills:data", "--run-dir", str(directory / "run")),
            *("--steps", str(num_steps), "--checkpoint-every", str(EVERY)),
            *("--max-restarts", str(len(kills)), "--timeout-s", "60"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "WEFT_TEST_KILLS": str(directory),
        },
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stderr


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows}


def check_kills(tmp_path: Path, plan_name: str, num_kills: int, first_kind: int = 0) -> None:
    """Every life's losses are the undisturbed ones, from the last whole checkpoint on."""
    plan = tmp_path / "plan.json"
    plan.write_text(chain_plan(model().trace(), **PLANS[plan_name]).to_json())
    kills = kills_of(num_kills, first_kind)
    num_steps = kills[-1]["step"] + 2 * EVERY
    train(tmp_path / "quiet", plan, [], num_steps)
    train(tmp_path / "killed", plan, kills, num_steps)
    wanted = losses(read_metrics(tmp_path / "quiet" / "run" / "metrics.jsonl"))
    assert sorted(wanted) == list(range(1, num_steps + 1))

    text = (tmp_path / "killed" / "deaths.jsonl").read_text()
    deaths = [json.loads(line) for line in text.splitlines()]
    assert [death["kind"] for death in deaths] == [kill["kind"] for kill in kills]
    for attempt in range(num_kills + 1):
        rows = losses(read_metrics(tmp_path / "killed" / f"attempt-{attempt}.jsonl"))
        assert rows == {step: wanted[step] for step in rows}, f"life {attempt}"
        if attempt:
            death, first = deaths[attempt - 1], min(rows) - 1
            assert death["newest"] <= first <= death["newest"] + EVERY
            assert death["step"] - first <= 2 * EVERY
    whole = losses(read_metrics(tmp_path / "killed" / "run" / "metrics.jsonl"))
    assert whole == wanted


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first_kind", [0, 2])
@pytest.mark.parametrize("plan_name", PLANS)
def test_killed_ranks_lose_nothing_but_the_steps_since_the_last_save(
    tmp_path: Path, plan_name: str, first_kind: int
) -> None:
    check_kills(tmp_path, plan_name, NUM_KILLS // 2 + first_kind // 2, first_kind)
