"""What one rank does in a step: its actions, bound to the slices of tensors that they move."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from weft.base.errors import UnsupportedError
from weft.plan.action import COMPUTE_KINDS, SEND_KINDS, Action, ActionKind
from weft.plan.communicate import insert_communication
from weft.plan.compute_index import ComputeIndex
from weft.plan.messages import Message, MessageTable, dependencies
from weft.plan.program import Program
from weft.plan.schedule import Schedule, ScheduleError
from weft.runtime.stage_program import CutEdge, StageCut

_BODY_OF_LONG_RUN = 4
"""Steps after which a schedule without flushes repeats: first, two in the middle, last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Samples of one edge that leave or reach a micro-batch of this rank.

    `first` counts within the rank's share of the micro-batch, `num_samples` of it are meant;
    `is_whole` says that this is all of the share. Tensors without a sample axis travel
    with the piece that `has_shared` marks. The fields of `peer`, a rank, tell the same of the other
    end. An edge without tensors only orders two stages: a token travels.
    """

    edge: CutEdge
    edge_slot: int
    backward: bool
    peer: int
    tag: int
    first: int
    num_samples: int
    is_whole: bool
    has_shared: bool
    peer_micro_batch: int
    peer_first: int
    peer_is_whole: bool


SendKey = tuple[ActionKind, int, int, int]
"""(kind, stage, micro-batch, peer stage) of a SEND or RECV."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundAction:
    """An action with what it moves: `pieces` over the transport, `local` inside the rank.

    The micro-batch counts from the start of the segment. `is_sent` says of a compute action that a
    SEND of what it makes follows, `is_last_send` of a SEND that no other follows. When a RECV has
    ended, the earlier SENDs in `arrived` are known to have ended too: what it received was sent
    after their receivers had them.
    """

    action: Action
    pieces: tuple[Piece, ...] = ()
    local: tuple[Piece, ...] = ()
    is_sent: bool = False
    is_last_send: bool = False
    arrived: tuple[SendKey, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageShape:
    """How a stage cuts the batch on one rank: samples of a share, and where the share begins."""

    stage: int
    micro_batch: int
    share: int
    offset: int
    num_micro_batches: int

    def first_sample(self, micro_batch: int) -> int:
        """First sample of the rank's share of a micro-batch."""
        return micro_batch * self.micro_batch + self.offset


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """All that a rank does: `segments` of one optimizer step each, and its stages' shapes.

    A flushing schedule has one segment, which repeats. One without flushes has a first, a repeating
    and a last segment (and exact ones for runs of fewer steps); `segment` picks.
    """

    rank: int
    device: int
    shapes: Mapping[int, StageShape]
    first: tuple[BoundAction, ...]
    middle: tuple[BoundAction, ...] = ()
    last: tuple[BoundAction, ...] = ()
    short: Mapping[int, tuple[tuple[BoundAction, ...], ...]] = field(default_factory=dict)
    middle_steps: int = 1

    def segment(self, step: int, num_steps: int) -> tuple[tuple[BoundAction, ...], int]:
        """The actions of step `step` of a run of `num_steps`, and the step they count from."""
        if not self.short:
            return self.first, step
        if num_steps in self.short:
            return self.short[num_steps][step], 0
        if step == 0:
            return self.first, 0
        if step == num_steps - 1:
            return self.last, step - (_BODY_OF_LONG_RUN - 1)
        return self.middle, step - self.middle_steps


def rank_plans(schedule: Schedule, cut: StageCut, devices: Sequence[int]) -> tuple[RankPlan, ...]:
    """The programs of the ranks that run `devices`, by rank.

    Raises ScheduleError where a tensor cannot be cut as the schedule asks.
    """
    _refuse_tensor_parallel(schedule)
    if schedule.is_synchronous:
        bound = _bind(schedule, cut, devices)
        return tuple(
            RankPlan(rank=r, device=d, shapes=_shapes(schedule, d), first=bound[r])
            for r, d in enumerate(devices)
        )
    _check_versions(schedule)
    runs = {
        n: [_split(program) for program in _bind(schedule.unrolled(n), cut, devices)]
        for n in range(1, _BODY_OF_LONG_RUN + 1)
    }
    plans: list[RankPlan] = []
    for rank, device in enumerate(devices):
        longest = runs[_BODY_OF_LONG_RUN][rank]
        plans.append(
            RankPlan(
                rank=rank,
                device=device,
                shapes=_shapes(schedule, device),
                first=longest[0],
                middle=longest[1],
                last=longest[-1],
                short={n: runs[n][rank] for n in runs},
            )
        )
    return tuple(plans)


def _check_versions(schedule: Schedule) -> None:
    """Without flushes the runtime keeps two versions: a step runs on the weights of one before."""
    for device in schedule.devices:
        for action in schedule.program(device):
            if action.kind not in COMPUTE_KINDS:
                continue
            wanted = action.micro_batch // schedule.num_micro_batches[action.stage] - 1
            if action.version != wanted:
                raise UnsupportedError(
                    f"action {action} of schedule {schedule.name!r} runs on weight version "
                    f"{action.version}; without flushes the runtime runs PipeDream-2BW's, "
                    f"{wanted} here"
                )


def _refuse_tensor_parallel(schedule: Schedule) -> None:
    for place in schedule.placements:
        if place.tp > 1:
            raise UnsupportedError(
                f"stage {place.stage} is split tensor-parallel over t = {place.tp} devices, which "
                "the runtime does not run yet; plan with tensor-parallel degree 1, or shard the "
                "stage with the `parallelize` hook"
            )


def _shapes(schedule: Schedule, device: int) -> dict[int, StageShape]:
    found: dict[int, StageShape] = {}
    for place in schedule.placements:
        if device in place.devices:
            count = schedule.num_micro_batches[place.stage]
            size = schedule.batch_size // count
            share = size // place.dp
            found[place.stage] = StageShape(
                stage=place.stage,
                micro_batch=size,
                share=share,
                offset=place.devices.index(device) * share,
                num_micro_batches=count,
            )
    return found


def _split(actions: Sequence[BoundAction]) -> tuple[tuple[BoundAction, ...], ...]:
    """The actions up to and including each STEP."""
    parts: list[tuple[BoundAction, ...]] = []
    start = 0
    for i, bound in enumerate(actions):
        if bound.action.kind is ActionKind.STEP:
            parts.append(tuple(actions[start : i + 1]))
            start = i + 1
    return tuple(parts)


def _bind(
    schedule: Schedule, cut: StageCut, devices: Sequence[int]
) -> list[tuple[BoundAction, ...]]:
    """Every rank's actions with their pieces."""
    run = insert_communication(schedule, with_order=True)
    has_backward = ComputeIndex.of(run).has_backward
    table = dependencies(run)
    keep = ~table.backward | (has_backward[table.sender_stage] & has_backward[table.receiver_stage])
    table = table.take(keep)
    pieces = _pieces(run, cut, table, devices)
    programs: dict[Program, list[Action]] = {}
    bound: list[list[BoundAction]] = []
    for device in devices:
        program = run.program(device)
        actions = programs.setdefault(program, list(program))
        last_send = {
            (a.kind, a.stage, a.micro_batch): i
            for i, a in enumerate(actions)
            if a.kind in (ActionKind.SEND_F, ActionKind.SEND_B)
        }
        bound.append([_bound(a, i, device, pieces, last_send) for i, a in enumerate(actions)])
    return [tuple(actions) for actions in _with_arrivals(bound)]


def _with_arrivals(bound: Sequence[Sequence[BoundAction]]) -> list[list[BoundAction]]:
    """The same actions, each RECV with the SENDs whose arrival it proves; see BoundAction.

    Rank a's message reached rank b by b's RECV in row r; whatever b sends to a in a row after r
    proves that, when a has it. A SEND that nothing answers is in no `arrived`.
    """
    rows: list[dict[SendKey, int]] = [
        {_send_key(b.action): row for row, b in enumerate(actions) if b.pieces} for actions in bound
    ]
    # By (from, to): rows of the SENDs in order, and the row of each one's RECV.
    traffic: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, actions in enumerate(bound):
        for row, one in enumerate(actions):
            if one.action.kind not in SEND_KINDS:
                continue
            for piece in one.pieces:
                received = rows[piece.peer].get(_received_as(one.action, piece))
                if received is not None:
                    traffic.setdefault((rank, piece.peer), []).append((row, received))
    proofs = {pair: _Proofs.of(moved) for pair, moved in traffic.items()}
    found = [list(actions) for actions in bound]
    for rank, actions in enumerate(bound):
        arrived: dict[int, list[SendKey]] = {}
        for one in actions:
            if one.action.kind not in SEND_KINDS or not one.pieces:
                continue
            ends = [
                _proof(proofs.get((piece.peer, rank)), rows, one.action, piece)
                for piece in one.pieces
            ]
            if None not in ends:
                last = max(end for end in ends if end is not None)
                arrived.setdefault(last, []).append(_send_key(one.action))
        for row, keys in arrived.items():
            found[rank][row] = replace(found[rank][row], arrived=tuple(keys))
    return found


def _send_key(action: Action) -> SendKey:
    return (action.kind, action.stage, action.micro_batch, action.peer)


def _received_as(action: Action, piece: Piece) -> SendKey:
    """The RECV at the other end of a SEND's piece."""
    kind = ActionKind.RECV_F if action.kind is ActionKind.SEND_F else ActionKind.RECV_B
    return (kind, action.peer, piece.peer_micro_batch, action.stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Proofs:
    """Rows of one rank's SENDs to another, ascending, and the earliest RECV row from each on."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @classmethod
    def of(cls, moved: Sequence[tuple[int, int]]) -> _Proofs:
        ordered = sorted(moved)
        earliest: list[int] = []
        for _, received in reversed(ordered):
            earliest.append(min(received, earliest[-1]) if earliest else received)
        return cls(sent=tuple(sent for sent, _ in ordered), received=tuple(reversed(earliest)))

    def after(self, row: int) -> int | None:
        """Where the first message that was sent after `row` is received."""
        place = bisect_right(self.sent, row)
        return self.received[place] if place < len(self.sent) else None


def _proof(
    back: _Proofs | None, rows: Sequence[Mapping[SendKey, int]], action: Action, piece: Piece
) -> int | None:
    """The sender's RECV that proves that a piece has arrived."""
    received = rows[piece.peer].get(_received_as(action, piece))
    return None if back is None or received is None else back.after(received)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """Pieces by (device, stage, micro-batch, peer stage, backward), and of local hand-overs."""

    sent: Mapping[tuple[int, int, int, int, bool], list[Piece]]
    received: Mapping[tuple[int, int, int, int, bool], list[Piece]]
    local: Mapping[tuple[int, int, int, bool], list[Piece]]


def _bound(
    action: Action,
    index: int,
    device: int,
    pieces: _Pieces,
    last_send: Mapping[tuple[ActionKind, int, int], int],
) -> BoundAction:
    kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
    if kind in (ActionKind.SEND_F, ActionKind.SEND_B):
        key = (device, stage, micro_batch, action.peer, kind is ActionKind.SEND_B)
        is_last = last_send[kind, stage, micro_batch] == index
        return BoundAction(
            action=action, pieces=tuple(pieces.sent.get(key, ())), is_last_send=is_last
        )
    if kind in (ActionKind.RECV_F, ActionKind.RECV_B):
        key = (device, stage, micro_batch, action.peer, kind is ActionKind.RECV_B)
        return BoundAction(action=action, pieces=tuple(pieces.received.get(key, ())))
    if kind in (ActionKind.F, ActionKind.B, ActionKind.I):
        own = (device, stage, micro_batch, kind is not ActionKind.F)
        sends = ActionKind.SEND_F if kind is ActionKind.F else ActionKind.SEND_B
        return BoundAction(
            action=action,
            local=tuple(pieces.local.get(own, ())),
            is_sent=(sends, stage, micro_batch) in last_send,
        )
    return BoundAction(action=action)


def _pieces(run: Schedule, cut: StageCut, table: MessageTable, devices: Sequence[int]) -> _Pieces:
    rank_of = {device: rank for rank, device in enumerate(devices)}
    slots = {pair: i for i, pair in enumerate(sorted(cut.edges))}
    orders = {
        (e.source, e.target): CutEdge(
            source=e.source, target=e.target, tensors=(), outputs=(), inputs=()
        )
        for e in run.edges
        if e.is_order_only
    }
    slots |= {pair: len(slots) + i for i, pair in enumerate(sorted(orders))}
    edges = {**orders, **cut.edges}
    shapes = {device: _shapes(run, device) for device in devices}
    found = _Pieces(sent={}, received={}, local={})
    _check_grids(run, cut)
    order = np.lexsort((table.first_sample, table.backward))
    for row in order.tolist():
        message = table[row]
        pair = (message.sender_stage, message.receiver_stage)
        pair = pair[::-1] if message.backward else pair
        edge = edges.get(pair)
        if edge is None or not _carries(edge, message):
            continue
        sender = shapes[message.sender][message.sender_stage]
        receiver = shapes[message.receiver][message.receiver_stage]
        sent_first = message.first_sample - sender.first_sample(message.sender_micro_batch)
        received_first = message.first_sample - receiver.first_sample(message.receiver_micro_batch)
        forward_first = sent_first if message.backward else received_first
        common = {
            "edge": edge,
            "edge_slot": slots[pair],
            "backward": message.backward,
            "tag": 2 * slots[pair] + int(message.backward),
            "num_samples": message.num_samples,
            # Whoever consumes a shared tensor takes it from, and returns its gradient to, the
            # sender of its first sample.
            "has_shared": forward_first == 0,
        }
        sent = Piece(
            **common,
            peer=rank_of[message.receiver],
            first=sent_first,
            is_whole=message.num_samples == sender.share,
            peer_micro_batch=message.receiver_micro_batch,
            peer_first=received_first,
            peer_is_whole=message.num_samples == receiver.share,
        )
        received = Piece(
            **common,
            peer=rank_of[message.sender],
            first=received_first,
            is_whole=message.num_samples == receiver.share,
            peer_micro_batch=message.sender_micro_batch,
            peer_first=sent_first,
            peer_is_whole=message.num_samples == sender.share,
        )
        if message.sender == message.receiver:
            key = (
                message.sender,
                message.sender_stage,
                message.sender_micro_batch,
                message.backward,
            )
            found.local.setdefault(key, []).append(sent)  # type: ignore[attr-defined]
            continue
        key = (
            message.sender,
            message.sender_stage,
            message.sender_micro_batch,
            message.receiver_stage,
            message.backward,
        )
        found.sent.setdefault(key, []).append(sent)  # type: ignore[attr-defined]
        key = (
            message.receiver,
            message.receiver_stage,
            message.receiver_micro_batch,
            message.sender_stage,
            message.backward,
        )
        found.received.setdefault(key, []).append(received)  # type: ignore[attr-defined]
    return found


def _carries(edge: CutEdge, message: Message) -> bool:
    """Whether anything is to be done for a dependency: on one device order needs no token."""
    if not edge.tensors:
        return message.sender != message.receiver
    return not message.backward or any(t.needs_grad for t in edge.tensors)


def _check_grids(run: Schedule, cut: StageCut) -> None:
    """Refuse edges between different cuts of the batch whose tensors cannot be cut by samples."""
    for (source, target), edge in cut.edges.items():
        a, b = run.placements[source], run.placements[target]
        counts = run.num_micro_batches
        if a.dp == b.dp and counts[source] == counts[target]:
            continue
        for spec in edge.tensors:
            if not spec.is_shared and spec.per_sample != 1:
                raise ScheduleError(
                    f"tensor {spec.name!r} between stages {source} and {target} has no axis with "
                    "one entry a sample, so it cannot be cut anew between micro-batches of "
                    f"{run.batch_size // counts[source]} on {a.dp} and "
                    f"{run.batch_size // counts[target]} on {b.dp} ranks; give both stages the "
                    "same micro-batch size and degree"
                )
