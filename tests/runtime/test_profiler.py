"""The profiler: blocks cut out of a program compute what the program does, and get measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from weft.base.errors import ConfigError, UnsupportedError
from weft.cli.profile import main
from weft.cluster.device_types import cpu_device_type
from weft.cost.model import Parallel
from weft.cost.profiled import BlockProfile, ProfiledCost
from weft.graph.capture import trace
from weft.graph.coarsen import coarsen
from weft.model.zoo.registry import load
from weft.runtime.block_program import cut_block, run_block
from weft.runtime.profiler import ProfilerConfig, profile_blocks
from zoo_sizes import SMALL

CPU = torch.device("cpu")


def test_a_cut_block_computes_what_the_module_does_at_another_batch() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    captured = trace(module, (torch.zeros(2, 4),))
    block = coarsen(captured.graph, 1).ops[0]
    program = cut_block(captured, block, CPU)
    x = torch.randn(5, 4)
    weights = iter(list(module.parameters()))
    tensors = [next(weights) if d.is_weight else x for d in program.inputs]
    (loss,) = run_block(program, tensors)
    torch.testing.assert_close(loss, module(x).mean())


@pytest.mark.parametrize("name", ["mmt", "unet", "gpt", "llama"])
def test_every_block_of_a_model_is_measured_and_prices_a_plan(name: str) -> None:
    captured = load(name, **SMALL[name]).trace()
    config = ProfilerConfig(batch_sizes=(1, 3), num_repeats=1, max_blocks=12)
    measured = profile_blocks(captured, config, device_name="cpu")
    cost = ProfiledCost(profile=BlockProfile.from_json(measured.profile.to_json()))
    cpu = cpu_device_type(1, 10**9)
    for op in measured.graph.ops:
        found = cost.op_cost(op, 2, Parallel(), cpu)
        assert found.forward_s > 0
        assert (found.backward_s > 0) == (op.flops_backward > 0) or op.is_loss


class FixedBatch(nn.Module):
    """Reshapes by a number that holds for a batch of 2 only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).view(2, 2, 2)


def test_a_model_of_fixed_batch_is_refused_but_for_its_own() -> None:
    captured = trace(FixedBatch(), (torch.zeros(2, 4),))
    with pytest.raises(UnsupportedError, match="--batch-sizes 2"):
        profile_blocks(captured, ProfilerConfig(batch_sizes=(4,)), device_name="cpu")
    config = ProfilerConfig(batch_sizes=(2,), num_repeats=1)
    assert profile_blocks(captured, config, device_name="cpu").profile.blocks


def test_the_verb_writes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    options = [a for k, v in SMALL["case-study"].items() for a in ("--option", f"{k}={v}")]
    arguments = ["case-study", *options, "--batch-sizes", "1,2", "--num-repeats", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--device", "cpu", "--out", str(out), "--json"])
    assert stop.value.code == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    profile = BlockProfile.load(out)
    assert profile.device == "cpu"
    assert len(rows) == 2 * len(profile.blocks) > 0


def test_sizes_must_rise() -> None:
    with pytest.raises(ConfigError, match="must rise"):
        ProfilerConfig(batch_sizes=(2, 1))
    with pytest.raises(ConfigError, match="whole numbers"):
        main(["case-study", "--batch-sizes", "a"])
