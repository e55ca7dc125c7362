"""From token ids to text as they come: detokenising, stop strings, log-probabilities.

Shared by the in-process `LLM` and the server. One `RequestProcessor` a request; it never looks at
the engine: `choices_to_finish` tells its owner which choices a stop string has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft.engine.request import FinishReason, Request, SequenceUpdate, TokenLogprobs
from weft.engine.sampling import SamplingParams
from weft.model.detokenizer import DetokenizeStream
from weft.model.tokenizer import Tokenizer
from weft.serve.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceDelta:
    """What one update added to one choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class StopScanner:
    """Finds stop strings in a stream of text, and holds back what may be the start of one.

    Of several stop strings the one that is complete first wins, so that the result depends on the
    text alone and not on how it was cut into tokens.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing may be pushed after it."""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Take text; return what is certain to be output.

        Where `may_stop` is false, stop strings that end in this text are passed over, and one
        that begins in it is found once it ends in a later text.
        """
        buffer = self._held + text
        end, begin, stop = -1, -1, None
        if may_stop:
            end, begin, stop = min(self._matches(buffer), default=(end, begin, stop))
        if stop is not None:
            self.matched = stop
            self._held = ""
            return buffer[: end if self._include else begin]
        cut = len(buffer) - self._num_held(buffer)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """Return what was held back; the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _matches(self, buffer: str) -> Iterator[tuple[int, int, str]]:
        """End, beginning and text of each stop string's first match that ends in the new text.

        What was held is old news: a stop string that ended in it was passed over on purpose.
        """
        for stop in self._stops:
            at = buffer.find(stop, max(0, len(self._held) - len(stop) + 1))
            if at >= 0:
                yield at + len(stop), at, stop

    def _num_held(self, buffer: str) -> int:
        longest = 0
        for stop in self._stops:
            at = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
            while at >= 0 and len(buffer) - at > longest:
                if stop.startswith(buffer[at:]):
                    longest = len(buffer) - at
                    break
                at = buffer.find(stop[0], at + 1)
        return longest


class ChoiceProcessor:
    """Text and log-probabilities of one choice."""

    def __init__(self, index: int, sampling: SamplingParams, stream: DetokenizeStream) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._text: list[str] = []
        self._stream = stream
        self._min_tokens = sampling.min_tokens
        self._include_stop = sampling.include_stop_str_in_output
        self._scanner = (
            StopScanner(sampling.stop, include=self._include_stop) if sampling.stop else None
        )

    @property
    def text(self) -> str:
        """All text that is certain so far."""
        return "".join(self._text)

    def push(self, update: SequenceUpdate) -> ChoiceDelta:
        """Take the engine's news; the choice must not be finished."""
        tokens = update.new_token_ids
        reason = update.finish_reason
        spoken = tokens
        if reason is FinishReason.STOP and tokens and not self._include_stop:
            spoken = tokens[:-1]  # EOS or a stop token is not part of the text.
        if self._scanner is None:
            text, num_kept = self._stream.push(spoken), len(tokens)
        else:
            text, num_kept = self._scan(self._scanner, spoken, len(tokens))
        if self.stop_reason is None and reason is not None:
            text += self._end()
            self.finish_reason = self.finish_reason or reason
            self.stop_reason = self.stop_reason or update.stop_token_id
        kept, logprobs = tokens[:num_kept], update.logprobs[:num_kept]
        self.token_ids.extend(kept)
        self.logprobs.extend(logprobs)
        if text:
            self._text.append(text)
        return ChoiceDelta(
            index=self.index,
            text=text,
            token_ids=kept,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _scan(
        self, scanner: StopScanner, spoken: tuple[int, ...], num_tokens: int
    ) -> tuple[str, int]:
        """Decode token by token; returns text and how many tokens belong to the output."""
        out: list[str] = []
        for position, token in enumerate(spoken, start=1):
            may_stop = len(self.token_ids) + position > self._min_tokens
            out.append(scanner.push(self._stream.push((token,)), may_stop=may_stop))
            if scanner.matched is not None:
                self._stop_at(scanner.matched)
                return "".join(out), position
        return "".join(out), num_tokens

    def _end(self) -> str:
        text = self._stream.finish()
        if self._scanner is None:
            return text
        text = self._scanner.push(text)
        if self._scanner.matched is not None:
            self._stop_at(self._scanner.matched)
            return text
        return text + self._scanner.flush()

    def _stop_at(self, stop: str) -> None:
        self.finish_reason, self.stop_reason = FinishReason.STOP, stop


class RequestProcessor:
    """All choices of one request."""

    def __init__(self, request: Request, tokenizer: Tokenizer, *, prompt: str | None) -> None:
        self.request = request
        self.prompt = prompt
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.choices_to_finish: list[int] = []
        """Choices that a stop string ended and the engine still runs; the owner empties it."""
        self._tokenizer = tokenizer
        sampling = request.sampling
        self.choices = [
            ChoiceProcessor(
                index,
                sampling,
                tokenizer.stream(
                    request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
                ),
            )
            for index in range(sampling.n)
        ]
        self._num_unfinished = sampling.n

    @property
    def is_finished(self) -> bool:
        """Whether every choice has a finish reason."""
        return self._num_unfinished == 0

    def push(self, update: SequenceUpdate) -> ChoiceDelta | None:
        """Take the engine's news; None if it says nothing new of an unfinished choice."""
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        self.prompt_logprobs.extend(update.prompt_logprobs)
        choice = self.choices[update.choice]
        if choice.finish_reason is not None:
            return None  # The engine ran on while the stop string was on its way to it.
        if not update.new_token_ids and update.finish_reason is None:
            return None
        delta = choice.push(update)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            if update.finish_reason is None:
                self.choices_to_finish.append(choice.index)
        return delta

    def output(self) -> RequestOutput:
        """Everything so far."""
        sampling = self.request.sampling
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            prompt_logprobs = (None, *map(self._position, self.prompt_logprobs))
        return RequestOutput(
            request_id=self.request.id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=tuple(map(self._completion, self.choices)),
            num_cached_tokens=self.num_cached_tokens,
            finished=self.is_finished,
        )

    def _completion(self, choice: ChoiceProcessor) -> CompletionOutput:
        wanted = self.request.sampling.logprobs is not None
        return CompletionOutput(
            index=choice.index,
            text=choice.text,
            token_ids=tuple(choice.token_ids),
            cumulative_logprob=sum(e.logprob for e in choice.logprobs) if wanted else None,
            logprobs=tuple(map(self._position, choice.logprobs)) if wanted else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _position(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        text = self._tokenizer.token_text
        position = {
            token: Logprob(logprob=logprob, rank=rank, decoded_token=text(token))
            for rank, (token, logprob) in enumerate(entry.top, start=1)
        }
        position.setdefault(
            entry.token_id,
            Logprob(logprob=entry.logprob, rank=entry.rank, decoded_token=text(entry.token_id)),
        )
        return position
