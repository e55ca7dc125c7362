"""What planning verbs share: the model's graph and the prices of its operators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster
from weft.cost.model import CostModel
from weft.cost.profiled import BlockProfile, ProfiledCost
from weft.cost.roofline import RooflineCost
from weft.cost.training import TRAINING_SPECS, TrainingSpec
from weft.graph.coarsen import coarsen
from weft.graph.graph import Graph
from weft.model.zoo.registry import resolve
from weft.plan.reprice import reprice
from weft.plan.train_plan import TrainPlan

MAX_BLOCKS = 150
"""Blocks that planners see at most."""


def load_graph(
    model: str, options: Mapping[str, Any] | None = None, max_blocks: int = MAX_BLOCKS
) -> Graph:
    """The graph of MODEL at block level."""
    return coarsen(resolve(model, options), max_blocks)


def load_cost(profile: Path | None, training: TrainingSpec) -> CostModel:
    """Prices from a profile file, or the roofline of each device type in the training dtype."""
    if profile is None:
        return RooflineCost(dtype=training.dtype)
    return ProfiledCost(profile=BlockProfile.load(profile))


def load_training(name: str) -> TrainingSpec:
    """The training preset called `name`; ConfigError lists the known ones."""
    if name not in TRAINING_SPECS:
        raise ConfigError(f"--training is {name!r}; known: {', '.join(TRAINING_SPECS)}")
    return TRAINING_SPECS[name]


def reprice_model(plan: TrainPlan, model: str, profile: Path | None, cluster: Cluster) -> TrainPlan:
    """`plan` of MODEL priced again: by a profile or the roofline, on `cluster`."""
    graph = resolve(model)
    if graph.digest != plan.graph_digest:
        graph = coarsen(graph, MAX_BLOCKS)
    return reprice(plan, graph, load_cost(profile, plan.training), cluster)
