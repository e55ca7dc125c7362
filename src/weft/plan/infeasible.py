"""Why nothing fits, and the smallest change that would."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from weft.cluster.cluster import Cluster
from weft.plan.cost_table import CostTable
from weft.plan.problem import ChangeKind, InfeasiblePlanError, PlanChange, Problem
from weft.plan.search import BottleneckSearch
from weft.plan.train_plan import TrainPlan

OtherPlans = Callable[[Problem], Iterable[TrainPlan]]
"""Makes the plans that a method tries beside its search, whether or not they fit."""


def explain_infeasible(
    problem: Problem,
    searches: Sequence[BottleneckSearch],
    others: OtherPlans | None = None,
) -> InfeasiblePlanError:
    """The error for a problem without a plan, with the least memory and the fewest devices.

    Each change is found by searching again, so that it is exact for the planner's class: with it a
    plan exists, with one byte or one device less there is none. `others` makes what the method
    tries beside its search; with half of the devices named they do not fit either.
    """
    changes = [*_more_memory(problem, searches, others), *_more_devices(problem, searches, others)]
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


def _more_memory(
    problem: Problem, searches: Sequence[BottleneckSearch], others: OtherPlans | None
) -> list[PlanChange]:
    table = problem.table
    limit = table.memory_bytes
    reserved = max(float(table.reserved_bytes(b).sum()) for b in problem.micro_batches)
    saved = sum(op.saved_bytes for op in table.graph.ops)
    saved += sum(edge.saved_bytes + edge.bytes_per_sample for edge in table.graph.edges)
    state = table.training.total_state_bytes(table.graph)
    enough = limit + state + 2 * saved * table.batch_size + int(reserved) + 1
    best: int | None = None
    for search, micro_batch in itertools.product(searches, problem.micro_batches):
        at_most = enough if best is None else best - 1
        if at_most <= limit or not search.fits(micro_batch, at_most):
            continue
        best = _least(limit, at_most, lambda size, s=search, b=micro_batch: s.fits(b, size))
    missing = [] if best is None else [best - limit]
    if others is not None:
        missing += [_missing_bytes(plan) for plan in others(problem)]
    if not missing:
        return []
    amount = min(missing)
    # Methods that only make plans that fit may do with less than the search.
    while others is not None and amount > 1:
        more = _on_cluster(problem, _with_memory(table.cluster, amount // 2))
        if not any(_missing_bytes(plan) <= 0 for plan in others(more)):
            break
        amount //= 2
    return [PlanChange(kind=ChangeKind.MEMORY_BYTES, amount=amount)]


def memory_change(plans: Iterable[TrainPlan]) -> tuple[PlanChange, ...]:
    """The least memory with which one of these plans, none of which fits, would fit."""
    missing = min((_missing_bytes(plan) for plan in plans), default=0)
    if missing <= 0:
        return ()
    return (PlanChange(kind=ChangeKind.MEMORY_BYTES, amount=missing),)


def _missing_bytes(plan: TrainPlan) -> int:
    """What the worst device lacks; at most 0 where the plan fits."""
    devices = plan.cluster.devices
    return max(
        num_bytes - devices[device].type.memory_bytes
        for device, num_bytes in plan.memory_bytes.items()
    )


def _more_devices(
    problem: Problem, searches: Sequence[BottleneckSearch], others: OtherPlans | None
) -> list[PlanChange]:
    limit = max(problem.micro_batches)
    counts = [
        search.fewest_devices(b, limit)
        for search, b in itertools.product(searches, problem.micro_batches)
    ]
    found = [count for count in counts if count is not None and count > problem.num_devices]
    if not found or problem.rules.pinned:
        return []
    amount = min(found) - problem.num_devices
    # Uniform splits may fit on fewer, on some counts and not on others.
    while others is not None and amount > 1:
        grown = _grown(problem.table.cluster, problem.num_devices + amount // 2)
        more = _on_cluster(problem, grown)
        if not any(_missing_bytes(plan) <= 0 for plan in others(more)):
            break
        amount //= 2
    return [PlanChange(kind=ChangeKind.NUM_DEVICES, amount=amount)]


def _on_cluster(problem: Problem, cluster: Cluster) -> Problem:
    """The same problem on another cluster."""
    table = problem.table
    cost_table = CostTable(
        table.graph, cluster, table.cost, training=table.training, batch_size=table.batch_size
    )
    return replace(problem, table=cost_table)


def _with_memory(cluster: Cluster, more_bytes: int) -> Cluster:
    """The same cluster with more memory on every device."""
    nodes = [
        replace(
            node,
            device_type=replace(
                node.device_type, memory_bytes=node.device_type.memory_bytes + more_bytes
            ),
        )
        for node in cluster.nodes
    ]
    return replace(cluster, nodes=tuple(nodes))


def _grown(cluster: Cluster, num_devices: int) -> Cluster:
    size = max(node.num_devices for node in cluster.nodes)
    last = cluster.nodes[-1]
    missing = num_devices - cluster.num_devices
    nodes = list(cluster.nodes)
    if last.num_devices < size:
        added = min(size - last.num_devices, missing)
        nodes[-1] = replace(last, num_devices=last.num_devices + added)
        missing -= added
    for start in range(0, missing, size):
        count = min(size, missing - start)
        nodes.append(replace(last, name=f"{last.name}+{start // size + 1}", num_devices=count))
    return replace(cluster, nodes=tuple(nodes))


def _least(fails: int, works: int, test: Callable[[int], bool]) -> int:
    """The least number in (fails, works] that passes a monotone test."""
    while works - fails > 1:
        middle = (fails + works) // 2
        if test(middle):
            works = middle
        else:
            fails = middle
    return works
