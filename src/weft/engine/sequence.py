"""One choice of one request on its way through the engine."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from weft.engine.request import FinishReason, Request


class SequenceState(StrEnum):
    """Where a sequence is."""

    BLOCKED = "blocked"
    """A further choice, until the first has computed the prompt that they share."""
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """Tokens of one choice and how far they are computed.

    Intervals: `0 <= num_confirmed <= num_computed <= len(tokens) + num_pending`. Tokens below
    `num_computed` are in submitted batches, below `num_confirmed` in collected ones; `num_pending`
    tokens are sampled by batches still in flight.
    """

    id: int
    request: Request
    choice: int
    seed: int
    order: tuple[int, int]
    """(priority, arrival number): smaller runs earlier and is preempted later."""
    max_len: int
    """Tokens at which it ends for length."""
    stop_ids: frozenset[int]
    """Tokens that end it."""
    tokens: list[int]
    """Prompt, then output as far as it is known."""
    hash_root: bytes
    """Seed of its prefix hashes: adapter version and tenant salt."""
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    num_computed: int = 0
    num_confirmed: int = 0
    num_pending: int = 0
    capacity: int = 0
    """Tokens that its pages can hold in every group."""
    num_registered: int = 0
    """Tokens whose pages are in the prefix index, or were found there."""
    last_batch: int = -1
    """Number of the latest batch that it is in."""
    epoch: int = 0
    """Counts preemptions, so that a late result of an earlier life is recognised."""
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    is_admitted_before: bool = False
    first_scheduled_s: float = 0.0
    arrived_s: float = 0.0
    first_token_s: float = math.nan
    """When its first output token was known, on the policy's clock."""
    num_prompt_logprobs_done: int = 0
    finish_reason: FinishReason | None = None
    parent: Sequence | None = None
    children: list[Sequence] = field(default_factory=lambda: [])
    hashes: list[bytes] = field(default_factory=lambda: [])
    """Chained digest of every full block of known tokens, at the policy's block size."""

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Output tokens that are known."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens that exist (known or pending) and are not in a batch yet."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt must be computed token by token, cache or not."""
        return self.choice == 0 and self.request.sampling.prompt_logprobs is not None

    def extend_hashes(self, block_tokens: int) -> None:
        """Hash the blocks of known tokens that are full and not hashed yet.

        The digest of a block covers everything before it, so that equal digests mean equal
        prefixes; 128 bits of BLAKE2 make an accidental match less likely than a memory error.
        """
        digest = self.hashes[-1] if self.hashes else self.hash_root
        for index in range(len(self.hashes), len(self.tokens) // block_tokens):
            block = self.tokens[index * block_tokens : (index + 1) * block_tokens]
            data = np.array(block, np.int32).tobytes()
            digest = hashlib.blake2b(digest + data, digest_size=16).digest()
            self.hashes.append(digest)


def hash_root(request: Request) -> bytes:
    """The start of a request's prefix hashes: blocks of another adapter or tenant never match."""
    adapter = request.adapter
    name = f"{adapter.id}@{adapter.version}" if adapter else ""
    parts = f"{len(name)}:{name}:{request.cache_salt}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(parts, digest_size=16).digest()
