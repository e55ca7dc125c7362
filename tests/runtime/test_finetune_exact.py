"""Finetuning through batches, in any windows beside inference, against autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.finetune_strategies import adapter_specs, cuts
from runtime.finetune_harness import (
    FinetuneHand,
    Sample,
    Span,
    gradients,
    random_sample,
    random_weights,
    reference_step,
    relative_error,
    write_weights,
)
from runtime.harness import Row, make_context, random_model, start
from weft.engine.batch import StepResult
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat

FAMILIES = (
    "llama2-mha",
    "llama3-gqa",
    "llama-mqa-biases",
    "mistral-window",
    "qwen2-mixed-windows",
    "qwen3-layer-types",
)
NUM_LAYERS = 3
SPEC = AdapterSpec(rank=4)


@dataclass
class Script:
    """Rows of a sample still to come, forward first, each list in its order."""

    forward: list[Span]
    backward: list[Span]


def draw_script(data: st.DataObject, sample: Sample) -> Script:
    """Windows of one sample: layers in groups, either order."""
    num = sample.num_tokens
    forward = [
        Span(sample=sample, begin=begin, end=end) for begin, end in pairwise(data.draw(cuts(num)))
    ]
    windows = list(pairwise(data.draw(cuts(num))))[::-1]
    groups = list(pairwise(data.draw(cuts(NUM_LAYERS))))[::-1]
    if data.draw(st.booleans(), label="layer-major"):
        # A row of several layers passes the whole sample; single layers go window by window.
        backward: list[Span] = []
        for low, high in groups:
            if high - low > 1:
                backward.append(Span(sample=sample, begin=0, end=num, layers=(low, high)))
            else:
                backward += [
                    Span(sample=sample, begin=begin, end=end, layers=(low, high))
                    for begin, end in windows
                ]
    else:
        backward = [
            Span(sample=sample, begin=begin, end=end, layers=group)
            for begin, end in windows
            for group in groups
        ]
    return Script(forward=forward, backward=backward)


@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_any_windows_beside_any_rows_give_exact_gradients(name: str, data: st.DataObject) -> None:
    spec = data.draw(adapter_specs())
    remat = data.draw(st.sampled_from(Remat))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    samples = [
        random_sample(rng, number, int(rng.integers(2, 50)), loss_scale=0.1 + number, index=number)
        for number in range(data.draw(st.integers(1, 3)))
    ]
    model = random_model(name)
    context = make_context(model, num_sequences=60)
    weights = random_weights(spec, context, seed=1)
    wanted = reference_step(model, context, spec, weights, samples)
    scripts = [draw_script(data, sample) for sample in samples]
    with TemporaryDirectory() as directory:
        path = write_weights(spec, context, weights, Path(directory) / "adapter")
        hand = FinetuneHand(context)
        hand.start(spec, samples=samples, remat=remat, initial_adapter=path)
        run_scripts(hand, scripts, rng)
        hand.step()
        grads = gradients(weights, hand.weights(Path(directory)))
    for sample in samples:
        loss = sum(loss.loss_sum for loss in hand.losses if loss.sample == sample.number)
        assert abs(loss - wanted.losses[sample.number]) <= 1e-12 * wanted.losses[sample.number]
    for key, grad in wanted.grads.items():
        assert relative_error(grads[key], grad) <= 1e-12, key


def run_scripts(hand: FinetuneHand, scripts: list[Script], rng: np.random.Generator) -> None:
    """Rows of all samples in random company: other samples' rows, a prompt, decodes, nothing."""
    prompt = rng.integers(0, 97, 40).tolist()
    position, is_started = 0, False
    while any(script.forward or script.backward for script in scripts):
        forward: list[Span] = []
        backward: list[Span] = []
        for script in scripts:
            if rng.random() < 0.7:
                if script.forward:
                    forward.append(script.forward.pop(0))
                elif script.backward:
                    num = int(rng.integers(1, 4))
                    backward += script.backward[:num]
                    del script.backward[:num]
        rows: list[Row] = []
        starts = [] if is_started else [start(0, prompt)]
        if position < len(prompt) and rng.random() < 0.6:
            count = int(rng.integers(1, 12))
            tokens = prompt[position : position + count]
            is_decode = position > 0 and len(tokens) == 1
            rows.append(Row(slot=0, tokens=tokens, begin=position, is_decode=is_decode))
            position += len(tokens)
        if rows or forward or backward:
            is_started = is_started or bool(rows)
            hand.run(rows=rows, forward=forward, backward=backward, starts=starts if rows else ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inference_rows_do_not_notice_finetuning_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same tokens, and log-probabilities within each dtype's round-off."""
    model = random_model("llama3-gqa")
    prompt = list(range(3, 33))

    def serve(hand: FinetuneHand, finetunes: bool) -> list[StepResult]:
        rng = np.random.default_rng(0)
        sample = random_sample(rng, 0, 30)
        parts = [{} for _ in range(5)]
        if finetunes:
            spans = [Span(sample=sample, begin=b, end=e) for b, e in ((0, 9), (9, 30))]
            back = [
                Span(sample=sample, begin=b, end=e, layers=(0, 3)) for b, e in ((20, 30), (0, 20))
            ]
            parts = [
                {"forward": spans[:1]},
                {"forward": spans[1:]},
                {"backward": back[:1]},
                {"backward": back[1:]},
                {},
            ]
            hand.start(SPEC, samples=[sample])
        results = [
            hand.run(rows=[Row(slot=0, tokens=prompt[:20])], starts=[start(0, prompt)], **parts[0]),
            hand.run(rows=[Row(slot=0, tokens=prompt[20:], begin=20)], **parts[1]),
        ]
        for step in range(3):
            token = int(results[-1].tokens[0, 0])
            row = Row(slot=0, tokens=[token], begin=30 + step, is_decode=True)
            results.append(hand.run(rows=[row], **parts[2 + step]))
        return results

    alone = serve(FinetuneHand(make_context(model, dtype=dtype)), False)
    hand = FinetuneHand(make_context(model, dtype=dtype))
    beside = serve(hand, True)
    assert len(hand.losses) == 2  # the finetuning rows did run
    hand.step()
    assert hand.outcomes[-1].steps[0].grad_norm > 0
    for a, b in zip(alone, beside, strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert a.logprobs is not None
        assert b.logprobs is not None
        tolerance = 1e-12 if dtype is torch.float64 else 1e-5 if dtype is torch.float32 else 0.05
        assert np.allclose(a.logprobs.top, b.logprobs.top, atol=tolerance, rtol=0)
