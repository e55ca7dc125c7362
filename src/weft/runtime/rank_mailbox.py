"""What moves between the stages of a rank and those of others, from forward to backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.plan.action import ActionKind
from weft.runtime.rank_program import BoundAction, Piece, SendKey, StageShape
from weft.runtime.stage_program import CutEdge, StageCut
from weft.runtime.transport import Handle, Transport

Key = tuple[int, int]
"""(stage, micro-batch counted from the start of the run)."""


@dataclass(kw_only=True, slots=True)
class _Posted:
    """A receive under way; what `arrived` beside its place goes there, or is added to it."""

    handle: Handle
    place: Tensor | None = None
    arrived: Tensor | None = None
    adds: bool = False

    def finish(self) -> None:
        """Move what arrived where it belongs."""
        if self.place is None or self.arrived is None:
            return
        if self.adds:
            self.place.add_(self.arrived)
        else:
            self.place.copy_(self.arrived)


class Mailbox:
    """One rank's tensors on their way: inputs and gradients that arrive, outputs that leave.

    `outputs` and `input_gradients` hold what a SEND will still need. A sent tensor is let go of as
    soon as an answer proves its arrival (`BoundAction.arrived`), at the latest by
    `wait_for_sends`: gloo cannot be asked whether a send has ended without waiting for it.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        cut: StageCut,
        shapes: Mapping[int, StageShape],
        device: torch.device,
    ) -> None:
        self._transport, self._device = transport, device
        self._edges = [cut.edges[pair] for pair in sorted(cut.edges)]
        self._num_inputs = {s: cut.stages[s].num_inputs for s in shapes}
        self._shares = {s: shape.share for s, shape in shapes.items()}
        self._inbox: dict[Key, list[Tensor | None]] = {}
        self._gradients: dict[Key, dict[int, list[Tensor | None]]] = {}
        self.outputs: dict[Key, list[Tensor]] = {}
        self.input_gradients: dict[Key, list[Tensor | None]] = {}
        self._posted: dict[SendKey, list[_Posted]] = {}
        self._sends: dict[SendKey, list[tuple[Handle, Tensor]]] = {}
        self._leaving: list[tuple[Handle, Tensor]] = []
        self._token = torch.zeros(1, dtype=torch.uint8, device=device)

    def take_inputs(self, key: Key) -> list[Tensor | None]:
        """What has arrived for a forward, by input; None for what comes from the data."""
        found = self._inbox.pop(key, None)
        return [None] * self._num_inputs[key[0]] if found is None else found

    def add_gradients(self, key: Key, totals: list[Tensor | None]) -> None:
        """Add to each output's gradient what came back over its edges, in their order."""
        arrived = self._gradients.pop(key, None)
        if arrived is None:
            return
        for slot in sorted(arrived):
            for output, gradient in zip(self._edges[slot].outputs, arrived[slot], strict=True):
                if gradient is None:
                    continue
                before = totals[output]
                totals[output] = gradient if before is None else before + gradient

    def receive(self, bound: BoundAction, shift: Mapping[int, int]) -> Iterator[Handle]:
        """Wait for what a RECV posted, and put it where it belongs."""
        action = bound.action
        key = (action.kind, action.stage, action.micro_batch + shift[action.stage], action.peer)
        for posted in self._posted.pop(key):
            yield posted.handle
            posted.finish()
        if bound.arrived:
            yield from self.drop_sends(bound, shift)

    def _open_send(self, bound: BoundAction, micro_batch: int) -> list[tuple[Handle, Tensor]]:
        """Where a SEND's handles are kept; tokens of edges that only order leave at once."""
        action = bound.action
        sent: list[tuple[Handle, Tensor]] = []
        self._sends[action.kind, action.stage, micro_batch, action.peer] = sent
        for piece in bound.pieces:
            if not piece.edge.tensors:
                self._send(self._token, piece, sent)
        return sent

    def send_outputs(self, bound: BoundAction, micro_batch: int) -> None:
        """Start sending what a forward made along one edge."""
        outputs = self.outputs[bound.action.stage, micro_batch]
        sent = self._open_send(bound, micro_batch)
        for piece in bound.pieces:
            for spec, output in zip(piece.edge.tensors, piece.edge.outputs, strict=True):
                part = _part(outputs[output], spec.axis, piece)
                if part is not None:
                    self._send(part, piece, sent)
        if bound.is_last_send:
            del self.outputs[bound.action.stage, micro_batch]

    def send_gradients(self, bound: BoundAction, micro_batch: int) -> None:
        """Start sending the input gradients of a backward along one edge."""
        key = (bound.action.stage, micro_batch)
        gradients = self.input_gradients.get(key, [])
        sent = self._open_send(bound, micro_batch)
        for piece in bound.pieces:
            for spec, position in zip(piece.edge.tensors, piece.edge.inputs, strict=True):
                gradient = gradients[position]
                if not spec.needs_grad or gradient is None:
                    continue
                part = _part(gradient, spec.axis, piece)
                if part is not None:
                    self._send(part, piece, sent)
        if bound.is_last_send:
            self.input_gradients.pop(key, None)

    def _send(self, tensor: Tensor, piece: Piece, sent: list[tuple[Handle, Tensor]]) -> None:
        tensor = tensor.contiguous()
        sent.append((self._transport.send(tensor, piece.peer, piece.tag), tensor))

    def drop_sends(self, bound: BoundAction, shift: Mapping[int, int]) -> Iterator[Handle]:
        """Let go of tensors whose arrival the RECV before this one has proved.

        The sender's own thread may hear of it a little later than the answer comes: one action on,
        waiting for the handle takes no time.
        """
        leaving, self._leaving = self._leaving, []
        for kind, stage, micro_batch, peer in bound.arrived:
            sent = self._sends.pop((kind, stage, micro_batch + shift[stage], peer), ())
            self._leaving.extend(sent)
        for handle, _ in leaving:
            yield handle

    def wait_for_sends(self) -> Iterator[Handle]:
        """Yield every send that is not known to have ended."""
        sends, self._sends = self._sends, {}
        leaving, self._leaving = self._leaving, []
        for sent in (leaving, *sends.values()):
            for handle, _ in sent:
                yield handle

    def post(self, bound: BoundAction, shift: int) -> None:
        """Post the receives of a RECV action into buffers of their own or slices of one."""
        action = bound.action
        micro_batch = action.micro_batch + shift
        posted: list[_Posted] = []
        is_forward = action.kind is ActionKind.RECV_F
        for piece in bound.pieces:
            if not piece.edge.tensors:
                token = torch.empty_like(self._token)
                handle = self._transport.receive(token, piece.peer, piece.tag)
                posted.append(_Posted(handle=handle, place=token))
            for i, spec in enumerate(piece.edge.tensors):
                if not is_forward and not spec.needs_grad:
                    continue
                if spec.axis is None and not piece.has_shared:
                    continue
                buffer = (
                    self._input_buffer(piece, i, (action.stage, micro_batch))
                    if is_forward
                    else self._gradient_buffer(piece, i, (action.stage, micro_batch))
                )
                posted.append(self._receive(buffer, spec.axis, piece))
        key = (action.kind, action.stage, micro_batch, action.peer)
        self._posted[key] = posted

    def _receive(self, buffer: Tensor, axis: int | None, piece: Piece) -> _Posted:
        part = buffer if axis is None or piece.is_whole else _narrow(buffer, axis, piece)
        if axis is None and piece.backward:
            # Several consumers return gradients of one shared tensor: they add up.
            arrived = torch.empty_like(buffer)
            handle = self._transport.receive(arrived, piece.peer, piece.tag)
            return _Posted(handle=handle, place=buffer, arrived=arrived, adds=True)
        if part.is_contiguous():
            return _Posted(handle=self._transport.receive(part, piece.peer, piece.tag))
        arrived = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        handle = self._transport.receive(arrived, piece.peer, piece.tag)
        return _Posted(handle=handle, place=part, arrived=arrived)

    def _input_buffer(self, piece: Piece, tensor: int, key: Key) -> Tensor:
        slots = self._inbox.get(key)
        if slots is None:
            slots = self._inbox[key] = [None] * self._num_inputs[key[0]]
        position = piece.edge.inputs[tensor]
        found = slots[position]
        if found is None:
            found = slots[position] = self._empty(piece.edge, tensor, key[0])
        return found

    def _gradient_buffer(self, piece: Piece, tensor: int, key: Key) -> Tensor:
        arrived = self._gradients.setdefault(key, {})
        slots = arrived.get(piece.edge_slot)
        if slots is None:
            slots = arrived[piece.edge_slot] = [None] * len(piece.edge.tensors)
        found = slots[tensor]
        if found is None:
            found = self._empty(piece.edge, tensor, key[0])
            if piece.edge.tensors[tensor].axis is None:
                found.zero_()
            slots[tensor] = found
        return found

    def _empty(self, edge: CutEdge, tensor: int, stage: int) -> Tensor:
        spec = edge.tensors[tensor]
        shape = spec.shape(self._shares[stage])
        return torch.empty(shape, dtype=spec.dtype, device=self._device)

    def hand_on(self, piece: Piece, key: Key) -> None:
        """Give outputs to a stage on this rank."""
        target = piece.edge.target
        peer_key = (target, piece.peer_micro_batch)
        outputs = self.outputs[key]
        for i, (spec, output) in enumerate(
            zip(piece.edge.tensors, piece.edge.outputs, strict=True)
        ):
            part = _part(outputs[output], spec.axis, piece)
            if part is None:
                continue
            slots = self._inbox.get(peer_key)
            if slots is None:
                slots = self._inbox[peer_key] = [None] * self._num_inputs[target]
            if spec.axis is None or (piece.is_whole and piece.peer_is_whole):
                slots[piece.edge.inputs[i]] = part
            else:
                buffer = self._input_buffer(piece, i, peer_key)
                _at_peer(buffer, spec.axis, piece).copy_(part)

    def hand_back(self, piece: Piece, key: Key) -> None:
        """Give input gradients to the stage on this rank that made the inputs."""
        source = piece.edge.source
        peer_key = (source, piece.peer_micro_batch)
        gradients = self.input_gradients[key]
        for i, (spec, position) in enumerate(
            zip(piece.edge.tensors, piece.edge.inputs, strict=True)
        ):
            gradient = gradients[position]
            if not spec.needs_grad or gradient is None:
                continue
            part = _part(gradient, spec.axis, piece)
            if part is None:
                continue
            buffer = self._gradient_buffer(piece, i, peer_key)
            if spec.axis is None:
                buffer.add_(part)
            else:
                _at_peer(buffer, spec.axis, piece).copy_(part)


def _narrow(tensor: Tensor, axis: int, piece: Piece) -> Tensor:
    # Edges between different cuts of the batch have one entry a sample (`rank_program`).
    return tensor.narrow(axis, piece.first, piece.num_samples)


def _at_peer(tensor: Tensor, axis: int, piece: Piece) -> Tensor:
    """Where a whole or partial piece lies in the tensor of a stage on the same rank."""
    if tensor.shape[axis] == piece.num_samples or piece.peer_is_whole:
        return tensor
    return tensor.narrow(axis, piece.peer_first, piece.num_samples)


def _part(tensor: Tensor, axis: int | None, piece: Piece) -> Tensor | None:
    """The piece's samples of a tensor; None where this piece does not carry it."""
    if axis is None:
        return tensor if piece.has_shared else None
    return tensor if piece.is_whole else _narrow(tensor, axis, piece)
