"""`weft simulate plan.json`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plan.plans import flat_cluster, stage_plan
from weft.base.errors import ConfigError
from weft.cli import simulate
from weft.cluster.cluster import Link
from weft.plan.deadlock import DeadlockError
from weft.plan.schedule import parse_schedule
from weft.plan.schedules import generate
from weft.plan.train_plan import PlanError

PLAN = stage_plan(
    [(0, 1), (0, 2), (1, 3), (2, 3)],
    4,
    batch_size=8,
    backward_s=2.0,
    saved_bytes=10,
    cluster=flat_cluster(4, Link(bandwidth_bytes_per_s=100.0, latency_s=0.01)),
)


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        simulate.main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_json_has_the_numbers_of_the_run(
    capsys: pytest.CaptureFixture[str], plan_file: str
) -> None:
    found = json.loads(run(capsys, plan_file, "--json", "--critical-path"))
    timeline = simulate.run(PLAN)
    assert found["simulated"] is True
    assert found["step_time_s"] == timeline.step_time_s
    assert found["peak_memory_bytes"] == timeline.peak_memory_bytes == 30
    assert found["depth"] == 3
    assert sum(found["critical_path_s"].values()) == pytest.approx(timeline.step_time_s)


def test_files_are_written(
    capsys: pytest.CaptureFixture[str], plan_file: str, tmp_path: Path
) -> None:
    names = ("chart.svg", "chart.png", "trace.json", "schedule.txt")
    paths = [str(tmp_path / name) for name in names]
    options = ("--svg", "--png", "--perfetto", "--schedule-out")
    out = run(capsys, plan_file, *(x for pair in zip(options, paths, strict=True) for x in pair))
    assert "F0" in out
    assert "step time" in out
    assert all(Path(path).stat().st_size > 500 for path in paths)
    assert parse_schedule(Path(paths[3]).read_text()) == generate(PLAN)


def test_schedules_by_name_and_from_a_file(
    capsys: pytest.CaptureFixture[str], plan_file: str, tmp_path: Path
) -> None:
    named = json.loads(run(capsys, plan_file, "--json", "--schedule", "gpipe"))
    path = tmp_path / "schedule.txt"
    path.write_text(generate(PLAN, "gpipe").to_text())
    assert json.loads(run(capsys, plan_file, "--json", "--schedule", str(path))) == named
    assert named["peak_memory_bytes"] == 80
    broken = path.read_text().replace("0F0 0F1", "0F1 0F0").replace("0F5 ", "", 1)
    path.write_text(broken.replace("3F0 ", "3F0 3B0 ", 1).replace(" 3B0", "", 2))
    with pytest.raises(ConfigError):
        simulate.main([plan_file, "--schedule", str(path)])
    with pytest.raises(ConfigError, match="neither a file nor one of gpipe"):
        simulate.main([plan_file, "--schedule", "zigzag"])


def test_a_schedule_that_would_hang_is_refused(plan_file: str, tmp_path: Path) -> None:
    text = generate(PLAN).to_text()
    text = text.replace("0F0 0F1 0F2 0B0", "0F0 0B0 0F1 0F2").replace("3F0 3B0 3F1", "3F0 3F1 3B0")
    path = tmp_path / "hangs.txt"
    path.write_text(text)
    with pytest.raises(DeadlockError, match="each of these waits for the next"):
        simulate.main([plan_file, "--schedule", str(path)])


def test_prices_of_another_cluster(
    capsys: pytest.CaptureFixture[str], plan_file: str, tmp_path: Path
) -> None:
    slow = flat_cluster(4, Link(bandwidth_bytes_per_s=10.0, latency_s=0.5))
    path = tmp_path / "slow.json"
    path.write_text(slow.to_json())
    plain = json.loads(run(capsys, plan_file, "--json"))
    priced = json.loads(run(capsys, plan_file, "--json", "--cluster", str(path)))
    assert priced["step_time_s"] == simulate.run(PLAN.replace(cluster=slow)).step_time_s
    assert priced["step_time_s"] > plain["step_time_s"]
    repaired = json.loads(run(capsys, plan_file, "--json", "--cluster", str(path), "--repair"))
    assert repaired["step_time_s"] < priced["step_time_s"]
    small = tmp_path / "small.json"
    small.write_text(flat_cluster(2).to_json())
    with pytest.raises(PlanError, match="device 3, but cluster"):
        simulate.main([plan_file, "--cluster", str(small)])
    with pytest.raises(PlanError, match="need the model"):
        simulate.main([plan_file, "--cluster", "summit-4"])
    with pytest.raises(ConfigError, match="add --model MODEL"):
        simulate.main([plan_file, "--profile", "p.json"])


def test_a_missing_plan_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read plan"):
        simulate.main([str(tmp_path / "none.json")])


def test_simulating_a_file_loads_no_torch(plan_file: str) -> None:
    code = (
        "import sys, weft.cli.simulate as s\n"
        f"try: s.main([{plan_file!r}, '--json'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_serving_goes_to_its_own_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Serving:
        main = staticmethod(seen.append)

    monkeypatch.setattr(simulate, "import_module", lambda name: Serving)
    simulate.main(["--trace", "t.csv", "--serve"])
    assert seen == [["--trace", "t.csv", "--serve"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan["stages"].clear(), "the plan has no stages"),
        (lambda plan: plan["stages"][0].update(devices=[999]), "runs on device 999"),
        (lambda plan: plan["stages"][0].update(ops=[]), "stage 0 has no operators"),
        (lambda plan: plan["stages"][0].update(k="2"), "stage 0: k is '2'"),
        (lambda plan: plan["stages"][0].update(all_reduce_s=float("nan")), "all_reduce_s is nan"),
        (lambda plan: plan.update(batch_size="x"), "batch_size is 'x'; it must be a whole number"),
        (
            lambda plan: plan["edges"].append(
                {
                    "source": 0,
                    "target": 99,
                    "forward_bytes_per_sample": 1,
                    "backward_bytes_per_sample": 1,
                }
            ),
            "99",
        ),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_refused(
    plan_file: str, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    data = json.loads(Path(plan_file).read_text())
    change(data)
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=re.escape(words)):
        simulate.main([str(edited)])


@pytest.mark.parametrize("option", ["--svg", "--perfetto", "--schedule-out"])
def test_files_that_cannot_be_written_are_refused_first(
    plan_file: str, tmp_path: Path, option: str
) -> None:
    with pytest.raises(ConfigError, match=f"{option} is .*, a directory"):
        simulate.main([plan_file, option, str(tmp_path)])
    with pytest.raises(ConfigError, match="there is no directory"):
        simulate.main([plan_file, option, str(tmp_path / "missing" / "file")])
