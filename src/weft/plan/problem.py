"""What every planning method is given, and the error of a problem that has no plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from weft.graph.series_parallel import Decomposition, decompose, linear_order
from weft.plan.constraints import NO_RULES, Rules
from weft.plan.cost_table import CostTable, divisors
from weft.plan.search import Effort
from weft.plan.train_plan import PlanError, SearchStatistics, TrainPlan

MAX_LISTED_SIZES = 24
"""Divisors of a batch up to which all of them are tried as micro-batch sizes."""


class Objective(StrEnum):
    """What a plan is chosen for."""

    BOTTLENECK = "bottleneck"
    """The least largest time per sample of a stage: the paper's."""
    STEP_TIME = "step_time"
    """The least simulated time of one optimizer step."""


class ChangeKind(StrEnum):
    """A change that would make an infeasible problem feasible."""

    MEMORY_BYTES = "memory_bytes"
    """More memory on every device."""
    NUM_DEVICES = "num_devices"
    """More devices of the same kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanChange:
    """The least amount by which something must grow; half of it is not enough."""

    kind: ChangeKind
    amount: int

    def __str__(self) -> str:
        if self.kind is ChangeKind.MEMORY_BYTES:
            return f"{self.amount:,} bytes more memory on every device"
        return f"{self.amount} more device{'' if self.amount == 1 else 's'} of this kind"


class InfeasiblePlanError(PlanError):
    """No plan fits; `constraint` names what binds, `changes` the smallest changes that would do.

    Planning again with any one of the changes succeeds, with half of it fails.
    """

    def __init__(
        self, message: str, constraint: str = "", changes: tuple[PlanChange, ...] = ()
    ) -> None:
        super().__init__(message, constraint, changes)
        self.message = message
        self.constraint = constraint
        self.changes = changes

    def __str__(self) -> str:
        return self.message


class SearchLimitError(PlanError):
    """A method gave up before it found any plan: by its own limit, or by the time limit."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One planning problem: the priced graph, the choices a method has, and its limits.

    `evaluate` gives the simulated seconds of a step of a plan.
    """

    table: CostTable
    micro_batches: tuple[int, ...]
    evaluate: Callable[[TrainPlan], float]
    objective: Objective = Objective.STEP_TIME
    recompute_choices: tuple[bool, ...] = (False,)
    k: int = 1
    rules: Rules = NO_RULES
    tailor: bool = False
    effort: Effort = field(default_factory=Effort)

    @cached_property
    def decomposition(self) -> Decomposition:
        """The series-parallel tree of the graph."""
        return decompose(self.rules.contract(self.table.graph))

    @cached_property
    def linear_order(self) -> tuple[int, ...]:
        """Operators, by position, in an order that finishes one branch before the next."""
        members = self.rules.members(self.table.graph)
        leaves = linear_order(self.decomposition.root)
        return tuple(op for leaf in leaves for op in members[leaf])

    @property
    def num_devices(self) -> int:
        """Devices of the cluster."""
        return self.table.cluster.num_devices

    @property
    def statistics(self) -> SearchStatistics:
        """What the search has done so far."""
        return SearchStatistics(
            num_candidates=self.effort.num_candidates,
            num_states=self.effort.num_states,
            num_iterations=self.effort.num_iterations,
            timed_out=self.effort.timed_out,
            search_time_s=self.effort.elapsed_s,
        )


def out_of_time(problem: Problem, method: str) -> SearchLimitError:
    """The error of a search whose time was over before its first plan."""
    return SearchLimitError(
        f"{method} found no plan within its time limit ({problem.effort.elapsed_s:.3g} s passed); "
        "raise the limit, or use method='graphpipe', which always finishes a first plan"
    )


def micro_batch_sizes(batch_size: int, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The micro-batch sizes to try: those wanted, or divisors of the batch.

    All divisors where they are few, else powers of two and the batch over powers of two. Raises
    PlanError for a size that does not divide the batch, naming the nearest that does.
    """
    if batch_size < 1:
        raise PlanError(f"batch_size is {batch_size}; it must be at least 1")
    every = divisors(batch_size, batch_size)
    if wanted is None:
        if len(every) <= MAX_LISTED_SIZES:
            return every
        power = {b for b in every if b & (b - 1) == 0}
        quotient = {b for b in every if (batch_size // b) & (batch_size // b - 1) == 0}
        return tuple(sorted(power | quotient))
    if not wanted:
        raise PlanError("micro_batches is empty; name at least one size, or leave it out")
    for size in wanted:
        if size < 1 or batch_size % size:
            nearest = min(every, key=lambda b: (abs(b - size), b))
            raise PlanError(
                f"micro-batch size {size} does not divide the batch of {batch_size}; the nearest "
                f"that does is {nearest}"
            )
    return tuple(sorted(set(wanted)))
