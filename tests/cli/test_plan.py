"""`weft plan MODEL`: the plan it writes, its table and JSON, constraints, exports, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from weft.base.errors import ConfigError
from weft.cli import plan as verb
from weft.cli.main import main as weft
from weft.cli.pricing import load_graph
from weft.graph.graph import Graph
from weft.plan.problem import InfeasiblePlanError
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.validate import validate_plan
from weft.sim.stage_executor import simulate

BRANCHED = ("case-study", "--option", "num_layers=2", "--option", "hidden=256")
CHAIN = ("gpt", "--option", "num_layers=4", "--option", "hidden=256", "--option", "vocab=512")
SUMMIT = ("--cluster", "summit-4", "--batch-size", "16", "--micro-batches", "1,2,4")
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


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test plans the same few models, and capturing one takes seconds."""
    monkeypatch.setattr(verb, "load_graph", _load_graph)


_GRAPHS: dict[str, Graph] = {}


def _load_graph(model: str, options: Mapping[str, Any]) -> Graph:
    key = f"{model} {sorted(options.items())}"
    if key not in _GRAPHS:
        _GRAPHS[key] = load_graph(model, options)
    return _GRAPHS[key]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        verb.main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> TrainPlan:
    out = tmp_path / "plan.json"
    run(capsys, *arguments, "--out", str(out))
    return TrainPlan.from_json(out.read_text())


def test_the_plan_is_written_and_its_row_is_what_the_simulator_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    found = json.loads(run(capsys, *BRANCHED, *SUMMIT, "--json", "--out", str(out)))
    assert found["simulated"] is True
    (row,) = found["rows"]
    assert set(row) == FIELDS
    plan = validate_plan(TrainPlan.from_json(out.read_text()))
    timeline = simulate(plan, contention=False)
    assert row["step_time_s"] == timeline.step_time_s == plan.step_time_s
    assert row["throughput_per_s"] == pytest.approx(16 / timeline.step_time_s)
    assert (row["num_stages"], row["depth"]) == (plan.num_stages, plan.depth)
    assert (plan.batch_size, plan.cluster.name, plan.method) == (16, "summit-4", "graphpipe")
    assert plan.micro_batch in (1, 2, 4)


def test_the_table_lists_every_stage_and_says_what_binds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    text = run(
        capsys,
        *(*BRANCHED, *SUMMIT, "--objective", "bottleneck", "--micro-batches", "1"),
        *("--out", str(out)),
    )
    plan = TrainPlan.from_json(out.read_text())
    assert plan.objective == "bottleneck"
    assert plan.num_stages > 1
    for stage in plan.stages:
        assert stage.ops[0][:12] in text
    assert "sets the rate" in text
    assert "(simulated)" in text


def test_options_reach_the_planner(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = planned(
        capsys,
        tmp_path,
        *(*BRANCHED, *SUMMIT, "--method", "spp", "--training", "adam-fp32", "--k", "2"),
        *("--objective", "bottleneck", "--time-limit", "60"),
    )
    assert (found.method, found.training.name) == ("spp", "adam-fp32")
    assert {stage.k for stage in found.stages} == {2}
    assert found.training.state_bytes_per_param == 16


def test_constraints_come_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ops = run(capsys, *BRANCHED, *SUMMIT, "--list-ops").split()
    assert json.loads(run(capsys, *BRANCHED, *SUMMIT, "--list-ops", "--json"))["rows"] == [
        {"op": op} for op in ops
    ]
    wanted = tmp_path / "constraints.json"
    wanted.write_text(
        json.dumps(
            [
                {"kind": "pin", "ops": [ops[0]], "devices": [3]},
                {"kind": "force-cut", "source": ops[0], "target": ops[1]},
                {"kind": "fixed-stage", "ops": [ops[-1]], "num_devices": 1},
            ]
        )
    )
    found = planned(capsys, tmp_path, *BRANCHED, *SUMMIT, "--constraints", str(wanted))
    assert found.stages[found.stage_of[ops[0]]].devices == (3,)
    assert found.stage_of[ops[0]] != found.stage_of[ops[1]]
    last = found.stages[found.stage_of[ops[-1]]]
    assert (last.ops, last.num_devices) == ((ops[-1],), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("{}", "a list of objects"),
        ('[{"kind": "glue", "ops": ["a"]}]', "keep-together"),
        ('[{"kind": "pin", "op": "a"}]', "ops, devices, node"),
        ('[{"kind": "keep-together", "ops": ["nowhere", "a"]}]', "nowhere.*--list-ops"),
    ],
)
def test_a_wrong_constraint_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "constraints.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        verb.main([*BRANCHED, *SUMMIT, "--constraints", str(path)])


