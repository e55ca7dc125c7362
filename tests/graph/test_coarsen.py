"""Coarsening: what must be preserved, and what must stay apart."""

from __future__ import annotations

import pytest

from weft.base.errors import ConfigError
from weft.cluster.presets import preset
from weft.cost.model import Parallel
from weft.cost.roofline import RooflineCost
from weft.graph.coarsen import coarsen
from weft.graph.graph import Edge, Graph, Op
from weft.model.zoo.registry import load
from weft.plan.api import plan
from zoo_sizes import SMALL


def chain(num_ops: int) -> Graph:
    return Graph.ordered(
        "chain",
        [Op(id=f"o{i}", kind="k", flops_forward=1.0 + i, output_bytes=4) for i in range(num_ops)],
        [Edge(source=f"o{i}", target=f"o{i + 1}", bytes_per_sample=4) for i in range(num_ops - 1)],
    )


@pytest.mark.parametrize("name", ["mmt", "clip", "unet", "llava"])
@pytest.mark.parametrize("max_blocks", [12, 150])
def test_blocks_preserve_cost_memory_and_order(name: str, max_blocks: int) -> None:
    graph = load(name, **SMALL[name]).graph()
    blocks = coarsen(graph, max_blocks).validate()
    assert len(blocks.ops) <= max_blocks
    members = [m for op in blocks.ops for m in (op.members or (op.id,))]
    assert sorted(members) == sorted(op.id for op in graph.ops)
    device = preset("summit-1").devices[0].type
    cost = RooflineCost()
    for samples in (1, 64):
        whole = sum(cost.op_cost(o, samples, Parallel(), device).total_s for o in graph.ops)
        parts = sum(cost.op_cost(o, samples, Parallel(), device).total_s for o in blocks.ops)
        assert parts == pytest.approx(whole, rel=1e-9)
    assert sum(o.saved_bytes for o in blocks.ops) == sum(o.saved_bytes for o in graph.ops)
    assert blocks.num_parameters == graph.num_parameters


def test_equal_branches_stay_apart_and_equal() -> None:
    blocks = coarsen(load("mmt", **(SMALL["mmt"] | {"num_branches": 4})).graph(), 40)
    per_branch = [
        [o.signature for o in blocks.ops if o.module_path.startswith(f"branches.{i}")]
        for i in range(4)
    ]
    assert per_branch[0]
    assert all(signatures == per_branch[0] for signatures in per_branch)


def test_skip_edges_keep_their_bytes() -> None:
    graph = load("unet", **SMALL["unet"]).graph()
    blocks = coarsen(graph, 10)
    of = {m: o.id for o in blocks.ops for m in (o.members or (o.id,))}
    for level in range(2):
        skip = next(
            e
            for e in graph.edges
            if e.source.startswith(f"down.{level}:") and graph.op_by_id[e.target].kind == "cat"
        )
        source, target = of[skip.source], of[skip.target]
        if source != target:
            block = next(e for e in blocks.edges if (e.source, e.target) == (source, target))
            assert block.bytes_per_sample >= skip.bytes_per_sample


@pytest.mark.parametrize("max_blocks", [1, 2, 7])
def test_any_limit_is_reached(max_blocks: int) -> None:
    assert len(coarsen(chain(40), max_blocks).ops) <= max_blocks


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_blocks is 0"):
        coarsen(chain(3), 0)


def test_a_light_loss_is_one_block_with_the_join_before_it() -> None:
    blocks = coarsen(load("case-study").graph())
    (loss,) = [op for op in blocks.ops if op.is_loss]
    assert [m.split(":")[0] for m in loss.members][-2:] == [".", "loss"]
    assert len(blocks.predecessors[loss.id]) == 2


@pytest.mark.parametrize("name", ["case-study", "candle-uno", "dlrm", "unet", "clip", "mmt"])
def test_the_optimum_over_blocks_is_within_two_percent(name: str) -> None:
    model = load(name)
    graph = model.graph()
    blocks = coarsen(graph)
    for num_devices in (4, 8):
        fine, coarse = (
            plan(
                g,
                preset(f"summit-{num_devices}"),
                batch_size=model.batch_size,
                method="graphpipe",
                objective="bottleneck",
            ).bottleneck_s
            for g in (graph, blocks)
        )
        assert coarse <= fine * 1.02
