"""What every engine is asked to do: batches of random prompts of equal or of mixed lengths."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from peers.roster import OURS, Engine

FIRST_PLAIN_TOKEN_ID = 3
"""Below are beginning, end and padding, which no prompt holds."""


class Kind(StrEnum):
    """The four questions asked."""

    UNIFORM = "uniform"
    """Equal prompts, equal answers."""
    MIXED = "mixed"
    """Prompt and answer lengths spread evenly around the same means."""
    TTFT = "ttft"
    """One prompt, one token."""
    PREFILL = "prefill"
    """One long prompt, one token; ours against the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One point of the measurement."""

    name: str
    kind: Kind
    prompt_lens: tuple[int, ...]
    num_new_tokens: tuple[int, ...]
    num_repeats: int = 1

    @property
    def batch(self) -> int:
        return len(self.prompt_lens)

    def admits(self, engine: Engine) -> bool:
        """The long prefill is set against the machine's own rate, so only ours runs it."""
        return self.kind is not Kind.PREFILL or engine.name.startswith(OURS)

    def shortened(self) -> Workload:
        """The same batch for a warm-up: half prompts, at most four tokens an answer."""
        return replace(
            self,
            prompt_lens=tuple(max(4, length // 2) for length in self.prompt_lens),
            num_new_tokens=tuple(min(4, count) for count in self.num_new_tokens),
        )


def standard_workloads(
    *, batches: Sequence[int], kinds: Sequence[str], max_len: int, quick: bool
) -> list[Workload]:
    """256-token prompts and 128 new tokens at each batch; mixed lengths where a batch has some."""
    prompt_len, num_new = (32, 16) if quick else (256, 128)
    out: list[Workload] = []
    for batch in batches:
        if Kind.UNIFORM in kinds:
            out.append(
                Workload(
                    name=f"batch {batch}",
                    kind=Kind.UNIFORM,
                    prompt_lens=(prompt_len,) * batch,
                    num_new_tokens=(num_new,) * batch,
                )
            )
        if Kind.MIXED in kinds and batch > 1:
            out.append(_mixed(batch, prompt_len, num_new))
    if Kind.TTFT in kinds:
        out.append(_one_token("ttft", Kind.TTFT, prompt_len, num_repeats=3))
    if Kind.PREFILL in kinds and max_len > 2048 and not quick:
        out.append(_one_token("prefill 2048", Kind.PREFILL, 2048, num_repeats=1))
    return out


def draw_prompts(
    workload: Workload, config: dict[str, Any], round_index: int, repeat: int
) -> tuple[list[list[int]], list[int]]:
    """Fresh tokens for each round, the same for every engine: no prompt cache can help anyone."""
    seed = (zlib.crc32(workload.name.encode()), round_index + 1, repeat)
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(FIRST_PLAIN_TOKEN_ID, config["vocab_size"], length).tolist()
        for length in workload.prompt_lens
    ]
    return prompts, list(workload.num_new_tokens)


def _mixed(batch: int, prompt_len: int, num_new: int) -> Workload:
    """Lengths from an eighth (a quarter) of the mean up, evenly, prompts and answers unrelated."""
    prompts = np.linspace(prompt_len / 8, prompt_len * 15 / 8, batch).round().astype(int)
    answers = np.linspace(num_new / 4, num_new * 7 / 4, batch).round().astype(int)
    rng = np.random.default_rng(batch)
    return Workload(
        name=f"mixed {batch}",
        kind=Kind.MIXED,
        prompt_lens=tuple(rng.permutation(prompts).tolist()),
        num_new_tokens=tuple(rng.permutation(answers).tolist()),
    )


def _one_token(name: str, kind: Kind, prompt_len: int, *, num_repeats: int) -> Workload:
    return Workload(
        name=name,
        kind=kind,
        prompt_lens=(prompt_len,),
        num_new_tokens=(1,),
        num_repeats=num_repeats,
    )
