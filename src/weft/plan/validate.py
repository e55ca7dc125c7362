"""Checks a plan against itself, its graph and its cluster; errors name stage and operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weft.cluster.cluster import Cluster
from weft.graph.graph import Graph
from weft.plan.in_flight import plan_in_flight
from weft.plan.train_plan import PlanError, Stage, TrainPlan


def validate_plan(
    plan: TrainPlan, graph: Graph | None = None, cluster: Cluster | None = None
) -> TrainPlan:
    """Return the plan, or raise PlanError for the first thing wrong with it.

    Checked always: numbering, devices and axes, micro-batches, edges, cycles, samples in flight,
    memory. With `graph`: that it is the plan's graph, that the stages partition it convexly, and
    that every dependency between stages has an edge. With `cluster`: that it is the plan's.
    """
    if not plan.stages:
        raise PlanError("the plan has no stages; plan again")
    for index, stage in enumerate(plan.stages):
        _check_stage(plan, index, stage)
    _check_edges(plan)
    _ = plan.topological_order
    _check_in_flight(plan)
    _check_memory(plan)
    if cluster is not None:
        _check_cluster(plan, cluster)
    if graph is not None:
        _check_graph(plan, graph)
    return plan


def _check_stage(plan: TrainPlan, index: int, stage: Stage) -> None:
    where = f"stage {index}"
    if stage.index != index:
        raise PlanError(f"{where} is numbered {stage.index}; number the stages in order")
    if not stage.ops:
        raise PlanError(f"{where} has no operators; remove it")
    if not stage.devices:
        raise PlanError(f"{where} has no devices; give it at least one")
    if len(set(stage.devices)) != len(stage.devices):
        raise PlanError(f"{where} lists a device twice: {stage.devices}")
    for device in stage.devices:
        if not 0 <= device < plan.cluster.num_devices:
            raise PlanError(
                f"{where} runs on device {device}; the cluster has 0 to "
                f"{plan.cluster.num_devices - 1}"
            )
    product = 1
    for size in stage.axes.values():
        product *= size
    if product != len(stage.devices):
        raise PlanError(
            f"{where} has axes {dict(stage.axes)} ({product} devices) but {len(stage.devices)} "
            "devices"
        )
    if stage.micro_batch < 1 or plan.batch_size % stage.micro_batch:
        raise PlanError(
            f"{where} has micro-batches of {stage.micro_batch}, which do not divide the batch of "
            f"{plan.batch_size}"
        )
    if stage.micro_batch % stage.dp:
        raise PlanError(
            f"{where} splits micro-batches of {stage.micro_batch} over {stage.dp} replicas; the "
            "degree must divide the size"
        )
    for name, times in (("forward_s", stage.forward_s), ("backward_s", stage.backward_s)):
        if stage.micro_batch not in times:
            raise PlanError(f"{where} has no {name} for its micro-batch size {stage.micro_batch}")


def _check_edges(plan: TrainPlan) -> None:
    seen: set[tuple[int, int]] = set()
    for edge in plan.edges:
        for end in (edge.source, edge.target):
            if not 0 <= end < plan.num_stages:
                raise PlanError(
                    f"edge {edge.source} -> {edge.target} names stage {end}; the plan has 0 to "
                    f"{plan.num_stages - 1}"
                )
        if edge.source == edge.target:
            raise PlanError(f"stage {edge.source} has an edge to itself; remove it")
        if (edge.source, edge.target) in seen:
            raise PlanError(f"edge {edge.source} -> {edge.target} is listed twice; merge them")
        seen.add((edge.source, edge.target))


def _check_in_flight(plan: TrainPlan) -> None:
    # Fewer samples than the rule's only wait longer, down to one group; none at all cannot run.
    for stage, needed in zip(plan.stages, plan_in_flight(plan), strict=True):
        least = min(stage.k * stage.micro_batch, needed)
        if stage.in_flight < least:
            raise PlanError(
                f"stage {stage.index} holds {stage.in_flight} samples in flight; it needs at "
                f"least {least}, and {needed} to keep its successors busy"
            )


def _check_memory(plan: TrainPlan) -> None:
    for device, num_bytes in plan.memory_bytes.items():
        limit = plan.cluster.devices[device].type.memory_bytes
        if num_bytes > limit:
            held = [stage.index for stage in plan.stages if device in stage.devices]
            raise PlanError(
                f"stages {held} need {num_bytes:,} bytes on device {device}, which has {limit:,}; "
                "plan again for this cluster, or lower the micro-batch or in-flight samples"
            )


def _check_cluster(plan: TrainPlan, cluster: Cluster) -> None:
    mine, other = plan.cluster.to_dict(), cluster.to_dict()
    difference = first_difference(mine, other)
    if difference:
        raise PlanError(
            f"the plan is for cluster {plan.cluster.name!r}, not {cluster.name!r}: {difference}"
        )


def first_difference(mine: object, other: object, path: str = "") -> str:
    """Where two pieces of plain data first differ, in words; empty where they do not."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*mine, *other]):
            if key == "name" and not path:
                continue
            here = f"{path}.{key}" if path else str(key)
            if key not in mine or key not in other:
                return f"{here} is only in the {'plan' if key in mine else 'given one'}"
            found = first_difference(mine[key], other[key], here)
            if found:
                return found
        return ""
    if isinstance(mine, list) and isinstance(other, list):
        if len(mine) != len(other):
            return f"{path} has {len(mine)} entries in the plan, {len(other)} in the given one"
        for i, (a, b) in enumerate(zip(mine, other, strict=True)):
            found = first_difference(a, b, f"{path}[{i}]")
            if found:
                return found
        return ""
    return "" if mine == other else f"{path} is {mine!r} in the plan, {other!r} in the given one"


