"""A loss over the whole batch: embeddings are gathered at a barrier, its gradient is cut up again.

Every rank of the loss's stage holds all samples of what the loss needs and computes it alike; the
first of them counts the loss and the gradients of the parameters inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.base.errors import IntegrityError
from weft.runtime.micro_batch import MicroBatch, accumulate
from weft.runtime.stage_program import Tail, TensorSpec
from weft.runtime.transport import Handle

if TYPE_CHECKING:
    from weft.runtime.rank_loop import RankLoop, StageRun


@dataclass(kw_only=True)
class WholeBatch:
    """The tail of one stage on one rank."""

    loop: RankLoop
    stage: StageRun
    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def tail(self) -> Tail:
        """What is computed once."""
        if self.stage.program.tail is None:
            raise IntegrityError(f"stage {self.stage.program.index} has no tail")
        return self.stage.program.tail

    @property
    def slot(self) -> int:
        """This rank's place among the stage's ranks."""
        return self.stage.group.index(self.loop.transport.rank)

    def keep(self, micro_batch: int, outputs: list[Tensor]) -> None:
        """Hold what the loss needs of a micro-batch."""
        self.kept[micro_batch] = [outputs[i] for i in self.tail.outputs]

    def note(self, micro_batch: int) -> Iterator[Handle]:
        """After a forward; after the last one compute the loss and its gradients."""
        del micro_batch
        if len(self.kept) < self.stage.shape.num_micro_batches:
            return
        columns = list(zip(*(self.kept[m] for m in sorted(self.kept)), strict=True))
        self.kept.clear()
        gathered: list[Tensor] = []
        for spec, parts in zip(self.tail.tensors, columns, strict=True):
            whole = parts[0]
            if spec.axis is not None:
                whole = yield from self._gather(spec.axis, parts)
            gathered.append(whole)
        self._compute(gathered)

    def gradients_of(self, micro_batch: int) -> list[Tensor | None]:
        """The gradients of a micro-batch's outputs, as far as they come from the tail."""
        shape = self.stage.shape
        found: list[Tensor | None] = [None] * self.stage.program.num_outputs
        for spec, output, gradient in zip(
            self.tail.tensors, self.tail.outputs, self.gradients, strict=True
        ):
            if gradient is None:
                continue
            if spec.axis is None:
                is_first = micro_batch == 0 and self.slot == 0
                found[output] = gradient if is_first else torch.zeros_like(gradient)
            else:
                first = shape.first_sample(micro_batch % shape.num_micro_batches)
                found[output] = gradient.narrow(spec.axis, first, shape.share)
        return found

    def _gather(self, axis: int, parts: tuple[Tensor, ...]) -> Any:
        """All samples of a tensor, in their order: micro-batch, then rank, then sample."""
        own_MS = torch.stack([part.movedim(axis, 0) for part in parts]).contiguous()
        ranks = [own_MS]
        if len(self.stage.group) > 1:
            ranks = [torch.empty_like(own_MS) for _ in self.stage.group]
            yield self.loop.transport.all_gather(own_MS, ranks, self.stage.group)
        return torch.stack(ranks, 1).flatten(0, 2).movedim(0, axis)

    def _compute(self, gathered: list[Tensor]) -> None:
        loop, tail, num_samples = self.loop, self.tail, self.loop.batch_size
        call = MicroBatch(
            seed=loop.seed,
            step=loop.step,
            first_sample=0,
            num_samples=num_samples,
            training=loop.training,
        )
        with_graph = self.stage.has_backward
        inputs: list[Tensor | None] = [None] * tail.program.num_inputs
        for spec, position, tensor in zip(tail.tensors, tail.inputs, gathered, strict=True):
            inputs[position] = tensor.detach().requires_grad_(with_graph and spec.needs_grad)
        if tail.program.leaves:
            leaves = tuple(leaf.leaf for leaf in tail.program.leaves)
            fetched = loop.source.fetch(loop.step, leaves, 0, num_samples)
            for leaf, tensor in zip(tail.program.leaves, fetched, strict=True):
                inputs[leaf.position] = tensor.to(loop.device)
        context = (
            torch.autocast(loop.device.type, loop.autocast)
            if loop.autocast is not None
            else nullcontext()
        )
        with torch.set_grad_enabled(with_graph), context:
            values = self.stage.tail(call, inputs)
        if self.slot == 0:
            found = loop.losses.setdefault(loop.step, [])
            found.extend(loop.loss_values(tail.program, values, num_samples))
        if with_graph:
            self._differentiate(values, inputs, tail.tensors)

    def _differentiate(
        self, values: Any, inputs: list[Tensor | None], specs: tuple[TensorSpec, ...]
    ) -> None:
        total = torch.zeros((), device=self.loop.device)
        position = 0
        for is_pair in self.tail.program.losses:
            samples = 1 if is_pair else self.loop.batch_size
            total = total + values[position] * (samples * self.loop.loss_scale)
            position += 2 if is_pair else 1
        wanted = [inputs[i] for i in self.tail.inputs]
        weights = [p for p in self.stage.tail.parameters() if p.requires_grad]
        ends = [t for t in wanted if t is not None and t.requires_grad]
        made = torch.autograd.grad(total, [*ends, *weights], allow_unused=True)
        by_tensor = dict(zip(map(id, ends), made, strict=False))
        self.gradients = [by_tensor.get(id(t)) for t in wanted]
        if self.slot:
            return
        for p, gradient in zip(weights, made[len(ends) :], strict=True):
            if gradient is not None:
                accumulate(p, gradient)
