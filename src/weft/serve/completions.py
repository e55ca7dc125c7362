"""`POST /v1/completions`: answers whole and in pieces."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec

from weft.engine.request import FinishReason
from weft.model.tokenizer import Tokenizer
from weft.serve.generation import Generation
from weft.serve.logprobs import LegacyLogprobs, prompt_logprobs
from weft.serve.output_processor import ChoiceDelta, RequestProcessor
from weft.serve.protocol import CompletionBody
from weft.serve.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    event,
)


class CompletionWriter:
    """Writes one request's answer; choice i of prompt p has index p * n + i."""

    def __init__(
        self,
        body: CompletionBody,
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        model: str,
        fingerprint: str,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._echo = bool(body.echo)
        self._wants_logprobs = body.logprobs is not None
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._id = generation.processors[0].request.id
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        self._legacy: dict[int, LegacyLogprobs] = {}

    async def whole(self) -> Completion:
        """Run to the end and answer at once."""
        await self._generation.finish()
        choices = [
            self._whole_choice(prompt, processor, choice)
            for prompt, processor in enumerate(self._generation.processors)
            for choice in range(len(processor.choices))
        ]
        return self._completion(choices, self._generation.usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, several at once where the reader is slower than the engine."""
        usage = None if self._include_usage else msgspec.UNSET
        begun: set[int] = set()
        async for news in self._generation.deltas():
            out: list[bytes] = []
            for prompt, delta in news:
                index = self._index(prompt, delta.index)
                is_first = index not in begun
                begun.add(index)
                if delta.text or delta.logprobs or delta.finish_reason or is_first:
                    choice = self._piece(prompt, delta, is_first=is_first)
                    out.append(event(self._completion([choice], usage)))
            if out:
                yield b"".join(out)
        if self._include_usage:
            yield event(self._completion([], self._generation.usage()))

    def _index(self, prompt: int, choice: int) -> int:
        return prompt * len(self._generation.processors[prompt].choices) + choice

    def _whole_choice(
        self, prompt: int, processor: RequestProcessor, choice: int
    ) -> CompletionChoice:
        state = processor.choices[choice]
        everything = ChoiceDelta(
            index=choice,
            text=state.text,
            token_ids=tuple(state.token_ids),
            logprobs=tuple(state.logprobs),
            finish_reason=state.finish_reason,
            stop_reason=state.stop_reason,
        )
        return self._piece(prompt, everything, is_first=True)

    def _piece(self, prompt: int, delta: ChoiceDelta, *, is_first: bool) -> CompletionChoice:
        processor = self._generation.processors[prompt]
        index = self._index(prompt, delta.index)
        echoes = self._echo and is_first
        shows_prompt = self._wants_prompt_logprobs and is_first
        return CompletionChoice(
            index=index,
            text=(self._prompt_text(processor) if echoes else "") + delta.text,
            logprobs=self._logprobs(index, processor, delta, echoes=echoes),
            finish_reason=_reason(delta.finish_reason),
            stop_reason=delta.stop_reason,
            prompt_logprobs=prompt_logprobs(self._tokenizer, processor.prompt_logprobs)
            if shows_prompt
            else msgspec.UNSET,
        )

    def _prompt_text(self, processor: RequestProcessor) -> str:
        if processor.prompt is not None:
            return processor.prompt
        return self._tokenizer.decode(
            processor.request.prompt_token_ids,
            skip_special_tokens=processor.request.sampling.skip_special_tokens,
        )

    def _logprobs(
        self, index: int, processor: RequestProcessor, delta: ChoiceDelta, *, echoes: bool
    ) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        legacy = self._legacy.get(index)
        if legacy is None:
            legacy = self._legacy[index] = LegacyLogprobs(self._tokenizer, processor.request)
        echoed = None
        if echoes:
            prompt = self._prompt_text(processor)
            echoed = legacy.echo(processor.prompt_logprobs, text=prompt)
        text_chars = None
        if delta.finish_reason is not None:
            before = len(self._prompt_text(processor)) if self._echo else 0
            text_chars = before + len(processor.choices[delta.index].text)
        piece = legacy.piece(delta.logprobs, text_chars=text_chars)
        return piece if echoed is None else _joined(echoed, piece)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )


def _joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
