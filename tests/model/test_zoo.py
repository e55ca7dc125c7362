"""The zoo: published sizes, one real training step each, and the resolver of MODEL."""

from __future__ import annotations

import pytest
import torch

from weft.base.errors import ConfigError, ModelLoadError
from weft.model.zoo.registry import NAMES, load, resolve, resolve_model
from zoo_sizes import SMALL


def tiny() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return torch.nn.Linear(4, 4), (torch.zeros(2, 4),)


def wrong() -> int:
    return 3


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains(name: str) -> None:
    torch.manual_seed(0)
    model = load(name, device="cpu", **SMALL[name])
    inputs = model.example_inputs
    output = model.module(*inputs) if isinstance(inputs, tuple) else model.module(**inputs)
    assert model.loss is not None
    loss = model.loss(output, *model.targets)
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)
    loss.backward()
    graph = model.graph()
    parameters = dict(model.module.named_parameters())
    assert all(parameters[p.id].grad is not None for p in graph.parameters)


@pytest.mark.parametrize(
    ("name", "millions"),
    # MMT 403 M; CANDLE 470 M in branches + 117 M after the join + 16.8 M (GraphPipe sheet §5.2).
    [("mmt", 403), ("candle-uno", 604)],
)
def test_published_sizes_need_no_memory(name: str, millions: int) -> None:
    model = load(name)
    assert all(p.is_meta for p in model.module.parameters())
    elements = sum(p.numel() for p in model.module.parameters())
    assert elements / 1e6 == pytest.approx(millions, rel=0.005)


def test_mmt_has_its_branches_and_one_loss() -> None:
    graph = load("mmt", **(SMALL["mmt"] | {"num_branches": 3})).graph()
    assert sum(not graph.predecessors[o.id] for o in graph.ops) == 3
    assert [o.id for o in graph.ops if o.is_loss] == ["loss"]


def test_a_frozen_vision_tower_gets_no_gradient() -> None:
    graph = load("llava", **(SMALL["llava"] | {"frozen_vision": True})).graph()
    tower = [o for o in graph.ops if "vision_tower" in o.module_path]
    assert tower
    assert all(o.flops_backward == 0 for o in tower)


def test_names_with_a_depth_and_user_functions_resolve() -> None:
    options = {k: v for k, v in SMALL["gpt"].items() if k != "num_layers"}
    assert resolve_model("gpt-3", options).name == "gpt-3"
    assert resolve(f"{__name__}:tiny").ops[0].id == ".:0"


def test_bad_specifications_are_refused() -> None:
    with pytest.raises(ConfigError, match="nearest built-in one is 'mmt'"):
        load("mmtt")
    with pytest.raises(ConfigError, match="nearest is 'num_layers'"):
        load("gpt", num_layer=3)
    with pytest.raises(ModelLoadError, match="cannot import"):
        resolve("no_such_package:f")
    with pytest.raises(ModelLoadError, match="no function 'absent'"):
        resolve("json:absent")
