"""Two torchrun agents on one machine, as on two: the commands of docs/guides/training.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.small import chain_plan, model
from train.test_launch import SLOW, environment, free_port, losses, no_orphans, wait_for_rank

pytestmark = pytest.mark.long
RENDEZVOUS = ("c10d", "static")


def agents(tmp_path: Path, how: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """One agent a machine, each with one rank of the plan's two."""
    plan = tmp_path / "plan.json"
    plan.write_text(chain_plan(model().trace(), 2).to_json())
    port = str(free_port())
    started: list[subprocess.Popen[str]] = []
    for node in range(2):
        meet = (
            ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run-1")
            if how == "c10d"
            else ("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port)
        )
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", *meet, "--max-restarts", "2", "-m", "weft", "train"),
            *(str(plan), "--module", "train.small:model", "--data", "train.small:data"),
            *("--run-dir", str(tmp_path / "run"), *arguments),
        ]
        started.append(
            subprocess.Popen(
                command,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def ended(started: list[subprocess.Popen[str]]) -> tuple[list[int], str, str]:
    """Exit codes, and what both printed."""
    said = [process.communicate(timeout=240) for process in started]
    codes = [process.returncode for process in started]
    return codes, "".join(out for out, _ in said), "".join(err for _, err in said)


@pytest.mark.parametrize("how", RENDEZVOUS)
def test_two_agents_train_one_plan(tmp_path: Path, how: str) -> None:
    codes, out, err = ended(agents(tmp_path, how, "--steps", "6"))
    assert codes == [0, 0], err
    assert "6 steps, loss" in out
    assert len(losses(tmp_path)) == 6
    for rank in range(2):  # rank r runs the r-th device, which holds stage r
        log = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert f"stage {rank}: " in log


def test_both_agents_restart_after_a_kill_on_one(tmp_path: Path) -> None:
    started = agents(tmp_path, "c10d", *SLOW, "--steps", "40", "--checkpoint-every", "5")
    victim = wait_for_rank(started, tmp_path, rank=1, num_steps=12)
    os.kill(victim, signal.SIGKILL)
    codes, out, err = ended(started)
    assert codes == [0, 0], err
    assert "40 steps, loss" in out
    assert "resuming from step-" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert len(losses(tmp_path)) == 40


@pytest.mark.parametrize("how", RENDEZVOUS)
def test_a_failure_that_comes_again_ends_both_agents(tmp_path: Path, how: str) -> None:
    started = agents(tmp_path, how, "--steps", "9", "--data-option", "poison=5", "--no-shuffle")
    codes, _, err = ended(started)
    assert all(code != 0 for code in codes)
    assert "weft train: rank" in err
    assert "is not finite on rank" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # the first loss stops it
    assert no_orphans(tmp_path)
