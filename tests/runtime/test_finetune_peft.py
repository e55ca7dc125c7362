"""Losses and gradients beside transformers + PEFT: the same numbers, and no more rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor

from runtime.finetune_harness import (
    FinetuneHand,
    Sample,
    gradients,
    random_weights,
    reference_step,
    relative_error,
    write_weights,
)
from runtime.harness import make_context, random_model
from weft.graph.adapter_spec import AdapterKind, AdapterSpec, Module, module_name

LORA = AdapterSpec(rank=8, alpha=16.0)
IA3 = AdapterSpec(
    kind=AdapterKind.IA3,
    target_modules=("k_proj", "v_proj", "down_proj"),
    feedforward_modules=("down_proj",),
)
FAMILIES = ("llama3-gqa", "mistral-window", "qwen2-mixed-windows", "qwen3", "llama-wide-heads")
"""The last one's heads and windows are those that the native window attention takes."""
WINDOWS = {"llama-wide-heads": 37}


def labelled_sample(number: int, num_tokens: int) -> Sample:
    """A prompt that is not learnt, and a completion that is; the loss is the labels' mean."""
    rng = np.random.default_rng(number)
    weights = np.ones(num_tokens, np.float32)
    weights[: num_tokens // 3] = 0
    return Sample(
        number=number,
        tokens=rng.integers(0, 97, num_tokens),
        label_weights=weights,
        loss_scale=1 / float(weights.sum()),
    )


def peft_step(
    name: str,
    spec: AdapterSpec,
    weights: Mapping[str, Tensor],
    sample: Sample,
    dtype: torch.dtype,
) -> tuple[float, dict[str, Tensor]]:
    """PEFT's loss and gradients, its adapters in float32 as by default."""
    model: Any = random_model(name)
    model.to(dtype)
    if spec.kind is AdapterKind.IA3:
        config: Any = IA3Config(
            target_modules=list(spec.target_modules),
            feedforward_modules=list(spec.feedforward_modules),
        )
    else:
        assert spec.target_modules == "all-linear"
        config = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules="all-linear")
    model = get_peft_model(model, config)
    parameters = dict(model.named_parameters())
    suffixes = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "l": "ia3_l.default"}
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        layer, module, kind = key.split(".")
        place = module_name(int(layer), Module(module))
        parameter = parameters[f"base_model.model.{place}.{suffixes[kind]}"]
        parameter.data.copy_(value.reshape(parameter.shape))
        found[key] = parameter
    tokens = torch.from_numpy(sample.tokens)[None]
    labels = tokens.masked_fill(torch.from_numpy(sample.label_weights)[None] == 0, -100)
    loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    loss.backward()
    grads = {key: torch.zeros_like(weights[key]) for key in found}
    for key, parameter in found.items():
        assert parameter.grad is not None
        grads[key] = parameter.grad.reshape(weights[key].shape)
    return loss.item(), grads


def our_step(
    name: str,
    spec: AdapterSpec,
    weights: Mapping[str, Tensor],
    sample: Sample,
    dtype: torch.dtype,
    directory: Path,
) -> tuple[float, dict[str, Tensor]]:
    hand = FinetuneHand(make_context(random_model(name), dtype=dtype, num_sequences=60))
    path = write_weights(spec, hand.context, weights, directory / "adapter")
    hand.start(spec, samples=[sample], initial_adapter=path)
    hand.pass_samples([sample], window=WINDOWS.get(name, 23))
    hand.step()
    loss = sum(loss.loss_sum for loss in hand.losses) * sample.loss_scale
    return loss, gradients(weights, hand.weights(directory))


@pytest.mark.parametrize("spec", [LORA, IA3], ids=lambda spec: str(spec.kind))
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_follows_peft(name: str, spec: AdapterSpec, tmp_path: Path) -> None:
    context = make_context(random_model(name), num_sequences=60)
    weights = {k: v.float() for k, v in random_weights(spec, context, seed=2, scale=0.1).items()}
    sample = labelled_sample(0, 60)
    wanted_loss, wanted = peft_step(name, spec, weights, sample, torch.float32)
    loss, found = our_step(name, spec, weights, sample, torch.float32, tmp_path)
    assert abs(loss - wanted_loss) <= 1e-5 * wanted_loss
    for key, grad in wanted.items():
        assert relative_error(found[key], grad) <= 1e-5, key


@pytest.mark.parametrize("name", ["llama3-gqa", "qwen3", "llama-wide-heads"])
def test_bfloat16_rounds_no_more_than_peft(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Errors against float64, for the same bfloat16 base and float32 adapters."""
    model = random_model(name)
    context = make_context(model, num_sequences=60)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    ours: list[float] = []
    theirs: list[float] = []
    for seed in range(4):
        weights = random_weights(LORA, context, seed=seed, scale=0.05)
        weights = {key: value.float() for key, value in weights.items()}
        sample = labelled_sample(seed, 70)
        exact = reference_step(model, context, LORA, weights, [sample]).grads
        _, found = our_step(name, LORA, weights, sample, torch.bfloat16, tmp_path / str(seed))
        _, peers = peft_step(name, LORA, weights, sample, torch.bfloat16)
        ours.append(_overall_error(found, exact))
        theirs.append(_overall_error(peers, exact))
    record_property("ours", float(np.mean(ours)))
    record_property("peft", float(np.mean(theirs)))
    assert np.mean(ours) <= 1.5 * np.mean(theirs)


def _overall_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    keys = sorted(wanted)
    return relative_error(
        torch.cat([found[key].double().flatten() for key in keys]),
        torch.cat([wanted[key].flatten() for key in keys]),
    )
