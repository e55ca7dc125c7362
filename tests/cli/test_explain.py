"""`weft explain plan.json`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plan.plans import flat_cluster, stage_plan
from weft.base.errors import ConfigError
from weft.cli import explain
from weft.plan.train_plan import PlanError

PLAN = stage_plan(
    [(0, 1), (0, 2), (1, 3), (2, 3)],
    4,
    batch_size=8,
    forward_s=[1.0, 1.0, 3.0, 1.0],
    backward_s=2.0,
    saved_bytes=100,
    cluster=flat_cluster(4, memory_bytes=1000),
)


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        explain.main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_words_and_the_table_name_the_slowest_stage(
    capsys: pytest.CaptureFixture[str], plan_file: str
) -> None:
    text = run(capsys, plan_file)
    assert "stage 2 (op2)" in text
    assert "2 *" in text


def test_json_has_a_row_for_every_stage(capsys: pytest.CaptureFixture[str], plan_file: str) -> None:
    found = json.loads(run(capsys, plan_file, "--json"))
    assert [row["stage"] for row in found["rows"]] == [0, 1, 2, 3]
    assert [row["is_bottleneck"] for row in found["rows"]] == [False, False, True, False]
    assert found["rows"][0]["memory_bytes"] == 300
    assert found["rows"][0]["memory_fraction"] == pytest.approx(0.3)
    assert found["sentences"]
    assert found["binds"] == ["operator", "compute"]
    assert found["devices"][0]["headroom_bytes"] == 700


def test_a_plan_that_is_wrong_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match="cannot read"):
        explain.main([str(path)])
    path.write_text("[]")
    with pytest.raises(PlanError, match="JSON object"):
        explain.main([str(path)])
    data = PLAN.to_dict()
    data["stages"][0]["in_flight"] = 0
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="stage 0 holds 0 samples"):
        explain.main([str(path)])


def test_nothing_loads_torch(plan_file: str) -> None:
    code = (
        "import sys\nfrom weft.cli.main import main\n"
        f"try:\n    main(['explain', {plan_file!r}])\n"
        "except SystemExit as error:\n    assert error.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
