"""From a plan of blocks to the plan of their operators, for whoever runs the operators."""

from __future__ import annotations

from dataclasses import replace

from weft.graph.coarsen import coarsen
from weft.graph.graph import Graph
from weft.plan.train_plan import TrainPlan
from weft.plan.validate import validate_plan


def at_operators(plan: TrainPlan, graph: Graph, max_blocks: int = 150) -> TrainPlan:
    """`plan` as a plan of `graph`, whether it was made for it or for its blocks.

    Stages, edges and prices stay; a stage of blocks becomes one of their operators.

    Raises:
        PlanError: the plan is of another graph; the message names the first difference.
    """
    if plan.graph_digest == graph.digest:
        return validate_plan(plan, graph)
    blocks = coarsen(graph, max_blocks)
    if plan.graph_digest != blocks.digest:
        planned = {op for stage in plan.stages for op in stage.ops}
        # Whichever level shares more operators with the plan tells more of what differs.
        shared_blocks = len(planned & set(blocks.op_index))
        shared_ops = len(planned & set(graph.op_index))
        return validate_plan(plan, blocks if shared_blocks >= shared_ops else graph)
    members = {op.id: op.members or (op.id,) for op in blocks.ops}
    stages = tuple(
        replace(stage, ops=tuple(member for op in stage.ops for member in members[op]))
        for stage in plan.stages
    )
    return validate_plan(plan.replace(stages=stages, graph_digest=graph.digest), graph)
