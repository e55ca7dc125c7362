"""The same plan at other prices: another cluster, or other costs of its operators."""

from __future__ import annotations

from dataclasses import replace

from weft.cluster.cluster import Cluster
from weft.cost.communication import Communication
from weft.cost.model import CostModel
from weft.graph.graph import Graph
from weft.plan.assemble import StageChoice, assemble
from weft.plan.cost_table import CostTable
from weft.plan.train_plan import PlanError, Stage, TrainPlan


def on_cluster(plan: TrainPlan, cluster: Cluster) -> TrainPlan:
    """`plan` with its messages and all-reduces at the links of another cluster.

    Compute times stay, so the devices must be of the plan's types; `reprice` has no such limit but
    needs the graph. Raises PlanError when a device is missing or of another type.
    """
    _require_devices(plan, cluster)
    for device in plan.used_devices:
        old, new = plan.cluster.devices[device].type, cluster.devices[device].type
        if old.name != new.name:
            raise PlanError(
                f"device {device} is a {old.name} in the plan and a {new.name} in cluster "
                f"{cluster.name!r}; compute times for it need the model (--model MODEL)"
            )
    stages = tuple(
        replace(stage, all_reduce_s=_all_reduce_s(stage, cluster)) for stage in plan.stages
    )
    return plan.replace(cluster=cluster, stages=stages, step_time_s=0.0)


def reprice(plan: TrainPlan, graph: Graph, cost: CostModel, cluster: Cluster) -> TrainPlan:
    """`plan`'s stages on the same devices of `cluster`, every time and memory figure from `cost`.

    Samples in flight are kept. Raises PlanError when the graph is not the plan's.
    """
    if graph.digest != plan.graph_digest:
        raise PlanError(
            f"the plan is for graph {plan.graph_name!r} with digest {plan.graph_digest[:12]}, "
            f"but the model gives {graph.name!r} with {graph.digest[:12]}; plan it again"
        )
    _require_devices(plan, cluster)
    table = CostTable(graph, cluster, cost, training=plan.training, batch_size=plan.batch_size)
    choices = [
        StageChoice(
            ops=tuple(graph.op_index[op] for op in stage.ops),
            micro_batch=stage.micro_batch,
            dp=stage.dp,
            tp=stage.tp,
            k=stage.k,
            recompute=stage.recompute,
            devices=stage.devices,
        )
        for stage in plan.stages
    ]
    priced = assemble(
        table,
        choices,
        method=plan.method,
        objective=plan.objective,
        schedule=plan.schedule,
        search=plan.search,
        notes=plan.notes,
    )
    by_ops = {stage.ops: stage for stage in priced.stages}
    stages = tuple(
        replace(by_ops[stage.ops], index=stage.index, in_flight=stage.in_flight)
        for stage in plan.stages
    )
    # The plan's own edges: those of a sequential plan say more than the graph does.
    return plan.replace(
        cluster=cluster, stages=stages, bottleneck_s=priced.bottleneck_s, step_time_s=0.0
    )


def _require_devices(plan: TrainPlan, cluster: Cluster) -> None:
    last = plan.used_devices[-1]
    if last >= cluster.num_devices:
        raise PlanError(
            f"the plan uses device {last}, but cluster {cluster.name!r} has devices 0 to "
            f"{cluster.num_devices - 1}; give one with at least {last + 1}"
        )


def _all_reduce_s(stage: Stage, cluster: Cluster) -> float:
    ring = stage.devices[:: stage.tp]
    if len(ring) < 2:
        return stage.all_reduce_s
    return Communication().all_reduce_s(stage.gradient_bytes, ring, cluster)
