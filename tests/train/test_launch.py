"""`weft train` on real processes: launch, dead ranks, failures that name rank and reason."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from train.small import chain_plan, data, model
from weft.base.errors import ConfigError, ModelLoadError
from weft.plan.train_plan import PlanError
from weft.runtime.stage_executor import NonFiniteLossError
from weft.runtime.transport import PeerTimeoutError
from weft.train.config import TrainConfig
from weft.train.launch import is_final, launch
from weft.train.run_dir import read_metrics
from weft.train.trainer import Trainer

TESTS = Path(__file__).resolve().parents[1]
SLOW = ("--data-option", "slow_s=0.02")
"""Steps that last long enough for a signal to land between them."""


def command(tmp_path: Path, *arguments: str, num_stages: int = 2) -> list[str]:
    plan = tmp_path / "plan.json"
    if not plan.exists():
        plan.write_text(chain_plan(model().trace(), num_stages).to_json())
    return [
        *(sys.executable, "-m", "weft", "train", str(plan), "--module", "train.small:model"),
        *("--data", "train.small:data", "--run-dir", str(tmp_path / "run"), *arguments),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def run(tmp_path: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tmp_path, *arguments, **options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def losses(tmp_path: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]


def test_two_ranks_train_and_a_killed_one_is_brought_back(tmp_path: Path) -> None:
    """The loss curve of a run with a killed rank is that of an undisturbed one."""
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    ended = run(quiet, "--steps", "40", "--checkpoint-every", "5")
    assert ended.returncode == 0, ended.stderr
    assert "40 steps, loss" in ended.stdout
    assert len(losses(quiet)) == 40

    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    process = subprocess.Popen(
        command(disturbed, *SLOW, "--steps", "40", "--checkpoint-every", "5"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    victim = wait_for_rank([process], disturbed, rank=1, num_steps=12)
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "40 steps, loss" in out
    log = (disturbed / "run" / "logs" / "rank-0.log").read_text()
    assert "resuming from step-" in log  # it was interrupted, and came back
    assert losses(disturbed) == losses(quiet)
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == "zombie"


def wait_for_rank(
    launchers: Sequence[subprocess.Popen[str]], where: Path, *, rank: int, num_steps: int
) -> int:
    """The process id of a rank, once the run has done so many steps."""
    deadline_s = time.monotonic() + 200
    metrics = where / "run" / "metrics.jsonl"
    while time.monotonic() < deadline_s and all(one.poll() is None for one in launchers):
        if metrics.exists() and len(read_metrics(metrics)) >= num_steps:
            for launcher in launchers:
                for child in psutil.Process(launcher.pid).children(recursive=True):
                    try:
                        if child.environ().get("RANK") == str(rank):
                            return child.pid
                    except psutil.Error:
                        continue
        time.sleep(0.02)
    raise AssertionError("the run ended, or never came so far")


def assert_ended_for_good(ended: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    """It failed without a trace on the terminal, no restart was used up, and nobody is left."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    noted = (tmp_path / "run" / "logs" / "failures").glob("rank-*.json")
    entries = [json.loads(file.read_text()) for file in noted]
    assert entries
    assert {entry["attempt"] for entry in entries} == {0}
    assert no_orphans(tmp_path)


def test_a_loss_that_is_not_finite_ends_every_rank_with_its_reason(tmp_path: Path) -> None:
    ended = run(tmp_path, "--steps", "9", "--data-option", "poison=5", "--no-shuffle")
    assert "is not finite on rank" in ended.stderr
    assert_ended_for_good(ended, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data-option", "num_samples=4"), "the data holds 4 samples"),
        (("--option", "width=12"), "is for graph"),
        (("--option", "depth=3"), "TypeError: model() got an unexpected keyword"),
        (("--data", "train.small:nothing"), "cannot be imported"),
    ],
)
def test_what_would_fail_again_uses_up_no_restart(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = run(tmp_path, "--steps", "9", *arguments)
    assert message in ended.stderr
    assert_ended_for_good(ended, tmp_path)


@pytest.mark.long
def test_a_checkpoint_of_another_model_ends_every_rank(tmp_path: Path) -> None:
    other = model(width=10)
    capture = other.trace()
    Trainer(
        plan=chain_plan(capture, 2),
        model=other,
        data=data(),
        config=TrainConfig(num_steps=1, run_dir=tmp_path / "run"),
        capture=capture,
    ).run()
    ended = run(tmp_path, "--steps", "9")
    assert "another model: parameter" in ended.stderr
    assert_ended_for_good(ended, tmp_path)


def test_only_failures_that_come_again_are_final() -> None:
    for error in (
        PlanError("x"),
        ConfigError("x"),
        ModelLoadError("x"),
        NonFiniteLossError("x"),
        TypeError("x"),
        ModuleNotFoundError("x"),
    ):
        assert is_final(error), error
    for error in (
        PeerTimeoutError("rank 1 hangs"),
        RuntimeError("Connection closed by peer"),
        torch.distributed.DistNetworkError("reset"),
        OSError("no route to host"),
    ):
        assert not is_final(error), error


def test_a_run_directory_that_cannot_be_written_starts_no_rank(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written"):
        launch([], num_ranks=2, max_restarts=3, run_dir=tmp_path / "run")


def test_a_world_of_another_size_is_refused_by_every_rank(tmp_path: Path) -> None:
    """As torchrun would start it, without our launcher: the rank says why itself."""
    ended = subprocess.run(
        command(tmp_path, "--steps", "1"),
        env={**environment(), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "weft train: rank 0: the plan runs on 2 devices, but torchrun started 3 ranks; start 2"
    )


def no_orphans(tmp_path: Path) -> bool:
    """Whether no process of this test's run is left; other workers' runs are theirs."""
    return not [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(tmp_path) in part for part in process.info["cmdline"] or [])
        and process.status() != psutil.STATUS_ZOMBIE
    ]


def test_sigterm_to_the_launcher_checkpoints_and_leaves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, *SLOW, "--steps", "100000"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rank([process], tmp_path, rank=0, num_steps=3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    done = json.loads((checkpoint / "train.json").read_text())["num_steps"]
    assert done >= 3
    assert len(losses(tmp_path)) == done
    assert no_orphans(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "num_steps is 0; it must be at least 1"),
        (("--steps", "2", "--lr", "-1"), "the learning rate is -1.0"),
    ],
)
def test_settings_are_refused_before_any_rank_starts(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = run(tmp_path, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_plans_are_told_at_start(tmp_path: Path) -> None:
    """Each rank of a multi-node run reads its own plan file: they may differ."""
    told = "rank 1 was started with another plan than rank 0"
    first = command(tmp_path, "--steps", "2")
    other = tmp_path / "other.json"
    other.write_text(chain_plan(model().trace(), 2, batch_size=16).to_json())
    second = [argument.replace("plan.json", "other.json") for argument in first]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            arguments,
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate((first, second))
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert told in said[0]  # nobody launched them that could say it
    noted = tmp_path / "run" / "logs" / "failures" / "rank-0.json"
    assert told in noted.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
