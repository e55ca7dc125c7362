"""Chain plans in the forms of other runtimes, and plans that have none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from plan.graphs import ToyCost, toy_cluster
from plan.models import chain, graph_of, layer, towers
from plan.plans import stage_plan
from weft.graph.coarsen import coarsen
from weft.graph.graph import Graph
from weft.plan.api import plan
from weft.plan.constraints import FixedStage
from weft.plan.export import (
    megatron_layout,
    module_fqns_per_model_part,
    torch_schedule_csv,
    whole_layers,
)
from weft.plan.schedules import generate
from weft.plan.train_plan import PlanError, TrainPlan


def decoder(num_layers: int) -> Graph:
    """A decoder whose layers have two operators each."""
    paths = ["embedding"]
    for number in range(num_layers):
        paths += [f"layers.{number}.attention", f"layers.{number}.mlp"]
    ops = [layer(path) for path in [*paths, "norm", "head", "loss"]]
    return graph_of("decoder", ops, [(i, i + 1) for i in range(len(ops) - 1)])


def cut(graph: Graph, *ends: int) -> TrainPlan:
    """The plan with a stage for every run of operators up to these positions."""
    starts = (0, *ends)
    stages = [
        FixedStage(ops=tuple(op.id for op in graph.ops[a:b]), num_devices=1)
        for a, b in zip(starts, (*ends, len(graph.ops)), strict=True)
    ]
    return plan(
        graph,
        toy_cluster(len(stages)),
        batch_size=4,
        micro_batches=(1,),
        cost=ToyCost(),
        constraints=stages,
    )


def expanded(layout: str) -> list[str]:
    """A layout as Megatron reads it: `x*n` stands for n of x."""
    text = re.sub(r"(.)\*(\d+)", lambda match: match[1] * int(match[2]), layout)
    return text.split("|")


def test_a_decoder_is_laid_out_by_its_layers() -> None:
    graph = decoder(4)
    # Operators: embedding, 4 x 2 in layers, norm, head, loss.
    found = cut(graph, 5, 9)
    assert module_fqns_per_model_part(found, graph) == [
        ["embedding", "layers.0", "layers.1"],
        ["layers.2", "layers.3"],
        ["norm", "head", "loss"],
    ]
    assert megatron_layout(found, graph) == "Et*2|t*2|L"
    assert expanded(megatron_layout(found, graph)) == ["Ett", "tt", "L"]
    alone = cut(graph, 1, 3, 9)
    assert megatron_layout(alone, graph) == "E|t|t*3|L"


def test_a_cut_layer_is_refused_by_name_and_whole_layers_prevent_it() -> None:
    graph = decoder(3)
    found = cut(graph, 4)
    for export in (module_fqns_per_model_part, megatron_layout):
        with pytest.raises(PlanError, match=r"'layers\.1' is cut between stages 0 and 1"):
            export(found, graph)
    kept = plan(
        graph,
        toy_cluster(4),
        batch_size=8,
        micro_batches=(1,),
        objective="bottleneck",
        cost=ToyCost(),
        constraints=whole_layers(graph),
    )
    assert kept.num_stages > 2
    assert expanded(megatron_layout(kept, graph)).count("|") == 0
    assert sum(part.count("t") for part in expanded(megatron_layout(kept, graph))) == 3


def test_blocks_name_the_modules_of_their_members() -> None:
    graph = coarsen(decoder(6), 8)
    assert any(op.members for op in graph.ops)
    found = plan(
        graph,
        toy_cluster(2),
        batch_size=8,
        micro_batches=(1,),
        objective="bottleneck",
        cost=ToyCost(),
        constraints=whole_layers(graph),
    )
    names = [name for part in module_fqns_per_model_part(found, graph) for name in part]
    assert names == ["embedding", *(f"layers.{i}" for i in range(6)), "norm", "head", "loss"]


def test_torch_reads_the_schedule() -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    graph = decoder(4)
    found = cut(graph, 5, 9)
    for name in ("1f1b", "gpipe", "zero-bubble"):
        text = torch_schedule_csv(found, generate(found, name))
        rows = [
            [schedules._Action.from_str(cell) for cell in row.split(",")]
            for row in text.splitlines()
        ]
        assert [{action.stage_index for action in row} for row in rows] == [{0}, {1}, {2}]
        # torch itself finds an order in which every message can be sent and received.
        lowered = schedules._add_send_recv(
            dict(enumerate(rows)), stage_to_rank=lambda stage: stage, num_stages=3
        )
        kinds = [action.computation_type.name for action in lowered[1]]
        assert kinds.count("RECV_F") == kinds.count("SEND_F") == 4
        assert kinds.count("RECV_B") == kinds.count("SEND_B") == 4


def test_replicas_share_a_row() -> None:
    found = stage_plan([(0, 1)], 2, batch_size=4, micro_batch=2, dp=[2, 1])
    rows = torch_schedule_csv(found, generate(found, "gpipe")).splitlines()
    assert rows == ["0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B1"]


def test_plans_that_these_runtimes_cannot_run_are_refused_by_name() -> None:
    graph = towers(2, 2)
    branched = plan(
        graph,
        toy_cluster(4),
        batch_size=8,
        micro_batches=(1,),
        objective="bottleneck",
        cost=ToyCost(),
    )
    assert branched.depth < branched.num_stages
    for runtime, export in (
        ("torchtitan", lambda: module_fqns_per_model_part(branched, graph)),
        ("Megatron-LM", lambda: megatron_layout(branched, graph)),
        ("torch.distributed", lambda: torch_schedule_csv(branched, generate(branched))),
    ):
        with pytest.raises(PlanError, match=rf"{runtime}.* runs chains of stages, but stage 0"):
            export()
    mixed = stage_plan([(0, 1)], 2, batch_size=4, micro_batch=[2, 1])
    with pytest.raises(PlanError, match=r"one micro-batch size, the plan has \[1, 2\]"):
        torch_schedule_csv(mixed, generate(mixed))
    asynchronous = stage_plan([(0, 1)], 2, batch_size=4)
    with pytest.raises(PlanError, match="does not flush"):
        torch_schedule_csv(asynchronous, generate(asynchronous, "2bw"))
    frozen = stage_plan([(0, 1)], 2, batch_size=4, frozen=[0])
    with pytest.raises(PlanError, match=r"stages \[0\] are frozen"):
        torch_schedule_csv(frozen, generate(frozen))


def test_a_model_without_one_list_of_layers_has_no_megatron_layout() -> None:
    flat = graph_of("flat", [layer("a"), layer("b")], [(0, 1)])
    with pytest.raises(PlanError, match="has none"):
        megatron_layout(cut(flat, 1), flat)
    two = graph_of("two", [layer("encoder.0"), layer("decoder.0")], [(0, 1)])
    with pytest.raises(PlanError, match="those of decoder, encoder"):
        megatron_layout(cut(two, 1), two)
    other = chain(2)
    with pytest.raises(PlanError, match="no operator 'embedding:0'"):
        megatron_layout(cut(flat, 1), other)
    assert replace(flat, name="again").digest == flat.digest
