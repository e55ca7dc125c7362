"""What a plan runs on: nodes of devices, links inside and between them, and the cluster file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from weft.base.errors import ConfigError
from weft.cluster.device import SAME_DEVICE as SAME_DEVICE
from weft.cluster.device import DeviceType as DeviceType
from weft.cluster.device import Efficiency as Efficiency
from weft.cluster.device import Link as Link
from weft.cluster.device_types import DEVICE_TYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine: equal devices joined by equal links."""

    name: str
    device_type: DeviceType
    num_devices: int
    intra: Link

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ConfigError(
                f"node {self.name!r} has num_devices {self.num_devices}; it must be at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLink:
    """The link between two named nodes, both directions, where it differs from `Cluster.inter`."""

    source: str
    target: str
    link: Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator; `index` counts over the whole cluster in node order."""

    index: int
    name: str
    node: str
    type: DeviceType


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes and the network between them.

    `nic_shared` says that all devices of a node send through one network card per direction, so
    that their messages to other nodes queue behind each other.
    """

    name: str
    nodes: tuple[Node, ...]
    inter: Link
    links: tuple[NodeLink, ...] = ()
    nic_shared: bool = True

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError(f"cluster {self.name!r} has zero devices; list at least one node")
        names = [node.name for node in self.nodes]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"cluster {self.name!r} lists node {name!r} twice; rename one")
        for entry in self.links:
            for end in (entry.source, entry.target):
                if end not in names:
                    raise ConfigError(
                        f"cluster {self.name!r} has a link between {entry.source!r} and "
                        f"{entry.target!r}, but no node {end!r}; nodes: {', '.join(names)}"
                    )

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """All devices, in node order."""
        found: list[Device] = []
        for node in self.nodes:
            for local in range(node.num_devices):
                found.append(
                    Device(
                        index=len(found),
                        name=f"{node.name}:{local}",
                        node=node.name,
                        type=node.device_type,
                    )
                )
        return tuple(found)

    @cached_property
    def num_devices(self) -> int:
        """Devices over all nodes."""
        return sum(node.num_devices for node in self.nodes)

    @cached_property
    def node_of_device(self) -> NDArray[np.int64]:
        """Position of each device's node, shape (num_devices,)."""
        return np.repeat(np.arange(len(self.nodes)), [node.num_devices for node in self.nodes])

    @cached_property
    def _node_by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _link_by_pair(self) -> Mapping[tuple[str, str], Link]:
        pairs = {(entry.source, entry.target): entry.link for entry in self.links}
        return {(b, a): link for (a, b), link in pairs.items()} | pairs

    def link(self, source: int, target: int) -> Link:
        """The link from one device index to another."""
        if source == target:
            return SAME_DEVICE
        a, b = self.devices[source].node, self.devices[target].node
        if a == b:
            return self._node_by_name[a].intra
        return self._link_by_pair.get((a, b), self.inter)

    def to_dict(self) -> dict[str, Any]:
        """The cluster as plain data, device types listed once; `from_dict` reads it back."""
        types = {node.device_type.name: node.device_type for node in self.nodes}
        return {
            "name": self.name,
            "device_types": {name: _device_type_dict(kind) for name, kind in types.items()},
            "nodes": [
                {
                    "name": node.name,
                    "device_type": node.device_type.name,
                    "num_devices": node.num_devices,
                    **_link_dict("intra", node.intra),
                }
                for node in self.nodes
            ],
            **_link_dict("inter", self.inter),
            "links": [
                {"source": e.source, "target": e.target, **asdict(e.link)} for e in self.links
            ],
            "nic_shared": self.nic_shared,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """Build a cluster from plain data; ConfigError names unknown keys and the nearest valid."""
        return _parse_cluster(data)

    def to_json(self) -> str:
        """The cluster as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Cluster:
        """Read what `to_json` wrote."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"this is not a cluster in JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Cluster:
        """Read a cluster file, whose keys are those of `to_dict`.

        A node may give `count` to stand for several equal ones (named `name-0`, `name-1`, ...);
        `device_type` may name a built-in type. ConfigError says what is wrong and what is valid.
        """
        try:
            data = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read cluster file {str(path)!r}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"cluster file {str(path)!r} is not YAML: {error}") from None
        if not isinstance(data, Mapping):
            raise ConfigError(f"cluster file {str(path)!r} must hold a mapping with key `nodes`")
        fields = {"name": Path(path).stem} | dict(cast(Mapping[str, Any], data))
        return cls.from_dict(fields)


def _link_dict(key: str, link: Link) -> dict[str, Any]:
    # JSON has no infinity; a free link is the default where a key is absent.
    return {} if link == SAME_DEVICE else {key: asdict(link)}


def _device_type_dict(kind: DeviceType) -> dict[str, Any]:
    fields = asdict(kind)
    del fields["name"]
    return fields


