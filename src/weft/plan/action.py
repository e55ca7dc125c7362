"""One step of a device's program, and the text that names it.

Grammar (docs/reference/schedule-grammar.md), in which `2SEND_F5>3` reads "stage 2 sends the output
of its micro-batch 5 to stage 3":

    action  = stage kind [micro_batch] [">" peer] ["~" version] ["@" task]
    stage, micro_batch, peer = digits ; version = ["-"] digits
    task    = letters, digits, "_", "-", "."

Compute actions without the optional parts are written as torch.distributed.pipelining writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from weft.base.errors import ConfigError


class ActionSyntaxError(ConfigError):
    """Text that is not an action, or an action that the grammar cannot express."""


class ActionKind(StrEnum):
    """What a device does in one step of its program."""

    F = "F"
    """Forward of one micro-batch."""
    B = "B"
    """Whole backward of one micro-batch: gradients of the inputs and of the weights."""
    I = "I"  # noqa: E741 - the literature's letter for the input-gradient half
    """First half of a backward: gradients of the inputs."""
    W = "W"
    """Second half of a backward: gradients of the weights."""
    RECOMPUTE = "RECOMPUTE"
    """Forward again, to restore activations that were not kept."""
    SEND_F = "SEND_F"
    """Hand a micro-batch's output to the peer stage."""
    RECV_F = "RECV_F"
    """Wait for a micro-batch's input from the peer stage; the receive was posted earlier."""
    SEND_B = "SEND_B"
    """Hand a micro-batch's input gradient to the peer stage."""
    RECV_B = "RECV_B"
    """Wait for a micro-batch's output gradient from the peer stage; it was posted earlier."""
    TRANSMIT = "TRANSMIT"
    """Move state (weights, pages) to the peer stage between waves of a schedule."""
    UNSHARD = "UNSHARD"
    """Gather a stage's sharded parameters."""
    RESHARD = "RESHARD"
    """Drop the gathered copy of a stage's parameters."""
    REDUCE_GRAD = "REDUCE_GRAD"
    """All-reduce a stage's gradients over its data-parallel devices."""
    STEP = "STEP"
    """Optimizer update of a stage; makes the next weight version."""
    LOAD = "LOAD"
    """Select the weight version that the following compute of this stage uses."""
    BUBBLE = "BUBBLE"
    """Idle time in which an executor may call a fill job."""


COMPUTE_KINDS = frozenset(
    {ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W, ActionKind.RECOMPUTE}
)
"""Kinds that run a stage's operators on one micro-batch."""

SEND_KINDS = frozenset({ActionKind.SEND_F, ActionKind.SEND_B})
"""Kinds that hand a micro-batch to a peer stage."""

RECV_KINDS = frozenset({ActionKind.RECV_F, ActionKind.RECV_B})
"""Kinds that wait for a micro-batch from a peer stage."""

_NEEDS_MICRO_BATCH = COMPUTE_KINDS | SEND_KINDS | RECV_KINDS
_NEEDS_PEER = SEND_KINDS | RECV_KINDS | {ActionKind.TRANSMIT}
_KINDS = "|".join(sorted((str(kind) for kind in ActionKind), key=len, reverse=True))
_ACTION = re.compile(
    rf"(?P<stage>\d+)(?P<kind>{_KINDS})(?P<micro_batch>\d+)?(?:>(?P<peer>\d+))?"
    r"(?:~(?P<version>-?\d+))?(?:@(?P<task>[\w.-]+))?"
)
_TASK = re.compile(r"[\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One step of a device's program.

    `micro_batch` counts within one optimizer step of the stage (-1: the action has none); `peer` is
    the other stage of a message (-1: none); `version` is the weight version relative to the newest
    one when the step began (0: that one, -1: the one before it).
    """

    kind: ActionKind
    stage: int
    micro_batch: int = -1
    task: str = ""
    peer: int = -1
    version: int = 0

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise ActionSyntaxError(f"action {self.kind} has stage {self.stage}; stages start at 0")
        if (self.micro_batch < 0) == (self.kind in _NEEDS_MICRO_BATCH):
            need = "needs a" if self.kind in _NEEDS_MICRO_BATCH else "takes no"
            raise ActionSyntaxError(
                f"action {self.stage}{self.kind} {need} micro-batch, got {self.micro_batch}"
            )
        if (self.peer < 0) == (self.kind in _NEEDS_PEER):
            need = "needs a" if self.kind in _NEEDS_PEER else "takes no"
            raise ActionSyntaxError(
                f"action {self.stage}{self.kind} {need} peer stage, got {self.peer}"
            )
        if not _TASK.fullmatch(self.task):
            raise ActionSyntaxError(
                f"task {self.task!r} of an action may hold only letters, digits, '_', '-' and '.'"
            )

    def __str__(self) -> str:
        parts = [str(self.stage), str(self.kind)]
        if self.micro_batch >= 0:
            parts.append(str(self.micro_batch))
        if self.peer >= 0:
            parts.append(f">{self.peer}")
        if self.version:
            parts.append(f"~{self.version}")
        if self.task:
            parts.append(f"@{self.task}")
        return "".join(parts)


def parse_action(text: str) -> Action:
    """The action that `text` names; ActionSyntaxError says what is wrong with it."""
    match = _ACTION.fullmatch(text.strip())
    if match is None:
        raise ActionSyntaxError(
            f"{text!r} is not an action; write stage, kind and micro-batch as in 2F0, "
            f"3SEND_F1>4 or 0STEP; kinds: {', '.join(ActionKind)}"
        )
    number = {name: int(match[name]) for name in ("micro_batch", "peer", "version") if match[name]}
    return Action(
        kind=ActionKind(match["kind"]),
        stage=int(match["stage"]),
        task=match["task"] or "",
        **number,
    )
