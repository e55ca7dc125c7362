"""How long an iteration may take, so that every request keeps its latency objectives.

A running request must get its next tokens at the pace that its objective asks for, a waiting one
its first token in time. What is left is the budget of an iteration. (FlexLLM, arXiv 2402.18789
§6.2, where the budget is the objective itself; here it is each request's own slack.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weft.cost.online_step_time import OnlineStepTime
from weft.cost.step_time import IterationShape, StepTimeModel
from weft.engine.finetune_limits import FinetuneConfig, LatencySlo
from weft.engine.iteration_shape import SpanTerms
from weft.engine.sequence import Sequence as EngineSequence

_HORIZON = 32
"""Tokens within which a request that fell behind must have caught up."""
_SPENT_AT_ONCE = 0.5
"""Share of what requests saved that one iteration may take."""
_MOST_SPENT = 3.0
"""Objectives that an iteration lasts at most, whatever was saved: answers should flow."""
_RESERVE_PROMPTS = 6
"""Usual prompts for which finetuning keeps requests ahead, so that a burst of them finds time."""
_MOST_RESERVE = 12.0
"""Objectives by which it does so at most."""
_MOST_MARGIN = 0.2
"""Share kept free above the prediction of a prompt's chunk, at most."""
_MOST_WAITING = 64
"""Of the queue, the first so many are looked at."""
_USUAL_CONTEXT = 256
_LEAST_TPOT_S = 0.02
_LEAST_TTFT_S = 1.0


def slo_from(model: StepTimeModel) -> LatencySlo:
    """Objectives of a model: TPOT max(20 ms, 4 x a lone decode's step), TTFT 1 s or 10 prefills."""
    shape = IterationShape(
        num_decode_rows=1, num_sampled_rows=1, decode_context_tokens=float(_USUAL_CONTEXT)
    )
    step_s = model.device_s(shape) + model.host_s(shape)
    return LatencySlo(tpot_s=max(_LEAST_TPOT_S, 4 * step_s), ttft_s=_LEAST_TTFT_S)


def promised(config: FinetuneConfig, model: StepTimeModel | None) -> LatencySlo:
    """What requests are promised: what was asked for, else what follows from the step times."""
    slo = config.slo or (LatencySlo() if model is None else slo_from(model))
    if config.slo_tpot_s is not None:
        slo = replace(slo, tpot_s=config.slo_tpot_s)
    if config.slo_ttft_s is not None:
        # A number that was asked for holds for long prompts too.
        slo = replace(slo, ttft_s=config.slo_ttft_s, ttft_prefills=0.0)
    return slo


