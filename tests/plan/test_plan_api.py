"""`weft.plan`: constraints, infeasible problems, bad input, baselines, exports, explanations."""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import pytest

import weft.plan
from plan.graphs import (
    STATE_BYTES,
    Case,
    RandomChooser,
    ToyCost,
    build_case,
    build_graph,
    toy_cluster,
)
from weft.base.errors import ConfigError, UnsupportedError
from weft.cost.training import TrainingSpec
from weft.graph.graph import Edge, Graph, Op, Parameter
from weft.plan.api import METHODS, plan
from weft.plan.constraints import FixedStage, ForbidCut, ForceCut, KeepTogether, Pin, freeze
from weft.plan.diff import diff
from weft.plan.explain import explain
from weft.plan.export import megatron_layout, module_fqns_per_model_part, torch_schedule_csv
from weft.plan.piper import enumerate_downsets
from weft.plan.problem import ChangeKind, InfeasiblePlanError, SearchLimitError
from weft.plan.schedules import generate
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.validate import validate_plan

SPEC = TrainingSpec(state_bytes_per_param=STATE_BYTES)


def chain(num_layers: int = 6, params: int = 4) -> Graph:
    ops = [
        Op(
            id=f"layers.{i}:0",
            kind="layer",
            module_path=f"layers.{i}",
            flops_forward=4.0,
            flops_backward=8.0,
            saved_bytes=2,
            output_bytes=1,
            param_ids=(f"w{i}",),
            signature="layer",
        )
        for i in range(num_layers)
    ]
    edges = [Edge(source=a.id, target=b.id, bytes_per_sample=1) for a, b in zip(ops, ops[1:])]  # noqa: B905, RUF007
    weights = [Parameter(id=f"w{i}", num_elements=params) for i in range(num_layers)]
    return Graph.ordered("chain", ops, edges, weights)


def branches(num_branches: int = 2, length: int = 3) -> Graph:
    ops, edges = [], []
    for b in range(num_branches):
        for i in range(length):
            ops.append(
                Op(
                    id=f"b{b}.{i}",
                    kind="layer",
                    flops_forward=4.0,
                    flops_backward=8.0,
                    saved_bytes=1,
                    output_bytes=1,
                    signature="layer",
                )
            )
            if i:
                edges.append(Edge(source=f"b{b}.{i - 1}", target=f"b{b}.{i}", bytes_per_sample=1))
        edges.append(Edge(source=f"b{b}.{length - 1}", target="join", bytes_per_sample=1))
    ops.append(Op(id="join", kind="join", flops_forward=1.0, flops_backward=1.0, is_loss=True))
    return Graph.ordered("branches", ops, edges)


def planned(graph: Graph, num_devices: int, memory: int = 10**9, **options: Any) -> TrainPlan:
    options = {"objective": "bottleneck", "batch_size": 8} | options
    cluster = toy_cluster(num_devices, memory)
    return plan(graph, cluster, training=SPEC, cost=ToyCost(), **options)


def test_the_package_is_the_function() -> None:
    found = weft.plan(chain(), toy_cluster(2), batch_size=8, cost=ToyCost(), training=SPEC)  # type: ignore[operator]
    assert isinstance(found, TrainPlan)
    assert TrainPlan.from_json(found.to_json()) == found


def test_branches_are_planned_side_by_side() -> None:
    found = planned(branches(), 2, micro_batches=(1,))
    sequential = planned(branches(), 2, method="spp", micro_batches=(1,))
    assert found.bottleneck_s <= sequential.bottleneck_s
    deep = planned(branches(4, 2), 4, micro_batches=(1,))
    chained = planned(branches(4, 2), 4, micro_batches=(1,), method="spp")
    assert deep.depth == 2
    assert chained.depth > 2
    assert deep.bottleneck_s <= chained.bottleneck_s


