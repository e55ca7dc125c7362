"""Initial weights: the same whatever part of a model a rank asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.base.errors import ModelLoadError, UnsupportedError
from weft.model.zoo.registry import load
from weft.runtime.param_init import (
    ModuleWeights,
    SafetensorsWeights,
    SeededWeights,
    empty_parameters,
)


class Small(nn.Module):
    """A table without an initialisation of its own, a tied pair, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.full((3, 4), 7.0))
        self.register_buffer("scale", torch.arange(4.0))
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.norm = nn.LayerNorm(4)


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def test_seeded_weights_do_not_depend_on_what_else_is_asked_for() -> None:
    with empty_parameters():
        module = Small()
    everything = SeededWeights(seed=3).load(names(module), module)
    for name in names(module):
        (alone,) = SeededWeights(seed=3).load([name], module).values()
        assert torch.equal(alone, everything[name])
    other = SeededWeights(seed=4).load(["one.weight"], module)["one.weight"]
    assert not torch.equal(other, everything["one.weight"])
    assert everything["one.weight"].std() > 0
    assert torch.equal(everything["norm.weight"], torch.ones(4))


def test_empty_parameters_keep_what_cannot_be_made_again() -> None:
    with empty_parameters():
        module = Small()
    assert module.one.weight.is_meta
    assert torch.equal(module.get_buffer("scale"), torch.arange(4.0))
    assert torch.equal(module.table, torch.full((3, 4), 7.0))
    drawn = SeededWeights().load(["table"], module)
    assert torch.equal(drawn["table"], module.table)
    assert not nn.Linear(2, 2).weight.is_meta


def test_own_rule_takes_the_place_of_the_modules() -> None:
    def ones(name: str, value: Tensor) -> None:
        value.fill_(len(name))

    module = load("gpt", num_layers=1, hidden=8, num_heads=2, vocab=16, seq=4).module
    found = SeededWeights(init=ones).load(["positions", "head.weight"], module)
    assert float(found["positions"].mean()) == 9
    assert float(found["head.weight"].mean()) == 11


def test_weights_without_values_are_refused_by_name() -> None:
    module = load("gpt", num_layers=1, hidden=8, num_heads=2, vocab=16, seq=4).module
    with pytest.raises(UnsupportedError, match=r"tokens\.weight"):
        ModuleWeights().load(["tokens.weight"], module)
    with pytest.raises(UnsupportedError, match="positions"):
        SeededWeights().load(["positions"], module)


@pytest.mark.parametrize("split", [False, True])
def test_safetensors_by_name(tmp_path: Path, split: bool) -> None:
    module = Small()
    # A tied weight may be stored under its other name.
    tensors = {n: p.detach().clone() for n, p in module.named_parameters() if n != "one.weight"}
    tensors["two.weight"] = torch.randn(4, 4)
    if split:
        half = dict(list(tensors.items())[:2])
        save_file(half, tmp_path / "a.safetensors")
        save_file({n: t for n, t in tensors.items() if n not in half}, tmp_path / "b.safetensors")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path if split else tmp_path / "model.safetensors"
    found = SafetensorsWeights(path).load(names(module), module)
    assert torch.equal(found["one.weight"], tensors["two.weight"])
    assert set(found) == set(names(module))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    module = Small()
    save_file({"table": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 1 parameters, first 'one.bias'"):
        SafetensorsWeights(tmp_path).load(["one.bias"], module)
    with pytest.raises(ModelLoadError, match=r"'table'.*shape"):
        SafetensorsWeights(tmp_path).load(["table"], module)
    with pytest.raises(ModelLoadError, match="no safetensors"):
        SafetensorsWeights(tmp_path / "none").load(["table"], module)


def test_files_of_another_dtype_are_read_in_the_models(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    halves = {name: p.detach().to(torch.bfloat16) for name, p in module.named_parameters()}
    save_file(halves, tmp_path / "model.safetensors")
    found = SafetensorsWeights(tmp_path).load(names(module), module)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert torch.equal(found["weight"], halves["weight"].float())


def test_values_that_would_be_lost_are_refused() -> None:
    state = nn.Linear(2, 2).state_dict()
    with empty_parameters(), pytest.raises(UnsupportedError, match="would be lost"):
        nn.Linear(2, 2).load_state_dict(state)
    nn.Linear(2, 2).load_state_dict(state)
