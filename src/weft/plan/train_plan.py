"""A training plan as data: stages, the edges between them, and everything needed to price them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster
from weft.cost.training import TrainingSpec

FORMAT_VERSION = 1
"""Version of the JSON form; a reader refuses any other."""


class PlanError(ConfigError):
    """A plan that is malformed, contradicts itself, or belongs to another graph or cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Operators that run together on one group of devices, with their memory and times.

    `devices` are global indices, one per combination of the named `axes` (row-major, dp first);
    rank r of the dp axis computes samples [r*b/dp, (r+1)*b/dp) of each micro-batch of b =
    `micro_batch` samples. `in_flight` is the number of samples whose activations may be held at
    once, over all ranks of the dp axis; `k` is the number of forwards, then backwards, in a group.

    Memory is per device: `state_bytes` (weights, gradients, optimizer), `saved_bytes_per_sample`
    kept from forward to backward, `input_bytes_per_sample` arriving from other stages, and
    `reserved_bytes` of scratch at this micro-batch size. `forward_s`, `backward_s` are seconds of
    one micro-batch, by micro-batch size, tensor-parallel collectives included, messages to other
    stages not; with `recompute` the backward includes the second forward. `all_reduce_s` and
    `step_s`, the optimizer's update, are paid once per step. A `frozen` stage has no backward.
    """

    index: int
    ops: tuple[str, ...]
    devices: tuple[int, ...]
    micro_batch: int
    in_flight: int
    forward_s: Mapping[int, float] = field(hash=False)
    backward_s: Mapping[int, float] = field(hash=False)
    axes: Mapping[str, int] = field(hash=False, default_factory=lambda: {"dp": 1})
    k: int = 1
    recompute: bool = False
    frozen: bool = False
    task: str = ""
    param_ids: tuple[str, ...] = ()
    param_bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    saved_bytes_per_sample: int = 0
    input_bytes_per_sample: int = 0
    reserved_bytes: int = 0
    all_reduce_s: float = 0.0
    step_s: float = 0.0

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return self.axes.get("dp", 1)

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.axes.get("tp", 1)

    @property
    def num_devices(self) -> int:
        """Devices that run this stage."""
        return len(self.devices)

    @property
    def micro_batch_s(self) -> float:
        """Seconds of compute for one micro-batch, forward and backward."""
        return self.forward_s[self.micro_batch] + self.backward_s[self.micro_batch]

    @property
    def num_in_flight(self) -> int:
        """Micro-batches in flight, rounded up."""
        return -(-self.in_flight // self.micro_batch)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations that one device holds at the peak."""
        return self.activation_bytes_at(self.in_flight)

    def activation_bytes_at(self, in_flight: int) -> int:
        """Bytes of activations on one device with `in_flight` samples held by the stage."""
        if self.recompute:
            # Inputs of every held sample, and all activations of the micro-batch being redone.
            held = self.input_bytes_per_sample * in_flight
            held += self.saved_bytes_per_sample * self.micro_batch
        else:
            held = self.saved_bytes_per_sample * in_flight
        return -(-held // self.dp)

    @property
    def memory_bytes(self) -> int:
        """Bytes that one device needs for this stage at the peak."""
        return self.state_bytes + self.activation_bytes + self.reserved_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEdge:
    """The source's forward precedes the target's, the target's backward the source's.

    Bytes are per sample over all distinct tensors. An edge of 0 forward bytes only orders: nothing
    is sent (sequential plans chain independent branches so). With 0 backward bytes but some forward
    bytes no gradient flows.
    """

    source: int
    target: int
    forward_bytes_per_sample: int = 0
    backward_bytes_per_sample: int = 0

    @property
    def is_order_only(self) -> bool:
        """Whether the edge carries no data."""
        return self.forward_bytes_per_sample == 0 and self.backward_bytes_per_sample == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchStatistics:
    """How a plan was found: work counted in candidate stages and states, and seconds."""

    num_candidates: int = 0
    num_states: int = 0
    num_iterations: int = 0
    timed_out: bool = False
    search_time_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A partition of a graph into stages on devices; self-contained, so that it can be simulated.

    `bottleneck_s` is the planner's largest time per sample over all stages (seconds per sample,
    transfers and amortised all-reduce included; Eq. 1 of GraphPipe, arXiv 2406.17145 §3).
    `step_time_s` is the simulated time of one optimizer step where the planner ran a simulation,
    else 0. Source of the form: stage graph G_S of the same section, many-to-many.
    """

    method: str
    graph_name: str
    graph_digest: str
    cluster: Cluster
    batch_size: int
    stages: tuple[Stage, ...]
    edges: tuple[StageEdge, ...]
    training: TrainingSpec = field(default_factory=TrainingSpec)
    objective: str = "bottleneck"
    schedule: str = "1f1b"
    bottleneck_s: float = 0.0
    step_time_s: float = 0.0
    search: SearchStatistics = field(default_factory=SearchStatistics)
    notes: tuple[str, ...] = ()

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Stages with an edge into each stage, ascending."""
        found: list[list[int]] = [[] for _ in self.stages]
        for edge in self.edges:
            found[edge.target].append(edge.source)
        return tuple(tuple(sorted(row)) for row in found)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Stages with an edge from each stage, ascending."""
        found: list[list[int]] = [[] for _ in self.stages]
        for edge in self.edges:
            found[edge.source].append(edge.target)
        return tuple(tuple(sorted(row)) for row in found)

    @cached_property
    def edge_by_pair(self) -> Mapping[tuple[int, int], StageEdge]:
        """Each edge by (source, target)."""
        return {(edge.source, edge.target): edge for edge in self.edges}

    @cached_property
    def topological_order(self) -> tuple[int, ...]:
        """Stage indices, every stage after its predecessors; PlanError names a cycle."""
        waiting = [len(row) for row in self.predecessors]
        ready = [i for i, count in enumerate(waiting) if count == 0]
        order: list[int] = []
        while ready:
            stage = ready.pop()
            order.append(stage)
            for target in self.successors[stage]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    ready.append(target)
        if len(order) < len(self.stages):
            stuck = [i for i, count in enumerate(waiting) if count > 0]
            raise PlanError(
                f"the stage graph has a cycle through stages {stuck}; every stage must be convex"
            )
        return tuple(order)

    @cached_property
    def depth(self) -> int:
        """Stages on the longest path: it sets the warm-up and the micro-batches in flight."""
        longest = [1] * len(self.stages)
        for stage in reversed(self.topological_order):
            longest[stage] = 1 + max((longest[t] for t in self.successors[stage]), default=0)
        return max(longest)

    @cached_property
    def used_devices(self) -> tuple[int, ...]:
        """Global indices of the devices that run a stage, ascending."""
        return tuple(sorted({device for stage in self.stages for device in stage.devices}))

    @cached_property
    def stage_of(self) -> Mapping[str, int]:
        """Stage index of each operator."""
        return {op: stage.index for stage in self.stages for op in stage.ops}

    @property
    def micro_batch(self) -> int:
        """Largest micro-batch size over the stages (they are equal unless tailored)."""
        return max(stage.micro_batch for stage in self.stages)

    def num_micro_batches(self, stage: int) -> int:
        """Micro-batches that one stage runs per step."""
        return self.batch_size // self.stages[stage].micro_batch

    @cached_property
    def memory_bytes(self) -> Mapping[int, int]:
        """Planned peak bytes on each used device, all its stages together."""
        found = dict.fromkeys(self.used_devices, 0)
        for stage in self.stages:
            for device in stage.devices:
                found[device] += stage.memory_bytes
        return found

    @property
    def peak_memory_bytes(self) -> int:
        """Planned peak bytes of the worst device."""
        return max(self.memory_bytes.values())

    def replace(self, **changes: Any) -> TrainPlan:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; `from_dict` reads it back."""
        return {
            "format": FORMAT_VERSION,
            "method": self.method,
            "objective": self.objective,
            "schedule": self.schedule,
            "graph_name": self.graph_name,
            "graph_digest": self.graph_digest,
            "batch_size": self.batch_size,
            "bottleneck_s": self.bottleneck_s,
            "step_time_s": self.step_time_s,
            "notes": list(self.notes),
            "training": asdict(self.training),
            "search": asdict(self.search),
            "stages": [_stage_dict(stage) for stage in self.stages],
            "edges": [asdict(edge) for edge in self.edges],
            "cluster": self.cluster.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainPlan:
        """Build a plan from plain data; PlanError names what is missing or unknown."""
        if data.get("format") != FORMAT_VERSION:
            raise PlanError(
                f"the plan's format is {data.get('format')!r}; this version reads "
                f"{FORMAT_VERSION}; plan again"
            )
        try:
            fields = {k: v for k, v in data.items() if k != "format"}
            _check_kinds("the plan", data, _PLAN_KINDS)
            fields["cluster"] = Cluster.from_dict(data["cluster"])
            fields["training"] = TrainingSpec(**data["training"])
            fields["search"] = SearchStatistics(**data["search"])
            fields["stages"] = tuple(_stage(stage) for stage in data["stages"])
            fields["edges"] = tuple(_edge(edge) for edge in data["edges"])
            fields["notes"] = tuple(data.get("notes", ()))
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"this is not a plan written by Weft ({type(error).__name__}: {error}); plan again"
            ) from None

    def to_json(self) -> str:
        """The plan as JSON text, cluster and costs included."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainPlan:
        """Read what `to_json` wrote."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise PlanError("the plan is not a JSON object; plan again")
        return cls.from_dict(data)


