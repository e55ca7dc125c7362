"""An optimizer's parameter groups in a checkpoint: by parameter name, so that any plan goes on.

Ranks hold different parameters and so may have different groups; what a run was started with is
kept beside the present values, so that a setting that the user changes for the rest is obeyed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from weft.runtime.rank_state import RankState

_log = logging.getLogger("weft.train")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupState:
    """The numbers of one parameter group, now and when the run began."""

    names: tuple[str, ...]
    values: Mapping[str, Any]
    initial: Mapping[str, Any]


def plain_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state dict JSON can hold; the rest is made again by its factory."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in state.items()
        if isinstance(value, (int, float, str, bool))
        or (isinstance(value, Tensor) and not value.dim())
        or (isinstance(value, list) and all(isinstance(v, (int, float)) for v in value))
    }


def initial_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each group of an optimizer that has made no step yet."""
    return [plain_values(group) for group in optimizer.param_groups]


def group_states(rank: RankState, initial: Sequence[Mapping[str, Any]]) -> list[GroupState]:
    """The groups of one rank."""
    if rank.optimizer is None:
        return []
    return [
        GroupState(names=names, values=plain_values(group), initial=begun)
        for group, names, begun in zip(
            rank.optimizer.param_groups, _names(rank), initial, strict=True
        )
    ]


def restore_groups(rank: RankState, saved: Sequence[GroupState]) -> None:
    """Give a rank's groups the saved values of their parameters.

    Where the run begins with other numbers than the saved one did, the user changed a setting: it
    is kept, and said. A learning rate that a scheduler has moved keeps its share of the new one.
    """
    if rank.optimizer is None:
        return
    state_of = {name: state for state in saved for name in state.names}
    for group, names in zip(rank.optimizer.param_groups, _names(rank), strict=True):
        state = next((state_of[name] for name in names if name in state_of), None)
        if state is None:
            continue
        for key, value in _merged(plain_values(group), state, rank.rank).items():
            _set(group, key, value)


def _merged(fresh: Mapping[str, Any], state: GroupState, rank: int) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in state.values.items():
        begun, now = state.initial.get(key), fresh.get(key)
        merged[key] = value if begun == now else now
        if begun != now and key != "initial_lr" and rank == 0:
            _log.warning("resuming with %s %s; the run began with %s", key, now, begun)
    peak = "initial_lr" if "initial_lr" in fresh else "lr"
    begun, now = state.initial.get(peak), fresh.get(peak)
    if begun and now is not None and "lr" in state.values:
        merged["lr"] = state.values["lr"] if begun == now else state.values["lr"] * now / begun
    return merged


def restore_scheduler(scheduler: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Let a rank's scheduler go on from another one's plain state."""
    own = ("base_lrs", "_last_lr")  # One entry a group of the rank that wrote it.
    state = {key: value for key, value in saved.items() if key not in own}
    scheduler.load_state_dict({**scheduler.state_dict(), **state})
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, LambdaLR):
        # A function of the step alone: also right where the schedule was changed.
        for group, base, share in zip(
            groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            _set(group, "lr", base * share(scheduler.last_epoch))
    scheduler._last_lr = [group["lr"] for group in groups]


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    held = group.get(key)
    if isinstance(held, Tensor):
        held.fill_(value)  # Such as a learning rate that a compiled step reads.
    else:
        group[key] = value


def _names(rank: RankState) -> list[tuple[str, ...]]:
    if rank.optimizer is None:
        return []
    name_of = {id(parameter): name for name, parameter in rank.trainable.items()}
    return [
        tuple(name_of[id(p)] for p in group["params"] if id(p) in name_of)
        for group in rank.optimizer.param_groups
    ]
