"""Ranks as processes of torch.distributed: gloo on CPUs, NCCL on CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.base.errors import ConfigError
from weft.runtime.transport import Handle, PeerTimeoutError, RankProgram


class _Work:
    """A torch.distributed work; `what` and the peers name it should it fail."""

    __slots__ = ("_peers", "_timeout", "_what", "_work")

    def __init__(self, work: Any, timeout: timedelta, what: str, peers: object) -> None:
        self._work, self._timeout, self._what, self._peers = work, timeout, what, peers

    def done(self) -> bool:
        return False  # gloo's messages complete in `wait` alone.

    def wait(self) -> None:
        try:
            # NCCL's wait orders streams and would return at once for a timeout of its own.
            self._work.wait(self._timeout)
        except RuntimeError as error:
            what = f"{self._what} {self._peers}"
            raise PeerTimeoutError(f"{what} failed: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """One end of a channel: its communicator, the peer's rank in it, and how errors name it."""

    group: Any
    peer: int
    sends: str
    receives: str


class DistTransport:
    """This process's rank (a `weft.runtime.transport.Transport`)."""

    def __init__(self, timeout_s: float) -> None:
        self._rank = dist.get_rank()
        self._timeout = timedelta(seconds=timeout_s)
        self._backend = dist.get_backend()
        self._groups: dict[tuple[int, ...], Any] = {}
        self._channels: dict[tuple[int, int], Any] = {}
        self._ends: dict[tuple[int, int], _End] = {}

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    def prepare(self, groups: Sequence[Sequence[int]], channels: Sequence[tuple[int, int]]) -> None:
        """Make the communicators, in one order on every rank.

        gloo tells channels apart by tags. NCCL knows no tags and runs what two ranks exchange in
        one queue, so there each direction of each pair gets a communicator of its own; within it
        messages keep the order that the schedule proves (`weft.plan.deadlock`).
        """
        everyone = tuple(range(dist.get_world_size()))
        for group in groups:
            key = tuple(group)
            if key not in self._groups and len(key) > 1 and key != everyone:
                self._groups[key] = dist.new_group(list(key), timeout=self._timeout)
        if self._backend == "nccl":
            for pair in channels:
                if pair not in self._channels:
                    self._channels[pair] = dist.new_group(sorted(pair), timeout=self._timeout)

    def process_group(self, group: Sequence[int]) -> Any:
        """The communicator of a prepared group."""
        return self._groups.get(tuple(group), dist.group.WORLD)

    def send(self, tensor: Tensor, receiver: int, tag: int) -> Handle:
        """Start sending."""
        end = self._ends.get((self._rank, receiver))
        if end is None:
            end = self._end(self._rank, receiver)
        # What dist.isend does once it has checked its arguments, which the cut has proved.
        work = end.group.send([_real(tensor)], end.peer, tag)
        return _Work(work, self._timeout, end.sends, receiver)

    def receive(self, tensor: Tensor, sender: int, tag: int) -> Handle:
        """Start receiving."""
        end = self._ends.get((sender, self._rank))
        if end is None:
            end = self._end(sender, self._rank)
        work = end.group.recv([_real(tensor)], end.peer, tag)
        return _Work(work, self._timeout, end.receives, sender)

    def _end(self, sender: int, receiver: int) -> _End:
        """This rank's end of a channel, made once."""
        group = self._channels.get((sender, receiver), dist.group.WORLD)
        peer = receiver if sender == self._rank else sender
        end = _End(
            group=group,
            peer=dist.get_group_rank(group, peer),
            sends=f"rank {self._rank}'s send to rank",
            receives=f"rank {self._rank}'s receive from rank",
        )
        self._ends[sender, receiver] = end
        return end

    def all_reduce(self, tensor: Tensor, group: Sequence[int]) -> Handle:
        """Start summing."""
        work = dist.all_reduce(tensor, group=self._groups.get(tuple(group)), async_op=True)
        return self._handle(work, f"rank {self._rank}'s sum over ranks", group)

    def all_gather(self, tensor: Tensor, outputs: Sequence[Tensor], group: Sequence[int]) -> Handle:
        """Start gathering."""
        found = self._groups.get(tuple(group))
        work = dist.all_gather(list(outputs), tensor, group=found, async_op=True)
        return self._handle(work, f"rank {self._rank}'s gather over ranks", group)

    def _handle(self, work: Any, what: str, group: Sequence[int]) -> Handle:
        return _Work(work, self._timeout, what, tuple(group))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class DistWorld:
    """The ranks of an initialised torch.distributed (a `weft.runtime.transport.World`)."""

    def __init__(self, timeout_s: float = 600.0) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialised; start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self._transport = DistTransport(timeout_s)

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return dist.get_world_size()

    @property
    def transports(self) -> Sequence[DistTransport]:
        """This process's rank."""
        return (self._transport,)

    def prepare(self, groups: Sequence[Sequence[int]], channels: Sequence[tuple[int, int]]) -> None:
        """Make the communicators."""
        self._transport.prepare(groups, channels)

    def mesh(self, group: Sequence[int], device_type: str) -> DeviceMesh | None:
        """A mesh of one axis over a prepared group; None for a group of one."""
        if len(group) < 2:
            return None
        return DeviceMesh.from_group(
            self._transport.process_group(group), device_type, mesh_dim_names=("dp",)
        )

    def drive(self, programs: Sequence[RankProgram]) -> None:
        """Run this rank's program, blocking where it waits; its errors name the action."""
        (program,) = programs
        for handle in program:
            try:
                handle.wait()
            except PeerTimeoutError as error:
                program.throw(error)

    def barrier(self) -> None:
        """Return once every rank has called it."""
        dist.barrier()

    def all_gather_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """Gather bytes of any length, as tensors."""
        (mine,) = parts
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        length = torch.tensor([len(mine)], device=device)
        lengths = [torch.zeros_like(length) for _ in range(self.num_ranks)]
        dist.all_gather(lengths, length)
        longest = max(1, *(int(n) for n in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        if mine:
            padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        gathered = [torch.zeros_like(padded) for _ in range(self.num_ranks)]
        dist.all_gather(gathered, padded)
        return [
            bytes(part[: int(n)].cpu().numpy().tobytes())
            for part, n in zip(gathered, lengths, strict=True)
        ]
