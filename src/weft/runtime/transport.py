"""What ranks need of each other: messages, sums over groups, and a world to run them in."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.base.errors import WeftError


class PeerTimeoutError(WeftError, TimeoutError):
    """A rank waited too long, or for ever; the message names rank, action and peer."""


class Handle(Protocol):
    """A message or sum under way."""

    def done(self) -> bool:
        """Whether `wait` would return at once; a transport that cannot tell says False."""
        ...

    def wait(self) -> None:
        """Block until done; raises PeerTimeoutError after the transport's timeout."""
        ...


class Transport(Protocol):
    """One rank's view of the others.

    Messages between two ranks with one tag arrive in the order in which they were sent; the
    receives of a tag must be posted in that order. `tag` is the number of an edge and direction, so
    each has a channel of its own. A sent tensor must not change before its handle is done.
    """

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    def send(self, tensor: Tensor, receiver: int, tag: int) -> Handle:
        """Start sending a contiguous tensor."""
        ...

    def receive(self, tensor: Tensor, sender: int, tag: int) -> Handle:
        """Start receiving into a contiguous tensor."""
        ...

    def all_reduce(self, tensor: Tensor, group: Sequence[int]) -> Handle:
        """Start summing a contiguous tensor over a group of ranks, in place.

        Ranks of a group start their sums in the same order.
        """
        ...

    def all_gather(self, tensor: Tensor, outputs: Sequence[Tensor], group: Sequence[int]) -> Handle:
        """Start gathering equal tensors of a group into `outputs`, in the group's order."""
        ...


RankProgram = Generator[Handle, None, None]
"""A rank's work: it yields whatever it has to wait for."""


class World(Protocol):
    """All ranks of a run, and those that live in this process."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        ...

    @property
    def transports(self) -> Sequence[Transport]:
        """One for each rank of this process."""
        ...

    def prepare(self, groups: Sequence[Sequence[int]], channels: Sequence[tuple[int, int]]) -> None:
        """Make communicators for these groups, and for these (sender, receiver) pairs.

        Every rank calls it with the same arguments.
        """
        ...

    def mesh(self, group: Sequence[int], device_type: str) -> DeviceMesh | None:
        """A mesh of one axis over a prepared group; None where there are no processes to mesh."""
        ...

    def drive(self, programs: Sequence[RankProgram]) -> None:
        """Run the programs of this process's ranks to their end."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...

    def all_gather_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """`parts` (one for each local rank) of all ranks, in rank order."""
        ...
