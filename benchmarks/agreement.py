"""Do the engines say the same? Greedy tokens of each on the trained model, against transformers."""

from __future__ import annotations

import inspect
import json.decoder
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from bench_models import BenchModel
from peers.client import Worker, WorkerError
from tokenizers import Tokenizer

REFERENCE = ("transformers", "float32")
PROMPT_LENS = (48, 96, 160, 31)
NUM_NEW_TOKENS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Leading tokens equal to the reference's, over a batch of prompts of mixed lengths."""

    engine: str
    num_equal: int
    num_tokens: int
    largest_gap: float | None
    """Reference's top-2 logit gap at the first differing tokens; None where none differs."""

    def describe(self) -> str:
        text = f"greedy tokens: {self.engine}: {self.num_equal}/{self.num_tokens} as {REFERENCE[0]}"
        if self.largest_gap is not None:
            text += f" (largest top-2 logit gap where a row first differs: {self.largest_gap:.2g})"
        return text


def check_agreement(
    model: BenchModel, workers: Mapping[tuple[str, str], Worker]
) -> list[Agreement]:
    """Compare every loaded engine with the reference; only a trained model tells something."""
    if model.name != "embedded" or REFERENCE not in workers:
        return []
    reference = workers[REFERENCE]
    prompts = _real_prompts(model)
    counts = [NUM_NEW_TOKENS] * len(prompts)
    expected = reference.generate(prompts, counts).tokens
    out: list[Agreement] = []
    for name, worker in workers.items():
        if name == REFERENCE:
            continue
        try:
            got = worker.generate(prompts, counts).tokens
        except WorkerError:
            continue
        num_equal = 0
        gaps: list[float] = []
        for prompt, want, have in zip(prompts, expected, got, strict=True):
            same = _common_prefix(want, have)
            num_equal += same
            if same < len(want):
                gaps.append(reference.call("top2_gap", tokens=prompt + want[:same]))
        out.append(
            Agreement(
                engine=" ".join(name),
                num_equal=num_equal,
                num_tokens=sum(counts),
                largest_gap=max(gaps) if gaps else None,
            )
        )
    return out


def _real_prompts(model: BenchModel) -> list[list[int]]:
    """Python source, which is what the embedded model has learnt."""
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    text = inspect.getsource(json.decoder) + inspect.getsource(textwrap)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    starts = [0, 200, 500, 900]
    return [ids[start : start + length] for start, length in zip(starts, PROMPT_LENS, strict=True)]


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a != b:
            return index
    return len(left)
