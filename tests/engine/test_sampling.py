"""What a request may ask for, and the random numbers behind it."""

from __future__ import annotations

import numpy as np
import pytest

from weft.base.errors import InvalidRequestError
from weft.engine.sampling import SamplingParams, uniforms

WRONG = [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("temperature", None),
    ("temperature", True),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", "x"),
    ("min_p", -0.1),
    ("n", 0),
    ("n", 1.5),
    ("n", "2"),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("min_tokens", 17),
    ("stop", ("",)),
    ("stop", 5),
    ("stop", ("a", 3)),
    ("stop", ("x",) * 17),
    ("stop_token_ids", "ab"),
    ("stop_token_ids", (1.5,)),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 3.0}),
    ("logit_bias", {1: "x"}),
    ("logit_bias", {1: 101.0}),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-300),
    ("presence_penalty", 2.1),
    ("frequency_penalty", "a"),
    ("logprobs", 21),
    ("logprobs", 1.5),
    ("prompt_logprobs", True),
    ("seed", "a"),
    ("seed", 2**64),
    ("ignore_eos", "no"),
]


@pytest.mark.parametrize(("param", "value"), WRONG, ids=[f"{p}={v!r}" for p, v in WRONG])
def test_wrong_values_are_refused_by_name(param, value):
    with pytest.raises(InvalidRequestError, match=param) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


def test_vllm_s_spellings_of_nothing_are_taken():
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, seed=None, top_k=-1)
    assert params.stop == ()
    assert params.stop_token_ids == ()
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"], stop_token_ids=[1]).stop == ("x", "y")
    assert SamplingParams(top_k=2**70).top_k == 2**31 - 1


def test_draws_are_uniform_and_depend_on_every_part_of_their_counter():
    size = 20_000
    seeds, zeros = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    index = np.arange(size)
    by_part = [
        uniforms(index.astype(np.uint64), zeros, zeros),
        uniforms(seeds, index, zeros),
        uniforms(seeds, zeros, index),
        uniforms(seeds, zeros, zeros, index),
    ]
    for draws in by_part:
        assert draws.min() >= 0
        assert draws.max() < 1
        assert len(np.unique(draws)) == size
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
        distance = np.abs(np.sort(draws) - (index + 0.5) / size).max()
        assert distance < 1.95 / size**0.5
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    again = uniforms(seeds[:1], zeros[:1], np.array([7]))
    assert again[0] == by_part[2][7]
