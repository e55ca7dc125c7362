"""Runs one rank's actions on real tensors: forward, backward, and what moves between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from weft.plan.action import ActionKind
from weft.runtime.batch_source import SampleSource
from weft.runtime.grad_sync import GradientSync
from weft.runtime.measured import LoopRecord
from weft.runtime.micro_batch import MicroBatch, WeightHalf
from weft.runtime.rank_program import BoundAction, Piece, RankPlan, StageShape
from weft.runtime.stage_program import CutEdge, StageCut, StageProgram
from weft.runtime.transport import Handle, PeerTimeoutError, Transport
from weft.runtime.whole_batch import WholeBatch

Key = tuple[int, int]
"""(stage, micro-batch counted from the start of the run)."""


@dataclass(kw_only=True, slots=True)
class StageRun:
    """One stage on this rank: its module, what it needs, and how it is to be run."""

    program: StageProgram
    module: Any
    shape: StageShape
    leaves: tuple[int, ...]
    grad_inputs: tuple[int, ...]
    has_backward: bool
    recompute: bool
    output_dtypes: tuple[torch.dtype | None, ...]
    """The dtype that each output is handed on in, None where it is left as it is."""
    weights: tuple[list[Tensor], list[Tensor]] | None = None
    """Without flushes: the newest weights and the version before, in the module's order."""
    tail: Any = None
    """The module of what is computed once for the whole batch, if anything is."""
    group: tuple[int, ...] = ()
    """The stage's ranks."""
    forced_weights: list[Tensor] | None = None
    """Weights to run with in place of the module's own."""


@dataclass(kw_only=True, slots=True)
class _Saved:
    """What a forward leaves for its backward."""

    call: MicroBatch
    inputs: list[Tensor]
    roots: list[Any] = field(default_factory=list)
    """Gradient edges of the outputs, None for an output without gradient; then of the losses."""
    loss_gradients: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] | None = None
    has_graph: bool = False


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


