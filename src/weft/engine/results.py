"""From the executor's columns of log-probabilities to those of one sequence."""

from __future__ import annotations

from weft.engine.batch import PromptLogprobs, StepResult
from weft.engine.request import TokenLogprobs
from weft.engine.sequence import Sequence


def token_logprobs(
    sequence: Sequence, result: StepResult, sample: int, tokens: list[int]
) -> tuple[TokenLogprobs, ...]:
    """One entry for each of a sequence's new tokens, if it asked for any."""
    wanted = sequence.request.sampling.logprobs
    if wanted is None or result.logprobs is None:
        return ()
    source = result.logprobs
    return tuple(
        TokenLogprobs(
            token_id=token,
            logprob=float(source.chosen[sample, k]),
            rank=int(source.ranks[sample, k]),
            top=tuple(
                zip(
                    source.top_ids[sample, k, :wanted].tolist(),
                    source.top[sample, k, :wanted].tolist(),
                    strict=True,
                )
            ),
        )
        for k, token in enumerate(tokens)
    )


def prompt_logprobs(sequence: Sequence, report: PromptLogprobs) -> tuple[TokenLogprobs, ...]:
    """The entries of a report that the sequence was not given yet; counts them as given.

    A preempted sequence computes its prompt again, and so reports it again.
    """
    wanted = sequence.request.sampling.prompt_logprobs
    if wanted is None:
        return ()
    first = sequence.num_prompt_logprobs_done + 1
    fresh = tuple(
        TokenLogprobs(
            token_id=sequence.tokens[position],
            logprob=float(report.chosen[i]),
            rank=int(report.ranks[i]),
            top=tuple(
                zip(
                    report.top_ids[i, :wanted].tolist(),
                    report.top[i, :wanted].tolist(),
                    strict=True,
                )
            ),
        )
        for i, position in enumerate(range(report.begin, report.begin + len(report.chosen)))
        if first <= position < sequence.num_prompt
    )
    sequence.num_prompt_logprobs_done += len(fresh)
    return fresh
