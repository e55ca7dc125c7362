"""Incremental decoding: text comes out as soon as its last byte is known, and never changes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

_PROMPT_CONTEXT = 8
"""Prompt tokens looked at: enough for a character that straddles the border."""
_MAX_HELD_TOKENS = 32
"""A run of undecodable tokens longer than this is given out as it is."""
_REPLACEMENT = "\ufffd"


class Vocabulary(Protocol):
    """What a stream needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids from here on stand for nothing; a padded output layer may give them."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids left out where special tokens are skipped."""
        ...

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode from scratch."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        ...


class DetokenizeStream(Protocol):
    """Decodes the tokens of one sequence as they come."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take tokens; return the text that became certain, possibly empty."""
        ...

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        ...


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; a token with other characters (an added one) is its UTF-8."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


class ByteLevelStream:
    """Byte-level BPE: tokens are byte strings, so a UTF-8 decoder is all it takes.

    A character that the prompt left unfinished comes out if the answer finishes it, and leaves no
    trace if not: U+FFFD stands for broken bytes of the answer only.
    """

    __slots__ = ("_decoder", "_is_at_border", "_skipped", "_vocabulary")

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(self._bytes(prompt_token_ids[-_PROMPT_CONTEXT:]))
        self._is_at_border = bool(self._decoder.getstate()[0])

    def push(self, token_ids: Iterable[int]) -> str:
        new = self._bytes(token_ids)
        if self._is_at_border and new:
            self._cross_border(new[:1])
        return self._decoder.decode(new)

    def finish(self) -> str:
        if self._is_at_border:
            return ""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_ids: Iterable[int]) -> bytes:
        token_bytes, skipped = self._vocabulary.token_bytes, self._skipped
        return b"".join(token_bytes(i) for i in token_ids if i not in skipped)

    def _cross_border(self, first: bytes) -> None:
        """Forget the prompt's unfinished character unless the answer's first byte continues it."""
        self._is_at_border = False
        try:
            codecs.utf_8_decode(self._decoder.getstate()[0] + first, "strict", False)
        except UnicodeDecodeError:
            self._decoder.reset()


class WindowStream:
    """Any decoder: compares the text of a short window of tokens with and without the new ones.

    The window starts where the text last was certain, so that what a decoder does at the start
    (dropping a leading space, say) cancels out.
    """

    __slots__ = ("_begin", "_ids", "_skip_special", "_unread", "_vocabulary")

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special_tokens
        known = vocabulary.vocab_size
        self._ids = [i for i in prompt_token_ids[-_PROMPT_CONTEXT:] if i < known]
        self._begin = 0
        self._unread = len(self._ids)

    def push(self, token_ids: Iterable[int]) -> str:
        out: list[str] = []
        for token_id in token_ids:
            if token_id >= self._vocabulary.vocab_size:
                continue
            self._ids.append(token_id)
            out.append(self._advance(final=False))
        return "".join(out)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._begin : self._unread])
        text = self._decode(self._ids[self._begin :])
        held = text.endswith(_REPLACEMENT) and len(self._ids) - self._unread < _MAX_HELD_TOKENS
        if len(text) <= len(known) or (held and not final):
            return ""
        self._begin, self._unread = self._unread, len(self._ids)
        if self._begin > 4 * _MAX_HELD_TOKENS:
            del self._ids[: self._begin]
            self._unread -= self._begin
            self._begin = 0
        return text[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids, skip_special_tokens=self._skip_special)
