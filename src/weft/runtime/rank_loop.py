"""Runs one rank's actions on real tensors: forward, backward, and what moves between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from weft.plan.action import RECV_KINDS, ActionKind
from weft.runtime.batch_source import SampleSource
from weft.runtime.grad_sync import GradientSync
from weft.runtime.measured import LoopRecord
from weft.runtime.micro_batch import MicroBatch, WeightHalf
from weft.runtime.rank_mailbox import Key, Mailbox
from weft.runtime.rank_program import BoundAction, RankPlan, StageShape
from weft.runtime.stage_program import StageCut, StageProgram
from weft.runtime.transport import Handle, PeerTimeoutError, Transport
from weft.runtime.whole_batch import WholeBatch


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """A segment's actions, and what is known of them before they run, by row.

    `posted` receives are to be posted before a row. `last_backward` are the rows of each stage's
    last action that makes gradients, `last_forward` that of the last forward of all.
    """

    actions: Sequence[BoundAction]
    receives: tuple[BoundAction, ...]
    posted: tuple[int, ...]
    last_backward: frozenset[int]
    last_forward: int

    @classmethod
    def of(cls, actions: Sequence[BoundAction], receive_ahead: int) -> _Segment:
        receives = tuple(one for one in actions if one.action.kind in RECV_KINDS)
        posted: list[int] = []
        last_backward: dict[int, int] = {}
        last_forward = -1
        # RECVs in a row are one wave: what joins several edges needs all of them.
        waves: list[int] = []
        row_waves: list[int] = []
        was_receive = False
        for one in actions:
            is_receive = one.action.kind in RECV_KINDS
            if is_receive:
                if not was_receive:
                    waves.append(0)
                waves[-1] += 1
            row_waves.append(len(waves) - is_receive)
            was_receive = is_receive
        ends = [0, *accumulate(waves)]
        for row, one in enumerate(actions):
            kind = one.action.kind
            ahead = max(receive_ahead, kind in RECV_KINDS)
            posted.append(ends[min(len(waves), row_waves[row] + ahead)])
            if kind in (ActionKind.B, ActionKind.W):
                last_backward[one.action.stage] = row
            elif kind is ActionKind.F:
                last_forward = row
        return cls(
            actions=actions,
            receives=receives,
            posted=tuple(posted),
            last_backward=frozenset(last_backward.values()),
            last_forward=last_forward,
        )


_SMALL_BYTES = 2**16
"""Messages below this are received when needed: gloo takes longer to post than to move them."""


def _has_large_edge(cut: StageCut, plan: RankPlan) -> bool:
    share = max(shape.share for shape in plan.shapes.values())
    return any(
        math.prod(spec.shape(share)) * spec.dtype.itemsize >= _SMALL_BYTES
        for edge in cut.edges.values()
        for spec in edge.tensors
    )


class RankLoop:
    """Executes segments of a rank's plan; see `run`.

    `first_step` is the optimizer step that the run's micro-batches count from. Gradients come out
    multiplied by `loss_scale`.
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
        self.seed = seed
        self.receive_ahead = receive_ahead if _has_large_edge(cut, plan) else 0
        self.device, self.batch_size = device, batch_size
        self.autocast = autocast
        self.loss_scale = 1.0
        self.mail = Mailbox(transport=transport, cut=cut, shapes=plan.shapes, device=device)
        self._saved: dict[Key, _Saved] = {}
        self._halves: dict[Key, WeightHalf] = {}
        self._segments: dict[int, _Segment] = {}
        self._loss_gradients: dict[tuple[int, int], Tensor] = {}
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
            ActionKind.SEND_F: self.mail.send_outputs,
            ActionKind.SEND_B: self.mail.send_gradients,
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
        after_forwards: Callable[[], None] | None = None,
    ) -> Iterator[Handle]:
        """Run a segment; yields what it waits for.

        `base` is the step that the segment's micro-batches count from; `flush` numbers the
        segment's batch among those of optimizer step `step`. With `is_last_flush` gradients are
        summed. With `keep_sends` messages may still be under way at the end. `after_forwards` is
        called when the segment's last forward has ended.
        """
        self.step, self._flush = step, flush
        known = self._segments.get(id(segment))
        if known is None:
            # The entry holds the segment, so no other can get its id.
            known = _Segment.of(segment, self.receive_ahead)
            self._segments[id(segment)] = known
        try:
            yield from self._actions(known, base, is_last_flush, after_forwards)
            if not keep_sends:
                self.current = "the end of the step"
                yield from self.mail.wait_for_sends()
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
        self,
        segment: _Segment,
        base: int,
        is_last_flush: bool,
        after_forwards: Callable[[], None] | None,
    ) -> Iterator[Handle]:
        mail, receives, num_posted = self.mail, segment.receives, 0
        shift = {s: base * run.shape.num_micro_batches for s, run in self.stages.items()}
        sync = self.sync if is_last_flush else None
        record = self.record.begin(self.step) if self.record is not None else None
        for row, bound in enumerate(segment.actions):
            action = bound.action
            kind, stage = action.kind, action.stage
            self.current = bound
            while num_posted < segment.posted[row]:
                ahead = receives[num_posted]
                mail.post(ahead, shift[ahead.action.stage])
                num_posted += 1
            if record is not None:
                record.actions.append(bound)
                record.start_s.append(time.perf_counter())
            run = self._run.get(kind)
            if run is not None:
                if sync is not None and row in segment.last_backward:
                    sync.expect(stage)
                run(bound, action.micro_batch + shift[stage])
                if kind is ActionKind.F:
                    if self._tails and stage in self._tails:
                        yield from self._tails[stage].note(action.micro_batch)
                    if row == segment.last_forward and after_forwards is not None:
                        after_forwards()
            elif kind is ActionKind.RECV_F or kind is ActionKind.RECV_B:
                yield from mail.receive(bound, shift)
            elif kind is ActionKind.REDUCE_GRAD and sync is not None:
                yield from sync.finish(stage)
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
        self.mail.outputs[key] = [out.detach() for out in outputs]
        if stage.tail is not None:
            self._tails[key[0]].keep(micro_batch, self.mail.outputs[key])
        for piece in bound.local:
            self.mail.hand_on(piece, key)
        if not bound.is_sent:
            del self.mail.outputs[key]

    def _take_inputs(self, stage: StageRun, key: Key) -> list[Tensor]:
        slots = self.mail.take_inputs(key)
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
                saved.roots.append(get_gradient_edge(loss))
                saved.loss_gradients.append(self._loss_gradient(stage, position, loss, is_pair))
            position += 2 if is_pair else 1
        saved.has_graph = True

    def _loss_gradient(self, stage: StageRun, position: int, loss: Tensor, is_pair: bool) -> Tensor:
        key = (stage.program.index, position)
        found = self._loss_gradients.get(key)
        if found is None or found.dtype != loss.dtype or found.shape != loss.shape:
            # A mean over the share counts with its samples, a sum for itself.
            factor = self.loss_scale * (1.0 if is_pair else stage.shape.share)
            found = torch.full_like(loss, factor, requires_grad=False)
            self._loss_gradients[key] = found
        return found

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
            self.mail.input_gradients[key] = made
            for piece in bound.local:
                self.mail.hand_back(piece, key)
            if not bound.is_sent:
                del self.mail.input_gradients[key]

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
        """The gradient of every output: the sum over the edges that it left by."""
        totals: list[Tensor | None] = [None] * stage.program.num_outputs
        if stage.tail is not None:
            totals = self._tails[key[0]].gradients_of(key[1])
        self.mail.add_gradients(key, totals)
        return totals
