"""What becomes of a request at the door: checked, numbered, and split into its choices."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import msgspec
import numpy as np

from weft.base.errors import InvalidRequestError, QueueFullError
from weft.engine.batch import SequenceStart
from weft.engine.config import PolicyConfig
from weft.engine.request import Request
from weft.engine.sampling import uniforms
from weft.engine.sequence import Sequence, SequenceState, hash_root


class Admission:
    """Checks requests against the limits and makes their sequences."""

    def __init__(self, config: PolicyConfig, *, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._num_requests = 0
        self._num_sequences = 0

    def validate(self, request: Request) -> None:
        """Check prompt and token ids.

        Raises:
            InvalidRequestError: `param` names what is wrong.
        """
        prompt = request.prompt_token_ids
        limit = self._config.max_model_len
        priority = cast("object", request.priority)  # Callers without a type checker exist.
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InvalidRequestError(
                f"priority is {priority!r}; it must be a whole number", "priority"
            )
        if not prompt:
            raise InvalidRequestError("the prompt is empty; it needs at least one token", "prompt")
        room = 0 if request.sampling.max_tokens == 0 else 1
        if len(prompt) + room > limit:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens; this model's context holds {limit}, and "
                f"{room} of them must be left for the answer: shorten the prompt to "
                f"{limit - room} tokens",
                "prompt",
                "context_length_exceeded",
            )
        lowest, highest = min(prompt), max(prompt)
        if lowest < 0 or highest >= self._vocab_size:
            raise InvalidRequestError(
                f"token id {lowest if lowest < 0 else highest} is out of range; "
                f"this model has ids 0 to {self._vocab_size - 1}",
                "prompt",
            )
        for param in ("logit_bias", "stop_token_ids"):
            for token in getattr(request.sampling, param) or ():
                if not 0 <= token < self._vocab_size:
                    raise InvalidRequestError(
                        f"{param} names token {token}; this model has ids 0 to "
                        f"{self._vocab_size - 1}",
                        param,
                    )

    def sequences(
        self, request: Request, in_use: Container[str], num_waiting: int
    ) -> list[Sequence]:
        """One sequence a choice; all but the first wait for the prompt that they share.

        Raises:
            InvalidRequestError: see `validate`; or the id is in use.
            QueueFullError: the queue is at its bound.
        """
        if request.id in in_use:
            raise InvalidRequestError(f"request id {request.id!r} is in use", "request_id")
        bound = self._config.max_waiting
        if bound is not None and num_waiting >= bound:
            raise QueueFullError(f"{num_waiting} requests are waiting; the queue holds {bound}")
        self.validate(request)
        number = self._num_requests
        self._num_requests += 1
        seed = self._seed(request, number)
        first, *further = [
            self._sequence(request, choice, (request.priority, number), seed)
            for choice in range(request.sampling.n)
        ]
        first.children = further
        for child in further:
            child.parent = first
            child.state = SequenceState.BLOCKED
        return [first, *further]

    def start(self, sequence: Sequence) -> SequenceStart:
        """What the executor must know of a sequence that takes a slot."""
        sampling = sequence.request.sampling
        return SequenceStart(
            slot=sequence.slot,
            sequence_id=sequence.id,
            token_ids=np.array(sequence.tokens, np.int32),
            num_prompt_tokens=sequence.num_prompt,
            sampling=sampling,
            seed=sequence.seed,
            choice=sequence.choice,
            banned_until_min_tokens=self._banned(sequence) if sampling.min_tokens else (),
        )

    def snapshot(self, sequence: Sequence) -> dict[str, Any]:
        """One unfinished choice as plain data."""
        return {
            "request": msgspec.to_builtins(sequence.request),
            "choice": sequence.choice,
            "seed": sequence.seed,
            "tokens": list(sequence.tokens),
            "num_prompt_logprobs_done": sequence.num_prompt_logprobs_done,
        }

    def restore(self, snapshot: list[dict[str, Any]]) -> list[Sequence]:
        """The choices of a snapshot, in its order, each on its own."""
        sequences: list[Sequence] = []
        for entry in snapshot:
            request = msgspec.convert(entry["request"], Request, str_keys=True)
            order = (request.priority, self._num_requests)
            self._num_requests += 1
            sequence = self._sequence(request, entry["choice"], order, entry["seed"])
            sequence.tokens = list(entry["tokens"])
            sequence.num_prompt_logprobs_done = entry["num_prompt_logprobs_done"]
            sequences.append(sequence)
        return sequences

    def _banned(self, sequence: Sequence) -> tuple[int, ...]:
        return tuple(sorted(sequence.stop_ids))

    def _sequence(
        self, request: Request, choice: int, order: tuple[int, int], seed: int
    ) -> Sequence:
        sampling = request.sampling
        limit = self._config.max_model_len
        if sampling.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + sampling.max_tokens)
        eos = () if sampling.ignore_eos else self._config.eos_token_ids
        number = self._num_sequences
        self._num_sequences += 1
        return Sequence(
            id=number,
            request=request,
            choice=choice,
            seed=seed,
            order=order,
            max_len=limit,
            stop_ids=frozenset((*eos, *sampling.stop_token_ids)),
            tokens=list(request.prompt_token_ids),
            hash_root=hash_root(request),
        )

    def _seed(self, request: Request, number: int) -> int:
        if request.sampling.seed is not None:
            return request.sampling.seed % 2**64
        draw = uniforms(
            np.array([self._config.seed % 2**64], np.uint64), np.array([number]), np.array([0])
        )
        return int(draw[0] * 2**53)
