"""Sums gradients over the ranks that hold a parameter, while backward still runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.runtime.transport import Handle, Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientGroup:
    """Parameters that the same ranks hold; `stage` is the one that alone uses them, else -1."""

    ranks: tuple[int, ...]
    stage: int
    names: tuple[str, ...]


class _Bucket:
    """Gradients side by side in one buffer, which is summed as a whole."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: tuple[int, ...]) -> None:
        self.parameters = tuple(parameters)
        self.ranks = ranks
        first = parameters[0]
        dtype = torch.float32 if first.dtype in (torch.bfloat16, torch.float16) else first.dtype
        total = sum(p.numel() for p in parameters)
        self.buffer = torch.zeros(total, dtype=dtype, device=first.device)
        self.views: list[Tensor] = []
        start = 0
        for p in parameters:
            self.views.append(self.buffer[start : start + p.numel()].view(p.shape))
            start += p.numel()
        self.in_place = dtype == first.dtype
        self.missing = 0
        self.handle: Handle | None = None
        self.attach()

    def attach(self) -> None:
        """Let backward accumulate right into the buffer."""
        self.buffer.zero_()
        if self.in_place:
            for p, view in zip(self.parameters, self.views, strict=True):
                p.grad = view

    def gather(self) -> None:
        """Move in what backward put elsewhere (low-precision parameters, replaced gradients)."""
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is not None and p.grad is not view:
                view.copy_(p.grad)

    def scatter(self) -> None:
        """Give the sums back to the parameters."""
        for p, view in zip(self.parameters, self.views, strict=True):
            p.grad = view if self.in_place else view.to(p.dtype)


class GradientSync:
    """The buckets of one rank.

    `expect(stage)` before a stage's last backward of a step makes its buckets start as soon as
    their gradients are complete; `finish` starts what is left and yields everything to wait for.
    Buckets of one group start in one order on all ranks, whatever order autograd takes.
    """

    def __init__(
        self,
        transport: Transport,
        groups: Sequence[GradientGroup],
        parameters: Mapping[str, nn.Parameter],
        bucket_bytes: int,
    ) -> None:
        self._transport = transport
        self._buckets: dict[int, list[_Bucket]] = {}
        self._next: dict[int, int] = {}
        self._of_parameter: dict[int, tuple[int, _Bucket]] = {}
        self._armed: set[int] = set()
        self._finished: set[int] = set()
        for group in groups:
            buckets = self._buckets.setdefault(group.stage, [])
            # Backward reaches the last parameters first.
            for members in _chunks([parameters[n] for n in reversed(group.names)], bucket_bytes):
                bucket = _Bucket(members, group.ranks)
                buckets.append(bucket)
                for p in members:
                    self._of_parameter[id(p)] = (group.stage, bucket)
                    p.register_post_accumulate_grad_hook(self._accumulated)
        self._next = dict.fromkeys(self._buckets, 0)

    def expect(self, stage: int) -> None:
        """The next backward of this stage is its last before the sum."""
        if stage in self._buckets:
            self._armed.add(stage)
            for bucket in self._buckets[stage]:
                bucket.missing = len(bucket.parameters)

    def finish(self, stage: int) -> Iterator[Handle]:
        """Start a stage's remaining buckets, and wait for all of them (-1: shared parameters).

        Does nothing for a stage that is finished since the last `clear`.
        """
        if stage in self._finished:
            return
        self._finished.add(stage)
        buckets = self._buckets.get(stage, [])
        self._armed.discard(stage)
        for bucket in buckets[self._next.get(stage, 0) :]:
            self._start(bucket)
        self._next[stage] = 0
        for bucket in buckets:
            if bucket.handle is not None:
                yield bucket.handle
                bucket.handle = None
            bucket.scatter()

    def clear(self) -> None:
        """Zero every bucket for the next step."""
        self._finished.clear()
        for buckets in self._buckets.values():
            for bucket in buckets:
                bucket.attach()

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether this parameter's gradient lives in a bucket."""
        return id(parameter) in self._of_parameter

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages with buckets; -1 stands for parameters that several stages share."""
        return tuple(sorted(self._buckets))

    def _accumulated(self, parameter: Tensor) -> None:
        stage, bucket = self._of_parameter[id(parameter)]
        if stage not in self._armed:
            return
        bucket.missing -= 1
        buckets = self._buckets[stage]
        while self._next[stage] < len(buckets) and buckets[self._next[stage]].missing == 0:
            self._start(buckets[self._next[stage]])
            self._next[stage] += 1

    def _start(self, bucket: _Bucket) -> None:
        bucket.gather()
        bucket.handle = self._transport.all_reduce(bucket.buffer, bucket.ranks)


def _chunks(parameters: Sequence[nn.Parameter], limit_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype of at most `limit_bytes`, or of one larger parameter."""
    chunk: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        if chunk and (size + p.nbytes > limit_bytes or p.dtype != chunk[0].dtype):
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += p.nbytes
    if chunk:
        yield chunk