def _check_graph(plan: TrainPlan, graph: Graph) -> None:
    if plan.graph_digest != graph.digest:
        raise PlanError(
            f"the plan is for graph {plan.graph_name!r} ({plan.graph_digest}), not "
            f"{graph.name!r} ({graph.digest}): {_graph_difference(plan, graph)}"
        )
    stage_of: dict[str, int] = {}
    for stage in plan.stages:
        for op in stage.ops:
            if op not in graph.op_index:
                raise PlanError(f"stage {stage.index} has operator {op!r}, which the graph has not")
            if op in stage_of:
                raise PlanError(f"operator {op!r} is in stages {stage_of[op]} and {stage.index}")
            stage_of[op] = stage.index
    for op in graph.ops:
        if op.id not in stage_of:
            raise PlanError(f"operator {op.id!r} is in no stage; add it to one")
    for edge in graph.edges:
        pair = (stage_of[edge.source], stage_of[edge.target])
        if pair[0] != pair[1] and pair not in plan.edge_by_pair:
            raise PlanError(
                f"operator {edge.source!r} of stage {pair[0]} feeds {edge.target!r} of stage "
                f"{pair[1]}, but there is no edge between the stages"
            )
    _check_gradients(plan, graph, stage_of)
    _check_convex(plan, graph, stage_of)


def _check_gradients(plan: TrainPlan, graph: Graph, stage_of: Mapping[str, int]) -> None:
    """Every trainable parameter is in a stage with a backward, and every gradient has its bytes."""
    for stage in plan.stages:
        names = [name for op in stage.ops for name in graph.ops[graph.op_index[op]].param_ids]
        trained = [name for name in names if graph.parameter_by_id[name].trainable]
        if stage.frozen and trained:
            raise PlanError(
                f"stage {stage.index} is frozen, but parameter {trained[0]!r} of it is trainable; "
                "freeze the parameter in the model (requires_grad=False) and plan again"
            )
    for edge in graph.edges:
        pair = (stage_of[edge.source], stage_of[edge.target])
        if pair[0] == pair[1] or not edge.needs_grad or not edge.bytes_per_sample:
            continue
        if not plan.edge_by_pair[pair].backward_bytes_per_sample:
            raise PlanError(
                f"edge {pair[0]} -> {pair[1]} carries no gradients back, but operator "
                f"{edge.source!r} needs one; plan again"
            )


def _check_convex(plan: TrainPlan, graph: Graph, stage_of: Mapping[str, int]) -> None:
    """No path leaves a stage and comes back."""
    left: dict[str, set[int]] = {}
    for op in graph.ops:
        own = stage_of[op.id]
        found: set[int] = set()
        for source in graph.predecessors[op.id]:
            found |= left[source]
            if stage_of[source] != own:
                found.add(stage_of[source])
        if own in found:
            raise PlanError(
                f"stage {own} is not convex: a path leaves it and comes back at operator {op.id!r}"
            )
        left[op.id] = found


def _graph_difference(plan: TrainPlan, graph: Graph) -> str:
    planned: Sequence[str] = [op for stage in plan.stages for op in stage.ops]
    missing = sorted(set(planned) - set(graph.op_index))
    extra = [op.id for op in graph.ops if op.id not in set(planned)]
    if missing:
        return f"operator {missing[0]!r} of stage {plan.stage_of[missing[0]]} is not in the graph"
    if extra:
        return f"operator {extra[0]!r} is in no stage"
    for stage in plan.stages:
        ops = [graph.ops[graph.op_index[op]] for op in stage.ops]
        names = dict.fromkeys(name for op in ops for name in op.param_ids)
        num_bytes = -(-sum(graph.parameter_by_id[n].size_bytes for n in names) // stage.tp)
        if num_bytes != stage.param_bytes:
            return (
                f"the same operators, but the first stage that differs is {stage.index} "
                f"({stage.ops[0]!r} to {stage.ops[-1]!r}): its parameters take "
                f"{stage.param_bytes:,} bytes in the plan and {num_bytes:,} in the graph"
            )
    return "the same operators, but their costs, parameters or edges differ"
