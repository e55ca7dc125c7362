"""`POST /v1/chat/completions`: answers whole and in pieces."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from weft.engine.request import TokenLogprobs
from weft.model.tokenizer import Tokenizer
from weft.serve.generation import Generation
from weft.serve.logprobs import chat_logprobs, prompt_logprobs
from weft.serve.output_processor import ChoiceDelta, ChoiceProcessor
from weft.serve.protocol import ChatBody
from weft.serve.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
    event,
)


class ChatWriter:
    """Writes one conversation's answer."""

    def __init__(
        self,
        body: ChatBody,
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        model: str,
        fingerprint: str,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._wants_logprobs = bool(body.logprobs)
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._id = generation.processors[0].request.id
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint

    async def whole(self) -> ChatCompletion:
        """Run to the end and answer at once."""
        await self._generation.finish()
        (processor,) = self._generation.processors
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[self._whole_choice(choice) for choice in processor.choices],
            usage=self._generation.usage(),
            prompt_logprobs=prompt_logprobs(self._tokenizer, processor.prompt_logprobs)
            if self._wants_prompt_logprobs
            else msgspec.UNSET,
        )

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: the role of every choice first, then text, then the usage."""
        (processor,) = self._generation.processors
        roles = [
            ChatChunkChoice(index=choice.index, delta=ChatDelta(role="assistant", content=""))
            for choice in processor.choices
        ]
        yield b"".join(event(self._chunk([role])) for role in roles)
        async for news in self._generation.deltas():
            out = [
                event(self._chunk([self._piece(delta)]))
                for _, delta in news
                if delta.text or delta.logprobs or delta.finish_reason
            ]
            if out:
                yield b"".join(out)
        if self._include_usage:
            yield event(self._chunk([], self._generation.usage()))

    def _whole_choice(self, choice: ChoiceProcessor) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=ChatAnswer(content=choice.text),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
            stop_reason=choice.stop_reason,
        )

    def _piece(self, delta: ChoiceDelta) -> ChatChunkChoice:
        is_last = delta.finish_reason is not None
        return ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text) if delta.text or not is_last else ChatDelta(),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish_reason.value if delta.finish_reason else None,
            stop_reason=delta.stop_reason if is_last else msgspec.UNSET,
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, entries) if self._wants_logprobs else None

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage if self._include_usage else msgspec.UNSET,
        )
