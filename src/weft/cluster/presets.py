"""Named clusters with a size, as in `summit-32`; every constant with its source.

Bandwidths are per direction. Where a node has fewer network cards than devices its devices share
the node's whole bandwidth (`nic_shared`); where each device has its own card they do not.

| family | node | inside | between | source |
|---|---|---|---|---|
| summit | 4 x V100-16 | NVLink2 47.9 GB/s a pair | EDR 12.5 GB/s, shared | GraphPipe sheet §5.1; 47.9 of 50 GB/s by p2pBandwidthLatencyTest on a 4 x V100-SXM2 server (Dell HPC guide) |
| g4dn | 4 x T4 (g4dn.12xlarge) | PCIe 3 x8 7.9 GB/s | 50 Gb/s, shared | AWS; SpotServe sheet §7 |
| g5 | 4 x A10G (g5.12xlarge) | PCIe 4 x8 15.8 GB/s | 40 Gb/s, shared | AWS |
| a100-40 | 8 x A100-40 (p4d.24xlarge) | NVSwitch 300 GB/s | 400 Gb/s, shared | AWS, NVIDIA |
| a100-80 | 8 x A100-80 (DGX A100) | NVSwitch 300 GB/s | 200 Gb/s a device | Megatron-LM sheet §5 |
| a800 | 8 x A800-80 | NVSwitch 200 GB/s | 400 Gb/s, shared | NVIDIA; Spindle (ASPLOS'25) |
| h100 | 8 x H100 (DGX H100) | NVSwitch 450 GB/s | 400 Gb/s a device | NVIDIA |
| h200 | 8 x H200 (DGX H200) | NVSwitch 450 GB/s | 400 Gb/s a device | NVIDIA |

Latencies are assumed: 5 us for NVLink and InfiniBand verbs, 10 us for PCIe through the host, 25 us
for TCP and EFA. Written down before any comparison was run, and not tuned to one.
"""  # noqa: E501

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from dataclasses import dataclass

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster, Link, Node
from weft.cluster.device import SAME_DEVICE, DeviceType
from weft.cluster.device_types import DEVICE_TYPES, cpu_device_type

_GBIT = 1e9 / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    device_type: str
    per_node: int
    intra: Link
    inter: Link
    nic_shared: bool


def _link(bandwidth_bytes_per_s: float, latency_s: float) -> Link:
    return Link(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=latency_s)


def _family(
    device_type: str, per_node: int, intra: Link, inter: Link, *, nic_shared: bool = True
) -> _Family:
    return _Family(
        device_type=device_type,
        per_node=per_node,
        intra=intra,
        inter=inter,
        nic_shared=nic_shared,
    )


_FAMILIES: dict[str, _Family] = {
    "summit": _family("v100-16", 4, _link(47.9e9, 5e-6), _link(12.5e9, 5e-6)),
    "g4dn": _family("t4", 4, _link(7.9e9, 10e-6), _link(50 * _GBIT, 25e-6)),
    "g5": _family("a10g", 4, _link(15.8e9, 10e-6), _link(40 * _GBIT, 25e-6)),
    "a100-40": _family("a100-40", 8, _link(300e9, 5e-6), _link(400 * _GBIT, 25e-6)),
    "a100-80": _family(
        "a100-80", 8, _link(300e9, 5e-6), _link(200 * _GBIT, 5e-6), nic_shared=False
    ),
    "a800": _family("a800", 8, _link(200e9, 5e-6), _link(400 * _GBIT, 5e-6)),
    "h100": _family("h100", 8, _link(450e9, 5e-6), _link(400 * _GBIT, 5e-6), nic_shared=False),
    "h200": _family("h200", 8, _link(450e9, 5e-6), _link(400 * _GBIT, 5e-6), nic_shared=False),
}

FAMILIES: tuple[str, ...] = (*_FAMILIES, "local")
"""Families that `preset` knows."""


def preset(name: str) -> Cluster:
    """The built-in cluster `family-size` (`summit-32` has 32 devices), or `local`, this machine.

    ConfigError lists the families and the nearest name.
    """
    if name == "local":
        return local_cluster()
    family, _, size = name.rpartition("-")
    if family not in _FAMILIES or not size.isdigit():
        if name in _FAMILIES:
            raise ConfigError(f"cluster {name!r} lacks its size; write for example '{name}-8'")
        near = difflib.get_close_matches(family or name, FAMILIES, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown cluster {name!r}; the nearest family is {near[0]!r}, used as "
            f"'{near[0]}-8' (families: {', '.join(FAMILIES)}), or give a YAML file"
        )
    if int(size) < 1:
        raise ConfigError(f"cluster {name!r} has zero devices; give a size of at least 1")
    kind = _FAMILIES[family]
    full, rest = divmod(int(size), kind.per_node)
    counts = [kind.per_node] * full + [rest] * (rest > 0)
    nodes = tuple(
        Node(
            name=f"node{i}",
            device_type=DEVICE_TYPES[kind.device_type],
            num_devices=count,
            intra=kind.intra if count > 1 else SAME_DEVICE,
        )
        for i, count in enumerate(counts)
    )
    inter = kind.inter if len(nodes) > 1 else SAME_DEVICE
    return Cluster(name=name, nodes=nodes, inter=inter, nic_shared=kind.nic_shared)


def load_cluster(spec: str) -> Cluster:
    """The cluster that CLUSTER on a command line means: a YAML or JSON file, or a preset."""
    if spec.endswith((".yaml", ".yml", ".json")) or os.path.sep in spec:
        return Cluster.from_yaml(spec)
    return preset(spec)


def local_cluster() -> Cluster:
    """This machine as one node: its NVIDIA devices where there are any, else its CPU."""
    kinds = _nvidia_devices()
    if kinds:
        intra = _FAMILIES["h100"].intra if kinds[0].name.startswith("h") else _link(15.8e9, 10e-6)
        return Cluster(
            name="local",
            nodes=(
                Node(
                    name="local",
                    device_type=kinds[0],
                    num_devices=len(kinds),
                    intra=intra if len(kinds) > 1 else SAME_DEVICE,
                ),
            ),
            inter=SAME_DEVICE,
        )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = cpu_device_type(os.cpu_count() or 1, memory_bytes)
    node = Node(name="local", device_type=cpu, num_devices=1, intra=SAME_DEVICE)
    return Cluster(name="local", nodes=(node,), inter=SAME_DEVICE)


def _nvidia_devices() -> list[DeviceType]:
    """Known device types of the NVIDIA cards here, by nvidia-smi; unknown cards are left out."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [_match_nvidia(line) for line in text.splitlines() if line.strip()]
    return [kind for kind in found if kind is not None]


def _match_nvidia(line: str) -> DeviceType | None:
    card, _, memory_mib = line.rpartition(",")
    card = card.lower()
    for name in ("h200", "h100", "a800", "a10g", "t4"):
        if name in card:
            return DEVICE_TYPES[name]
    if "a100" in card:
        return DEVICE_TYPES["a100-80" if float(memory_mib) > 50_000 else "a100-40"]
    return DEVICE_TYPES["v100-16"] if "v100" in card else None
