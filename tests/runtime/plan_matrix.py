"""What the planners are asked for in the numerics matrix, and their plans."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

from pairwise import Row, pairwise
from plan.plans import FREE, flat_cluster
from runtime.matrix_models import MODELS, named_case
from runtime.train_plans import TRAINING, chain_cut, plan_of_cut
from weft.cluster.cluster import Link
from weft.cost.roofline import RooflineCost
from weft.plan.api import METHODS
from weft.plan.api import plan as make_plan
from weft.plan.problem import InfeasiblePlanError
from weft.plan.train_plan import TrainPlan

BATCH = 8
LINKS = {"dear": Link(bandwidth_bytes_per_s=1e10), "free": FREE}
"""Where bytes are dear, all-reduces cost more than messages between stages; else replicas win."""
MEMORY_SHARE = {2: 0.7, 3: 0.5, 4: 0.4}
"""Memory of a device by their number, as a share of what the model needs on one: makes stages."""
PLANNERS = tuple(name for name in METHODS if name not in ("2bw", "brute-force"))
"""2BW computes another rule (`test_stage_semantics`); brute force searches graphs of a few ops."""
AXES: dict[str, tuple[Any, ...]] = {
    "model": MODELS,
    "planner": PLANNERS,
    "num_devices": (2, 3, 4),
    "link": tuple(LINKS),
    "k": (1, 2),
    "own_sizes": (False, True),
    "objective": ("bottleneck", "step_time"),
    "recompute": ("never", "always", "by stage"),
}


def is_valid(row: Row) -> bool:
    """What the planners offer together."""
    # Sequential peers of the literature have one micro-batch size, no groups and one objective.
    simple = row["k"] == 1 and not row["own_sizes"] and row["objective"] == "step_time"
    return row["planner"] in ("graphpipe", "spp") or simple


EVERY = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
"""All combinations, valid or not."""
_RARE = (
    ("gpt", "graphpipe", 2, "dear", 1, True, "bottleneck", "never"),
    ("dlrm", "graphpipe", 4, "free", 1, False, "bottleneck", "by stage"),
    ("candle-uno", "graphpipe", 2, "dear", 1, True, "bottleneck", "always"),
)
"""Plans of mixed micro-batch sizes and degrees, which few rows lead to."""
CHOSEN = [*pairwise(AXES, is_valid), *(dict(zip(AXES, row, strict=True)) for row in _RARE)]
"""A choice in which every two options meet."""


@cache
def needed_bytes(name: str) -> int:
    """What the whole model needs on one device."""
    graph = named_case(name, BATCH).capture.graph
    (stage,) = plan_of_cut(graph, chain_cut(graph, 1), BATCH).stages
    return stage.state_bytes + stage.saved_bytes_per_sample * stage.in_flight


def planned(row: Row) -> TrainPlan:
    """The plan that the row's planner makes, with as little memory as it can do with."""
    num_devices, share = row["num_devices"], MEMORY_SHARE[row["num_devices"]]
    while True:
        memory_bytes = int(needed_bytes(row["model"]) * share)
        try:
            return make_plan(
                named_case(row["model"], BATCH).capture.graph,
                flat_cluster(num_devices, LINKS[row["link"]], memory_bytes=memory_bytes),
                batch_size=BATCH,
                method=row["planner"],
                objective=row["objective"],
                training=replace(TRAINING, recompute=row["recompute"] == "always"),
                cost=RooflineCost(),
                micro_batches=(1, 2, 4),
                k=row["k"],
                per_stage_micro_batch=row["own_sizes"],
                per_stage_recompute=row["recompute"] == "by stage",
                max_blocks=12,
            )
        except InfeasiblePlanError:
            share *= 1.3
