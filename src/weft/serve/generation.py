"""The prompts of one HTTP request on their way through the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from weft.base.errors import InvalidRequestError, QueueFullError, WeftError
from weft.engine.request import FinishReason
from weft.model.tokenizer import Tokenizer
from weft.serve.engine_client import EngineClient
from weft.serve.http_errors import GenerationFailedError
from weft.serve.output_processor import ChoiceDelta, RequestProcessor
from weft.serve.request_factory import Prepared
from weft.serve.responses import CachedTokens, Usage


class ClientGoneError(WeftError, ConnectionError):
    """The caller hung up; nobody is left to answer."""


class Generation:
    """Submits prompts, turns the engine's updates into text, ends choices at stop strings."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        prepared: Sequence[Prepared],
        *,
        is_streamed: bool,
        max_live_choices: int,
    ) -> None:
        wanted = sum(item.request.sampling.n for item in prepared)
        if wanted > max_live_choices:
            raise InvalidRequestError(
                f"{len(prepared)} prompts with n = {prepared[0].request.sampling.n} ask for "
                f"{wanted} answers at once; this server takes at most {max_live_choices}: ask for "
                "fewer",
                "n" if len(prepared) <= max_live_choices else "prompt",
            )
        if client.num_live_choices + wanted > max_live_choices:
            raise QueueFullError(
                f"the queue is full: {client.num_live_choices} answers are under way or waiting, "
                f"{wanted} more are asked for, {max_live_choices} is the most; try again later"
            )
        self._client = client
        self.processors = [
            RequestProcessor(item.request, tokenizer, prompt=item.prompt) for item in prepared
        ]
        self._index = {item.request.id: i for i, item in enumerate(prepared)}
        # Nobody reads along and no stop string waits to be found: one look at the end will do.
        in_bulk = not is_streamed and not any(item.request.sampling.stop for item in prepared)
        self._mailbox = client.submit(
            (item.request for item in prepared), only_when_finished=in_bulk
        )

    async def deltas(self) -> AsyncIterator[list[tuple[int, ChoiceDelta]]]:
        """What is new, with the index of its prompt, until every choice has ended.

        Raises:
            GenerationFailedError: a prompt's logits were not finite.
            ClientGoneError: `abandon` was called.
            EngineDeadError: the engine is gone.
        """
        while not all(processor.is_finished for processor in self.processors):
            news: list[tuple[int, ChoiceDelta]] = []
            for update in await self._mailbox.next():
                index = self._index[update.request_id]
                processor = self.processors[index]
                delta = processor.push(update)
                for choice in processor.choices_to_finish:
                    self._client.finish(update.request_id, choice)
                processor.choices_to_finish.clear()
                if delta is None:
                    continue
                if delta.finish_reason is FinishReason.ERROR:
                    raise GenerationFailedError(
                        "the model's output was not finite (NaN or infinity) for this request"
                    )
                news.append((index, delta))
            if news:
                yield news

    async def finish(self) -> None:
        """Run to the end; raises as `deltas`."""
        async for _ in self.deltas():
            pass

    def cancel(self) -> None:
        """End what still runs; does nothing to what has ended."""
        self._client.cancel(self._mailbox)

    def abandon(self) -> None:
        """The caller is gone: end everything and wake whoever waits."""
        self._mailbox.fail(ClientGoneError("the client hung up"))
        self.cancel()

    def usage(self) -> Usage:
        """Tokens so far. A prompt that was computed once for n choices counts once."""
        num_prompt = sum(len(p.request.prompt_token_ids) for p in self.processors)
        num_generated = sum(len(c.token_ids) for p in self.processors for c in p.choices)
        num_cached = sum(p.num_cached_tokens for p in self.processors)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_generated,
            total_tokens=num_prompt + num_generated,
            prompt_tokens_details=CachedTokens(cached_tokens=num_cached),
        )
