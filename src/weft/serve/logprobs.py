"""Log-probabilities in the three shapes that clients expect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weft.engine.request import Request, TokenLogprobs
from weft.model.tokenizer import Tokenizer
from weft.serve.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    finite,
)


class LegacyLogprobs:
    """OpenAI's completions format of one choice; follows its text from piece to piece.

    A token's `text_offset` is the index in the returned text at which its first character begins,
    for a token in the midst of a character that of this character. What is not in the text
    (skipped special tokens, what a stop string cut off) takes no room.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._prompt_token_ids = request.prompt_token_ids
        self._stream = tokenizer.stream(
            request.prompt_token_ids, skip_special_tokens=request.sampling.skip_special_tokens
        )
        self._offset = 0

    def echo(self, entries: Sequence[TokenLogprobs], *, text: str) -> CompletionLogprobs:
        """Format the prompt, whose text comes first; nothing predicts its first token."""
        out = _nothing()
        self._add(out, self._prompt_token_ids[0], None)
        for entry in entries:
            self._add(out, entry.token_id, entry)
        out.text_offset.extend(self._prompt_offsets(text)[: len(out.tokens)])
        self._offset = len(text)
        return out

    def piece(
        self, entries: Iterable[TokenLogprobs], *, text_chars: int | None = None
    ) -> CompletionLogprobs:
        """Format tokens that follow those of earlier calls.

        `text_chars` is the length of the whole text, once that is known.
        """
        out = _nothing()
        for entry in entries:
            self._add(out, entry.token_id, entry)
            offset = self._offset if text_chars is None else min(self._offset, text_chars)
            out.text_offset.append(offset)
            self._offset += len(self._stream.push((entry.token_id,)))
        return out

    def _prompt_offsets(self, text: str) -> list[int]:
        offsets: list[int] = []
        offset = 0
        stream = self._tokenizer.stream(skip_special_tokens=False)
        for token_id in self._prompt_token_ids:
            offsets.append(min(offset, len(text)))
            if token_id in self._tokenizer.special_ids:
                # Written out in the text, or added by the tokenizer, or skipped.
                special = self._tokenizer.token_text(token_id)
                offset += len(special) if text.startswith(special, offset) else 0
            else:
                offset += len(stream.push((token_id,)))
        return offsets

    def _add(self, out: CompletionLogprobs, token_id: int, entry: TokenLogprobs | None) -> None:
        out.tokens.append(self._token(token_id))
        if entry is None:
            out.token_logprobs.append(None)
            out.top_logprobs.append(None)
            return
        top = {self._token(token): finite(logprob) for token, logprob in entry.top}
        top.setdefault(self._token(token_id), finite(entry.logprob))
        out.token_logprobs.append(finite(entry.logprob))
        out.top_logprobs.append(top)

    def _token(self, token_id: int) -> str:
        """The token's text; `bytes:\\x..` where it is only a part of a character."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _nothing() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]) -> ChatLogprobs:
    """OpenAI's chat format."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=tokenizer.token_text(entry.token_id),
                logprob=finite(entry.logprob),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=tokenizer.token_text(token),
                        logprob=finite(logprob),
                        bytes=list(tokenizer.token_bytes(token)),
                    )
                    for token, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]
) -> list[dict[str, dict[str, float | int | str]] | None]:
    """vLLM's format: one dictionary by token id for each prompt token, null for the first."""
    out: list[dict[str, dict[str, float | int | str]] | None] = [None]
    for entry in entries:
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)]
        if all(token != entry.token_id for token, _, _ in ranked):
            ranked.append((entry.token_id, entry.logprob, entry.rank))
        out.append(
            {
                str(token): {
                    "logprob": finite(logprob),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, logprob, rank in ranked
            }
        )
    return out
