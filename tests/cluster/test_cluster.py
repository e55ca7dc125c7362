"""Cluster: links, files, presets, and what a file may not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster
from weft.cluster.presets import FAMILIES, load_cluster, preset

TWO_NODES = """
device_types:
  big: {memory_bytes: 8e9, peak_flops: {float32: 1e12}, memory_bandwidth_bytes_per_s: 1e11}
nodes:
  - {name: a, device_type: big, num_devices: 2, intra: {bandwidth_bytes_per_s: 1e10}}
  - {name: b, device_type: t4, count: 2}
inter: {bandwidth_bytes_per_s: 1e9, latency_s: 1e-5}
links:
  - {source: a, target: b-1, bandwidth_bytes_per_s: 5e8}
"""


def write(path: Path, text: str) -> str:
    file = path / "two.yaml"
    file.write_text(text)
    return str(file)


def test_a_file_with_own_and_built_in_types(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path, TWO_NODES))
    assert [d.name for d in cluster.devices] == ["a:0", "a:1", "b-0:0", "b-1:0"]
    assert cluster.link(0, 1).bandwidth_bytes_per_s == 1e10
    assert cluster.link(1, 2).transfer_s(1e9) == pytest.approx(1 + 1e-5)
    assert cluster.link(3, 0).bandwidth_bytes_per_s == 5e8
    assert cluster.link(2, 2).transfer_s(1e9) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_survive_json(family: str) -> None:
    cluster = preset(family if family == "local" else f"{family}-10")
    assert family == "local" or cluster.num_devices == 10
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_summit_32_is_eight_nodes_of_four() -> None:
    cluster = preset("summit-32")
    assert [node.num_devices for node in cluster.nodes] == [4] * 8
    assert cluster.link(0, 3).bandwidth_bytes_per_s > cluster.link(3, 4).bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("num_devices", "num_device", r"'num_device'.*nearest valid key is 'num_devices'"),
        ("latency_s: 1e-5", "latenzy_s: 1e-5", "nearest valid key is 'latency_s'"),
        ("target: b-1", "target: c", "no node 'c'"),
        ("device_type: t4", "device_type: t5", "nearest known is 't4'"),
        ("num_devices: 2", "num_devices: 0", "num_devices 0"),
        ("memory_bytes: 8e9", "memory_bytes: lots", "'lots'; it must be a number"),
        ("bandwidth_bytes_per_s: 5e8", "bandwidth_bytes_per_s: 0", "greater than 0"),
    ],
)
def test_mistakes_in_a_file_are_named(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in TWO_NODES
    with pytest.raises(ConfigError, match=message):
        load_cluster(write(tmp_path, TWO_NODES.replace(before, after)))


def test_no_nodes_means_zero_devices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero devices"):
        load_cluster(write(tmp_path, "nodes: []"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("summitt-8", "nearest family is 'summit'"),
        ("a100-40", "lacks its size"),
        ("h100-0", "zero"),
    ],
)
def test_unknown_presets_name_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(name)