def prefill_shape(num_tokens: int) -> IterationShape:
    """One prompt alone, seen by layers without a window."""
    return IterationShape(
        num_prefill_rows=1,
        num_prefill_tokens=num_tokens,
        num_sampled_rows=1,
        prefill_context_tokens=float(num_tokens),
        prefill_pairs=num_tokens * (num_tokens + 1) / 2,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A prompt that is not computed yet."""

    sequence: EngineSequence
    begin: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Seconds that running requests leave to an iteration; infinite where none runs."""

    prompt_s: float
    """With a prompt's chunk, which must be computed some time."""
    finetune_s: float
    """With finetuning: never more."""


class Pacer:
    """Turns requests' clocks into seconds of an iteration."""

    def __init__(self, slo: LatencySlo, step_time: OnlineStepTime, terms: SpanTerms) -> None:
        self.slo = slo
        self._step_time = step_time
        self._terms = terms

    @property
    def most_s(self) -> float:
        """Seconds of an iteration with decodes at most, whatever was saved."""
        return _MOST_SPENT * self.slo.tpot_s

    def pace(self, sequences: Sequence[EngineSequence], start_s: float) -> Pace:
        """What an iteration with these decodes may take, if it starts at `start_s`.

        The objective is a mean over a request, so that what all of them saved in earlier iterations
        may be spent: half of it at a time, since predictions err and a request may end; finetuning
        leaves a reserve. Their tokens that are in flight count as delivered by then. A request that
        cannot make its objective any more, whatever is done, asks for no more than the objective
        itself.
        """
        tpot_s = self.slo.tpot_s
        prompt_s = finetune_s = self.most_s if sequences else math.inf
        latest_s = -math.inf  # Of those that are in time: the one with least to spend.
        least_s = None
        for sequence in sequences:
            if math.isnan(sequence.first_token_s):
                latest_s = max(latest_s, 0.0)
                continue  # Its first token is in flight: it begins with a clean slate.
            gaps = sequence.num_output + sequence.num_pending - 1
            behind_s = start_s - sequence.first_token_s - tpot_s * gaps
            if behind_s <= 0:
                latest_s = max(latest_s, behind_s)
                continue
            left = max(1, sequence.max_len - len(sequence.tokens) - sequence.num_pending)
            if least_s is None:
                least_s = self._least_decode_s()
            own_s = tpot_s
            if behind_s <= left * (tpot_s - least_s):
                own_s -= behind_s / min(left, _HORIZON)
            prompt_s = min(prompt_s, own_s)
            finetune_s = min(finetune_s, own_s)
        if latest_s > -math.inf:
            prompt_s = min(prompt_s, tpot_s - _SPENT_AT_ONCE * latest_s)
            reserve_s = _RESERVE_PROMPTS * self.prefill_s(0, _USUAL_CONTEXT)
            lacking_s = latest_s + min(reserve_s, _MOST_RESERVE * tpot_s)
            share = _SPENT_AT_ONCE if lacking_s <= 0 else 1 / _HORIZON
            finetune_s = min(finetune_s, tpot_s - share * lacking_s)
        return Pace(prompt_s=prompt_s, finetune_s=finetune_s)

    def first_tokens_s(self, pending: Sequence[Pending], start_s: float) -> float:
        """Seconds that this iteration may take before the first of these prompts is too late.

        Prompts are computed in their order, at the rate of an otherwise empty device.
        """
        limit, ahead_s = math.inf, 0.0
        for prompt in pending:
            ahead_s += self.prefill_s(prompt.begin, prompt.count)
            if not math.isnan(prompt.sequence.first_token_s):
                continue  # Preempted: its first token was in time or not.
            limit = min(limit, self.deadline_s(prompt.sequence) - start_s - ahead_s)
        return limit

    def deadline_s(self, sequence: EngineSequence) -> float:
        """When a request's first token is due."""
        slo = self.slo
        own_s = slo.ttft_prefills * self.prefill_s(0, sequence.num_prompt)
        return sequence.arrived_s + max(slo.ttft_s, own_s)

    def prefill_s(self, begin: int, count: int) -> float:
        """Seconds of `count` tokens of a prompt behind `begin` cached ones, alone."""
        if count <= 0:
            return 0.0
        shape = self._terms.add_prefill(IterationShape(), begin, count, samples=True)
        return self._step_time.seconds(shape)

    def chunk_tokens(
        self,
        decodes: IterationShape,
        pending: Sequence[Pending],
        *,
        start_s: float,
        limit_s: float,
        granule: int,
        most: int,
    ) -> int:
        """Tokens of prompts that may join these decodes without holding them up.

        More, doubling, where first tokens would come too late at that pace.
        """
        first = pending[0]
        shape_of = self._terms.add_prefill
        # The prompt must be computed some time: little is kept free for what cannot be foreseen.
        margin = 1.0 + min(self._step_time.residual, _MOST_MARGIN)
        low, high = 0, max(1, most // granule)
        while low < high:
            middle = (low + high + 1) // 2
            shape = shape_of(decodes, first.begin, middle * granule, samples=True)
            fits = self._step_time.seconds(shape) * margin <= limit_s
            low, high = (middle, high) if fits else (low, middle - 1)
        count = max(1, low) * granule
        decode_s = self._step_time.seconds(decodes)
        ahead = self._prefills_ahead(pending, start_s)
        while count < most:
            chunk_s = self._step_time.seconds(shape_of(decodes, first.begin, count, samples=True))
            share = max(1e-3, 1.0 - decode_s / chunk_s) if chunk_s > 0 else 1.0
            if all(ahead_s / share <= left_s for ahead_s, left_s in ahead):
                return count
            count *= 2
        return most

    def _prefills_ahead(
        self, pending: Sequence[Pending], start_s: float
    ) -> list[tuple[float, float]]:
        """For each first token that is due: what must be computed for it, and the time left."""
        found: list[tuple[float, float]] = []
        ahead_s = 0.0
        for prompt in pending:
            ahead_s += self.prefill_s(prompt.begin, prompt.count)
            if math.isnan(prompt.sequence.first_token_s):
                found.append((ahead_s, self.deadline_s(prompt.sequence) - start_s))
        return found

    def _least_decode_s(self) -> float:
        shape = IterationShape(
            num_decode_rows=1, num_sampled_rows=1, decode_context_tokens=float(_USUAL_CONTEXT)
        )
        return min(self._step_time.seconds(shape), 0.99 * self.slo.tpot_s)


def decode_shape(sequences: Sequence[EngineSequence], terms: SpanTerms) -> IterationShape:
    """An iteration of these decodes alone."""
    count = len(sequences)
    contexts = [len(sequence.tokens) + sequence.num_pending for sequence in sequences]
    return replace(
        IterationShape(),
        num_decode_rows=count,
        num_sampled_rows=count,
        decode_context_tokens=terms.contexts(contexts),
    )


def waiting_prompts(
    queue: Sequence[tuple[tuple[int, int], int, EngineSequence]],
) -> list[Pending]:
    """The first of a queue, in its order."""
    first = heapq.nsmallest(_MOST_WAITING, queue)
    return [
        Pending(sequence=sequence, begin=0, count=len(sequence.tokens)) for _, _, sequence in first
    ]
