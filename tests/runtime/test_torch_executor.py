"""Batches made by hand: pages scattered, rows of all kinds together, tokens not known yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.tiny_models import CONFIGS
from runtime.harness import HandMade, Row, make_context, random_model, reference_logits, start
from weft.base.errors import IntegrityError, UnsupportedError
from weft.engine import wire
from weft.engine.batch import UNKNOWN_TOKEN, Batch, SegmentKind, StepResult
from weft.model.kernels.cpu_team import native_kernels

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 97, size).tolist() for size in (61, 7, 30, 45)]


def engine(name: str = "llama3-gqa", dtype: torch.dtype = torch.float64) -> HandMade:
    context = make_context(random_model(name), dtype=dtype, num_sequences=20)
    # Whatever a page held before must not matter.
    context.arena.view(dtype).fill_(float("nan"))
    return HandMade(context)


def assert_logprobs(result: StepResult, sample: int, name: str, tokens: list[int]) -> None:
    """The result's likeliest tokens are transformers' after `tokens`, with their logprobs."""
    assert result.logprobs is not None
    expected = reference_logits(random_model(name), tokens)[-1].log_softmax(-1)
    ids = result.logprobs.top_ids[sample, 0]
    found = torch.from_numpy(result.logprobs.top[sample, 0])
    torch.testing.assert_close(found, expected[ids].float(), rtol=0, atol=5e-5)
    torch.testing.assert_close(found, expected.topk(20).values.float(), rtol=0, atol=5e-5)
    assert result.tokens[sample, 0] == ids[0]


def run(hand: HandMade, batch: Batch) -> StepResult:
    hand.executor.submit(wire.decode(wire.encode(batch), Batch))
    return hand.executor.collect()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixed_rows_equal_whole_sequences(name: str, dtype: torch.dtype) -> None:
    hand = engine(name, dtype)
    starts = [start(slot, tokens) for slot, tokens in enumerate(SEQUENCES)]
    # Chunks of three prompts of which one samples; then a decode, a chunk and a fresh prompt.
    first = run(
        hand,
        hand.batch(
            [
                Row(slot=0, tokens=SEQUENCES[0][:23], samples=False),
                Row(slot=1, tokens=SEQUENCES[1]),
                Row(slot=2, tokens=SEQUENCES[2][:17], samples=False),
            ],
            starts=starts[:3],
        ),
    )
    assert_logprobs(first, 0, name, SEQUENCES[1])
    token = int(first.tokens[0, 0])
    second = run(
        hand,
        hand.batch(
            [
                Row(slot=1, tokens=[token], begin=7, is_decode=True),
                Row(slot=2, tokens=SEQUENCES[2][17:], begin=17),
                Row(slot=0, tokens=SEQUENCES[0][23:24], begin=23, samples=False),
                Row(slot=3, tokens=SEQUENCES[3]),
            ],
            starts=starts[3:],
        ),
    )
    assert second.num_tokens.tolist() == [1, 1, 1]
    assert_logprobs(second, 0, name, [*SEQUENCES[1], token])
    assert_logprobs(second, 1, name, SEQUENCES[2])
    assert_logprobs(second, 2, name, SEQUENCES[3])
    grown = [int(second.tokens[sample, 0]) for sample in range(3)]
    third = run(
        hand,
        hand.batch(
            [
                Row(slot=3, tokens=[grown[2]], begin=45, is_decode=True),
                Row(slot=1, tokens=[grown[0]], begin=8, is_decode=True),
                Row(slot=0, tokens=SEQUENCES[0][24:], begin=24),
            ]
        ),
    )
    assert_logprobs(third, 0, name, [*SEQUENCES[3], grown[2]])
    assert_logprobs(third, 1, name, [*SEQUENCES[1], token, grown[0]])
    assert_logprobs(third, 2, name, SEQUENCES[0])


def test_unknown_tokens_are_what_the_last_batch_sampled() -> None:
    name = "llama2-mha"
    hand = engine(name)
    executor = hand.executor
    executor.submit(
        hand.batch(
            [Row(slot=1, tokens=SEQUENCES[1]), Row(slot=2, tokens=SEQUENCES[2])],
            starts=[start(1, SEQUENCES[1]), start(2, SEQUENCES[2])],
        )
    )
    executor.submit(
        hand.batch(
            [
                Row(slot=2, tokens=[UNKNOWN_TOKEN], begin=30, is_decode=True),
                Row(slot=1, tokens=[UNKNOWN_TOKEN], begin=7, is_decode=True),
            ]
        )
    )
    first, second = executor.collect(), executor.collect()
    assert (first.batch_id, second.batch_id) == (1, 2)
    assert_logprobs(second, 0, name, [*SEQUENCES[2], int(first.tokens[1, 0])])
    assert_logprobs(second, 1, name, [*SEQUENCES[1], int(first.tokens[0, 0])])


def test_moved_pages_carry_their_keys_and_values() -> None:
    name = "qwen2"
    hand = engine(name)
    run(
        hand,
        hand.batch(
            [Row(slot=0, tokens=SEQUENCES[0][:40], samples=False)],
            starts=[start(0, SEQUENCES[0])],
        ),
    )
    # Slot 3 shares nothing with slot 0, whose three pages are copied to its own.
    moves = np.stack((hand.tables[0][0, :3], hand.tables[0][3, :3]), axis=1)
    result = run(
        hand,
        hand.batch(
            [Row(slot=3, tokens=SEQUENCES[0][40:], begin=40)],
            starts=[start(3, SEQUENCES[0])],
            page_moves=moves,
        ),
    )
    assert_logprobs(result, 0, name, SEQUENCES[0])


def test_prompt_logprobs_of_chunks_cover_the_prompt() -> None:
    name = "llama3-gqa"
    hand = engine(name)
    prompt = SEQUENCES[0][:50]
    expected = reference_logits(random_model(name), prompt).log_softmax(-1)
    begun = start(0, prompt, prompt_logprobs=3)
    reports = []
    for begin, end in ((0, 20), (20, 21), (21, 50)):
        row = Row(
            slot=0, tokens=prompt[begin:end], begin=begin, samples=end == 50, ranks_prompt=True
        )
        result = run(hand, hand.batch([row], starts=[begun] if begin == 0 else []))
        reports += result.prompt_logprobs
    assert [report.begin for report in reports] == [1, 21, 22]
    chosen = np.concatenate([report.chosen for report in reports])
    assert len(chosen) == 49
    for position, logprob in enumerate(chosen, start=1):
        assert abs(logprob - float(expected[position - 1, prompt[position]])) < 1e-5
    top_ids = np.concatenate([report.top_ids for report in reports])
    assert top_ids.tolist() == expected[:-1].topk(3).indices.tolist()
    ranks = np.concatenate([report.ranks for report in reports])
    assert ranks[0] == 1 + int((expected[0] > expected[0, prompt[1]]).sum())


def test_a_sequence_whose_logits_are_not_finite_fails_alone() -> None:
    name = "mistral-window"
    hand = engine(name)
    embedding = hand.context.decoder.weights.embedding.dense()
    poisoned = 96
    embedding[poisoned] = float("nan")
    prompts = [[1, 2, 3], [4, poisoned, 5], [6, 7]]
    result = run(
        hand,
        hand.batch(
            [Row(slot=slot, tokens=prompt) for slot, prompt in enumerate(prompts)],
            starts=[start(slot, prompt) for slot, prompt in enumerate(prompts)],
        ),
    )
    assert result.num_tokens.tolist() == [1, 0, 1]
    assert_logprobs(result, 0, name, prompts[0])
    assert_logprobs(result, 2, name, prompts[2])


def test_rows_without_samples_give_an_empty_result() -> None:
    hand = engine()
    result = run(
        hand,
        hand.batch([Row(slot=0, tokens=[1, 2], samples=False)], starts=[start(0, [1, 2, 3])]),
    )
    assert result.tokens.shape == (0, 1)
    assert result.num_tokens.shape == (0,)
    assert result.logprobs is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": np.array([SegmentKind.VERIFY], np.uint8)}, "VERIFY.*PREFILL, DECODE"),
        ({"kinds": np.array([SegmentKind.FT_BACKWARD], np.uint8)}, "FT_BACKWARD"),
        ({"models": np.ones(1, np.uint8)}, "draft"),
        ({"layers": np.array([[0, 2]], np.int16)}, "partial layer ranges"),
    ],
)
def test_what_the_executor_lacks_is_refused_by_name(
    changes: dict[str, object], message: str
) -> None:
    hand = engine()
    with pytest.raises(UnsupportedError, match=message):
        hand.executor.submit(hand.batch([Row(slot=0, tokens=[1])], starts=(), **changes))


def test_misuse_is_an_integrity_error() -> None:
    hand = engine()
    with pytest.raises(IntegrityError, match="without a submitted batch"):
        hand.executor.collect()
    hand.executor.close()
    hand.executor.close()
    with pytest.raises(IntegrityError, match="closed"):
        hand.executor.submit(hand.batch([Row(slot=0, tokens=[1])]))


def test_an_executor_adopts_the_pages_of_its_predecessor() -> None:
    name = "llama2-mha"
    hand = engine(name)
    run(
        hand,
        hand.batch(
            [Row(slot=0, tokens=SEQUENCES[0][:40], samples=False)], starts=[start(0, SEQUENCES[0])]
        ),
    )
    hand.executor.close()
    heir = HandMade(hand.context)
    heir.tables = hand.tables
    result = run(
        heir,
        heir.batch(
            [Row(slot=0, tokens=SEQUENCES[0][40:], begin=40)], starts=[start(0, SEQUENCES[0])]
        ),
    )
    assert_logprobs(result, 0, name, SEQUENCES[0])


@pytest.mark.parametrize("name", ["llama3-gqa", "qwen2-mixed-windows", "qwen3", "llama2-mha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_decodes_equal_the_decoders_own(name: str, dtype: torch.dtype) -> None:
    if native_kernels() is None:
        pytest.skip("no native CPU kernels on this processor")
    context = make_context(random_model(name), dtype=dtype, num_sequences=20)
    recorded = HandMade(context, replays_decodes=True)
    plain = HandMade(context, replays_decodes=False)
    prefill = recorded.batch(
        [Row(slot=slot, tokens=tokens) for slot, tokens in enumerate(SEQUENCES)],
        starts=[start(slot, tokens) for slot, tokens in enumerate(SEQUENCES)],
    )
    tokens = run(plain, prefill).tokens[:, 0]
    assert np.array_equal(run(recorded, prefill).tokens[:, 0], tokens)
    # Fewer rows than were recorded, in another order, and one slot less each time.
    for step, slots in enumerate(([2, 0, 3, 1], [1, 2, 0], [0, 2], [2])):
        batch = recorded.batch(
            [
                Row(
                    slot=slot,
                    tokens=[UNKNOWN_TOKEN],
                    begin=len(SEQUENCES[slot]) + step,
                    is_decode=True,
                )
                for slot in slots
            ]
        )
        ours, theirs = run(recorded, batch), run(plain, batch)
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert np.array_equal(ours.tokens, theirs.tokens)
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        np.testing.assert_allclose(ours.logprobs.chosen, theirs.logprobs.chosen, atol=tolerance)
    assert recorded.num_replayed == 4
    assert plain.num_replayed == 0
