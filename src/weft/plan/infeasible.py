"""Why nothing fits, and the smallest change that would."""

from __future__ import annotations

from collections.abc import Callable

from weft.plan.cost_table import CostTable
from weft.plan.problem import ChangeKind, InfeasiblePlanError, PlanChange, Problem
from weft.plan.search import BottleneckSearch


def explain_infeasible(problem: Problem, search: BottleneckSearch) -> InfeasiblePlanError:
    """The error for a problem without a plan, with the least memory and the fewest devices.

    Each change is found by searching again, so that it is exact for the planner's class: with it a
    plan exists, with one byte or one device less there is none.
    """
    changes = [*_more_memory(problem, search), *_more_devices(problem, search)]
    constraint = tightest(problem.table, problem.micro_batches)
    devices = f"{problem.num_devices} device{'' if problem.num_devices == 1 else 's'}"
    limit = problem.table.memory_bytes
    lines = [
        f"no plan fits graph {problem.table.graph.name!r} on {devices} of {limit:,} bytes each "
        f"with a batch of {problem.table.batch_size}: {constraint}"
    ]
    if changes:
        lines.append("it would fit with " + ", or with ".join(map(str, changes)))
    elif problem.rules:
        lines.append("no amount of memory or devices helps: relax the constraints")
    return InfeasiblePlanError("; ".join(lines), constraint, tuple(changes))


def tightest(table: CostTable, micro_batches: tuple[int, ...]) -> str:
    """The operator or the total that binds memory first, in words."""
    size = min(micro_batches)
    needs: list[tuple[int, str]] = []
    for op in table.graph.ops:
        state = sum(
            table.training.state_bytes(table.graph.parameter_by_id[name])
            for name in dict.fromkeys(op.param_ids)
        )
        needs.append((state + op.saved_bytes * size, op.id))
    largest, name = max(needs)
    if largest > table.memory_bytes:
        return (
            f"operator {name!r} alone needs {largest:,} bytes (state, and activations of one "
            f"micro-batch of {size})"
        )
    total = table.training.total_state_bytes(table.graph)
    return (
        f"parameters with gradients and optimizer state take {total:,} bytes in all, and the "
        f"activations in flight come on top (largest operator: {name!r} with {largest:,} bytes)"
    )


def _more_memory(problem: Problem, search: BottleneckSearch) -> list[PlanChange]:
    table = problem.table
    limit = table.memory_bytes
    reserved = max(float(table.reserved_bytes(b).sum()) for b in problem.micro_batches)
    saved = sum(op.saved_bytes for op in table.graph.ops)
    saved += sum(edge.saved_bytes + edge.bytes_per_sample for edge in table.graph.edges)
    state = table.training.total_state_bytes(table.graph)
    enough = limit + state + 2 * saved * table.batch_size + int(reserved) + 1
    best: int | None = None
    for micro_batch in problem.micro_batches:
        at_most = enough if best is None else best - 1
        if at_most <= limit or not search.fits(micro_batch, at_most):
            continue
        best = _least(limit, at_most, lambda size, b=micro_batch: search.fits(b, size))
    if best is None:
        return []
    return [PlanChange(kind=ChangeKind.MEMORY_BYTES, amount=best - limit)]


def _more_devices(problem: Problem, search: BottleneckSearch) -> list[PlanChange]:
    limit = max(problem.micro_batches)
    counts = [search.fewest_devices(b, limit) for b in problem.micro_batches]
    found = [count for count in counts if count is not None and count > problem.num_devices]
    if not found or problem.rules.pinned:
        return []
    return [PlanChange(kind=ChangeKind.NUM_DEVICES, amount=min(found) - problem.num_devices)]


def _least(fails: int, works: int, test: Callable[[int], bool]) -> int:
    """The least number in (fails, works] that passes a monotone test."""
    while works - fails > 1:
        middle = (fails + works) // 2
        if test(middle):
            works = middle
        else:
            fails = middle
    return works
