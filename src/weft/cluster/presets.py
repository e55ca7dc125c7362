"""Named clusters with a size, as in `summit-32`; every constant with its source."""

from __future__ import annotations

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster, Link, Node
from weft.cluster.device_types import DEVICE_TYPES


def preset(name: str) -> Cluster:
    """The built-in cluster of this name, `family-size`; ConfigError lists the families."""
    family, _, size = name.rpartition("-")
    if family != "summit" or not size.isdigit() or int(size) < 1:
        raise ConfigError(f"unknown cluster preset {name!r}; families: summit")
    return _homogeneous(
        name,
        "v100-16",
        int(size),
        4,
        Link(bandwidth_bytes_per_s=50e9, latency_s=5e-6),
        Link(bandwidth_bytes_per_s=12.5e9, latency_s=5e-6),
    )


def _homogeneous(
    name: str, device_type: str, size: int, per_node: int, intra: Link, inter: Link
) -> Cluster:
    full, rest = divmod(size, per_node)
    counts = [per_node] * full + ([rest] if rest else [])
    nodes = tuple(
        Node(name=f"node{i}", device_type=DEVICE_TYPES[device_type], num_devices=count, intra=intra)
        for i, count in enumerate(counts)
    )
    return Cluster(name=name, nodes=nodes, inter=inter)
