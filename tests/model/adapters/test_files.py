"""Adapter files: PEFT's in both directions, ours, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from model.adapters.mixed import PROMPTS, run_mixed
from model.adapters.random_adapters import random_adapter
from model.adapters.wide import wide_transformers
from runtime.harness import make_context, random_model, reference_logits
from weft.base.errors import AdapterLoadError, UnsupportedError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.model.adapters.files import read_adapter, read_adapter_spec, write_adapter
from weft.model.adapters.weights import AdapterWeights
from weft.model.config import ModelConfig

REGEX = r"model\.layers\.[02]\..*(q_proj|up_proj)"
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "list": lambda: LoraConfig(r=4, target_modules=["q_proj", "self_attn.v_proj"]),
    "regex": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=REGEX),
    "all-linear": lambda: LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    "excluded": lambda: LoraConfig(r=3, target_modules="all-linear", exclude_modules=["o_proj"]),
    "rslora": lambda: LoraConfig(r=6, lora_alpha=5, use_rslora=True, target_modules=["o_proj"]),
    "layers": lambda: LoraConfig(r=5, target_modules=["down_proj"], layers_to_transform=[1, 2]),
    "patterns": lambda: LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "gate_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 7, "gate_proj": 2},
        alpha_pattern={r".*\.k_proj": 1.5},
    ),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3-inputs": lambda: IA3Config(
        target_modules=["q_proj", "o_proj", "up_proj"], feedforward_modules=["q_proj", "up_proj"]
    ),
}


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with wide_transformers():
        yield


def peft_model(name: str, config: PeftConfig, seed: int = 5) -> Any:
    """A transformers model under PEFT whose adapter's weights are random."""
    model = get_peft_model(random_model(name), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "ia3_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("ia3_" in key))
    return model.eval()


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_dict(random_model(name).config.to_dict())


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_saves_runs_as_in_peft(kind: str, tmp_path: Path) -> None:
    model = peft_model("qwen2", CONFIGS[kind]())
    model.save_pretrained(str(tmp_path))
    context = make_context(random_model("qwen2"))
    adapter = read_adapter(tmp_path, context.config, dtype=torch.float64)
    found = run_mixed(context, [adapter, None])
    torch.testing.assert_close(found[0], reference_logits(model, PROMPTS[0]), rtol=0, atol=1e-10)
    plain = reference_logits(random_model("qwen2"), PROMPTS[0])
    assert (found[0] - plain).abs().max() > 1e-3


def assert_same(found: AdapterWeights, wanted: AdapterWeights) -> None:
    assert found.kind is wanted.kind
    pairs = list(zip(found, wanted, strict=True))
    assert pairs
    for ours, theirs in pairs:
        assert (ours.target, ours.activation) == (theirs.target, theirs.activation)
        assert list(ours.weights) == list(theirs.weights)
        assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)


