"""What the API process and the engine process say to each other: msgpack, nothing live."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np

from weft.engine import wire
from weft.engine.batch import AdapterRef, Float32, Int32, Int64
from weft.engine.finetune import (
    CheckpointSaved,
    FinetuneEvent,
    FinetuneJobSpec,
    JobChanged,
    StepMetrics,
    TrainingSample,
)
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


class PackedSamples(msgspec.Struct, frozen=True, kw_only=True):
    """Many samples as three arrays: thousands of small ones would hold an iteration up."""

    token_ids: Int32
    label_weights: Float32
    ends: Int64
    """Sample i is [ends[i - 1], ends[i])."""
    lines: Int64

    @classmethod
    def of(cls, samples: Iterable[TrainingSample]) -> PackedSamples:
        """Pack samples, in order."""
        given = list(samples)
        return cls(
            token_ids=np.concatenate([np.empty(0, np.int32), *(s.token_ids for s in given)]),
            label_weights=np.concatenate(
                [np.empty(0, np.float32), *(s.label_weights for s in given)]
            ),
            ends=np.cumsum([s.num_tokens for s in given], dtype=np.int64),
            lines=np.array([s.line for s in given], np.int64),
        )

    def unpacked(self) -> tuple[TrainingSample, ...]:
        """The samples again, as views."""
        starts = [0, *self.ends.tolist()]
        return tuple(
            TrainingSample(
                token_ids=self.token_ids[begin:end],
                label_weights=self.label_weights[begin:end],
                line=line,
            )
            for (begin, end), line in zip(
                itertools.pairwise(starts), self.lines.tolist(), strict=True
            )
        )


class AddJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a finetuning job; answered with `Answer`."""

    call_id: int
    spec: FinetuneJobSpec
    """Without its samples."""
    samples: PackedSamples
    validation: PackedSamples
    is_paused: bool = False
    """It begins standing still."""

    @classmethod
    def of(cls, call_id: int, spec: FinetuneJobSpec, *, is_paused: bool = False) -> AddJob:
        """Take a job apart."""
        return cls(
            is_paused=is_paused,
            call_id=call_id,
            spec=replace(spec, samples=(), validation=()),
            samples=PackedSamples.of(spec.samples),
            validation=PackedSamples.of(spec.validation),
        )

    def whole(self) -> FinetuneJobSpec:
        """The job again."""
        return replace(
            self.spec, samples=self.samples.unpacked(), validation=self.validation.unpacked()
        )


class JobAction(StrEnum):
    """What can be done to a job that is under way."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"


class ControlJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Do something to a job; answered with `Answer`."""

    call_id: int
    job_id: str
    action: JobAction


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Read an adapter directory and serve it as a version; answered with `Answer`."""

    call_id: int
    ref: AdapterRef
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop a version once no request uses it; answered with `Answer`."""

    call_id: int
    ref: AdapterRef


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Close the executor and end the process."""


ToEngine = (
    Configure
    | Submit
    | Cancel
    | FinishChoice
    | CheckIntegrity
    | AddJob
    | ControlJob
    | LoadAdapter
    | UnloadAdapter
    | Shutdown
)


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


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to what carries its `call_id`; an empty error means that it was done."""

    call_id: int
    error: str = ""
    """Name of a class in `weft.base.errors`."""
    message: str = ""


class JobNews(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job: exactly one field is set."""

    metrics: StepMetrics | None = None
    change: JobChanged | None = None
    save: CheckpointSaved | None = None

    @classmethod
    def of(cls, event: FinetuneEvent) -> JobNews:
        """Wrap an event."""
        match event:
            case StepMetrics():
                return cls(metrics=event)
            case JobChanged():
                return cls(change=event)
            case CheckpointSaved():
                return cls(save=event)

    @property
    def event(self) -> FinetuneEvent:
        """The event again."""
        found = self.metrics or self.change or self.save
        assert found is not None
        return found


class FinetuneGauges(msgspec.Struct, frozen=True, kw_only=True):
    """Finetuning beside inference: counters since the start, and the latest iteration."""

    num_forward_tokens: int
    num_steps: int
    predicted_s: float
    """Of the iteration, as it was foreseen; 0 before the first."""
    actual_s: float
    head_room_s: float
    """What the objectives left beside inference."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All news of one iteration in one message."""

    updates: list[SequenceUpdate]
    rejected: list[Rejected]
    stats: EngineStats
    news: list[JobNews] = []
    finetune: FinetuneGauges | None = None


FromEngine = Ready | Failed | Checked | Answer | Progress

# Unions are no types to a type checker.
_TO_ENGINE: Any = ToEngine
_FROM_ENGINE: Any = FromEngine


def encode(message: ToEngine | FromEngine) -> bytes:
    """Pack a message."""
    return wire.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Unpack what the API process sent."""
    return wire.decode(data, _TO_ENGINE)


def decode_from_engine(data: bytes) -> FromEngine:
    """Unpack what the engine sent."""
    return wire.decode(data, _FROM_ENGINE)
