"""Weft weaves training, finetuning and serving into the same accelerators.

The public names below are resolved on first use, so that importing a room that only decides
(graph, cluster, cost, plan, engine, sim) never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.base.errors import WeftError as WeftError
    from weft.cluster.cluster import Cluster as Cluster
    from weft.cost.training import TrainingSpec as TrainingSpec
    from weft.engine.sampling import SamplingParams as SamplingParams
    from weft.graph.capture import capture as capture
    from weft.graph.graph import Graph as Graph
    from weft.plan.api import plan as plan
    from weft.serve.llm import LLM as LLM
    from weft.serve.lora_request import LoRARequest as LoRARequest
    from weft.serve.outputs import CompletionOutput as CompletionOutput
    from weft.serve.outputs import RequestOutput as RequestOutput
    from weft.sim.stage_executor import simulate as simulate
    from weft.train.config import TrainConfig as TrainConfig
    from weft.train.data import TrainData as TrainData
    from weft.train.trainer import Trainer as Trainer

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "LLM": "weft.serve.llm",
    "LoRARequest": "weft.serve.lora_request",
    "CompletionOutput": "weft.serve.outputs",
    "RequestOutput": "weft.serve.outputs",
    "SamplingParams": "weft.engine.sampling",
    "WeftError": "weft.base.errors",
    "Cluster": "weft.cluster.cluster",
    "Graph": "weft.graph.graph",
    "TrainConfig": "weft.train.config",
    "TrainData": "weft.train.data",
    "Trainer": "weft.train.trainer",
    "TrainingSpec": "weft.cost.training",
    "capture": "weft.graph.capture",
    "simulate": "weft.sim.stage_executor",
}
"""Public name -> the module that defines it. `plan` is a package that can be called."""

__all__ = ["__version__", "plan", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name == "plan":
        return import_module("weft.plan")
    try:
        module = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'weft' has no attribute {name!r}") from None
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
