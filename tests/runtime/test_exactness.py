"""Every family against transformers: chunks, mixed batches, prefix hits and preemptions included.

A greedy answer is right if, for the sequence as a whole, transformers' likeliest token at every
position of the answer is the answer's next one: by induction that is its own greedy decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from model.tiny_models import CONFIGS
from runtime.harness import (
    Run,
    make_context,
    mixed_requests,
    random_model,
    reference_logits,
    run_requests,
)
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.model.config import ModelConfig
from weft.model.kernels.cpu_team import native_kernels

NUM_PROMPTS = 200
MAX_MODEL_LEN = 96


def assert_events_happened(run: Run) -> None:
    assert run.stats.num_preemptions > 0
    assert run.stats.prefix_cache_hits > 0
    assert run.stats.num_chunked_prefills > 0


def replace_sampling(request: Request, **changes: Any) -> Request:
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **changes))


def serve(name: str, requests: list[Request], dtype: torch.dtype) -> Run:
    """Serve on an arena so small that sequences are preempted."""
    model = random_model(name)
    context = make_context(model, dtype=dtype, max_model_len=MAX_MODEL_LEN, num_sequences=1.7)
    return run_requests(context, requests)


def assert_right(model: PreTrainedModel, requests: list[Request], run: Run) -> None:
    """Every answer is full, and transformers' own greedy one."""
    for request in requests:
        output = run.outputs[request.id, 0]
        assert len(output.tokens) == request.sampling.max_tokens
        logits = reference_logits(model, [*request.prompt_token_ids, *output.tokens])
        expected = logits[len(request.prompt_token_ids) - 1 : -1].argmax(-1)
        assert output.tokens == expected.tolist(), request.id


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_greedy_is_token_for_token(name: str) -> None:
    requests = mixed_requests(name, NUM_PROMPTS)
    run = serve(name, requests, torch.float64)
    assert_events_happened(run)
    assert_right(random_model(name), requests, run)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CONFIGS)
def test_float64_greedy_is_token_for_token_at_any_size(name: str, seed: int) -> None:
    """More prompts, other weights, and another shape of engine for each seed."""
    rng = np.random.default_rng(seed)
    requests = mixed_requests(name, 400, seed=100 + seed)
    model = random_model(name, seed)
    context = make_context(model, max_model_len=MAX_MODEL_LEN, num_sequences=rng.uniform(1.2, 6))
    run = run_requests(
        context,
        requests,
        max_num_seqs=int(rng.integers(2, 24)),
        max_num_batched_tokens=int(rng.integers(24, 96)),
        arrivals_per_step=int(rng.integers(1, 6)),
    )
    assert_right(model, requests, run)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_differs_only_at_ties_and_logprobs_agree(name: str) -> None:
    requests = [
        # Prompt log-probabilities need the whole prompt computed: such requests skip the cache.
        replace_sampling(request, prompt_logprobs=(2, None, None)[index % 3])
        for index, request in enumerate(mixed_requests(name, NUM_PROMPTS, seed=1, logprobs=3))
    ]
    run = serve(name, requests, torch.float32)
    assert_events_happened(run)
    model = random_model(name)
    if (
        native_kernels() is not None
        and ModelConfig.from_dict(model.config.to_dict()).head_dim % 16 == 0
    ):
        assert run.num_replayed > 0
    num_ties = 0
    for request in requests:
        output = run.outputs[request.id, 0]
        prompt = request.prompt_token_ids
        logits = reference_logits(model, [*prompt, *output.tokens])
        logprobs = logits.log_softmax(-1)
        for position, entry in enumerate(output.prompt_logprobs, start=1):
            assert entry.token_id == prompt[position]
            assert abs(entry.logprob - logprobs[position - 1, entry.token_id]) < 1e-4
        asked = request.sampling.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == (len(prompt) - 1 if asked else 0)
        for step, (token, entry) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
            row = logprobs[len(prompt) - 1 + step]
            best = row.topk(2)
            if token != int(best.indices[0]):
                assert best.values[0] - best.values[1] < 1e-5, request.id
                num_ties += 1
                break
            assert entry.token_id == token
            assert abs(entry.logprob - row[token]) < 1e-4
            assert entry.rank == 1
            top = torch.tensor([logprob for _, logprob in entry.top])
            assert (top - row[[token_id for token_id, _ in entry.top]]).abs().max() < 1e-4
    assert num_ties <= 0.005 * NUM_PROMPTS


@pytest.mark.parametrize("name", ["llama3-gqa", "mistral-window", "qwen3-layer-types"])
def test_a_seeded_request_draws_the_same_whatever_runs_beside_it(name: str) -> None:
    """In float64 exactly: alone, in the crowd, and after a preemption."""
    crowd = [
        dataclasses.replace(
            request,
            sampling=SamplingParams(
                temperature=0.5 + index % 3,
                top_p=(1.0, 0.8)[index % 2],
                top_k=(0, 0, 7, 40)[index % 4],
                min_p=(0.0, 0.05)[index % 5 == 0],
                frequency_penalty=(0.0, 0.7)[index % 6 == 0],
                repetition_penalty=(1.0, 1.3)[index % 7 == 0],
                max_tokens=12,
                seed=index * 7919,
                n=1 + (index % 9 == 0),
            ),
        )
        for index, request in enumerate(mixed_requests(name, 60, seed=2))
    ]
    together = serve(name, crowd, torch.float64)
    assert_events_happened(together)
    model = random_model(name)
    context = make_context(model, max_model_len=MAX_MODEL_LEN)
    for request in crowd[::3]:
        alone = run_requests(context, [request], max_num_batched_tokens=128)
        assert alone.stats.num_preemptions == 0
        for choice in range(request.sampling.n):
            key = (request.id, choice)
            assert alone.outputs[key].tokens == together.outputs[key].tokens


def test_choices_of_one_request_differ_and_share_a_seed() -> None:
    model = random_model("llama2-mha")
    context = make_context(model)
    request = Request(
        id="r",
        prompt_token_ids=tuple(range(40)),
        sampling=SamplingParams(n=4, seed=5, max_tokens=16, temperature=2.0),
    )
    run = run_requests(context, [request])
    answers = {tuple(run.outputs["r", choice].tokens) for choice in range(4)}
    assert len(answers) == 4


@pytest.mark.parametrize("name", ["llama3-gqa", "qwen2"])
def test_bfloat16_follows_the_reference_within_its_precision(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    requests = mixed_requests(name, 60, seed=3, logprobs=0)
    run = serve(name, requests, torch.bfloat16)
    model = random_model(name)
    num_same, errors = 0, []
    for request in requests:
        output = run.outputs[request.id, 0]
        prompt = request.prompt_token_ids
        logprobs = reference_logits(model, [*prompt, *output.tokens]).log_softmax(-1)
        rows = logprobs[len(prompt) - 1 : -1]
        num_same += output.tokens == rows.argmax(-1).tolist()
        errors += [
            abs(entry.logprob - float(row[entry.token_id]))
            for entry, row in zip(output.logprobs, rows, strict=True)
        ]
    record_property("share_of_identical_answers", num_same / len(requests))
    mean = sum(errors) / len(errors)
    record_property("mean_logprob_error", mean)
    assert mean < 0.15