def test_constraints_hold_and_change_the_plan() -> None:
    graph = chain()
    free = planned(graph, 3, micro_batches=(1,))
    assert [len(stage.ops) for stage in free.stages] == [2, 2, 2]
    names = [op.id for op in graph.ops]
    kept = planned(graph, 3, micro_batches=(1,), constraints=[KeepTogether(ops=tuple(names[1:4]))])
    assert kept.stage_of[names[1]] == kept.stage_of[names[3]]
    joined = planned(
        graph, 3, micro_batches=(1,), constraints=[ForbidCut(source=names[1], target=names[2])]
    )
    assert joined.stage_of[names[1]] == joined.stage_of[names[2]]
    cut = planned(
        graph, 3, micro_batches=(1,), constraints=[ForceCut(source=names[0], target=names[1])]
    )
    assert cut.stage_of[names[0]] != cut.stage_of[names[1]]
    pinned = planned(graph, 4, micro_batches=(1,), constraints=[Pin(ops=(names[0],), node="n1")])
    assert set(pinned.stages[pinned.stage_of[names[0]]].devices) <= {2, 3}
    fixed = planned(
        graph, 4, micro_batches=(2,), constraints=[FixedStage(ops=tuple(names[:1]), devices=(2, 3))]
    )
    assert fixed.stages[0].ops == (names[0],)
    assert fixed.stages[0].devices == (2, 3)
    for found in (kept, joined, cut, pinned, fixed):
        validate_plan(found, graph)


def test_a_frozen_stage_across_branches_is_kept_and_the_rest_is_filled_in() -> None:
    graph = branches()
    hand = FixedStage(ops=("b0.1", "b1.1"), num_devices=1)
    found = planned(graph, 4, micro_batches=(1,), constraints=[hand])
    assert any(set(stage.ops) == {"b0.1", "b1.1"} for stage in found.stages)
    validate_plan(found, graph)
    again = planned(graph, 4, micro_batches=(1,), constraints=freeze(found))
    assert [stage.ops for stage in again.stages] == [stage.ops for stage in found.stages]
    assert [stage.devices for stage in again.stages] == [stage.devices for stage in found.stages]


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ([KeepTogether(ops=("nope",))], "nope"),
        ([Pin(ops=("layers.0:0",))], "devices or a node"),
        ([Pin(ops=("layers.0:0",), node="n9")], "n9"),
        ([FixedStage(ops=("layers.0:0", "layers.2:0"))], "layers.1:0"),
        (
            [
                ForceCut(source="layers.0:0", target="layers.1:0"),
                KeepTogether(ops=("layers.0:0", "layers.1:0")),
            ],
            "apart",
        ),
    ],
)
def test_contradictory_constraints_are_refused_by_name(constraints: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        planned(chain(), 4, constraints=constraints)


def _refused(case: Case) -> InfeasiblePlanError | None:
    try:
        _attempt(case, 0, 0)
    except InfeasiblePlanError as error:
        return error
    return None


def _attempt(case: Case, more_devices: int, more_bytes: int) -> TrainPlan:
    limit = case.cluster.devices[0].type.memory_bytes
    return plan(
        case.graph,
        toy_cluster(case.cluster.num_devices + more_devices, limit + more_bytes),
        batch_size=case.batch_size,
        objective="bottleneck",
        training=case.training,
        micro_batches=case.micro_batches,
        cost=ToyCost(),
    )


def test_the_smallest_change_fits_and_half_of_it_does_not() -> None:
    checked = dict.fromkeys(ChangeKind, 0)
    for seed in range(120):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=6, max_devices=3)
        error = _refused(case)
        if error is None:
            continue
        assert error.constraint
        assert pickle.loads(pickle.dumps(error)).changes == error.changes
        for change in error.changes:
            is_memory = change.kind is ChangeKind.MEMORY_BYTES
            half = change.amount // 2
            _attempt(case, *((0, change.amount) if is_memory else (change.amount, 0)))
            with pytest.raises(InfeasiblePlanError):
                _attempt(case, *((0, half) if is_memory else (half, 0)))
            checked[change.kind] += 1
    assert all(number >= 3 for number in checked.values()), checked


def test_bad_input_is_refused_with_what_would_do() -> None:
    with pytest.raises(PlanError, match="nearest that does is 2"):
        planned(chain(), 2, micro_batches=(3,), batch_size=16)
    with pytest.raises(ConfigError, match="graphpipe"):
        planned(chain(), 2, method="graphpip")
    with pytest.raises(ConfigError, match="step_time"):
        planned(chain(), 2, objective="speed")
    with pytest.raises(UnsupportedError, match="graphpipe, spp"):
        planned(chain(), 2, method="piper", constraints=[KeepTogether(ops=("layers.0:0",))])
    with pytest.raises(InfeasiblePlanError, match=r"layers\.\d:0"):
        planned(chain(params=100), 2, memory=64)


