"""What the API process and the engine process say to each other: msgpack, nothing live."""

from __future__ import annotations

import msgspec

from weft.engine.request import EngineStats, Request, SequenceUpdate
from weft.serve.engine_config import EngineConfig, EngineInfo


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First word to the engine: build yourself from this."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request, already checked."""

    request: Request


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a request's choices at once."""

    request_id: str


class FinishChoice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stop string has ended one choice."""

    request_id: str
    choice: int


class CheckIntegrity(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Verify every invariant and answer with `Checked`."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Close the executor and end the process."""


ToEngine = Configure | Submit | Cancel | FinishChoice | CheckIntegrity | Shutdown


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine is built."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Last word of an engine that cannot go on."""

    error: str
    """Name of a class in `weft.base.errors`; another name stands for an unexpected error."""
    message: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request that the policy would not take."""

    request_id: str
    message: str
    param: str | None
    code: str | None


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `CheckIntegrity`; an empty string means that all is well."""

    problem: str
    stats: EngineStats


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All news of one iteration in one message."""

    updates: list[SequenceUpdate]
    rejected: list[Rejected]
    stats: EngineStats


FromEngine = Ready | Failed | Checked | Progress

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Pack a message."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Unpack what the API process sent."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Unpack what the engine sent."""
    return _from_engine.decode(data)