class RankLoop:
    """Executes segments of a rank's plan; see `run`.

    `first_step` is the optimizer step that the run's micro-batches count from.
    """

    def __init__(
        self,
        *,
        plan: RankPlan,
        cut: StageCut,
        stages: Mapping[int, StageRun],
        transport: Transport,
        source: SampleSource,
        sync: GradientSync | None,
        seed: int,
        receive_ahead: int,
        autocast: torch.dtype | None,
        device: torch.device,
        batch_size: int,
        splits_backward: bool = False,
        training: bool = True,
    ) -> None:
        self.splits_backward, self.training = splits_backward, training
        self.plan, self.cut, self.stages = plan, cut, stages
        self.transport, self.source, self.sync = transport, source, sync
        self.seed, self.receive_ahead = seed, receive_ahead
        self.device, self.batch_size = device, batch_size
        self.autocast = autocast
        self._edges = [cut.edges[pair] for pair in sorted(cut.edges)]
        self._inbox: dict[Key, list[Tensor | None]] = {}
        self._gradients: dict[Key, dict[int, list[Tensor | None]]] = {}
        self._outputs: dict[Key, list[Tensor]] = {}
        self._input_gradients: dict[Key, list[Tensor | None]] = {}
        self._saved: dict[Key, _Saved] = {}
        self._halves: dict[Key, WeightHalf] = {}
        self._posted: dict[tuple[ActionKind, int, int, int], list[_Posted]] = {}
        self._sends: list[tuple[Handle, Tensor]] = []
        self.losses: dict[int, list[tuple[Tensor, Tensor | int]]] = {}
        self._in_flight: dict[int, int] = dict.fromkeys(stages, 0)
        self.peak_in_flight: dict[int, int] = dict.fromkeys(stages, 0)
        self.record: LoopRecord | None = None
        self.current: BoundAction | str = ""
        self._flush = 0
        self.step = 0
        self._tails = {
            s: WholeBatch(loop=self, stage=run) for s, run in stages.items() if run.tail is not None
        }
        self.first_step = 0
        self._run = {
            ActionKind.F: self._forward,
            ActionKind.B: self._backward,
            ActionKind.I: self._input_half,
            ActionKind.W: self._weight_half,
            ActionKind.RECOMPUTE: self._recompute,
            ActionKind.SEND_F: self._send_outputs,
            ActionKind.SEND_B: self._send_gradients,
        }

    def run(
        self,
        segment: Sequence[BoundAction],
        *,
        base: int,
        step: int,
        flush: int,
        is_last_flush: bool,
        keep_sends: bool,
    ) -> Iterator[Handle]:
        """Run a segment; yields what it waits for.

        `base` is the step that the segment's micro-batches count from; `flush` numbers the
        segment's batch among those of optimizer step `step`. With `is_last_flush` gradients are
        summed. With `keep_sends` messages may still be under way at the end.
        """
        self.step, self._flush = step, flush
        try:
            yield from self._actions(segment, base, is_last_flush)
            if not keep_sends:
                self.current = "the end of the step"
                yield from self._wait_for_sends()
        except PeerTimeoutError as error:
            raise PeerTimeoutError(
                f"rank {self.plan.rank} (device {self.plan.device}) hangs in step {step} at "
                f"{self.where}: {error}"
            ) from error

    @property
    def where(self) -> str:
        """The action that runs, and the ranks that it exchanges tensors with."""
        if isinstance(self.current, str):
            return self.current
        peers = sorted({piece.peer for piece in self.current.pieces})
        ranks = f" (peer rank {', '.join(map(str, peers))})" if peers else ""
        return f"action {self.current.action}{ranks}"

    def _actions(
        self, segment: Sequence[BoundAction], base: int, is_last_flush: bool
    ) -> Iterator[Handle]:
        receives = [
            bound
            for bound in segment
            if bound.action.kind in (ActionKind.RECV_F, ActionKind.RECV_B)
        ]
        num_posted, num_received = 0, 0
        shift = {s: base * run.shape.num_micro_batches for s, run in self.stages.items()}
        last_backward = _last_backwards(segment) if is_last_flush else {}
        record = self.record.begin(self.step) if self.record is not None else None
        for index, bound in enumerate(segment):
            action = bound.action
            kind, stage = action.kind, action.stage
            self.current = bound
            while num_posted < min(len(receives), num_received + self.receive_ahead):
                ahead = receives[num_posted]
                self._post(ahead, shift[ahead.action.stage])
                num_posted += 1
            if record is not None:
                record.actions.append(bound)
                record.start_s.append(time.perf_counter())
            if kind in (ActionKind.RECV_F, ActionKind.RECV_B):
                if num_received >= num_posted:
                    self._post(bound, shift[stage])
                    num_posted += 1
                num_received += 1
                key = (kind, stage, action.micro_batch + shift[stage], action.peer)
                for posted in self._posted.pop(key):
                    yield posted.handle
                    posted.finish()
            elif kind is ActionKind.REDUCE_GRAD:
                if is_last_flush and self.sync is not None:
                    yield from self.sync.finish(stage)
            elif kind in self._run:
                if last_backward.get(stage) == index and self.sync is not None:
                    self.sync.expect(stage)
                self._run[kind](bound, action.micro_batch + shift[stage])
                if kind is ActionKind.F and self.stages[stage].tail is not None:
                    yield from self._tails[stage].note(action.micro_batch)
            if record is not None:
                record.end_s.append(time.perf_counter())

    def take_losses(self, step: int) -> tuple[float, float]:
        """(sum, weight) of the losses of an optimizer step, once."""
        losses = self.losses.pop(step, [])
        return sum(float(loss) for loss, _ in losses), sum(float(w) for _, w in losses)

    # Forward

    def _forward(self, bound: BoundAction, micro_batch: int) -> None:
        stage = self.stages[bound.action.stage]
        key = (bound.action.stage, micro_batch)
        inputs = self._take_inputs(stage, key)
        saved = _Saved(
            call=self._call(stage, micro_batch),
            inputs=inputs,
            weights=self._weights(stage, micro_batch),
        )
        keeps_graph = stage.has_backward and not stage.recompute
        values = self._compute(stage, saved, with_graph=keeps_graph)
        outputs = values[: stage.program.num_outputs]
        if stage.program.losses:
            found = self.losses.setdefault(self._step_of(stage, micro_batch), [])
            losses = values[stage.program.num_outputs :]
            found.extend(self.loss_values(stage.program, losses, stage.shape.share))
        if stage.has_backward:
            if keeps_graph:
                self._save_roots(stage, saved, values)
            self._saved[key] = saved
            held = self._in_flight[key[0]] = self._in_flight[key[0]] + 1
            self.peak_in_flight[key[0]] = max(self.peak_in_flight[key[0]], held)
        self._outputs[key] = [out.detach() for out in outputs]
        if stage.tail is not None:
            self._tails[key[0]].keep(micro_batch, self._outputs[key])
        for piece in bound.local:
            self._hand_on(piece, key)
        if not bound.is_sent:
            del self._outputs[key]

    def _take_inputs(self, stage: StageRun, key: Key) -> list[Tensor]:
        slots: list[Tensor | None] = self._inbox.pop(key, [None] * stage.program.num_inputs)
        if stage.leaves:
            first = self._flush * self.batch_size + self._first_sample(stage, key[1])
            step = self._step_of(stage, key[1])
            fetched = self.source.fetch(step, stage.leaves, first, stage.shape.share)
            for leaf, tensor in zip(stage.program.leaves, fetched, strict=True):
                slots[leaf.position] = tensor.to(self.device, non_blocking=True)
        inputs: list[Tensor] = []
        for position, tensor in enumerate(slots):
            if tensor is None:
                raise RuntimeError(f"input {position} of stage {key[0]} did not arrive")
            inputs.append(tensor)
        if stage.has_backward:
            for position in stage.grad_inputs:
                inputs[position] = inputs[position].detach().requires_grad_()
        return inputs

    def _first_sample(self, stage: StageRun, micro_batch: int) -> int:
        """First sample of this rank's share, within the batch."""
        return stage.shape.first_sample(micro_batch % stage.shape.num_micro_batches)

    def _step_of(self, stage: StageRun, micro_batch: int) -> int:
        """The optimizer step of a micro-batch: without flushes it may be the next one."""
        if stage.weights is None:
            return self.step
        return self.first_step + micro_batch // stage.shape.num_micro_batches

    def _weights(self, stage: StageRun, micro_batch: int) -> list[Tensor] | None:
        """Of two versions the older one, except for forwards ahead into the next step."""
        if stage.weights is None:
            return stage.forced_weights
        return stage.weights[0 if self._step_of(stage, micro_batch) > self.step else 1]

    def _call(self, stage: StageRun, micro_batch: int) -> MicroBatch:
        return MicroBatch(
            seed=self.seed,
            step=self._step_of(stage, micro_batch),
            training=self.training,
            weight_half=WeightHalf() if self.splits_backward else None,
            first_sample=self._flush * self.batch_size + self._first_sample(stage, micro_batch),
            num_samples=stage.shape.share,
        )

    def _compute(self, stage: StageRun, saved: _Saved, *, with_graph: bool) -> Sequence[Any]:
        context = (
            torch.autocast(self.device.type, self.autocast)
            if self.autocast is not None
            else nullcontext()
        )
        with torch.set_grad_enabled(with_graph), context:
            values = stage.module(saved.call, saved.inputs, saved.weights)
            if self.autocast is None:
                return values
            cast = [
                value if dtype is None else value.to(dtype)
                for value, dtype in zip(values, stage.output_dtypes, strict=False)
            ]
            return [*cast, *values[len(cast) :]]

    @staticmethod
    def loss_values(
        program: StageProgram, values: Sequence[Any], num_samples: int
    ) -> Iterator[tuple[Tensor, Tensor | int]]:
        """(sum, weight) of each loss; a mean counts with the samples that it is of."""
        position = 0
        for is_pair in program.losses:
            loss = values[position].detach()
            if is_pair:
                weight = values[position + 1]
                yield loss, weight.detach() if isinstance(weight, Tensor) else weight
            else:
                # Several tasks' means share one weight: their sum is the loss.
                counts = program.counts_samples and position == 0
                yield loss * num_samples, num_samples if counts else 0
            position += 2 if is_pair else 1

    def _save_roots(self, stage: StageRun, saved: _Saved, values: Sequence[Any]) -> None:
        """Keep where gradients enter, not the outputs themselves: those may leave memory."""
        count = stage.program.num_outputs
        saved.roots = [
            get_gradient_edge(out) if out.requires_grad else None for out in values[:count]
        ]
        position = count
        for is_pair in stage.program.losses:
            loss = values[position]
            if loss.requires_grad:
                # A mean over the share counts with its samples, a sum for itself.
                factor = 1.0 if is_pair else float(stage.shape.share)
                saved.roots.append(get_gradient_edge(loss))
                saved.loss_gradients.append(torch.full_like(loss, factor, requires_grad=False))
            position += 2 if is_pair else 1
        saved.has_graph = True

    # Backward

    def _recompute(self, bound: BoundAction, micro_batch: int) -> None:
        stage = self.stages[bound.action.stage]
        saved = self._saved[bound.action.stage, micro_batch]
        self._restore(stage, saved)

    def _restore(self, stage: StageRun, saved: _Saved) -> None:
        values = self._compute(stage, saved, with_graph=True)
        self._save_roots(stage, saved, values)

    def _backward(self, bound: BoundAction, micro_batch: int) -> None:
        stage = self.stages[bound.action.stage]
        key = (bound.action.stage, micro_batch)
        saved = self._saved.pop(key)
        if not saved.has_graph:
            self._restore(stage, saved)
        self._in_flight[key[0]] -= 1
        gradients = [*self._output_gradients(stage, key), *saved.loss_gradients]
        pairs = [
            (root, gradient)
            for root, gradient in zip(saved.roots, gradients, strict=True)
            if root is not None and gradient is not None
        ]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [g for _, g in pairs])
        if stage.grad_inputs:
            made: list[Tensor | None] = [t.grad for t in saved.inputs]
            for position in stage.grad_inputs:
                if made[position] is None:
                    made[position] = torch.zeros_like(saved.inputs[position])
            self._input_gradients[key] = made
            for piece in bound.local:
                self._hand_back(piece, key)
            if not bound.is_sent:
                del self._input_gradients[key]

    def _input_half(self, bound: BoundAction, micro_batch: int) -> None:
        key = (bound.action.stage, micro_batch)
        half = self._saved[key].call.weight_half
        if half is not None:
            half.is_open = True
            self._halves[key] = half
        self._backward(bound, micro_batch)

    def _weight_half(self, bound: BoundAction, micro_batch: int) -> None:
        half = self._halves.pop((bound.action.stage, micro_batch), None)
        if half is not None:
            with torch.no_grad():
                half.run()

    def _output_gradients(self, stage: StageRun, key: Key) -> list[Tensor | None]:
        """The gradient of every output: the sum over the edges that it left by, in their order."""
        totals: list[Tensor | None] = [None] * stage.program.num_outputs
        if stage.tail is not None:
            totals = self._tails[key[0]].gradients_of(key[1])
        arrived = self._gradients.pop(key, {})
        for slot in sorted(arrived):
            edge = self._edges[slot]
            for output, gradient in zip(edge.outputs, arrived[slot], strict=True):
                if gradient is None:
                    continue
                before = totals[output]
                totals[output] = gradient if before is None else before + gradient
        return totals

    # What moves

    def _send_outputs(self, bound: BoundAction, micro_batch: int) -> None:
        outputs = self._outputs[bound.action.stage, micro_batch]
        for piece in bound.pieces:
            for spec, output in zip(piece.edge.tensors, piece.edge.outputs, strict=True):
                part = _part(outputs[output], spec.axis, piece)
                if part is not None:
                    self._send(part, piece)
        if bound.is_last_send:
            del self._outputs[bound.action.stage, micro_batch]

    def _send_gradients(self, bound: BoundAction, micro_batch: int) -> None:
        gradients = self._input_gradients[bound.action.stage, micro_batch]
        for piece in bound.pieces:
            for spec, position in zip(piece.edge.tensors, piece.edge.inputs, strict=True):
                gradient = gradients[position]
                if not spec.needs_grad or gradient is None:
                    continue
                part = _part(gradient, spec.axis, piece)
                if part is not None:
                    self._send(part, piece)
        if bound.is_last_send:
            del self._input_gradients[bound.action.stage, micro_batch]

    def _send(self, tensor: Tensor, piece: Piece) -> None:
        tensor = tensor.contiguous()
        self._sends.append((self.transport.send(tensor, piece.peer, piece.tag), tensor))

    def _wait_for_sends(self) -> Iterator[Handle]:
        sends, self._sends = self._sends, []
        for handle, _ in sends:
            yield handle

    def _post(self, bound: BoundAction, shift: int) -> None:
        """Post the receives of a RECV action into buffers of their own or slices of one."""
        action = bound.action
        micro_batch = action.micro_batch + shift
        posted: list[_Posted] = []
        is_forward = action.kind is ActionKind.RECV_F
        for piece in bound.pieces:
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
            handle = self.transport.receive(arrived, piece.peer, piece.tag)
            return _Posted(handle=handle, place=buffer, arrived=arrived, adds=True)
        if part.is_contiguous():
            return _Posted(handle=self.transport.receive(part, piece.peer, piece.tag))
        arrived = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        handle = self.transport.receive(arrived, piece.peer, piece.tag)
        return _Posted(handle=handle, place=part, arrived=arrived)

    def _input_buffer(self, piece: Piece, tensor: int, key: Key) -> Tensor:
        slots = self._inbox.get(key)
        if slots is None:
            slots = self._inbox[key] = [None] * self.stages[key[0]].program.num_inputs
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
        shape = spec.shape(self.stages[stage].shape.share)
        return torch.empty(shape, dtype=spec.dtype, device=self.device)

    def _hand_on(self, piece: Piece, key: Key) -> None:
        """Give outputs to a stage on this rank."""
        target = piece.edge.target
        peer_key = (target, piece.peer_micro_batch)
        outputs = self._outputs[key]
        for i, (spec, output) in enumerate(
            zip(piece.edge.tensors, piece.edge.outputs, strict=True)
        ):
            part = _part(outputs[output], spec.axis, piece)
            if part is None:
                continue
            slots = self._inbox.get(peer_key)
            if slots is None:
                slots = self._inbox[peer_key] = [None] * self.stages[target].program.num_inputs
            if spec.axis is None or (piece.is_whole and piece.peer_is_whole):
                slots[piece.edge.inputs[i]] = part
            else:
                buffer = self._input_buffer(piece, i, peer_key)
                _at_peer(buffer, spec.axis, piece).copy_(part)

    def _hand_back(self, piece: Piece, key: Key) -> None:
        """Give input gradients to the stage on this rank that made the inputs."""
        source = piece.edge.source
        peer_key = (source, piece.peer_micro_batch)
        gradients = self._input_gradients[key]
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


def _last_backwards(segment: Sequence[BoundAction]) -> dict[int, int]:
    """Index of each stage's last action that makes gradients."""
    return {
        bound.action.stage: i
        for i, bound in enumerate(segment)
        if bound.action.kind in (ActionKind.B, ActionKind.W)
    }


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
