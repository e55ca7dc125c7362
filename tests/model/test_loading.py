"""Checkpoints that load, and those that are refused with file and tensor named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.tiny_models import write_checkpoint
from weft.base.errors import ModelLoadError
from weft.model.config import ModelConfig
from weft.model.linear import DenseLinear
from weft.model.loading import load_weights
from weft.model.weights import DecoderWeights, RandomSource, build_weights


def load(directory: Path, dtype: torch.dtype = torch.float64) -> DecoderWeights:
    config = ModelConfig.from_directory(directory)
    return load_weights(directory, config, DenseLinear, dtype=dtype)


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite model.safetensors; a None drops the tensor ('__' in a key stands for '.')."""
    tensors = load_file(directory / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", ["llama-mqa-biases", "qwen3-layer-types", "llama3-gqa"])
def test_merged_layers_hold_the_checkpoint(name: str, tmp_path: Path) -> None:
    state = write_checkpoint(name, tmp_path).state_dict()
    weights = load(tmp_path)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        parts = [state[f"{prefix}.self_attn.{p}_proj.weight"] for p in "qkv"]
        assert torch.equal(layer.qkv.dense(), torch.cat(parts))
        parts = [state[f"{prefix}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        assert torch.equal(layer.gate_up.dense(), torch.cat(parts))
        theirs, ours = state.get(f"{prefix}.self_attn.o_proj.bias"), layer.output.bias
        assert (theirs is None) == (ours is None)
        if theirs is not None and ours is not None:
            assert torch.equal(ours, theirs)
    assert torch.equal(weights.embedding.dense(), state["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head.dense(), state["lm_head.weight"])
    assert (weights.lm_head is weights.embedding) == (name == "llama3-gqa")


def test_sharded_equals_single_and_casts(tmp_path: Path) -> None:
    write_checkpoint("qwen2", tmp_path / "one")
    write_checkpoint("qwen2", tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load(tmp_path / "one"), load(tmp_path / "many", torch.bfloat16)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert torch.equal(a.down.dense().bfloat16(), b.down.dense())
    assert many.size_bytes * 4 == one.size_bytes


@pytest.mark.parametrize("name", ["llama3-gqa", "qwen2"])
def test_a_tied_output_layer_of_its_own_values_is_used_as_it_stands(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(name, tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, lm_head__weight=embedding.clone())
    weights = load(tmp_path)
    assert weights.lm_head is weights.embedding
    assert not caplog.records
    own = embedding.flip(0).contiguous()
    edit(tmp_path, lm_head__weight=own)
    weights = load(tmp_path)
    assert torch.equal(weights.lm_head.dense(), own)
    assert torch.equal(weights.embedding.dense(), embedding)
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(theirs.lm_head.weight, own), "the reference does the same"
    edit(tmp_path, lm_head__weight=own[1:].contiguous())
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight has shape"):
        load(tmp_path)


def test_random_weights_of_no_two_layers_are_equal() -> None:
    source = RandomSource(seed=0, dtype=torch.float32)
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(32)]
    drawn = {tuple(source.tensor(name, (4,)).tolist()) for name in names}
    assert len(drawn) == len(names)


def test_random_weights_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    write_checkpoint("llama2-mha", tmp_path)
    config = ModelConfig.from_directory(tmp_path)

    def down(seed: int, layer: int) -> torch.Tensor:
        source = RandomSource(seed=seed, dtype=torch.float32)
        return build_weights(config, source, DenseLinear).layers[layer].down.dense()

    assert torch.equal(down(3, 1), down(3, 1))
    assert not torch.equal(down(3, 1), down(4, 1))
    assert not torch.equal(down(3, 1), down(3, 2))


def test_bad_tensors_are_named(tmp_path: Path) -> None:
    write_checkpoint("llama2-mha", tmp_path)
    edit(tmp_path, model__layers__1__mlp__up_proj__weight=torch.zeros(48, 63))
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj.*\(48, 63\).*\(48, 64\)"):
        load(tmp_path)
    edit(tmp_path, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelLoadError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)
    edit(
        tmp_path,
        model__layers__1__mlp__up_proj__weight=torch.zeros(48, 64, dtype=torch.int8),
    )
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight is torch\.int8"):
        load(tmp_path)


def test_tensors_that_the_model_has_no_use_for_are_refused(tmp_path: Path) -> None:
    write_checkpoint("llama2-mha", tmp_path)
    edit(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    load(tmp_path)
    edit(tmp_path, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    with pytest.raises(ModelLoadError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_half_written_files_are_named(tmp_path: Path, share: float) -> None:
    write_checkpoint("llama2-mha", tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is no complete.*half-written"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_checkpoint("llama2-mha", tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    kept = (tmp_path / shard).read_bytes()
    (tmp_path / shard).unlink()
    with pytest.raises(ModelLoadError, match=rf"{shard} is missing"):
        load(tmp_path)
    (tmp_path / shard).write_bytes(kept)
    other = next(s for s in content["weight_map"].values() if s != shard)
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=rf"{other} lacks tensor {name}"):
        load(tmp_path)
    content["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match="outside the model directory"):
        load(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"only safetensors are read .found pytorch_model"):
        load(tmp_path)
