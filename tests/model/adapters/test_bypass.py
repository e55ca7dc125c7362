"""Adapters beside the linears, against models into which they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.adapters.mixed import PROMPTS, run_mixed
from model.adapters.random_adapters import merge, random_adapter
from model.adapters.wide import wide_transformers
from runtime.harness import HandMade, Row, make_context, random_model, reference_logits
from weft.graph.adapter_spec import AdapterKind, AdapterSpec, Module
from weft.model.adapters.weights import AdapterWeights
from weft.model.forward_step import BypassGroup, BypassStep
from weft.model.linear import DenseLinear
from weft.runtime.step_builder import build_step

LORA = AdapterSpec(rank=3, alpha=7.0)
IA3 = AdapterSpec(kind=AdapterKind.IA3, target_modules=("k_proj", "v_proj", "down_proj"))
ODD_IA3 = AdapterSpec(kind=AdapterKind.IA3, feedforward_modules=("q_proj", "up_proj", "o_proj"))
BOTTLENECK = AdapterSpec(kind=AdapterKind.BOTTLENECK, rank=5, activation="gelu")
NAMES = frozenset(
    ("layer_input", "attn_normed", "query_flat", "key_flat", "values", "attn_out", "attn_sub")
) | {"mlp_input", "mlp_normed", "gate", "up", "act", "mlp_sub", "low_rank:up_proj"}


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with wide_transformers():
        yield


@dataclass
class Calls:
    """How often the linears of a layer were called, and over how many rows."""

    num_rows: list[int] = field(default_factory=list[int])


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls()
    plain = DenseLinear.forward

    def forward(self: DenseLinear, x: Tensor) -> Tensor:
        calls.num_rows.append(x.shape[0])
        return plain(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(DenseLinear, "forward", forward)
        yield calls


@pytest.mark.parametrize("name", ["llama-mqa-biases", "mistral-window", "qwen2", "qwen3"])
def test_mixed_rows_equal_merged_models(name: str) -> None:
    context = make_context(random_model(name), num_sequences=24)
    adapters: list[AdapterWeights | None] = [
        random_adapter(spec, context.config, seed=seed)
        for seed, spec in enumerate((LORA, IA3, ODD_IA3, replace(LORA, rank=9, use_rslora=True)))
    ]
    found = run_mixed(context, [*adapters, None])
    for prompt, adapter, logits in zip(PROMPTS, [*adapters, None], found, strict=True):
        model = random_model(name)
        plain = reference_logits(model, prompt)
        if adapter is not None:
            merge(model, adapter)
            assert (reference_logits(model, prompt) - plain).abs().max() > 1e-2
        torch.testing.assert_close(logits, reference_logits(model, prompt), rtol=0, atol=1e-10)


def test_bottlenecks_equal_hooks_on_sub_layers() -> None:
    model = random_model("qwen3")
    context = make_context(model)
    adapter = random_adapter(BOTTLENECK, context.config, seed=3)
    found = run_mixed(context, [None, adapter, adapter])
    plain = [reference_logits(model, prompt) for prompt in PROMPTS[:3]]

    def hook(module: Module, layer: int) -> Any:
        w = adapter.layers[layer][module].weights

        def changed(_: object, __: object, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            inner = torch.nn.functional.gelu(y @ w["down"].T + w["down_bias"])
            y = y + inner @ w["up"].T + w["up_bias"]
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return changed

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(hook(Module.SELF_ATTN, index))
        layer.mlp.register_forward_hook(hook(Module.MLP, index))
    torch.testing.assert_close(found[0], plain[0], rtol=0, atol=1e-10)
    for index in (1, 2):
        wanted = reference_logits(model, PROMPTS[index])
        assert (wanted - plain[index]).abs().max() > 1e-2
        torch.testing.assert_close(found[index], wanted, rtol=0, atol=1e-10)


def test_groups_may_be_given_as_token_numbers() -> None:
    context = make_context(random_model("qwen2"))
    adapter = random_adapter(LORA, context.config, seed=0)
    wanted = run_mixed(context, [adapter, None, adapter])
    made = HandMade(context)
    batch = made.batch([Row(slot=i, tokens=PROMPTS[i]) for i in range(3)])
    step = build_step(batch, context, torch.zeros(8, dtype=torch.int32))
    rows = torch.tensor([11, 2, 5, 6, 7, 1, 8, 9, 10, 3, 0])
    for spec in (LORA, IA3, ODD_IA3, BOTTLENECK):
        adapter = random_adapter(spec, context.config, seed=0)
        wanted = run_mixed(context, [adapter, None, adapter])
        group = BypassGroup(rows=rows[rows != 4], adapter=adapter)
        bypassed = replace(step, bypass=BypassStep(groups=(group,)))
        hidden = context.decoder.embed(step.token_ids)
        found = context.decoder.logits(context.decoder.forward(hidden, bypassed, context.kv))
        torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-12)


def test_each_linear_is_called_once_whatever_the_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(random_model("qwen2"))
    adapters = [
        random_adapter(spec, context.config, seed=seed)
        for seed, spec in enumerate((LORA, IA3, BOTTLENECK, replace(LORA, rank=2)))
    ]
    with counted(monkeypatch) as calls:
        run_mixed(context, [*adapters, None])
    num_tokens = sum(len(prompt) for prompt in PROMPTS)
    linears = 4 * context.config.num_layers
    assert calls.num_rows == [num_tokens] * (linears + 1)  # the output layer too


@dataclass
class Kept:
    """Taps that copy what they are shown."""

    rows: slice
    wanted: frozenset[str]
    tensors: dict[tuple[int, str], Tensor] = field(default_factory=dict[tuple[int, str], Tensor])

    def wants(self, layer: int) -> frozenset[str]:
        return self.wanted

    def keep(self, layer: int, name: str, rows: slice, value: Tensor) -> None:
        assert value.shape[0] == rows.stop - rows.start
        self.tensors[layer, name] = value.clone()


def test_taps_see_their_rows_and_change_nothing() -> None:
    context = make_context(random_model("llama2-mha"))
    adapters = [random_adapter(LORA, context.config, seed=seed) for seed in range(2)]
    wanted = run_mixed(context, [None, *adapters])
    taps = Kept(rows=slice(5, 12), wanted=NAMES)
    found = run_mixed(context, [None, *adapters], taps=taps)
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=0, atol=1e-12)
    assert set(taps.tensors) == {(layer, name) for layer in range(3) for name in NAMES}
    for layer in range(3):
        seen = {name: taps.tensors[layer, name] for name in NAMES}
        up = context.decoder.weights.layers[layer].gate_up.dense().chunk(2)[1]
        bypass = adapters[1].layers[layer][Module.UP_PROJ]
        low = seen["mlp_normed"] @ bypass.weights["A"].T
        torch.testing.assert_close(seen["low_rank:up_proj"], low, rtol=0, atol=1e-12)
        product = seen["mlp_normed"] @ up.T + bypass.target.scale * low @ bypass.weights["B"].T
        torch.testing.assert_close(seen["up"], product, rtol=0, atol=1e-12)
        act = torch.nn.functional.silu(seen["gate"]) * seen["up"]
        torch.testing.assert_close(seen["act"], act, rtol=0, atol=1e-12)
        mlp_input = seen["layer_input"] + seen["attn_sub"]
        torch.testing.assert_close(seen["mlp_input"], mlp_input, rtol=0, atol=1e-12)
        if layer:
            below = taps.tensors[layer - 1, "mlp_input"] + taps.tensors[layer - 1, "mlp_sub"]
            torch.testing.assert_close(seen["layer_input"], below, rtol=0, atol=1e-12)
