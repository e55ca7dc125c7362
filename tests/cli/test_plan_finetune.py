"""`weft plan --finetune`."""

from __future__ import annotations

import json

import pytest

from weft.base.errors import ConfigError
from weft.cli.plan import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ending:
        main(["--finetune", *arguments])
    assert ending.value.code == 0
    return capsys.readouterr().out


def test_the_report_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "110m", "--seq-len", "512", "--dtype", "float32", "--json"))
    assert [row["remat"] for row in report["rows"]] == ["none", "pruned", "layer-input"]
    for row in report["rows"]:
        parts = set(row) - {"remat", "weights", "inference_kv", "job_total", "total"}
        assert row["job_total"] == sum(row[part] for part in parts)
        assert row["total"] == row["job_total"] + row["weights"] + row["inference_kv"]
    none, pruned, layer_input = (row["activations"] for row in report["rows"])
    assert none > pruned > layer_input == 512 * 12 * 768 * 4


def test_the_tables_name_the_sheet_and_the_partition(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        capsys,
        *("llama-3.1-70b", "--target-modules", "down_proj", "--ablation", "--seq-len", "1024"),
        *("--tensor-parallel", "4"),
    )
    assert "+ token-level finetuning" in out
    assert "85.2%" in out  # the figure's own saving
    assert "Partition of each bypass" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "neither a known name"),
        (("110m", "--rank", "300"), r"must be in \[1, 256\]"),
        (("110m", "--target-modules", "foo_proj"), "there are q_proj"),
        (("110m", "--seq-len", "0"), "seq_len is 0"),
    ],
)
def test_bad_input_says_what(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--finetune", *arguments])