_WHOLE, _NUMBER = (int,), (int, float)

_PLAN_KINDS = {"batch_size": _WHOLE, "bottleneck_s": _NUMBER, "step_time_s": _NUMBER}

_STAGE_KINDS = {
    **dict.fromkeys(("index", "micro_batch", "in_flight", "k"), _WHOLE),
    **dict.fromkeys(("param_bytes", "gradient_bytes", "state_bytes", "reserved_bytes"), _NUMBER),
    **dict.fromkeys(("saved_bytes_per_sample", "input_bytes_per_sample"), _NUMBER),
    **dict.fromkeys(("all_reduce_s", "step_s"), _NUMBER),
}

_EDGE_KINDS = {
    **dict.fromkeys(("source", "target"), _WHOLE),
    **dict.fromkeys(("forward_bytes_per_sample", "backward_bytes_per_sample"), _NUMBER),
}


def _check_kinds(
    where: str, data: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]
) -> None:
    """Raise PlanError for a value that is no number of its kind, is negative, or is not finite."""
    for name, allowed in kinds.items():
        value = data.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, allowed) or not 0 <= value < math.inf:
            kind = "whole number" if allowed is _WHOLE else "finite number"
            raise PlanError(f"{where}: {name} is {value!r}; it must be a {kind} of at least 0")


def _edge(data: Mapping[str, Any]) -> StageEdge:
    _check_kinds(f"edge {data['source']} -> {data['target']}", data, _EDGE_KINDS)
    return StageEdge(**data)


def _stage_dict(stage: Stage) -> dict[str, Any]:
    fields = asdict(stage)
    for name in ("forward_s", "backward_s"):
        fields[name] = {str(size): seconds for size, seconds in fields[name].items()}
    return fields


def _stage(data: Mapping[str, Any]) -> Stage:
    fields = dict(data)
    _check_kinds(f"stage {data['index']}", data, _STAGE_KINDS)
    for name in ("forward_s", "backward_s"):
        times = {int(size): float(seconds) for size, seconds in fields[name].items()}
        if not all(math.isfinite(t) and t >= 0 for t in times.values()):
            raise PlanError(f"stage {data.get('index')}: {name} holds a negative or NaN time")
        fields[name] = times
    for name in ("ops", "devices", "param_ids"):
        fields[name] = tuple(fields[name])
    return Stage(**fields)
