"""Log-probabilities in the three shapes that clients expect."""

from __future__ import annotations

from collections.abc import Iterable

from weft.engine.request import TokenLogprobs
from weft.model.tokenizer import Tokenizer
from weft.serve.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    finite,
)


class LegacyLogprobs:
    """OpenAI's completions format; keeps count of the text offset from piece to piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def piece(
        self, entries: Iterable[TokenLogprobs], *, first_token: int | None = None
    ) -> CompletionLogprobs:
        """Format tokens that follow those of earlier calls.

        `first_token` is the first token of an echoed prompt, which nothing predicts.
        """
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if first_token is not None:
            self._add(out, first_token, None, None)
        for entry in entries:
            top = {self._token(token): finite(logprob) for token, logprob in entry.top}
            top.setdefault(self._token(entry.token_id), finite(entry.logprob))
            self._add(out, entry.token_id, finite(entry.logprob), top)
        return out

    def _add(
        self,
        out: CompletionLogprobs,
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        token = self._token(token_id)
        out.tokens.append(token)
        out.token_logprobs.append(logprob)
        out.top_logprobs.append(top)
        out.text_offset.append(self._offset)
        self._offset += len(self._tokenizer.token_text(token_id))

    def _token(self, token_id: int) -> str:
        """The token's text; `bytes:\\x..` where it is only a part of a character."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


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