def _mapping(value: object, where: str, allowed: Iterable[str]) -> dict[str, Any]:
    """`value` as a dict whose keys are all in `allowed`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, not {type(value).__name__}")
    found = dict(cast(Mapping[str, Any], value))
    valid = sorted(allowed)
    for key in found:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where} has unknown key {key!r}; the nearest valid key is {near[0]!r} "
                f"(all: {', '.join(valid)})"
            )
    return found


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list, not {type(value).__name__}")
    return cast(list[object], value)


def _number(value: object, where: str) -> float:
    # YAML 1.1 reads 50e9 (no dot) as a string; a user means the number.
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(cast(float, value))
    except (TypeError, ValueError):
        raise ConfigError(f"{where} is {value!r}; it must be a number") from None


def _required(data: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise ConfigError(f"{where} lacks key {key!r}; add it")
    return data[key]


def _parse_link(value: object, where: str, extra: tuple[str, ...] = ()) -> Link:
    data = _mapping(value, where, ("bandwidth_bytes_per_s", "latency_s", *extra))
    bandwidth = _required(data, "bandwidth_bytes_per_s", where)
    return Link(
        bandwidth_bytes_per_s=_number(bandwidth, f"{where}: bandwidth_bytes_per_s"),
        latency_s=_number(data.get("latency_s", 0.0), f"{where}: latency_s"),
    )


def _parse_device_type(name: str, value: object) -> DeviceType:
    where = f"device type {name!r}"
    data = _mapping(value, where, (f for f in DeviceType.__dataclass_fields__ if f != "name"))
    peaks = _mapping(
        _required(data, "peak_flops", where), f"{where}: peak_flops", data["peak_flops"]
    )
    efficiency = _mapping(
        data.get("efficiency", {}), f"{where}: efficiency", Efficiency.__dataclass_fields__
    )
    bandwidth = _required(data, "memory_bandwidth_bytes_per_s", where)
    return DeviceType(
        name=name,
        memory_bytes=int(_number(_required(data, "memory_bytes", where), f"{where}: memory_bytes")),
        peak_flops={k: _number(v, f"{where}: peak_flops[{k}]") for k, v in peaks.items()},
        memory_bandwidth_bytes_per_s=_number(bandwidth, f"{where}: memory_bandwidth_bytes_per_s"),
        efficiency=Efficiency(
            **{k: _number(v, f"{where}: efficiency.{k}") for k, v in efficiency.items()}
        ),
        launch_s=_number(data.get("launch_s", 0.0), f"{where}: launch_s"),
    )


def _parse_nodes(value: object, types: Mapping[str, DeviceType]) -> Iterable[Node]:
    for position, entry in enumerate(_list(value, "cluster: nodes")):
        where = f"node {position}"
        data = _mapping(entry, where, ("name", "device_type", "num_devices", "intra", "count"))
        name = str(data.get("name", f"node{position}"))
        kind = str(_required(data, "device_type", where))
        if kind not in types:
            near = difflib.get_close_matches(kind, types, n=1, cutoff=0.0)
            raise ConfigError(
                f"node {name!r} has unknown device_type {kind!r}; the nearest known is "
                f"{near[0]!r} (all: {', '.join(types)})"
            )
        num_devices = int(_number(data.get("num_devices", 1), f"node {name!r}: num_devices"))
        if num_devices == 1 and "intra" not in data:
            intra = SAME_DEVICE
        else:
            intra = _parse_link(_required(data, "intra", f"node {name!r}"), f"node {name!r}: intra")
        count = int(_number(data.get("count", 1), f"node {name!r}: count"))
        for i in range(count):
            yield Node(
                name=f"{name}-{i}" if "count" in data else name,
                device_type=types[kind],
                num_devices=num_devices,
                intra=intra,
            )


def _parse_cluster(value: Mapping[str, Any]) -> Cluster:
    keys = ("name", "device_types", "nodes", "inter", "links", "nic_shared")
    data = _mapping(value, "cluster", keys)
    own = _mapping(
        data.get("device_types", {}), "cluster: device_types", data.get("device_types", {})
    )
    types = dict(DEVICE_TYPES) | {k: _parse_device_type(str(k), v) for k, v in own.items()}
    nodes = tuple(_parse_nodes(_required(data, "nodes", "cluster"), types))
    if "inter" in data:
        inter = _parse_link(data["inter"], "cluster: inter")
    elif len(nodes) <= 1:
        inter = SAME_DEVICE
    else:
        raise ConfigError("cluster lacks key 'inter', the link between its nodes; add it")
    links: list[NodeLink] = []
    for position, entry in enumerate(_list(data.get("links", []), "cluster: links")):
        where = f"link {position}"
        link = _parse_link(entry, where, extra=("source", "target"))
        ends = cast(Mapping[str, Any], entry)
        links.append(
            NodeLink(
                source=str(_required(ends, "source", where)),
                target=str(_required(ends, "target", where)),
                link=link,
            )
        )
    return Cluster(
        name=str(data.get("name", "cluster")),
        nodes=nodes,
        inter=inter,
        links=tuple(links),
        nic_shared=bool(data.get("nic_shared", True)),
    )
