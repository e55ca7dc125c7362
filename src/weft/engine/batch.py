"""What crosses between a policy and an executor: Batch down, StepResult up.

A batch is a list of segments, one row each, of whatever kind. Rows and tokens are columns of
NumPy arrays, never one object a token, so that a batch costs the same to build, to ship to another
process and to upload. There are no tensors and no live objects in here.

Shape legend: R rows (segments), T tokens, G cache groups, S sampled rows, P pages of a table,
K tokens sampled for a row, N likeliest tokens reported, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from weft.engine.finetune import FinetuneOutcome, FinetuneWork
from weft.engine.sampling import SamplingParams

UNKNOWN_TOKEN = -1
"""In `Batch.token_ids`: the token that an earlier, still unfinished batch samples for this slot."""
NULL_PAGE = 0
"""Never allocated; fills page tables where a sequence has no page (yet, or any more)."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class SegmentKind(IntEnum):
    """What a row does. An executor refuses a kind that it lacks by name."""

    PREFILL = 0
    """Known tokens of a sequence: writes their keys and values."""
    DECODE = 1
    """One token of a sequence whose next is sampled."""
    VERIFY = 2
    """A tree of guessed tokens, each seeing its prefix and its ancestors."""
    FT_FORWARD = 3
    """Tokens of a finetuning sample, forward."""
    FT_BACKWARD = 4
    """A span of a finetuning sample, backward through the row's layers; it holds no tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRef:
    """One version of an adapter; publishing makes a new version, running requests keep theirs."""

    id: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheGroup:
    """Layers with equal bytes per token and equal window; a sequence has one page table a group."""

    layers: tuple[int, ...]
    page_tokens: int
    """Tokens that one page of the arena holds for all layers of the group."""
    window: int | None = None
    """A token sees itself and the `window - 1` before it; None means all before it."""
    model: int = 0
    """0 is the target, 1 the draft."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorInfo:
    """What a policy must know of an executor: plain numbers only."""

    num_pages: int
    """Pages of the arena, the null page included."""
    page_bytes: int
    groups: tuple[CacheGroup, ...]
    num_layers: int
    vocab_size: int
    max_num_seqs: int
    """Slots: sequences that hold state in the executor at once."""
    max_finetune_samples: int = 0
    """Further rows of the page tables, from `max_num_seqs` on, for samples of finetuning jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceStart:
    """A sequence takes a slot: all that the sampler needs to know of it from then on.

    Sent again in full when a preempted sequence comes back.
    """

    slot: int
    sequence_id: int
    token_ids: Int32
    """Prompt and the output so far, for penalties."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    """Resolved: never None; in [0, 2**64)."""
    choice: int = 0
    banned_until_min_tokens: tuple[int, ...] = ()
    """Tokens that may not be drawn before `sampling.min_tokens` are out: EOS and stop ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One iteration: rows of any kind, their tokens, and where each may look and must write.

    Rows come in the order of their kinds. The executor applies, in this order: `freed_slots`,
    `starts`, `page_moves`, the rows, sampling.
    """

    batch_id: int
    kinds: npt.NDArray[np.uint8]
    """[R] of SegmentKind."""
    slots: Int32
    """[R] the sequence's slot in the executor."""
    row_starts: Int32
    """[R+1] row r holds tokens row_starts[r] to row_starts[r+1]."""
    layers: npt.NDArray[np.int16]
    """[R, 2] the layers [a, b) that the row passes through."""
    adapters: Int32
    """[R] index into `adapter_refs`, or -1 for the bare model."""
    models: npt.NDArray[np.uint8]
    """[R] 0 is the target, 1 the draft."""
    token_ids: Int32
    """[T] or UNKNOWN_TOKEN: what the latest earlier batch sampled for the row's slot."""
    positions: Int32
    """[T] position of the token in its sequence (depth, for a tree)."""
    prefix_lens: Int32
    """[T] cached tokens of its sequence that a token sees, itself included where it is a chain."""
    page_tables: tuple[Int32, ...]
    """G arrays [R, P]: page of tokens [i * page_tokens, (i + 1) * page_tokens), or NULL_PAGE."""
    write_slots: tuple[Int64, ...]
    """G arrays [T]: page * page_tokens + offset where the token's keys and values go."""
    sample_rows: Int32
    """[S] rows whose last token's logits are sampled."""
    prompt_logprob_rows: Int32
    """Rows of which every token's log-probability of its successor in the prompt is wanted."""
    adapter_refs: tuple[AdapterRef, ...] = ()
    starts: tuple[SequenceStart, ...] = ()
    freed_slots: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    page_moves: Int32 = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """[.., 2] pages copied whole, source to target, before the rows run."""
    ancestor_masks: npt.NDArray[np.uint8] | None = None
    """[T, bytes] bit j of a VERIFY token: it sees token j of its row; None without trees."""
    logits_masks: npt.NDArray[np.uint32] | None = None
    """[S, ceil(V/32)] bit set where a token is allowed; None allows all."""
    finetune: FinetuneWork | None = None
    """Commands and spans of finetuning jobs; None without any."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.kinds)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledLogprobs:
    """Log-probabilities of sampled tokens under the model's own distribution."""

    chosen: Float32
    """[S, K]; NaN where the row did not ask."""
    ranks: Int32
    """[S, K] 1 for the likeliest."""
    top_ids: Int32
    """[S, K, N] likeliest first; N is the most that any row asked for."""
    top: Float32
    """[S, K, N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens [begin, begin + n) of one row's sequence."""

    row: int
    begin: int
    """Position of the first token reported: the row's first position + 1."""
    chosen: Float32
    """[n]."""
    ranks: Int32
    """[n]."""
    top_ids: Int32
    """[n, N]."""
    top: Float32
    """[n, N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one batch produced, aligned with `Batch.sample_rows`."""

    batch_id: int
    tokens: Int32
    """[S, K] sampled tokens; row s holds num_tokens[s] of them."""
    num_tokens: Int32
    """[S] 0 where the row's logits were not finite: its sequence fails, its neighbours do not."""
    logprobs: SampledLogprobs | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    elapsed_s: float = 0.0
    """Seconds that the executor was busy with the batch."""
    finetune: FinetuneOutcome | None = None
