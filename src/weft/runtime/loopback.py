"""All ranks in one process and one thread: they take turns, and a deadlock is seen at once."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from weft.base.errors import ConfigError
from weft.runtime.transport import Handle, PeerTimeoutError, RankProgram


@dataclass(kw_only=True, slots=True)
class _Sent:
    """A message that stays with the sender until it is received."""

    queue: deque[Tensor]
    tensor: Tensor
    taken: bool = False

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


@dataclass(kw_only=True, slots=True)
class _Receive:
    """A posted receive; receives of one queue are served in the order of posting."""

    queue: deque[Tensor]
    posted: deque[_Receive]
    tensor: Tensor
    what: str
    complete: bool = False

    def done(self) -> bool:
        while self.queue and self.posted and not self.complete:
            first, sent = self.posted.popleft(), self.queue.popleft()
            if first.tensor.shape != sent.shape or first.tensor.dtype != sent.dtype:
                raise ConfigError(
                    f"{first.what} expects {tuple(first.tensor.shape)} {first.tensor.dtype}, but "
                    f"{tuple(sent.shape)} {sent.dtype} was sent"
                )
            first.tensor.copy_(sent)
            first.complete = True
        return self.complete

    def wait(self) -> None:
        if not self.done():
            raise PeerTimeoutError(f"{self.what} waits for a message that was not sent")


@dataclass(kw_only=True, slots=True)
class _Meeting:
    """A collective: complete once every member has brought its tensor."""

    group: tuple[int, ...]
    outputs: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    complete: bool = False

    def bring(self, rank: int, tensor: Tensor, outputs: Sequence[Tensor] | None) -> None:
        self.tensors[rank] = tensor
        if outputs is not None:
            self.outputs[rank] = outputs
        if len(self.tensors) < len(self.group):
            return
        parts = [self.tensors[member] for member in self.group]
        if self.outputs:
            for received in self.outputs.values():
                for target, part in zip(received, parts, strict=True):
                    target.copy_(part)
        else:
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            for part in parts:
                part.copy_(total)
        self.complete = True


@dataclass(kw_only=True, slots=True)
class _MeetingHandle:
    meeting: _Meeting
    rank: int

    def done(self) -> bool:
        return self.meeting.complete

    def wait(self) -> None:
        if not self.meeting.complete:
            missing = sorted(set(self.meeting.group) - self.meeting.tensors.keys())
            raise PeerTimeoutError(
                f"rank {self.rank} waits in a collective over {self.meeting.group} for ranks "
                f"{missing}"
            )


class LoopbackTransport:
    """One rank of a LoopbackWorld (a `weft.runtime.transport.Transport`)."""

    def __init__(self, world: LoopbackWorld, rank: int) -> None:
        self._world = world
        self._rank = rank
        self._num_meetings: dict[tuple[int, ...], int] = defaultdict(int)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    def send(self, tensor: Tensor, receiver: int, tag: int) -> Handle:
        """Leave the tensor for the receiver."""
        self._world.check_rank(receiver)
        queue = self._world.queues[self._rank, receiver, tag]
        queue.append(tensor)
        return _Sent(queue=queue, tensor=tensor)

    def receive(self, tensor: Tensor, sender: int, tag: int) -> Handle:
        """Take the sender's next tensor of this tag."""
        self._world.check_rank(sender)
        key = (sender, self._rank, tag)
        posted = self._world.posted[key]
        handle = _Receive(
            queue=self._world.queues[key],
            posted=posted,
            tensor=tensor,
            what=f"rank {self._rank}'s receive from rank {sender} on channel {tag}",
        )
        posted.append(handle)
        return handle

    def all_reduce(self, tensor: Tensor, group: Sequence[int]) -> Handle:
        """Sum over the group, in the order of its ranks."""
        return self._meet(tensor, None, group)

    def all_gather(self, tensor: Tensor, outputs: Sequence[Tensor], group: Sequence[int]) -> Handle:
        """Gather the group's tensors."""
        return self._meet(tensor, outputs, group)

    def _meet(
        self, tensor: Tensor, outputs: Sequence[Tensor] | None, group: Sequence[int]
    ) -> Handle:
        key = tuple(group)
        number = self._num_meetings[key]
        self._num_meetings[key] += 1
        meetings = self._world.meetings
        meeting = meetings.setdefault((key, number), _Meeting(group=key))
        meeting.bring(self._rank, tensor, outputs)
        if meeting.complete:
            del meetings[key, number]
        return _MeetingHandle(meeting=meeting, rank=self._rank)


class LoopbackWorld:
    """Ranks that take turns in one thread (a `weft.runtime.transport.World`).

    A rank runs until it has to wait; when all wait for each other, PeerTimeoutError says for what.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self.queues: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        self.posted: dict[tuple[int, int, int], deque[_Receive]] = defaultdict(deque)
        self.meetings: dict[tuple[tuple[int, ...], int], _Meeting] = {}
        self._transports = tuple(LoopbackTransport(self, rank) for rank in range(num_ranks))

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return self._num_ranks

    @property
    def transports(self) -> Sequence[LoopbackTransport]:
        """All ranks."""
        return self._transports

    def check_rank(self, rank: int) -> None:
        """Raise ConfigError for a rank that the world has not."""
        if not 0 <= rank < self._num_ranks:
            raise ConfigError(f"rank {rank} is not among the world's {self._num_ranks}")

    def prepare(self, groups: Sequence[Sequence[int]], channels: Sequence[tuple[int, int]]) -> None:
        """Nothing to prepare."""

    def mesh(self, group: Sequence[int], device_type: str) -> None:
        """Ranks of one process make no mesh."""

    def drive(self, programs: Sequence[RankProgram]) -> None:
        """Let each program run until it waits, in turn, until all have ended."""
        waiting: dict[int, Handle | None] = dict.fromkeys(range(len(programs)))
        while waiting:
            moved = False
            for rank, handle in list(waiting.items()):
                if handle is not None and not handle.done():
                    continue
                moved = True
                waiting_for = next(programs[rank], None)
                while waiting_for is not None and waiting_for.done():
                    waiting_for = next(programs[rank], None)
                if waiting_for is None:
                    del waiting[rank]
                else:
                    waiting[rank] = waiting_for
            if not moved:
                self._raise_stuck(waiting, programs)

    @staticmethod
    def _raise_stuck(waiting: dict[int, Handle | None], programs: Sequence[RankProgram]) -> None:
        """Let each waiting program say where it is: its error names rank, action and peer."""
        reasons: list[str] = []
        for rank, handle in waiting.items():
            try:
                if handle is not None:
                    handle.wait()
            except PeerTimeoutError as error:
                try:
                    programs[rank].throw(error)
                except PeerTimeoutError as named:
                    reasons.append(str(named))
        raise PeerTimeoutError("every rank waits for another: " + "; ".join(reasons))

    def barrier(self) -> None:
        """All ranks are here."""

    def all_gather_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """The parts of all ranks."""
        return list(parts)
