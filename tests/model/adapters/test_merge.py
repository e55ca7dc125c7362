"""Merged directories against transformers models whose weights were changed in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.adapters.random_adapters import merge, random_adapter
from model.tiny_models import write_checkpoint
from weft.base.errors import ConfigError, UnsupportedError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.model.adapters.files import write_adapter
from weft.model.adapters.merge import merge_adapter
from weft.model.config import ModelConfig

SPECS = {
    "lora": AdapterSpec(rank=4, alpha=8.0, target_modules=("q_proj", "o_proj", "down_proj")),
    "ia3": AdapterSpec(
        kind=AdapterKind.IA3, target_modules=("k_proj", "v_proj", "up_proj", "down_proj")
    ),
}


@pytest.mark.parametrize("name", ["llama3-gqa", "llama-mqa-biases"])
@pytest.mark.parametrize("kind", SPECS)
def test_a_merged_directory_is_the_model_with_its_adapter(
    tmp_path: Path, name: str, kind: str
) -> None:
    base, adapter_dir, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = write_checkpoint(name, base, max_shard_size="20KB")
    config = ModelConfig.from_directory(base)
    adapter = random_adapter(SPECS[kind], config, seed=1)
    write_adapter(adapter_dir, SPECS[kind], adapter)
    num_merged = merge_adapter(base, adapter_dir, out)
    assert num_merged == config.num_layers * len(SPECS[kind].target_modules)
    merge(model, adapter)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).state_dict()
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(merged[key], expected, rtol=1e-13, atol=1e-13)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ConfigError, match="not empty"):
        merge_adapter(base, adapter_dir, out)


def test_a_bottleneck_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_checkpoint("llama3-gqa", base)
    spec = AdapterSpec(kind=AdapterKind.BOTTLENECK, rank=4, target_modules=("mlp",))
    write_adapter(
        tmp_path / "adapter", spec, random_adapter(spec, ModelConfig.from_directory(base), seed=1)
    )
    with pytest.raises(UnsupportedError, match="bottleneck"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
