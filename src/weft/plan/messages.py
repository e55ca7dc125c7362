"""Which samples go from which device to which: one pure function that every executor uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from weft.plan.schedule import Placement, Schedule
from weft.plan.train_plan import StageEdge


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """Samples [first_sample, first_sample + num_samples) of a step's batch, between two devices.

    Forward messages carry the sender's output, backward ones the gradient of the sender's input.
    Micro-batches count within the step.
    """

    backward: bool
    sender_stage: int
    receiver_stage: int
    sender_micro_batch: int
    receiver_micro_batch: int
    sender: int
    receiver: int
    first_sample: int
    num_samples: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MessageTable(Sequence[Message]):
    """Messages as columns of shape (number of messages,); a `Sequence[Message]`.

    `sender` and `receiver` are global device indices.
    """

    backward: NDArray[np.bool_]
    sender_stage: NDArray[np.int32]
    receiver_stage: NDArray[np.int32]
    sender_micro_batch: NDArray[np.int32]
    receiver_micro_batch: NDArray[np.int32]
    sender: NDArray[np.int32]
    receiver: NDArray[np.int32]
    first_sample: NDArray[np.int64]
    num_samples: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    def take(self, rows: Any) -> MessageTable:
        """The messages at `rows` (indices, a mask or a slice)."""
        return MessageTable(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def crosses(self) -> NDArray[np.bool_]:
        """Which rows are messages at all: bytes that leave a device."""
        return (self.sender != self.receiver) & (self.num_bytes > 0)

    def __len__(self) -> int:
        return len(self.sender)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> MessageTable: ...
    def __getitem__(self, index: int | slice) -> Message | MessageTable:
        if isinstance(index, slice):
            return self.take(index)
        return Message(**{f.name: getattr(self, f.name)[index].item() for f in fields(self)})

    def __iter__(self) -> Iterator[Message]:
        for index in range(len(self)):
            yield self[index]


def messages(schedule: Schedule) -> MessageTable:
    """Every message of one optimizer step, ordered by edge, direction, sample and receiver.

    Rank r of a stage with data-parallel degree d owns samples [r*b/d, (r+1)*b/d) of each of its
    micro-batches of b samples; a message is a largest run of samples with one owner on either side.
    With tensor parallelism each rank of the receiver gets its replica's samples from one rank of
    the sender. Source: the implicit scatter and gather of the GraphPipe artifact (sheet §4).
    """
    table = dependencies(schedule)
    return table.take(table.crosses)


def dependencies(schedule: Schedule) -> MessageTable:
    """All of `messages`, and those that stay on a device or only order two stages (0 bytes)."""
    parts = [
        _edge_messages(schedule, edge, backward)
        for edge in schedule.edges
        for backward in (False, True)
        if not backward or edge.is_order_only or edge.backward_bytes_per_sample > 0
    ]
    return MessageTable(
        **{
            f.name: np.concatenate([part[f.name] for part in parts])
            if parts
            else np.zeros(0, dtype=bool if f.name == "backward" else np.int64)
            for f in fields(MessageTable)
        }
    )


def _edge_messages(schedule: Schedule, edge: StageEdge, backward: bool) -> dict[str, Any]:
    sender_stage, receiver_stage = edge.source, edge.target
    bytes_per_sample = edge.forward_bytes_per_sample
    if backward:
        sender_stage, receiver_stage = receiver_stage, sender_stage
        bytes_per_sample = edge.backward_bytes_per_sample
    sender, receiver = schedule.placements[sender_stage], schedule.placements[receiver_stage]
    pieces = _pieces(
        schedule.batch_size,
        _Grid.of(schedule, sender),
        _Grid.of(schedule, receiver),
    )
    count = len(pieces.first_sample)
    return {
        "backward": np.full(count, backward),
        "sender_stage": np.full(count, sender_stage, dtype=np.int32),
        "receiver_stage": np.full(count, receiver_stage, dtype=np.int32),
        "sender_micro_batch": pieces.sender_micro_batch,
        "receiver_micro_batch": pieces.receiver_micro_batch,
        "sender": np.array(sender.devices, dtype=np.int32)[pieces.sender_slot],
        "receiver": np.array(receiver.devices, dtype=np.int32)[pieces.receiver_slot],
        "first_sample": pieces.first_sample,
        "num_samples": pieces.num_samples,
        "num_bytes": pieces.num_samples * bytes_per_sample,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """How a stage cuts the batch: samples of a replica's share of a micro-batch, and degrees."""

    share: int
    dp: int
    tp: int

    @classmethod
    def of(cls, schedule: Schedule, place: Placement) -> _Grid:
        dp = place.dp
        share = schedule.batch_size // (schedule.num_micro_batches[place.stage] * dp)
        return cls(share=share, dp=dp, tp=place.tp)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """Largest runs of samples with one owner on either side; slots index a stage's devices."""

    first_sample: NDArray[np.int64]
    num_samples: NDArray[np.int64]
    sender_micro_batch: NDArray[np.int32]
    receiver_micro_batch: NDArray[np.int32]
    sender_slot: NDArray[np.int64]
    receiver_slot: NDArray[np.int64]


# The edges of a plan, and the candidates of a planner, mostly cut the batch alike.
@lru_cache(maxsize=64)
def _pieces(batch_size: int, sender: _Grid, receiver: _Grid) -> _Pieces:
    shares = (sender.share, receiver.share)
    first = np.arange(0, batch_size, min(shares))
    if max(shares) % min(shares):
        first = np.union1d(first, np.arange(0, batch_size, max(shares)))
    num_samples = np.repeat(np.diff(first, append=batch_size), receiver.tp)
    first = np.repeat(first, receiver.tp)
    receiver_rank = np.tile(np.arange(receiver.tp), len(first) // receiver.tp)
    sender_rank = receiver_rank * sender.tp // receiver.tp
    sent, received = first // sender.share, first // receiver.share
    return _Pieces(
        first_sample=first,
        num_samples=num_samples,
        sender_micro_batch=(sent // sender.dp).astype(np.int32),
        receiver_micro_batch=(received // receiver.dp).astype(np.int32),
        sender_slot=sent % sender.dp * sender.tp + sender_rank,
        receiver_slot=received % receiver.dp * receiver.tp + receiver_rank,
    )