def test_more_devices_than_can_help_are_left_idle_and_said_so() -> None:
    found = planned(chain(2), 7, micro_batches=(1,))
    assert len(found.used_devices) == 2
    assert any("5 of 7 devices stay idle" in note for note in found.notes)


def test_a_time_limit_returns_the_best_so_far_marked() -> None:
    found = planned(branches(3, 6), 4, time_limit_s=0.0)
    assert found.search.timed_out
    assert any("time limit" in note for note in found.notes)
    validate_plan(found)


def test_step_time_is_never_slower_than_any_baseline() -> None:
    compared = 0
    for seed in range(25):
        graph = build_graph(RandomChooser(random.Random(seed)), max_ops=9).graph
        ours = planned(graph, 4, objective="step_time")
        for method in METHODS:
            if method in ("graphpipe", "2bw"):
                continue
            try:
                other = planned(graph, 4, objective="step_time", method=method)
            except PlanError:
                continue
            validate_plan(other, graph)
            assert ours.step_time_s <= other.step_time_s * (1 + 1e-12), (seed, method)
            compared += 1
    assert compared > 100


def test_tailored_stages_are_valid_and_never_slower() -> None:
    graph = branches(2, 4)
    uniform = planned(graph, 4, objective="step_time")
    own = planned(graph, 4, objective="step_time", per_stage_micro_batch=True)
    validate_plan(own, graph)
    assert own.step_time_s <= uniform.step_time_s


def test_piper_counts_downsets_and_gives_up_where_the_published_program_does() -> None:
    found = enumerate_downsets(branches(2, 3), 1000)
    assert found is not None
    assert len(found) == 1 + (3 + 1) ** 2
    assert enumerate_downsets(branches(7, 4), 40_000) is None
    with pytest.raises(SearchLimitError, match="40,000"):
        planned(branches(7, 4), 4, method="piper")


def test_baselines_agree_on_a_chain_of_equal_layers() -> None:
    for method in ("graphpipe", "spp", "pipedream", "piper", "brute-force"):
        found = planned(chain(4), 4, method=method, micro_batches=(1,))
        assert [stage.ops for stage in found.stages] == [(f"layers.{i}:0",) for i in range(4)]


def test_chain_plans_are_written_for_other_runtimes() -> None:
    graph = chain(6)
    found = planned(graph, 3, micro_batches=(1,))
    assert module_fqns_per_model_part(found, graph) == [
        ["layers.0", "layers.1"],
        ["layers.2", "layers.3"],
        ["layers.4", "layers.5"],
    ]
    assert megatron_layout(found, graph) == "Et*2|t*2|t*2L"
    rows = torch_schedule_csv(found, generate(found)).splitlines()
    assert rows[2].split(",")[:4] == ["2F0", "2B0", "2F1", "2B1"]
    assert [len(row.split(",")) for row in rows] == [16, 16, 16]
    with pytest.raises(PlanError, match="chains of stages"):
        megatron_layout(planned(branches(), 3, micro_batches=(1,)), branches())


def test_validator_names_stage_and_operator() -> None:
    graph = chain(4)
    found = planned(graph, 2, micro_batches=(1,))
    with pytest.raises(PlanError, match=r"layers\.3:0"):
        validate_plan(found, chain(3))
    with pytest.raises(PlanError, match="memory_bytes"):
        validate_plan(found, graph, toy_cluster(2, 1234))
    data = json.loads(found.to_json())
    data["stages"][1]["ops"] = data["stages"][1]["ops"][:1]
    with pytest.raises(PlanError, match=r"layers\.3:0"):
        validate_plan(TrainPlan.from_dict(data), graph)


def test_diff_and_explain_speak_of_what_changed_and_what_binds() -> None:
    old, new = planned(chain(4), 2, micro_batches=(1,)), planned(chain(4), 4, micro_batches=(1,))
    assert diff(old, old) == ""
    assert "num_stages: 2 -> 4" in diff(old, new)
    told = explain(new)
    assert sum(report.is_bottleneck for report in told.stages) == 1
    assert any("sets the rate" in sentence for sentence in told.sentences)
