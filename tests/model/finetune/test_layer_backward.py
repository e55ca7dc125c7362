"""Every layer's backward, in any windows, against autograd over the whole sequence, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import finetune_reference as reference
from model.finetune_strategies import adapter_specs, cuts
from model.tiny_models import random_model
from runtime.harness import make_context
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat
from weft.model.adapters.weights import model_targets
from weft.model.decoder import attention_shape
from weft.model.finetune.attention import KvGrads
from weft.model.finetune.dropout import DropoutKey, dropout_scale
from weft.model.finetune.layer_backward import layer_backward, wants_kv_grads
from weft.model.finetune.layer_tensors import LayerTensors, WindowPlace
from weft.model.finetune.loss import window_loss
from weft.model.finetune.parameters import TrainedWeights
from weft.model.finetune.plan import plan_layers
from weft.model.kernels.held_tokens import HeldTokens
from weft.model.rope import rope_table

FAMILIES = (
    "llama2-mha",
    "llama3-gqa",
    "llama-mqa-biases",
    "llama-yarn",
    "mistral-window",
    "qwen2",
    "qwen2-mixed-windows",
    "qwen3",
    "qwen3-layer-types",
)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_windows_give_the_gradients_of_the_whole_sequence(name: str, data: st.DataObject) -> None:
    spec = data.draw(adapter_specs())
    remat = data.draw(st.sampled_from(Remat))
    num = data.draw(st.integers(2, 40))
    bounds = data.draw(cuts(num))
    layer_major = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    tokens = torch.randint(0, 97, (num,), generator=generator)
    label_weights = torch.rand(num, generator=generator) * (
        torch.rand(num, generator=generator) < 0.7
    )
    label_weights[-1] = 1.0
    check(name, spec, remat, tokens, label_weights, bounds, layer_major, generator)


def check(
    name: str,
    spec: AdapterSpec,
    remat: Remat,
    tokens: Tensor,
    label_weights: Tensor,
    bounds: Sequence[int],
    layer_major: bool,
    generator: torch.Generator,
) -> None:
    """The reference runs forward; its tensors are what the layers are given as kept."""
    hf = random_model(name)
    context = make_context(hf)
    config, decoder = context.config, context.decoder
    targets = model_targets(spec, config)
    trained = TrainedWeights(spec, targets, dtype=torch.float64, device=torch.device("cpu"), seed=3)
    trained.master.add_(torch.randn(len(trained.master), generator=generator) * 0.1)
    rope = rope_table(config.rope, config.head_dim, 128, torch.float64)
    key = DropoutKey(seed=5, step=2, index=1, probability=spec.dropout)
    adapter = reference.make_adapter(spec, targets, trained.tensors())
    if spec.dropout:
        adapter.masks = lambda target, num: dropout_scale(
            key,
            layer=target.layer,
            module=target.module,
            positions=torch.arange(num),
            num_features=target.in_features,
            dtype=torch.float64,
        )
    model = reference.ReferenceModel(
        config=hf.config, state=hf.state_dict(), cos=rope.cos, sin=rope.sin, windows=config.windows
    )
    run = reference.run(model, adapter, tokens)
    wanted_loss = reference.loss(model, run.hidden, tokens, label_weights)
    (0.25 * wanted_loss).backward()

    num = len(tokens)
    labelled = torch.nonzero(label_weights[1:])[:, 0]
    found = window_loss(
        run.hidden.detach()[labelled],
        tokens[1:][labelled],
        0.25 * label_weights[1:][labelled],
        weights=decoder.weights,
        kernels=decoder.kernels,
        norm_eps=config.rms_norm_eps,
    )
    found_loss = (found.losses.double() * label_weights[1:][labelled]).sum().item()
    assert abs(found_loss - wanted_loss.item()) <= 1e-12 * abs(wanted_loss.item())
    assert found.d_hidden is not None
    d_hidden = torch.zeros(num, config.hidden_size, dtype=torch.float64)
    d_hidden[labelled] = found.d_hidden

    plans = plan_layers(decoder, trained, remat)
    shape = attention_shape(config)
    kv_shape = (shape.num_kv_heads, num, shape.head_dim)
    kv_grads = []
    for plan in plans:
        wants = wants_kv_grads(plan)
        keys, values = (
            torch.zeros(kv_shape, dtype=torch.float64) if want else None for want in wants
        )
        kv_grads.append(KvGrads(keys=keys, values=values))
    windows = list(pairwise(bounds))[::-1]
    layers = [plan.index for plan in plans if not plan.needs.is_empty][::-1]
    order = [(layer, window) for layer in layers for window in windows]
    if not layer_major:
        order.sort(key=lambda item: -item[1][0])
    for layer, (begin, end) in order:
        tensors = {k: v.detach() for k, v in run.tensors[layer].items()}
        heads = {
            k: tensors[k][:end].unflatten(1, (shape.num_kv_heads, -1)).transpose(0, 1)
            for k in ("keys", "values")
        }
        kv = HeldTokens(**heads, first=0, begin=begin, end=end, window=config.windows[layer])
        place = WindowPlace(
            positions=torch.arange(begin, end),
            cos=rope.cos[begin:end],
            sin=rope.sin[begin:end],
            dropout=key if spec.dropout else None,
        )
        plan = plans[layer]
        saved = {k: tensors[k][begin:end] for k in plan.needs.saved}
        d_input = layer_backward(
            plan,
            LayerTensors(plan, saved, place, kv),
            place,
            d_hidden[begin:end],
            kv_grads[layer],
        )
        assert (d_input is None) == (layer == layers[-1])
        if d_input is not None:
            d_hidden[begin:end] = d_input
    for slot in trained.slots:
        wanted = adapter.weights[slot.key].grad
        assert wanted is not None
        assert relative_error(slot.view(trained.grads), wanted) <= 1e-12, slot.key