def test_a_chain_is_exported_for_other_runtimes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (*CHAIN, *SUMMIT, "--objective", "bottleneck", "--method", "spp")
    plan = planned(capsys, tmp_path, *arguments)
    parts = json.loads(run(capsys, *arguments, "--export", "torchtitan"))
    assert len(parts) > 1
    names = [name for part in parts for name in part]
    assert sorted(names) == ["head", *(f"layers.{i}" for i in range(4)), "norm", "tokens"]
    layout = run(capsys, *arguments, "--export", "megatron").strip()
    assert sum(int(count or 1) for count in re.findall(r"t(?:\*(\d+))?", layout)) == 4
    assert layout.startswith("E")
    assert layout.endswith("L")
    rows = run(capsys, *arguments, "--export", "torch-csv").splitlines()
    assert len(rows) == plan.num_stages
    assert "0F0" in rows[0].split(",")


def test_a_branched_plan_is_not_exported_as_a_chain() -> None:
    with pytest.raises(PlanError, match="runs chains of stages"):
        verb.main(
            [
                *(*BRANCHED, *SUMMIT, "--micro-batches", "1", "--objective", "bottleneck"),
                *("--export", "megatron"),
            ]
        )


def test_what_changed_against_another_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = tmp_path / "plan.json"
    run(capsys, *BRANCHED, *SUMMIT, "--method", "spp", "--out", str(old))
    same = run(capsys, *BRANCHED, *SUMMIT, "--method", "spp", "--against", str(old))
    assert same.strip() == ""
    other = run(capsys, *BRANCHED, *SUMMIT, "--method", "data-parallel", "--against", str(old))
    assert "method: spp -> data-parallel" in other


def test_stages_of_a_plan_are_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = (*BRANCHED, *SUMMIT, "--objective", "bottleneck", "--micro-batches", "1")
    old = planned(capsys, tmp_path, *options)
    (tmp_path / "old.json").write_text(old.to_json())
    assert old.num_stages > 1
    kept = planned(capsys, tmp_path, *BRANCHED, *SUMMIT, "--freeze", f"{tmp_path}/old.json:0")
    stage = kept.stages[kept.stage_of[old.stages[0].ops[0]]]
    assert (stage.ops, stage.devices) == (old.stages[0].ops, old.stages[0].devices)
    whole = planned(capsys, tmp_path, *options, "--freeze", f"{tmp_path}/old.json")
    assert {s.ops for s in whole.stages} == {s.ops for s in old.stages}
    for numbers, words in (("9", "has stages 0 to"), ("x", "plan.json:0,2")):
        with pytest.raises(ConfigError, match=words):
            verb.main([*options, "--freeze", f"{tmp_path}/old.json:{numbers}"])


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InfeasiblePlanError, match="bytes more memory on every device"):
        verb.main(
            [
                *("case-study", "--option", "hidden=16384", "--option", "num_layers=8"),
                *("--cluster", "summit-2", "--batch-size", "4", "--objective", "bottleneck"),
            ]
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mmtt", *SUMMIT), "'mmt'"),
        ((*BRANCHED, "--cluster", "sumit-4"), "summit"),
        ((*BRANCHED, *SUMMIT, "--method", "graph"), "'graphpipe'"),
        ((*BRANCHED, *SUMMIT, "--training", "sgd"), "sgd-fp32"),
        ((*BRANCHED, *SUMMIT, "--micro-batches", "a"), "whole numbers"),
        ((*BRANCHED, *SUMMIT, "--micro-batches", "3"), "nearest that does is 2"),
        ((*BRANCHED, *SUMMIT, "--against", "nowhere.json"), "nowhere.json"),
        ((*BRANCHED, *SUMMIT, "--constraints", "nowhere.json"), "nowhere.json"),
        ((*BRANCHED, *SUMMIT, "--out", "."), "a directory"),
        ((*BRANCHED, *SUMMIT, "--out", "nowhere/plan.json"), "there is no directory"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        weft(["plan", *arguments])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("weft plan: ")
    assert words in text


def test_a_missing_cluster_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        weft(["plan", *BRANCHED])
    assert caught.value.code == 2
    assert "--cluster" in capsys.readouterr().err
