"""`weft.plan(...)`: every method, what it refuses, and what it says."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import weft.plan
from plan.graphs import ToyCost, toy_cluster
from plan.models import chain, graph_of, layer, towers, with_memory
from weft.base.errors import ConfigError, GraphError, UnsupportedError
from weft.cluster.cluster import DeviceType
from weft.cost.model import OpCost, Parallel
from weft.cost.profiled import BlockProfile, BlockTimes
from weft.cost.training import TrainingSpec
from weft.graph.graph import Graph, Op
from weft.plan.api import METHODS, plan
from weft.plan.constraints import FixedStage, ForbidCut, ForceCut, KeepTogether, Pin, freeze
from weft.plan.problem import ChangeKind, InfeasiblePlanError, SearchLimitError
from weft.plan.replay import step_time_s
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.validate import validate_plan

BASELINES = ("spp", "pipedream", "piper", "megatron", "2bw", "data-parallel")


def toy_plan(graph: Graph, num_devices: int, **options: Any) -> TrainPlan:
    options = {"batch_size": 16, "cost": ToyCost(), **options}
    cluster = options.pop("cluster", None) or toy_cluster(num_devices)
    return plan(graph, cluster, **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_valid_plan(method: str) -> None:
    graph = towers(2, 3)
    found = toy_plan(graph, 4, method=method)
    validate_plan(found, graph, toy_cluster(4))
    assert found.method == method
    assert found.objective == "step_time"
    assert found.step_time_s == step_time_s(found)
    assert found.search.search_time_s > 0


@pytest.mark.parametrize(
    "graph", [chain(6), towers(2, 4), towers(4, 2), chain(5, weights=900), towers(3, 3, weights=40)]
)
@pytest.mark.parametrize("batch_size", [4, 24])
def test_no_baseline_is_faster_in_simulation(graph: Graph, batch_size: int) -> None:
    best = toy_plan(graph, 4, batch_size=batch_size).step_time_s
    for method in BASELINES:
        if method == "2bw":
            continue  # Asynchronous: its step is not one optimizer step of the same training.
        other = toy_plan(graph, 4, batch_size=batch_size, method=method)
        assert best <= other.step_time_s * (1 + 1e-12), method


def test_branches_run_beside_each_other() -> None:
    # Messages are free here, so a pipeline half as deep wins.
    found = toy_plan(towers(2, 4), 4, micro_batches=(1,), objective="bottleneck")
    assert found.depth < found.num_stages
    chained = toy_plan(towers(2, 4), 4, micro_batches=(1,), objective="bottleneck", method="spp")
    assert chained.depth == chained.num_stages
    assert step_time_s(found) < step_time_s(chained)


def test_the_package_is_the_function_and_still_a_package() -> None:
    graph, cluster = chain(3), toy_cluster(2)
    called = weft.plan(graph, cluster, batch_size=8, cost=ToyCost())  # pyright: ignore
    assert called.stages == plan(graph, cluster, batch_size=8, cost=ToyCost()).stages
    code = (
        "import sys, weft.plan, weft.plan.train_plan\n"
        "assert callable(weft.plan) and 'weft.plan.api' not in sys.modules\n"
        "import weft.plan.api, weft.plan.explain, weft.plan.export\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_problem_gives_the_same_plan() -> None:
    graph = towers(3, 3, weights=10)
    first, second = toy_plan(graph, 4), toy_plan(graph, 4)
    assert first == second
    assert TrainPlan.from_json(first.to_json()) == first


def test_an_evaluator_decides_which_candidate_is_fastest() -> None:
    seen: list[TrainPlan] = []

    def evaluate(candidate: TrainPlan) -> float:
        seen.append(candidate)
        return float(abs(candidate.num_stages - 2) + 1)

    found = toy_plan(chain(6), 4, evaluate=evaluate)
    assert found.num_stages == 2
    assert found.step_time_s == 1.0
    assert len({candidate.num_stages for candidate in seen}) > 1


def test_a_profile_prices_the_operators(tmp_path: Path) -> None:
    graph = chain(2)
    times = {
        op.signature: BlockTimes(
            op_id=op.id, batch_sizes=(1, 16), forward_s=(0.5, 8.0), backward_s=(1.0, 16.0)
        )
        for op in graph.ops
    }
    profile = BlockProfile(model="chain", device="toy", dtype="float32", blocks=times)
    found = plan(graph, toy_cluster(1), batch_size=16, micro_batches=(16,), profile=profile)
    # Five operators, forward 8 s and backward 16 s each.
    assert found.step_time_s == pytest.approx(5 * 24.0)
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json())
    again = plan(graph, toy_cluster(1), batch_size=16, micro_batches=(16,), profile=path)
    assert again == found


# Options


def test_recomputation_is_chosen_only_where_memory_needs_it() -> None:
    graph = chain(6, saved_bytes=50)
    options: dict[str, Any] = {"objective": "bottleneck", "per_stage_recompute": True}
    assert not any(stage.recompute for stage in toy_plan(graph, 2, **options).stages)
    # A pipeline of two holds three samples of half the operators' 450 bytes, or more.
    tight = with_memory(toy_cluster(2), 260)
    with pytest.raises(InfeasiblePlanError):
        toy_plan(graph, 2, cluster=tight, objective="bottleneck")
    saved = toy_plan(graph, 2, cluster=tight, **options)
    assert any(stage.recompute for stage in saved.stages)
    validate_plan(saved, graph, tight)
    everywhere = toy_plan(graph, 2, training=TrainingSpec(recompute=True))
    assert all(stage.recompute for stage in everywhere.stages)


def test_groups_of_k_use_the_schedule_that_runs_them() -> None:
    found = toy_plan(chain(6), 2, k=2, micro_batches=(1,), objective="bottleneck")
    assert {stage.k for stage in found.stages} == {2}
    assert found.schedule == "kfkb"
    assert found.stages[0].in_flight == 4


def test_own_micro_batches_of_stages_are_never_slower() -> None:
    graph = graph_of(
        "skewed",
        # The first operator is dear to start, so it prefers larger micro-batches.
        [replace(layer("a", 1.0), fixed_flops=40.0, signature="a"), layer("b", 6.0), layer("c", 6)],
        [(0, 1), (1, 2)],
    )
    uniform = toy_plan(graph, 3)
    own = toy_plan(graph, 3, per_stage_micro_batch=True)
    assert own.step_time_s <= uniform.step_time_s
    validate_plan(own, graph)


def test_a_time_limit_gives_the_best_so_far_and_marks_it() -> None:
    for objective in ("bottleneck", "step_time"):
        found = toy_plan(towers(4, 8), 8, batch_size=64, objective=objective, time_limit_s=1e-9)
        assert found.search.timed_out
        assert any("time limit" in note for note in found.notes)
        validate_plan(found)
    for method in ("spp", "megatron", "data-parallel"):
        validate_plan(toy_plan(towers(2, 4), 4, method=method, time_limit_s=0.0))
    for method in ("pipedream", "piper"):
        # Not the same as a problem without a plan.
        with pytest.raises(SearchLimitError, match=f"{method} found no plan within its time"):
            toy_plan(towers(2, 4), 4, method=method, time_limit_s=0.0)
    unhurried = toy_plan(towers(4, 8), 8, batch_size=64, time_limit_s=600)
    assert not unhurried.search.timed_out
    assert not any("time limit" in note for note in unhurried.notes)


def test_more_devices_than_can_help_stay_idle_and_it_says_so() -> None:
    found = toy_plan(chain(1), 16, batch_size=2, cluster=toy_cluster(16, per_node=1))
    assert len(found.used_devices) < 16
    assert any(f"{16 - len(found.used_devices)} of 16 devices" in note for note in found.notes)


def test_a_large_graph_is_planned_in_blocks_and_returned_in_operators() -> None:
    graph = chain(40)
    found = toy_plan(graph, 4, max_blocks=10, objective="bottleneck")
    validate_plan(found, graph)
    assert sorted(op for stage in found.stages for op in stage.ops) == sorted(graph.op_index)
    kept = toy_plan(
        graph,
        4,
        max_blocks=10,
        objective="bottleneck",
        constraints=[KeepTogether(ops=("layers.0:0", "layers.30:0"))],
    )
    assert kept.stage_of["layers.0:0"] == kept.stage_of["layers.30:0"]


# Constraints


@pytest.mark.parametrize("objective", ["bottleneck", "step_time"])
def test_cuts_are_forced_and_forbidden(objective: str) -> None:
    graph = chain(6)
    free = toy_plan(graph, 2, objective="bottleneck", micro_batches=(1,))
    border = free.stages[0].ops[-1], free.stages[1].ops[0]
    kept = toy_plan(
        graph,
        2,
        objective=objective,
        micro_batches=(1,),
        constraints=[ForbidCut(source=border[0], target=border[1])],
    )
    assert kept.stage_of[border[0]] == kept.stage_of[border[1]]
    forced = toy_plan(
        graph,
        2,
        objective=objective,
        micro_batches=(1,),
        constraints=[ForceCut(source="layers.0:0", target="layers.1:0")],
    )
    assert forced.stage_of["layers.0:0"] != forced.stage_of["layers.1:0"]


def test_pinned_operators_run_where_they_must() -> None:
    graph, cluster = chain(6), toy_cluster(4)
    found = toy_plan(
        graph,
        4,
        micro_batches=(1,),
        constraints=[Pin(ops=("head:0",), node="n0"), Pin(ops=("embedding:0",), devices=(3,))],
    )
    home = found.stages[found.stage_of["head:0"]]
    assert {cluster.devices[device].node for device in home.devices} == {"n0"}
    assert found.stages[found.stage_of["embedding:0"]].devices == (3,)


def test_a_frozen_hand_written_stage_stays_and_the_rest_is_filled_in() -> None:
    graph = towers(2, 4)
    hand = FixedStage(ops=("branches.0.0:0", "branches.0.1:0", "branches.0.2:0"), devices=(2,))
    found = toy_plan(graph, 4, constraints=[hand])
    stage = found.stages[found.stage_of["branches.0.0:0"]]
    assert stage.ops == hand.ops
    assert stage.devices == (2,)
    validate_plan(found, graph)
    again = toy_plan(graph, 4, constraints=freeze(found, [stage.index]))
    assert again.stages[again.stage_of["branches.0.0:0"]].ops == hand.ops
    # A whole plan frozen comes back as it is.
    whole = toy_plan(graph, 4, constraints=freeze(found), micro_batches=(found.micro_batch,))
    assert {(s.ops, s.devices) for s in whole.stages} == {(s.ops, s.devices) for s in found.stages}


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ([KeepTogether(ops=("nowhere:0", "head:0"))], "nowhere:0"),
        ([Pin(ops=("head:0",), devices=(9,))], "device 9"),
        ([Pin(ops=("head:0",), node="n7")], "n7"),
        ([Pin(ops=("head:0",))], "exactly one"),
        (
            [
                KeepTogether(ops=("layers.0:0", "layers.1:0")),
                ForceCut(source="layers.0:0", target="layers.1:0"),
            ],
            "forced apart and kept together",
        ),
        ([FixedStage(ops=("layers.0:0", "layers.2:0"))], "layers.1:0"),
        ([FixedStage(ops=("layers.0:0",), num_devices=3)], "15"),
    ],
)
def test_constraints_that_cannot_hold_are_refused(constraints: list[Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        toy_plan(chain(4), 4, constraints=constraints)


def test_a_method_without_constraints_says_which_take_them() -> None:
    with pytest.raises(UnsupportedError, match="graphpipe, spp"):
        toy_plan(chain(4), 2, method="piper", constraints=[KeepTogether(ops=("head:0",))])


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "graphpip"}, "'graphpipe'"),
        ({"objective": "speed"}, "bottleneck, step_time"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"micro_batches": (6,)}, "nearest that does is 4"),
        ({"micro_batches": ()}, "micro_batches is empty"),
        ({"micro_batches": (0,)}, "micro-batch size is 0"),
        ({"k": 0}, "k is 0"),
        ({"k": 32}, "k is 32"),
        ({"time_limit_s": -1.0}, "time_limit_s is -1.0"),
        ({"time_limit_s": math.nan}, "time_limit_s is nan"),
        ({"max_blocks": 0}, "max_blocks is 0"),
    ],
)
def test_wrong_options_are_refused_with_what_is_right(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        toy_plan(chain(4), 4, **options)


def test_an_unusable_graph_is_refused() -> None:
    good = chain(3)
    broken = replace(good.ops[1], flops_forward=math.nan)
    with pytest.raises(GraphError, match=r"layers\.0:0"):
        toy_plan(replace(good, ops=(good.ops[0], broken, *good.ops[2:])), 2)
    idle = tuple(replace(op, flops_forward=0.0, flops_backward=0.0) for op in good.ops)
    with pytest.raises(GraphError, match="total cost of 0"):
        toy_plan(replace(good, ops=idle), 2)
    ops = [replace(op, is_loss=op.id == "layers.0:0") for op in good.ops]
    with pytest.raises(GraphError, match=r"layers\.1:0.*reaches no loss"):
        toy_plan(replace(good, ops=tuple(ops)), 2)


def test_a_price_that_is_no_time_is_refused() -> None:
    class Broken(ToyCost):
        def op_cost(
            self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
        ) -> OpCost:
            return OpCost(forward_s=1.0, backward_s=-1.0)

    with pytest.raises(PlanError, match=r"embedding:0.*-1"):
        plan(chain(3), toy_cluster(2), batch_size=4, cost=Broken())


# What does not fit


@pytest.mark.parametrize("method", ["graphpipe", "spp"])
@pytest.mark.parametrize("objective", ["bottleneck", "step_time"])
@pytest.mark.parametrize("graph", [chain(6, weights=100), towers(3, 3, weights=100)])
def test_the_change_that_an_infeasible_problem_names_is_the_least(
    graph: Graph, objective: str, method: str
) -> None:
    tight = 2500
    options: dict[str, Any] = {"method": method, "objective": objective, "batch_size": 12}
    with pytest.raises(InfeasiblePlanError) as caught:
        toy_plan(graph, 2, cluster=toy_cluster(2, tight), **options)
    error = caught.value
    assert error.constraint
    assert error.constraint in str(error)
    changes = {change.kind: change.amount for change in error.changes}
    assert set(changes) == {ChangeKind.MEMORY_BYTES, ChangeKind.NUM_DEVICES}

    def fits(num_devices: int, memory_bytes: int) -> bool:
        try:
            found = toy_plan(
                graph,
                num_devices,
                cluster=toy_cluster(num_devices, memory_bytes),
                **options,
            )
        except InfeasiblePlanError:
            return False
        validate_plan(found, graph)
        return True

    more = changes[ChangeKind.MEMORY_BYTES]
    assert fits(2, tight + more)
    assert not fits(2, tight + more // 2)
    assert not fits(2, tight + more - 1)
    extra = changes[ChangeKind.NUM_DEVICES]
    assert fits(2 + extra, tight)
    assert not fits(2 + extra // 2, tight)


def test_an_operator_larger_than_any_device_is_named() -> None:
    graph = graph_of(
        "large", [layer("a"), layer("big", weights=10_000), layer("c")], [(0, 1), (1, 2)], 10_000
    )
    with pytest.raises(InfeasiblePlanError, match=r"operator 'big:0' alone needs 80,0") as caught:
        toy_plan(graph, 4, cluster=toy_cluster(4, 1000))
    # No number of devices helps, only memory.
    assert [change.kind for change in caught.value.changes] == [ChangeKind.MEMORY_BYTES]


@pytest.mark.parametrize("method", ["data-parallel", "megatron", "2bw", "pipedream", "piper"])
def test_baselines_say_what_does_not_fit(method: str) -> None:
    graph = chain(6, weights=100)
    with pytest.raises(InfeasiblePlanError) as caught:
        toy_plan(graph, 2, cluster=toy_cluster(2, 900), method=method)
    assert caught.value.constraint in str(caught.value)
    for change in caught.value.changes:
        assert change.kind is ChangeKind.MEMORY_BYTES or change.amount > 0
        if change.kind is ChangeKind.NUM_DEVICES:
            continue
        toy_plan(graph, 2, cluster=toy_cluster(2, 900 + change.amount), method=method)
        with pytest.raises(InfeasiblePlanError):
            toy_plan(graph, 2, cluster=toy_cluster(2, 899 + change.amount), method=method)


@pytest.mark.parametrize("method", ["data-parallel", "megatron"])
def test_uniform_baselines_name_the_memory_that_would_do(method: str) -> None:
    with pytest.raises(InfeasiblePlanError, match="bytes more memory") as caught:
        toy_plan(chain(6, weights=100), 2, cluster=toy_cluster(2, 900), method=method)
    assert [change.kind for change in caught.value.changes] == [ChangeKind.MEMORY_BYTES]
