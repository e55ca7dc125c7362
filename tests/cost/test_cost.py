"""Cost models: the roofline by hand, measured tables, FlexFlow's file, and training memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster, Node
from weft.cluster.device import DeviceType, Efficiency, Link
from weft.cluster.presets import preset
from weft.cost.flexflow import read_flexflow_profile
from weft.cost.model import Parallel
from weft.cost.profiled import BlockProfile, BlockTimes, ProfiledCost
from weft.cost.roofline import RooflineCost
from weft.cost.training import ADAM_BF16, ADAM_FP32, SGD_FP32, TrainingSpec
from weft.graph.graph import Kernel, Op, Parameter

DEVICE = DeviceType(
    name="d",
    memory_bytes=10**9,
    peak_flops={"float32": 1e9},
    memory_bandwidth_bytes_per_s=1e6,
    efficiency=Efficiency(max_fraction=0.5, half_flops=1e6),
    launch_s=0.25,
)


def test_a_product_pays_fill_and_launch() -> None:
    op = Op(id="a", kind="linear", flops_forward=1e6, flops_backward=2e6)
    cost = RooflineCost().op_cost(op, 2, Parallel(), DEVICE)
    # 2e6 FLOP at half of the peak, plus the fill of half_flops at that rate, plus one launch.
    assert cost.forward_s == pytest.approx((2e6 + 1e6) / 5e8 + 0.25)
    assert cost.backward_s == pytest.approx((4e6 + 2 * 1e6) / 5e8 + 0.5)


def test_other_kernels_are_bound_by_memory() -> None:
    kernel = Kernel(flops_forward=1e6, bytes_accessed=3e6, fixed_bytes=1e6, is_product=False)
    op = Op(id="a", kind="add", kernels=(kernel,))
    assert RooflineCost().op_cost(op, 2, Parallel(), DEVICE).forward_s == pytest.approx(7.25)


def test_ring_all_reduce_and_the_slowest_link() -> None:
    fast, slow = Link(bandwidth_bytes_per_s=1e9), Link(bandwidth_bytes_per_s=1e8, latency_s=1e-3)
    nodes = tuple(Node(name=n, device_type=DEVICE, num_devices=2, intra=fast) for n in ("x", "y"))
    cluster = Cluster(name="c", nodes=nodes, inter=slow)
    cost = RooflineCost()
    assert cost.all_reduce_s(1e8, [0], cluster) == 0
    assert cost.all_reduce_s(1e8, [0, 1], cluster) == pytest.approx(2 * 0.5e8 / 1e9)
    expected = 2 * 3 * (1e-3 + 0.25e8 / 1e8)
    assert cost.all_reduce_s(1e8, [3, 0, 2, 1], cluster) == pytest.approx(expected)


def test_training_memory_of_the_presets() -> None:
    trained = Parameter(id="w", num_elements=10)
    frozen = Parameter(id="f", num_elements=10, trainable=False)
    assert [s.state_bytes(trained) for s in (SGD_FP32, ADAM_FP32, ADAM_BF16)] == [80, 160, 160]
    assert [s.state_bytes(frozen) for s in (SGD_FP32, ADAM_BF16)] == [40, 20]
    assert SGD_FP32.gradient_bytes(frozen) == 0
    with pytest.raises(ConfigError, match="at least 4"):
        TrainingSpec(state_bytes_per_param=2.0)


def profiled() -> ProfiledCost:
    times = BlockTimes(op_id="a", batch_sizes=(1, 4), forward_s=(1.0, 2.5), backward_s=(2.0, 5.0))
    profile = BlockProfile(model="m", device="d", dtype="float32", blocks={"s": times})
    return ProfiledCost(profile=BlockProfile.from_json(profile.to_json()))


@pytest.mark.parametrize(("samples", "forward_s"), [(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)])
def test_measured_times_are_affine_between_and_beyond(samples: int, forward_s: float) -> None:
    cost = profiled().op_cost(Op(id="a", kind="k", signature="s"), samples, Parallel(), DEVICE)
    assert cost.forward_s == pytest.approx(forward_s)


def test_a_profile_of_something_else_is_refused() -> None:
    op = Op(id="b", kind="k", signature="other")
    with pytest.raises(ConfigError, match="no block 'b'"):
        profiled().op_cost(op, 1, Parallel(), DEVICE)
    with pytest.raises(ConfigError, match="measured on 'd'"):
        profiled().op_cost(op, 1, Parallel(), preset("summit-1").devices[0].type)
    with pytest.raises(ConfigError, match="not a block profile"):
        BlockProfile.from_json("{}")


def flexflow_file(path: Path, **changes: object) -> Path:
    def entry(name: str, inputs: list[int], weight: int, ms: float) -> dict[str, object]:
        return {
            "name": name,
            "inputs": inputs,
            "input_size": [400] * len(inputs),
            "weight_size": weight,
            "runtime": {"1": ms, "2": ms * 1.5},
            "reserved_mem": {"1": 7, "2": 9} if name == "mha" else {},
        }

    data = {"0": entry("input", [], 0, 0.0), "1": entry("mha", [0], 4000, 3.0)}
    data["2"] = entry("concat", [1, 1], 0, 6.0) | changes
    file = path / "profile.json"
    file.write_text(json.dumps(data))
    return file


def test_flexflow_profiles_become_a_graph_and_its_costs(tmp_path: Path) -> None:
    model = read_flexflow_profile(flexflow_file(tmp_path))
    graph = model.graph
    assert [op.kind for op in graph.ops] == ["input", "mha", "concat"]
    assert graph.parameter_by_id["1.weight"].num_elements == 1000
    assert [(e.bytes_per_sample, e.needs_grad) for e in graph.edges] == [(400, False), (800, True)]
    v100 = preset("summit-1").devices[0].type
    assert model.cost.op_cost(graph.ops[1], 2, Parallel(), v100).total_s == pytest.approx(4.5e-3)
    assert model.cost.reserved_bytes(graph.ops[1], 2) == 9


def test_malformed_flexflow_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads '9'"):
        read_flexflow_profile(flexflow_file(tmp_path, inputs=[9, 1]))
    with pytest.raises(ConfigError, match="2 inputs but 1"):
        read_flexflow_profile(flexflow_file(tmp_path, input_size=[4]))
    with pytest.raises(ConfigError, match=r"'2'.*malformed"):
        read_flexflow_profile(flexflow_file(tmp_path, runtime=3))
