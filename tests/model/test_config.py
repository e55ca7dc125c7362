"""config.json of every family against transformers' own reading, and the refusals by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.tiny_models import COMMON, CONFIGS, LLAMA3, YARN, random_model
from weft.base.errors import ModelLoadError, UnsupportedError
from weft.model.config import ModelConfig, ModelFamily
from weft.model.generation import GenerationDefaults
from weft.model.rope import RopeKind, parse_rope, rope_table

LLAMA: dict[str, Any] = {"model_type": "llama", **COMMON}


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    theirs = CONFIGS[name]
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_directory(tmp_path)
    assert ours.family == theirs.model_type
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.tie_word_embeddings is theirs.tie_word_embeddings
    assert ours.eos_token_ids == (2,)
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if kinds is None:
        assert ours.windows == (window,) * 3
    else:
        assert ours.windows == tuple(window if "sliding" in kind else None for kind in kinds)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
        LLAMA3,
        YARN,
        {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 16, "truncate": False},
        {**YARN, "attention_factor": 0.8},
    ],
)
def test_rope_tables_equal_transformers(rope: dict[str, Any]) -> None:
    theirs = LlamaConfig(**{**COMMON, "head_dim": 64}, rope_parameters=copy.deepcopy(rope))
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(128)[None])
    config = parse_rope({"rope_parameters": rope}, 128, "config.json")
    table = rope_table(config, 64, 128, torch.float32)
    torch.testing.assert_close(table.cos, cos[0, :, :32], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.sin, sin[0, :, :32], rtol=1e-6, atol=1e-6)


def test_old_and_new_rope_keys_mean_the_same() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    old = ModelConfig.from_dict({**LLAMA, "rope_theta": 500.0, "rope_scaling": scaling})
    new = ModelConfig.from_dict({**LLAMA, "rope_parameters": LLAMA3})
    assert old.rope == new.rope
    assert old.rope.kind is RopeKind.LLAMA3
    assert old.rope.theta == 500.0
    assert ModelConfig.from_dict({**LLAMA, "rope_theta": 7.0, "rope_scaling": None}).rope.theta == 7


def test_context_grows_with_the_scaling() -> None:
    assert ModelConfig.from_dict(LLAMA).max_context == 128
    assert ModelConfig.from_dict({**LLAMA, "rope_parameters": YARN}).max_context == 128
    yarn = {**YARN, "original_max_position_embeddings": 128}
    assert ModelConfig.from_dict({**LLAMA, "rope_parameters": yarn}).max_context == 512


def test_parameters_are_counted() -> None:
    for name, theirs in CONFIGS.items():
        ours = ModelConfig.from_dict(theirs.to_dict())
        assert ours.num_parameters == random_model(name).num_parameters(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'.*llama .*qwen3"),
        ({"model_type": "mixtral"}, "mixture of experts.*llama"),
        ({"model_type": "qwen3", "num_experts": 8}, "mixture of experts"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised .awq.*float32"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*yarn"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"rope_parameters": {**LLAMA3, "beta_fast": 3}}, "beta_fast of llama3"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"sliding_window": 4}, "sliding_window is 4 on a llama"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types on a mis"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModelConfig.from_dict({**LLAMA, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 3}, r"\(4\) is no multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"eos_token_id": 1000}, "beyond vocab_size"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear RoPE lacks factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "llama3 RoPE lacks low_freq_fac"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "lacks high_freq_factor, low_freq_fac"),
        ({"rope_scaling": {**YARN, "factor": None}}, "yarn RoPE lacks factor"),
        ({"rope_scaling": {**YARN, "attention_factor": "x"}}, "attention_factor of yarn.*'x'"),
        ({"rope_scaling": {**YARN, "mscale": "x", "mscale_all_dim": 1}}, "mscale of yarn.*'x'"),
        ({"rope_scaling": {**YARN, "rope_theta": 1.0}}, "rope_theta of yarn RoPE is 1.0"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate of yarn RoPE is 1"),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "factor of yarn RoPE is inf"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings of yarn RoPE is 0.5",
        ),
        ({"rope_scaling": "linear"}, "config.json: rope_scaling is 'linear'; an object"),
        ({"rope_parameters": [1]}, "config.json: rope_parameters is .1.; an object"),
        ({"architectures": 5}, "config.json: architectures is 5; a list"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; a list"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": "x",
            },
            "max_window_layers is 'x'",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
            "no sliding_window is in use",
        ),
    ],
)
def test_inconsistent_configurations_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_dict({**LLAMA, **change})


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="not a directory"):
        ModelConfig.from_directory(tmp_path / "nothing")
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ModelLoadError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_directory(tmp_path)


def test_generation_defaults_merge_eos_lists(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(LLAMA)
    assert GenerationDefaults.from_directory(tmp_path, config).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 2, 7], "temperature": 0.6, "top_k": 20, "do_sample": True})
    )
    defaults = GenerationDefaults.from_directory(tmp_path, config)
    assert defaults.eos_token_ids == (5, 2, 7)
    assert defaults.sampling == {"temperature": 0.6, "top_k": 20}
    with pytest.raises(ModelLoadError, match="beyond vocab_size"):
        GenerationDefaults.from_dict({"eos_token_id": 97}, config)
    with pytest.raises(ModelLoadError, match="top_p is 'a'"):
        GenerationDefaults.from_dict({"top_p": "a"}, config)
    with pytest.raises(ModelLoadError, match=r"generation_config.json: temperature is -1.*fail"):
        GenerationDefaults.from_dict({"temperature": -1}, config)
    assert not GenerationDefaults.from_dict({"max_new_tokens": 3}, config).sampling


def test_family_names_are_model_types() -> None:
    assert {family.value for family in ModelFamily} == {c.model_type for c in CONFIGS.values()}
