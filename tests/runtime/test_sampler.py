"""The sampler against plain NumPy definitions, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.harness import start
from weft.engine.batch import Batch, SegmentKind
from weft.engine.sampling import uniforms
from weft.runtime.sampler import Sampled, sample
from weft.runtime.sampling_plan import plan_sampling
from weft.runtime.slots import SlotTable

CPU = torch.device("cpu")
POSITION = 9
"""Of each row's last token; the drawn token takes the next."""


def batch_of(slots: list[int], masks: np.ndarray | None = None) -> Batch:
    num = len(slots)
    return Batch(
        batch_id=0,
        kinds=np.full(num, SegmentKind.DECODE, np.uint8),
        slots=np.array(slots, np.int32),
        row_starts=np.arange(num + 1, dtype=np.int32),
        layers=np.zeros((num, 2), np.int16),
        adapters=np.full(num, -1, np.int32),
        models=np.zeros(num, np.uint8),
        token_ids=np.zeros(num, np.int32),
        positions=np.full(num, POSITION, np.int32),
        prefix_lens=np.full(num, POSITION + 1, np.int32),
        page_tables=(),
        write_slots=(),
        sample_rows=np.arange(num, dtype=np.int32),
        prompt_logprob_rows=np.empty(0, np.int32),
        logits_masks=masks,
    )


def run(
    logits: torch.Tensor,
    params: list[dict[str, Any]],
    *,
    prompts: list[list[int]] | None = None,
    outputs: list[list[int]] | None = None,
    masks: np.ndarray | None = None,
    seed: int = 3,
) -> Sampled:
    """Sample one token for each row of logits, row r with the parameters `params[r]`."""
    table = SlotTable(len(params), logits.shape[1], CPU)
    for slot, given_params in enumerate(params):
        prompt = prompts[slot] if prompts else [0]
        begun = start(slot, prompt, seed=seed + slot, **{"logprobs": None, **given_params})
        output = outputs[slot] if outputs else []
        tokens = np.array([*prompt, *output], np.int32)
        banned = given_params.get("stop_token_ids", ())
        begun = type(begun)(
            **{
                name: getattr(begun, name)
                for name in ("slot", "sequence_id", "num_prompt_tokens", "sampling", "seed")
            },
            token_ids=tokens,
            banned_until_min_tokens=banned,
        )
        table.apply(np.empty(0, np.int32), [begun])
    batch = batch_of(list(range(len(params))), masks)
    return sample(logits, plan_sampling(batch, table, CPU))


def expected_token(scores: np.ndarray, seed: int, **params: Any) -> int:
    """The definition: temperature, min_p, top_k, top_p, then the inverse CDF in id order."""
    scores = scores.astype(np.float64) / params.get("temperature", 1.0)
    weights = np.exp(scores - scores.max())
    weights[weights < params.get("min_p", 0.0)] = 0
    top_k = params.get("top_k", 0)
    if top_k > 0:
        weights[weights < np.sort(weights)[-min(top_k, len(weights))]] = 0
    top_p = params.get("top_p", 1.0)
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= top_p * weights.sum()]] = 0
    u = uniforms(np.array([seed], np.uint64), np.zeros(1, np.int64), np.array([POSITION + 1]))[0]
    return int(np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right"))


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 200, 1000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([7, 300, 4097, 20000]),
)
def test_draws_follow_the_definition_in_any_company(
    params: list[dict[str, Any]], seed: int, vocab_size: int
) -> None:
    rng = np.random.default_rng(seed)
    # A few tokens stand out in some rows, none in others.
    logits = rng.normal(size=(len(params), vocab_size)) * rng.uniform(0.01, 4, (len(params), 1))
    tokens = run(torch.from_numpy(logits), params, seed=seed).tokens.tolist()
    expected = [
        expected_token(row, seed + slot, **row_params)
        for slot, (row, row_params) in enumerate(zip(logits, params, strict=True))
    ]
    assert tokens == expected


def test_frequencies_match_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    num = 4000
    tokens = run(logits.repeat(num, 1), [{"temperature": 1.0}] * num).tokens
    shares = torch.bincount(tokens, minlength=4) / num
    assert (shares - logits.exp()).abs().max() < 0.03


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 50)))
    params = [{"temperature": 0.0}, {"temperature": 1.5}, {"temperature": 1e-6}]
    sampled = run(logits, params)
    best = logits.argmax(-1).tolist()
    assert sampled.tokens.tolist() == [
        best[0],
        expected_token(logits[1].numpy(), 4, temperature=1.5),
        best[2],
    ]


def test_penalties_are_openais_and_ctrls() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.8, -1.0, 1.0]] * 5, dtype=torch.float64)
    params = [
        {"repetition_penalty": 2.0},
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 0.15},
        {"presence_penalty": 0.15},
        {"frequency_penalty": -2.0},
    ]
    prompts = [[0, 1], [0], [0, 0, 0], [0], [2]]
    outputs = [[2], [1], [0], [0], [3, 3, 3]]
    sampled = run(logits, params, prompts=prompts, outputs=outputs)
    # Row 0: 2/2, 1.9/2, 1.8/2 against 1.0: the first of the equal ones. Row 2: prompt tokens do
    # not count, one output does: 1.85. Row 4: -1 + 3 * 2 = 5.
    assert sampled.tokens.tolist() == [0, 2, 1, 1, 3]


