"""What an executor holds of finetuning jobs and of their samples in flight.

Shape legend: n tokens of a sample, h hidden, Hkv key-value heads, D head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weft.base.errors import IntegrityError
from weft.engine.finetune import FinetuneSegment, JobStart, SampleStart
from weft.model.adapters.weights import (
    AdapterWeights,
    FrozenBypass,
    collect_layers,
    model_targets,
)
from weft.model.finetune.attention import KvGrads
from weft.model.finetune.dropout import DropoutKey
from weft.model.finetune.layer_backward import wants_kv_grads
from weft.model.finetune.layer_tensors import LayerPlan, WindowPlace
from weft.model.finetune.optimizer import make_optimizer
from weft.model.finetune.parameters import TrainedWeights
from weft.model.finetune.plan import plan_layers
from weft.model.finetune.primitives import wide_dtype
from weft.model.finetune.saved import SavedTensors
from weft.model.linear import tensor_bytes
from weft.runtime.device_context import DeviceContext
from weft.runtime.transfer import upload


class JobState:
    """One job: its trained weights, its optimizer, and what its backward needs of each layer."""

    def __init__(self, start: JobStart, context: DeviceContext) -> None:
        config = context.config
        self.start = start
        self.trained = TrainedWeights(
            start.adapter,
            model_targets(start.adapter, config),
            dtype=context.layout.dtype,
            device=context.device,
            seed=start.seed,
        )
        self.plans = plan_layers(context.decoder, self.trained, start.remat)
        self.optimizer = make_optimizer(start.optimizer, self.trained.master)
        self.num_steps = 0
        """Optimizer steps done."""
        self.adapter = self.adapter_of(self.trained.working)
        """The working weights, as forward rows apply them: views that steps change."""

    @property
    def size_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.trained.size_bytes + sum(map(tensor_bytes, self.optimizer.state.values()))

    def adapter_of(self, flat: Tensor) -> AdapterWeights:
        """An adapter whose weights are views of a flat tensor [P], such as a copy."""
        num_layers = len(self.plans)
        bypasses = (
            FrozenBypass(target=b.target, weights=b.weights, activation=b.activation)
            for layer in range(num_layers)
            for b in self.trained.bypasses(layer, flat).values()
        )
        return AdapterWeights(
            kind=self.start.adapter.kind, layers=collect_layers(bypasses, num_layers)
        )


class SampleState:
    """One sample between its start and its end."""

    def __init__(self, job: JobState, start: SampleStart, context: DeviceContext) -> None:
        self.job = job
        self.start = start
        self.num_tokens = len(start.token_ids)
        self.saved = SavedTensors(context.config.num_layers)
        self.forward_end = 0
        """Tokens before it have been forward."""
        self._dtype = context.layout.dtype
        self._device = context.device
        self._rope = context.decoder.rope
        self._kv_shape = (context.layout.num_kv_heads, self.num_tokens, context.layout.head_dim)
        self._kv_grads: list[KvGrads | None] = [None] * context.config.num_layers
        self._spare_kv_grads: KvGrads | None = None
        """A finished layer's, for the next one: fresh memory costs a page fault every 4 KiB."""
        self._done_from = [self.num_tokens] * context.config.num_layers
        self._labelled = np.flatnonzero(start.label_weights[1:])
        """Positions whose successor is a label that counts."""
        self.d_hidden: Tensor | None = None
        """[n, h] gradient at the border that each token's backward has come to."""
        if not start.is_validation:
            shape = (self.num_tokens, context.config.hidden_size)
            self.d_hidden = torch.zeros(shape, dtype=self._dtype, device=self._device)

    @property
    def dropout(self) -> DropoutKey | None:
        """What its masks depend on; None where nothing is dropped."""
        probability = self.job.start.adapter.dropout
        if self.start.is_validation or not probability:
            return None
        return DropoutKey(
            seed=self.job.start.seed,
            step=self.start.step,
            index=self.start.index,
            probability=probability,
        )

    def labelled(self, begin: int, end: int) -> np.ndarray:
        """Positions in [begin, end) whose successor is a label that counts, [w] int64."""
        first, last = np.searchsorted(self._labelled, (begin, end))
        return self._labelled[first:last]

    def place(self, begin: int, end: int) -> WindowPlace:
        """Positions and rotations of a window."""
        return WindowPlace(
            positions=upload(np.arange(begin, end, dtype=np.int64), self._device),
            cos=self._rope.cos[begin:end],
            sin=self._rope.sin[begin:end],
            dropout=self.dropout,
        )

    def kv_grads(self, layer: int) -> KvGrads:
        """The accumulators of a layer, zero when first asked for."""
        found = self._kv_grads[layer]
        if found is None:
            found = self._kv_grads[layer] = self._fresh_kv_grads(self.job.plans[layer])
        return found

    def _fresh_kv_grads(self, plan: LayerPlan) -> KvGrads:
        spare, self._spare_kv_grads = self._spare_kv_grads, None
        before = (None, None) if spare is None else (spare.keys, spare.values)
        parts: list[Tensor | None] = []
        for room, wants in zip(before, wants_kv_grads(plan), strict=True):
            if not wants:
                parts.append(None)
            elif room is not None:
                parts.append(room.zero_())
            else:
                wide = wide_dtype(self._dtype)
                parts.append(torch.zeros(self._kv_shape, dtype=wide, device=self._device))
        keys, values = parts
        return KvGrads(keys=keys, values=values)

    def went_forward(self, segment: FinetuneSegment) -> None:
        """Count a forward window.

        Raises:
            IntegrityError: it does not begin where the last one ended, or is no window.
        """
        if not self.forward_end == segment.begin < segment.end <= self.num_tokens:
            raise IntegrityError(
                f"{_name(segment)} goes forward on [{segment.begin}, {segment.end}); it holds "
                f"{self.num_tokens} tokens, of which {self.forward_end} have been forward"
            )
        self.forward_end = segment.end

    def check_backward(self, segment: FinetuneSegment, layer: int) -> None:
        """Whether a layer may now go backward on a span.

        Raises:
            IntegrityError: forward is not complete, windows do not run right to left, or the layer
                above is not done on the span.
        """
        begin, end = segment.begin, segment.end
        above = self._done_from[layer + 1] if layer + 1 < len(self._done_from) else 0
        if self.start.is_validation or self.forward_end < self.num_tokens:
            reason = f"only {self.forward_end} of {self.num_tokens} tokens have been forward"
        elif not 0 <= begin < end or self._done_from[layer] != end:
            reason = f"the layer is done from {self._done_from[layer]} on"
        elif above > begin:
            reason = f"layer {layer + 1} is done from {above} on"
        else:
            return
        raise IntegrityError(
            f"{_name(segment)} cannot go backward on [{begin}, {end}) in layer {layer}: {reason}"
        )

    def went_backward(self, layer: int, begin: int) -> None:
        """A layer is done on all tokens from `begin` on: forget what only that needed."""
        self._done_from[layer] = begin
        self.saved.release(layer, begin)
        if begin == 0:
            # The lowest layer has no next; in window-major order all layers have theirs by now.
            is_needed = any(grads is None for grads in self._kv_grads[:layer])
            self._spare_kv_grads = self._kv_grads[layer] if is_needed else None
            self._kv_grads[layer] = None

    @property
    def size_bytes(self) -> int:
        """Bytes held, pages apart."""
        tensors = [self.d_hidden]
        for grads in (*self._kv_grads, self._spare_kv_grads):
            if grads is not None:
                tensors += [grads.keys, grads.values]
        return sum(map(tensor_bytes, tensors)) + self.saved.size_bytes


def _name(segment: FinetuneSegment) -> str:
    return f"sample {segment.sample} of job {segment.job_id}"
