"""Plans for clusters with devices of several types: outside the search's claim of optimality.

The search prices every stage on the slowest device type and with the smallest memory. On a mixed
cluster that wastes the better devices, so its plans are tried again where the heaviest stages run
on the fastest devices, and whole searches are made on the faster devices alone, whose prices,
degrees and memory are then those of their own type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from weft.cluster.cluster import Cluster
from weft.plan.assemble import StageChoice, assemble
from weft.plan.cost_table import CostTable
from weft.plan.placement import choose_devices
from weft.plan.problem import Problem
from weft.plan.train_plan import TrainPlan


def is_mixed(problem: Problem) -> bool:
    """Whether the cluster has devices of more than one type."""
    return len({node.device_type.name for node in problem.table.cluster.nodes}) > 1


def heaviest_on_fastest(problem: Problem, plan: TrainPlan) -> TrainPlan | None:
    """The plan with its stages, heaviest first, on the fastest devices that hold them.

    None where the stages share devices or some group must mix device types.
    """
    table = problem.table
    if sum(stage.num_devices for stage in plan.stages) != len(plan.used_devices):
        return None
    choices = _choices(table, plan)
    reference = table.op_times(1)
    work_s = reference.forward_s + reference.backward_s
    load_s = [float(work_s[list(choice.ops)].sum()) / choice.num_devices for choice in choices]
    free = {
        name: [d.index for d in table.cluster.devices if d.type.name == name]
        for name in _fastest_first(table)
    }
    placed: dict[int, tuple[int, ...]] = {}
    for number in sorted(range(len(choices)), key=lambda i: -load_s[i]):
        for indices in free.values():
            chosen = choose_devices(table.cluster, indices, choices[number].num_devices)
            if chosen is not None:
                placed[number] = chosen
                indices[:] = [index for index in indices if index not in set(chosen)]
                break
        else:
            return None
    return _assembled(
        problem, [replace(choice, devices=placed[i]) for i, choice in enumerate(choices)], plan
    )


def on_faster_devices(problem: Problem) -> Iterator[tuple[Problem, tuple[int, ...]]]:
    """The problem on the devices of the fastest type alone, of the fastest two, ...

    With each, the index that every device of the smaller cluster has in the whole one.
    """
    table = problem.table
    names = _fastest_first(table)
    for count in range(1, len(names)):
        chosen = set(names[:count])
        indices = tuple(d.index for d in table.cluster.devices if d.type.name in chosen)
        cluster = _part(table.cluster, chosen)
        smaller = CostTable(
            table.graph, cluster, table.cost, training=table.training, batch_size=table.batch_size
        )
        yield replace(problem, table=smaller), indices


def moved(problem: Problem, plan: TrainPlan, indices: Sequence[int]) -> TrainPlan:
    """A plan of a smaller cluster on the devices of the whole one."""
    choices = [
        replace(choice, devices=tuple(indices[device] for device in stage.devices))
        for choice, stage in zip(_choices(problem.table, plan), plan.stages, strict=True)
    ]
    return _assembled(problem, choices, plan)


def _fastest_first(table: CostTable) -> list[str]:
    """Device types by the time of the whole graph on one sample."""
    names = {node.device_type.name for node in table.cluster.nodes}
    total_s = {}
    for name in sorted(names):
        times = table.on(name).op_times(1)
        total_s[name] = float(times.forward_s.sum() + times.backward_s.sum())
    return sorted(total_s, key=lambda name: total_s[name])


def _part(cluster: Cluster, names: set[str]) -> Cluster:
    """The nodes of a cluster that have these device types."""
    nodes = tuple(node for node in cluster.nodes if node.device_type.name in names)
    kept = {node.name for node in nodes}
    links = tuple(link for link in cluster.links if {link.source, link.target} <= kept)
    return replace(cluster, nodes=nodes, links=links)


def _choices(table: CostTable, plan: TrainPlan) -> list[StageChoice]:
    position = table.graph.op_index
    return [
        StageChoice(
            ops=tuple(position[op] for op in stage.ops),
            micro_batch=stage.micro_batch,
            dp=stage.num_devices // stage.tp,
            tp=stage.tp,
            k=stage.k,
            recompute=stage.recompute,
        )
        for stage in plan.stages
    ]


def _assembled(problem: Problem, choices: Sequence[StageChoice], plan: TrainPlan) -> TrainPlan:
    return assemble(
        problem.table,
        choices,
        method=plan.method,
        objective=plan.objective,
        schedule=plan.schedule,
        sequential=any(edge.is_order_only for edge in plan.edges),
        notes=plan.notes,
    )