def test_counts_grow_with_what_is_sampled() -> None:
    table = SlotTable(1, 4, CPU)
    begun = start(0, [3], logprobs=None, frequency_penalty=1.0)
    table.apply(np.empty(0, np.int32), [begun])
    logits = torch.tensor([[2.5, 2.0, 0.0, 0.0]])
    seen = []
    for _ in range(4):
        plan = plan_sampling(batch_of([0]), table, CPU)
        tokens = sample(logits, plan).tokens
        assert plan.edits is not None
        assert plan.edits.penalties is not None
        table.record(np.array([0], np.int32), tokens, plan.edits.penalties)
        seen += tokens.tolist()
    assert seen == [0, 1, 0, 1]
    assert table.last_token.tolist() == [1]


def test_masks_bans_and_biases() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0] + [0.0] * 36] * 4)
    masks = np.full((4, 2), 0xFFFFFFFF, np.uint32)
    masks[0, 0] = 0b1100
    masks[3] = (0, 1 << 5)
    params = [
        {},
        {"min_tokens": 2, "stop_token_ids": (0, 1)},
        {"logit_bias": {0: -100.0, 3: 2.5, 39: 1.0}},
        {},
    ]
    prompts = [[0], [1] * POSITION, [0], [0]]
    sampled = run(logits, params, masks=masks, prompts=prompts)
    assert sampled.tokens.tolist() == [2, 2, 3, 37]
    # Ten tokens of output and more: the ban is over.
    sampled = run(logits, params, masks=masks, prompts=[[0]] * 4)
    assert sampled.tokens[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_take_the_first_of_the_likeliest(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(5, 700))).to(dtype)
    logits[1, [30, 400]] = 9.0
    logits[2, 5] = float("nan")
    logits[3, 699] = float("inf")
    logits[4] = -float("inf")
    sampled = run(logits, [{}] * 5)
    assert sampled.tokens.tolist() == [int(logits[0].argmax()), 30, 0, 0, 0]
    assert sampled.is_ok.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_fail_alone(poison: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 60)))
    params = [{"temperature": t, "top_p": p} for t, p in ((0, 1), (1, 0.9), (0, 1), (1, 1))]
    clean = run(logits, params)
    logits[1, 7] = poison
    logits[2, 59] = poison
    sampled = run(logits, params)
    assert sampled.is_ok.tolist() == [True, False, False, True]
    assert sampled.tokens[[0, 3]].tolist() == clean.tokens[[0, 3]].tolist()
    assert sampled.tokens[[1, 2]].tolist() == [0, 0]


def test_a_mask_that_allows_nothing_fails_the_row() -> None:
    logits = torch.zeros(2, 32)
    masks = np.array([[0], [1]], np.uint32)
    assert run(logits, [{}, {}], masks=masks).is_ok.tolist() == [False, True]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(3, 40)))
    params = [{"logprobs": 2, "logit_bias": {5: 100.0}}, {}, {"logprobs": 4, "temperature": 0.7}]
    sampled = run(logits, params)
    assert sampled.logprobs is not None
    reference = logits.log_softmax(-1)
    for index, row in enumerate((0, 2)):
        token = sampled.tokens[row]
        torch.testing.assert_close(sampled.logprobs.chosen[index], reference[row, token])
        order = reference[row].argsort(descending=True)
        assert order[sampled.logprobs.ranks[index] - 1] == token
        assert sampled.logprobs.top_ids[index].tolist() == order[:4].tolist()
    assert sampled.tokens[0] == 5


def test_numbers_drawn_ahead_are_those_of_their_positions() -> None:
    table = SlotTable(3, 8, CPU)
    slots = np.array([2, 0], np.int32)
    for seed, positions in ((1, range(90, 300)), (2, (5, 4, 1000, 1001, 6))):
        begun = [start(slot, [0], seed=seed + slot, temperature=1.0) for slot in (0, 2)]
        table.apply(np.empty(0, np.int32), begun)
        for position in positions:
            at = np.array([position, position + 3 * seed])
            expected = uniforms(
                slots.astype(np.uint64) + np.uint64(seed), np.zeros(2, np.int64), at
            )
            assert np.array_equal(table.uniforms_at(slots, at), expected)


def test_freed_slots_give_their_penalty_rows_back() -> None:
    table = SlotTable(8, 16, CPU)
    for _ in range(20):
        table.apply(
            np.arange(8, dtype=np.int32),
            [start(slot, [slot], presence_penalty=1.0) for slot in range(8)],
        )
    assert table.penalty_pool.output_counts.shape[0] == 8