SPECS = {
    "lora": AdapterSpec(rank=5, alpha=2.5, use_rslora=True),
    "patterns": AdapterSpec(
        rank=4,
        target_modules=("q_proj", "mlp.up_proj"),
        exclude_modules=("layers.0.mlp.up_proj",),
        rank_pattern={"layers.2.self_attn.q_proj": 9},
        alpha_pattern={"up_proj": 3.0},
        layers_to_transform=(0, 2),
    ),
    "regex": AdapterSpec(target_modules=REGEX),
    "ia3": AdapterSpec(
        kind=AdapterKind.IA3,
        target_modules=("k_proj", "up_proj", "down_proj"),
        feedforward_modules=("up_proj", "down_proj"),
    ),
    "ia3-layers": AdapterSpec(
        kind=AdapterKind.IA3, feedforward_modules=("down_proj",), layers_to_transform=(0, 2)
    ),
    "ia3-outputs": AdapterSpec(kind=AdapterKind.IA3, target_modules=("k_proj",)),
    "regex-layers": AdapterSpec(
        target_modules=REGEX, layers_to_transform=(2,), rank_pattern={"q_proj": 3}
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_what_we_write_runs_in_peft_and_reads_back(kind: str, tmp_path: Path) -> None:
    context = make_context(random_model("llama2-mha"))
    adapter = random_adapter(SPECS[kind], context.config, seed=1)
    write_adapter(tmp_path, SPECS[kind], adapter, base_model="some/base")
    model = PeftModel.from_pretrained(random_model("llama2-mha"), str(tmp_path)).eval()
    found = run_mixed(context, [adapter])[0]
    torch.testing.assert_close(found, reference_logits(model, PROMPTS[0]), rtol=0, atol=1e-10)  # type: ignore[arg-type]
    assert model.peft_config["default"].base_model_name_or_path == "some/base"
    again = read_adapter(tmp_path, context.config, dtype=torch.float64)
    assert_same(again, adapter)


def test_bottlenecks_read_back(tmp_path: Path) -> None:
    context = make_context(random_model("qwen3"))
    spec = AdapterSpec(
        kind=AdapterKind.BOTTLENECK,
        rank=6,
        target_modules=("mlp",),
        activation="silu",
        layers_to_transform=(1,),
    )
    adapter = random_adapter(spec, context.config, seed=1)
    write_adapter(tmp_path, spec, adapter)
    assert read_adapter_spec(tmp_path) == spec
    again = read_adapter(tmp_path, context.config, dtype=torch.float64)
    assert_same(again, adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_pattern": ["h"]}, "layers_pattern"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"some_new_thing": 3}, "some_new_thing = 3"),
    ],
)
def test_what_is_not_run_is_refused_by_name(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    peft_model("qwen2", CONFIGS["list"]()).save_pretrained(str(tmp_path))
    read_adapter_spec(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UnsupportedError, match=said):
        read_adapter_spec(tmp_path)


def test_what_peft_has_for_lora_alone_is_refused_for_ia3(tmp_path: Path) -> None:
    peft_model("qwen2", CONFIGS["ia3"]()).save_pretrained(str(tmp_path))
    edit(tmp_path, {"layers_to_transform": [0]})
    with pytest.raises(UnsupportedError, match="layers_to_transform"):
        read_adapter_spec(tmp_path)


def edit(directory: Path, change: dict[str, Any]) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 0}, r"rank is 0; it must be in \[1, 256\]"),
        ({"r": 257}, "rank is 257"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": -1}, "alpha is -1"),
        ({"lora_alpha": 10**400}, "lora_alpha is beyond"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["lm_head"]}, "does not fit this model: target_modules"),
        ({"target_modules": ["q_proj", "w2"]}, "'w2' is unknown"),
        ({"target_modules": "("}, "no regular expression"),
        ({"layers_to_transform": [9]}, "layer 9"),
        ({"r": 5}, r"q_proj.lora_A.weight has shape \[4, 64\], but this model needs \[5, 64\]"),
        ({"target_modules": ["k_proj"]}, "it lacks base_model.model.model.layers.0.self_attn.k_"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    peft_model("qwen2", CONFIGS["list"]()).save_pretrained(str(tmp_path))
    edit(tmp_path, change)
    with pytest.raises(AdapterLoadError, match=said):
        read_adapter(tmp_path, config_of("qwen2"), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_weights_of_other_kinds_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    peft_model("qwen2", CONFIGS["list"]()).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterLoadError, match=f"holds {dtype}; it must hold float32"):
        read_adapter(tmp_path, config_of("qwen2"), dtype=torch.float32)


def test_an_adapter_of_another_base_is_refused_with_the_shape(tmp_path: Path) -> None:
    peft_model("qwen2", CONFIGS["list"]()).save_pretrained(str(tmp_path))
    said = r"v_proj.lora_B.weight has shape \[32, 4\], but this model needs \[64, 4\].*another base"
    with pytest.raises(AdapterLoadError, match=said):
        read_adapter(tmp_path, config_of("llama2-mha"), dtype=torch.float32)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    config = config_of("qwen2")
    with pytest.raises(AdapterLoadError, match=r"neither adapter_config\.json"):
        read_adapter(tmp_path, config, dtype=torch.float32)
    peft_model("qwen2", CONFIGS["list"]()).save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, weights)
    with pytest.raises(AdapterLoadError, match="NaN or infinity"):
        read_adapter(tmp_path, config, dtype=torch.float32)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, weights)
    with pytest.raises(AdapterLoadError, match=r"it has besides base_model.model.lm_head.weight"):
        read_adapter(tmp_path, config, dtype=torch.float32)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterLoadError, match="truncated or damaged"):
        read_adapter(tmp_path, config, dtype=torch.float32)
    weights.unlink()
    with pytest.raises(AdapterLoadError, match="is missing"):
        read_adapter(tmp_path, config, dtype=torch.float32)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UnsupportedError, match="is a pickle"):
        read_adapter(tmp_path, config, dtype=torch.float32)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterLoadError, match="not valid JSON"):
        read_adapter(tmp_path, config, dtype=torch.float32)
