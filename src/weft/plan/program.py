"""A device's list of actions, kept as columns so that a million of them stay small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import Action, ActionKind

KINDS: tuple[ActionKind, ...] = tuple(ActionKind)
"""Column code -> kind."""

CODE: dict[ActionKind, int] = {kind: code for code, kind in enumerate(KINDS)}
"""Kind -> column code."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program(Sequence[Action]):
    """Actions in order; a `Sequence[Action]` that stores one array per field.

    All arrays have shape (number of actions,). `task` indexes `tasks`.
    """

    kind: NDArray[np.uint8]
    stage: NDArray[np.int32]
    micro_batch: NDArray[np.int32]
    peer: NDArray[np.int32]
    version: NDArray[np.int32]
    task: NDArray[np.int16]
    tasks: tuple[str, ...] = ("",)

    @classmethod
    def of(cls, actions: Iterable[Action]) -> Program:
        """The program of these actions."""
        rows = list(actions)
        tasks = tuple(dict.fromkeys(action.task for action in rows)) or ("",)
        code = {task: index for index, task in enumerate(tasks)}
        return cls(
            kind=np.array([CODE[a.kind] for a in rows], dtype=np.uint8),
            stage=np.array([a.stage for a in rows], dtype=np.int32),
            micro_batch=np.array([a.micro_batch for a in rows], dtype=np.int32),
            peer=np.array([a.peer for a in rows], dtype=np.int32),
            version=np.array([a.version for a in rows], dtype=np.int32),
            task=np.array([code[a.task] for a in rows], dtype=np.int16),
            tasks=tasks,
        )

    @classmethod
    def from_columns(
        cls,
        *,
        kind: Any,
        stage: Any,
        micro_batch: Any = -1,
        peer: Any = -1,
        version: Any = 0,
    ) -> Program:
        """The program of these columns; a scalar stands for a constant column."""
        shape = np.broadcast_shapes(
            *(np.shape(column) for column in (kind, stage, micro_batch, peer, version)), (1,)
        )

        def column(values: Any, dtype: type[np.generic]) -> NDArray[Any]:
            return np.ascontiguousarray(np.broadcast_to(np.asarray(values, dtype=dtype), shape))

        return cls(
            kind=column(kind, np.uint8),
            stage=column(stage, np.int32),
            micro_batch=column(micro_batch, np.int32),
            peer=column(peer, np.int32),
            version=column(version, np.int32),
            task=np.zeros(shape, dtype=np.int16),
        )

    @classmethod
    def concat(cls, parts: Sequence[Program]) -> Program:
        """These programs, one after the other."""
        if len(parts) < 2:
            return parts[0] if parts else EMPTY_PROGRAM
        tasks = tuple(dict.fromkeys(task for part in parts for task in part.tasks)) or ("",)
        code = {task: index for index, task in enumerate(tasks)}
        recoded = [np.array([code[t] for t in p.tasks], dtype=np.int16)[p.task] for p in parts]
        return cls(
            kind=np.concatenate([p.kind for p in parts]),
            stage=np.concatenate([p.stage for p in parts]),
            micro_batch=np.concatenate([p.micro_batch for p in parts]),
            peer=np.concatenate([p.peer for p in parts]),
            version=np.concatenate([p.version for p in parts]),
            task=np.concatenate(recoded),
            tasks=tasks,
        )

    def take(self, rows: Any) -> Program:
        """The actions at `rows` (indices, a mask or a slice)."""
        return Program(
            kind=self.kind[rows],
            stage=self.stage[rows],
            micro_batch=self.micro_batch[rows],
            peer=self.peer[rows],
            version=self.version[rows],
            task=self.task[rows],
            tasks=self.tasks,
        )

    def of_kinds(self, kinds: Iterable[ActionKind]) -> Program:
        """The actions of these kinds, in order."""
        return self.take(np.isin(self.kind, [CODE[kind] for kind in kinds]))

    @cached_property
    def kinds(self) -> frozenset[ActionKind]:
        """The kinds that occur."""
        return frozenset(KINDS[code] for code in np.unique(self.kind))

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> Program: ...
    def __getitem__(self, index: int | slice) -> Action | Program:
        if isinstance(index, slice):
            return self.take(index)
        return Action(
            kind=KINDS[self.kind[index]],
            stage=int(self.stage[index]),
            micro_batch=int(self.micro_batch[index]),
            task=self.tasks[self.task[index]],
            peer=int(self.peer[index]),
            version=int(self.version[index]),
        )

    def __iter__(self) -> Iterator[Action]:
        for index in range(len(self)):
            yield self[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        if len(self) != len(other):
            return False
        names = ("kind", "stage", "micro_batch", "peer", "version")
        if not all(np.array_equal(getattr(self, n), getattr(other, n)) for n in names):
            return False
        return [self.tasks[t] for t in self.task] == [other.tasks[t] for t in other.task]

    def __hash__(self) -> int:
        return hash((self.kind.tobytes(), self.stage.tobytes(), self.micro_batch.tobytes()))

    def __str__(self) -> str:
        return " ".join(map(str, self))


EMPTY_PROGRAM = Program.of(())
"""A program without actions."""
