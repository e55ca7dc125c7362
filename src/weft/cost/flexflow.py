"""Reads the profile of GraphPipe's FlexFlow profiler: a graph and its measured costs at once.

Format (GraphPipe sheet §2.5): `{op id: {name, inputs: [op ids], input_size: [bytes per sample],
weight_size: bytes, runtime: {batch size: milliseconds forward + backward}, reserved_mem: {batch
size: bytes}}}`, the bytes of `input_size` in the order of `inputs`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.base.errors import ConfigError
from weft.cost.profiled import BlockProfile, BlockTimes, ProfiledCost
from weft.graph.graph import Edge, Graph, Op, Parameter

# Backward of a dense layer is two products to forward's one; the file holds only their sum.
_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexFlowModel:
    """What a FlexFlow profile holds: the operator graph, and the cost model of its device."""

    graph: Graph
    cost: ProfiledCost


def read_flexflow_profile(path: str | Path, *, device: str = "v100-16") -> FlexFlowModel:
    """Read a FlexFlow `profile.json`, measured on a `device` of fp32.

    The one figure for forward and backward is split 1 : 2. An operator keeps its inputs for
    backward; one without inputs (an input op) keeps nothing. Sinks are the losses. Raises
    ConfigError, naming the operator and the key, where the file is not such a profile.
    """
    name = Path(path).stem
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read profile {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"profile {str(path)!r} is not JSON: {error}") from None
    entries = {str(op_id): _entry(str(op_id), fields) for op_id, fields in data.items()}
    consumed = {source for entry in entries.values() for source in entry["inputs"]}
    for op_id, entry in entries.items():
        for source in entry["inputs"]:
            if source not in entries:
                raise ConfigError(f"operator {op_id!r} reads {source!r}, which is not in the file")
    output_bytes: dict[str, int] = defaultdict(int)
    for entry in entries.values():
        for source, size in zip(entry["inputs"], entry["input_size"], strict=True):
            output_bytes[source] = max(output_bytes[source], size)
    graph = Graph.ordered(
        name,
        [
            _op(op_id, entry, output_bytes[op_id], op_id not in consumed)
            for op_id, entry in entries.items()
        ],
        _edges(entries),
        [
            Parameter(id=f"{op_id}.weight", num_elements=entry["weight_size"] // 4)
            for op_id, entry in entries.items()
            if entry["weight_size"]
        ],
    )
    blocks = {op_id: _times(op_id, entry) for op_id, entry in entries.items()}
    profile = BlockProfile(
        model=name, device=device, dtype="float32", blocks=blocks, graph_digest=graph.digest
    )
    return FlexFlowModel(graph=graph, cost=ProfiledCost(profile=profile))


def _entry(op_id: str, fields: Any) -> dict[str, Any]:
    try:
        inputs = [str(source) for source in fields["inputs"]]
        sizes = [int(size) for size in fields["input_size"]]
        runtime = {int(k): float(v) for k, v in fields["runtime"].items()}
        reserved = {int(k): int(v) for k, v in fields.get("reserved_mem", {}).items()}
        entry: dict[str, Any] = {
            "name": str(fields["name"]),
            "inputs": inputs,
            "input_size": sizes,
            "weight_size": int(fields["weight_size"]),
            "runtime": dict(sorted(runtime.items())),
            "reserved_mem": reserved,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"operator {op_id!r} of the FlexFlow profile is malformed ({type(error).__name__}: "
            f"{error}); it needs name, inputs, input_size, weight_size and runtime"
        ) from None
    if len(inputs) != len(sizes):
        raise ConfigError(
            f"operator {op_id!r} has {len(inputs)} inputs but {len(sizes)} input sizes"
        )
    if not runtime:
        raise ConfigError(f"operator {op_id!r} has no runtime at any batch size")
    return entry


def _op(op_id: str, entry: Mapping[str, Any], output_bytes: int, is_sink: bool) -> Op:
    return Op(
        id=op_id,
        kind=entry["name"],
        module_path=entry["name"],
        bytes_accessed=float(sum(entry["input_size"]) + output_bytes),
        param_ids=(f"{op_id}.weight",) if entry["weight_size"] else (),
        saved_bytes=sum(entry["input_size"]),
        output_bytes=output_bytes,
        is_loss=is_sink,
        signature=op_id,
    )


def _edges(entries: Mapping[str, Mapping[str, Any]]) -> list[Edge]:
    summed: dict[tuple[str, str], int] = defaultdict(int)
    for op_id, entry in entries.items():
        for source, size in zip(entry["inputs"], entry["input_size"], strict=True):
            summed[source, op_id] += size
    # Nothing flows back into an operator that only loads an input.
    loads = {op_id for op_id, e in entries.items() if not e["inputs"] and not e["weight_size"]}
    return [
        Edge(source=a, target=b, bytes_per_sample=size, needs_grad=a not in loads)
        for (a, b), size in summed.items()
    ]


def _times(op_id: str, entry: Mapping[str, Any]) -> BlockTimes:
    runtime: Mapping[int, float] = entry["runtime"]
    reserved: Mapping[int, int] = entry["reserved_mem"]
    return BlockTimes(
        op_id=op_id,
        batch_sizes=tuple(runtime),
        forward_s=tuple(ms * 1e-3 * _FORWARD_SHARE for ms in runtime.values()),
        backward_s=tuple(ms * 1e-3 * (1 - _FORWARD_SHARE) for ms in runtime.values()),
        reserved_bytes=tuple(reserved.get(b, 0) for b in runtime) if reserved else (),
    )
