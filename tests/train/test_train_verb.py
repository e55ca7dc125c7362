"""`weft train` without its ranks: what it builds, and how it sums up a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from weft.base.errors import ConfigError, ModelLoadError
from weft.cli.train import _account, load_model
from weft.model.zoo.registry import ZooModel
from weft.train.config import TrainConfig
from weft.train.trainer import TrainReport


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of trained weights, and module `users_own` that reads it."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes)).save_pretrained(tmp_path / "in")
    ids = torch.zeros(2, 4, dtype=torch.long)

    def loads() -> ZooModel:
        module = LlamaForCausalLM.from_pretrained(tmp_path / "in")
        return ZooModel(name="loads", module=module, example_inputs={"input_ids": ids})

    def begins() -> ZooModel:
        module = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "in"))
        return ZooModel(name="begins", module=module, example_inputs={"input_ids": ids})

    def restores() -> ZooModel:
        module = torch.nn.Linear(2, 2)
        module.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        return ZooModel(name="restores", module=module, example_inputs=(torch.zeros(2, 2),))

    module = ModuleType("users_own")
    module.__dict__.update(loads=loads, begins=begins, restores=restores)
    monkeypatch.setitem(sys.modules, "users_own", module)
    return tmp_path / "in"


def test_trained_weights_are_not_lost_in_silence(pretrained: Path) -> None:
    with pytest.raises(ConfigError, match=r"loads the weights of .* as --weights"):
        load_model("users_own:loads", None)
    assert load_model("users_own:loads", None, has_weights=True).name == "loads"
    assert load_model("users_own:begins", None).name == "begins"
    with pytest.raises(ModelLoadError, match="what it loads would be lost"):
        load_model("users_own:restores", None)


@pytest.mark.parametrize(
    ("first", "done", "was_stopped", "said"),
    [
        (0, 4, False, "4 steps, loss 0.5, 10.0 samples/s; run in run"),
        (4, 4, False, "nothing left to do: 4 steps were done before; run in run"),
        (0, 2, True, "2 steps, of 4: stopped by SIGTERM, with a checkpoint, loss 0.5, 10.0"),
    ],
)
def test_how_a_run_ended(first: int, done: int, was_stopped: bool, said: str) -> None:
    report = TrainReport(
        num_steps=done,
        first_step=first,
        loss=0.5 if first == 0 else float("nan"),
        validation_loss=None,
        samples_per_s=10.0,
        was_stopped=was_stopped,
    )
    assert _account(report, TrainConfig(num_steps=4, run_dir=Path("run"))).startswith(said)
