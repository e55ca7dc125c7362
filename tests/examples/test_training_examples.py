"""The training examples' own models and data; the digits and the exported GPT end to end."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft import LLM, SamplingParams
from weft.base.errors import ConfigError
from weft.model.zoo.registry import load
from weft.runtime.param_init import SafetensorsWeights, empty_parameters
from weft.train.checkpoint import model_tensors
from weft.train.data import ColumnSource
from weft.train.export import export_directory

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of examples/."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_towers_are_captured_alike_with_empty_parameters(example: Any) -> None:
    """Positions have no initialisation of their own and stay real while the others are empty."""
    towers = example("digits_towers")
    with empty_parameters():
        partly_empty = towers.model(image_layers=1, text_layers=1)
    held = dict(partly_empty.module.named_parameters())
    assert held["image.patches.weight"].is_meta
    assert not held["image.positions"].is_meta
    graph = partly_empty.graph()
    assert graph.digest == towers.model(image_layers=1, text_layers=1).graph().digest
    assert (
        dict(partly_empty.module.named_parameters())["image.positions"] is held["image.positions"]
    )


def test_digits_are_split_and_captions_name_them(example: Any) -> None:
    towers = example("digits_towers")
    data = towers.data()
    image, ids = data.inputs
    assert len(image) + len(data.validation.inputs[0]) == 1797
    words = {i: word for word, i in towers._ID.items()}
    for row in range(5):
        caption = [words[int(i)] for i in ids[row]]
        assert towers.NUMBERS[int(data.targets[0][row])] in caption
    assert len(towers.class_captions()) == 10


def test_loss_counts_every_caption_of_the_digit_as_right(example: Any) -> None:
    towers = example("digits_towers")
    digit = torch.tensor([3, 3, 8])
    blocks = torch.where(digit[:, None] == digit[None, :], 50.0, 0.0)
    # Two right captions share the probability: the least loss is log 2 for two of three rows.
    assert float(towers.same_digit_loss(blocks, digit)) == pytest.approx(2 / 3 * np.log(2))


@pytest.mark.parametrize("name", ["dlrm", "candle-uno"])
def test_known_rules_fit_the_zoo_models(example: Any, name: str) -> None:
    script = example("train_dlrm")
    rules = example("known_rules")
    function, taken = script.DATA[name]
    data = getattr(rules, function)(**{key: script.SIZES[name][key] for key in taken})
    capture = load(name, device="cpu", **script.SIZES[name]).trace()
    source = ColumnSource(data, capture, 128)
    leaves = tuple(range(len(capture.leaves)))
    assert all(len(tensor) == 4 for tensor in source.fetch(0, leaves, 0, 4))
    assert 0 < script.noise_of(name) < 0.6
    plan = script.branches(name)
    assert len(plan.used_devices) == 3
    # The branches run beside each other.
    assert not any({e.source, e.target} == {0, 1} for e in plan.edges)


@pytest.mark.long
def test_gpt_is_trained_exported_served_and_read_back(tmp_path: Path, example: Any) -> None:
    """Two ranks; the directory generates text, and its weights are the checkpoint's."""
    out, run_dir = tmp_path / "gpt", tmp_path / "run"
    ended = run(
        "train_stdlib_gpt.py",
        *("--out", str(out), "--run-dir", str(run_dir), "--steps", "2", "--batch", "8"),
        *("--hidden", "64", "--layers", "2", "--length", "32", "--vocab", "300"),
        *("--max-files", "8"),
    )
    assert ended.returncode == 0, ended.stderr
    gpt = example("stdlib_gpt")
    module = gpt.model(vocab=300, hidden=64, layers=2, length=32).module
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    trained = model_tensors(checkpoint)
    found = SafetensorsWeights(out).load(list(trained), module)
    for name, value in trained.items():
        assert torch.equal(found[name], value), name
    with LLM(str(out)) as llm:
        (output,) = llm.generate(["import os"], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4
    with pytest.raises(ConfigError, match="not empty"):
        export_directory(checkpoint, out, config={})
    # In several files, with an index.
    split = tmp_path / "split"
    export_directory(checkpoint, split, config={}, max_file_bytes=40_000)
    assert len(list(split.glob("*.safetensors"))) > 1
    again = SafetensorsWeights(split).load(list(trained), module)
    assert all(torch.equal(again[name], value) for name, value in trained.items())


@pytest.mark.long
def test_the_digits_demonstration_reaches_its_accuracy(tmp_path: Path) -> None:
    ended = run("train_digits.py", "--run-dir", str(tmp_path / "run"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "run" / "compared.png").is_file()
