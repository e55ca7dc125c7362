"""Sequential planners against an enumeration of their own classes, and cases worked by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from plan.graphs import (
    Case,
    RandomChooser,
    RandomGraph,
    ToyCost,
    build_case,
    build_graph,
    random_graphs,
    toy_cluster,
)
from plan.models import chain, towers, with_memory
from weft.cluster.cluster import Cluster
from weft.cost.training import TrainingSpec
from weft.graph.graph import Graph
from weft.graph.series_parallel import decompose, linear_order
from weft.plan.api import METHODS, plan
from weft.plan.cost_table import CostTable, StageTable, Variant
from weft.plan.deadlock import check_deadlock
from weft.plan.layers import even_split, layer_segments
from weft.plan.megatron import ranked_configurations, to_plan
from weft.plan.pipedream import plan_of_size
from weft.plan.piper import candidates, enumerate_downsets, num_states
from weft.plan.problem import InfeasiblePlanError, Problem, micro_batch_sizes
from weft.plan.replay import step_time_s
from weft.plan.schedule import ScheduleError
from weft.plan.schedules import generate
from weft.plan.spp import linear_search
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.validate import validate_plan

TRAINING = TrainingSpec(state_bytes_per_param=8.0)
Blocks = tuple[tuple[int, ...], ...]


@dataclass
class Prices:
    """Seconds per sample and micro-batches held of single stages, from the shared table."""

    graph: Graph
    cluster: Cluster
    batch_size: int
    training: TrainingSpec = TRAINING
    known: dict[Any, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = CostTable(
            self.graph, self.cluster, ToyCost(), training=self.training, batch_size=self.batch_size
        )

    def stage(
        self, ops: tuple[int, ...], micro_batch: int, dp: int, recompute: bool
    ) -> tuple[float, int]:
        key = (ops, micro_batch, dp, recompute)
        if key not in self.known:
            member = np.zeros((1, len(self.graph.ops)), dtype=np.bool_)
            member[0, list(ops)] = True
            variant = Variant(dp=dp, recompute=recompute)
            found = StageTable(self.table, member).candidates(micro_batch, [variant])
            self.known[key] = (
                float(found.time_per_sample_s[0, 0]),
                int(found.max_in_flight[0, 0]),
            )
        return self.known[key]


def least_chain_s(case: Case, chains: Iterator[Blocks]) -> float:
    """The least bottleneck of these chains of stages, over sizes, degrees and recomputation."""
    prices = Prices(case.graph, case.cluster, case.batch_size, case.training)
    num_devices = case.cluster.num_devices
    best = math.inf
    for blocks, micro_batch in itertools.product(list(chains), case.micro_batches):
        degrees = [d for d in range(1, num_devices + 1) if micro_batch % d == 0]
        for choice in itertools.product(degrees, repeat=len(blocks)):
            if sum(choice) > num_devices:
                continue
            worst = 0.0
            for position, (ops, dp) in enumerate(zip(blocks, choice, strict=True)):
                held = len(blocks) - position
                options = [prices.stage(ops, micro_batch, dp, r) for r in case.recompute_choices]
                worst = max(worst, min((s for s, most in options if most >= held), default=1e300))
            best = min(best, worst)
    return best if best < 1e300 else math.inf


def contiguous(order: Sequence[int], max_stages: int) -> Iterator[Blocks]:
    """Cuts of an order into stages."""
    n = len(order)
    for count in range(1, min(n, max_stages) + 1):
        for cuts in itertools.combinations(range(1, n), count - 1):
            ends = (0, *cuts, n)
            yield tuple(tuple(order[a:b]) for a, b in itertools.pairwise(ends))


def downset_chains(graph: Graph, max_stages: int) -> Iterator[Blocks]:
    """Every sequence of stages that reads only from itself and from earlier ones."""
    n = len(graph.ops)
    arcs = [(graph.op_index[e.source], graph.op_index[e.target]) for e in graph.edges]
    for count in range(1, min(n, max_stages) + 1):
        for labels in itertools.product(range(count), repeat=n):
            if len(set(labels)) == count and all(labels[a] <= labels[b] for a, b in arcs):
                yield tuple(tuple(i for i in range(n) if labels[i] == s) for s in range(count))


def bottleneck_s(case: Case, method: str) -> float:
    try:
        found = plan(
            case.graph,
            case.cluster,
            batch_size=case.batch_size,
            method=method,
            objective="bottleneck",
            training=case.training,
            micro_batches=case.micro_batches,
            per_stage_recompute=len(case.recompute_choices) > 1,
            cost=ToyCost(),
        )
    except InfeasiblePlanError:
        return math.inf
    validate_plan(found, case.graph, case.cluster)
    return found.bottleneck_s


def leaf_order(graph: Graph) -> list[int]:
    return [graph.op_index[name] for name in linear_order(decompose(graph).root)]


def test_spp_equals_every_cut_of_the_linear_order() -> None:
    infeasible = 0
    for seed in range(60):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=6, max_devices=4)
        chains = contiguous(leaf_order(case.graph), case.cluster.num_devices)
        expected = least_chain_s(case, chains)
        infeasible += math.isinf(expected)
        assert bottleneck_s(case, "spp") == pytest.approx(expected, rel=1e-12), seed
    assert 0 < infeasible < 30


def test_piper_equals_every_chain_of_downsets() -> None:
    beats_linear = 0
    for seed in range(60):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=5, max_devices=3)
        expected = least_chain_s(case, downset_chains(case.graph, case.cluster.num_devices))
        found = bottleneck_s(case, "piper")
        assert found == pytest.approx(expected, rel=1e-12), seed
        beats_linear += found < bottleneck_s(case, "spp") * (1 - 1e-9)
    assert beats_linear > 0, "no case needs a stage that is not contiguous"


def hierarchical(
    order: Sequence[int], prices: Prices, micro_batch: int, servers: int, per_server: int
) -> float:
    """PipeDream's two levels by plain recursion: segments on whole servers, stages inside."""

    def stage_s(ops: tuple[int, ...], dp: int) -> float:
        return math.inf if micro_batch % dp else prices.stage(ops, micro_batch, dp, False)[0]

    def inside(ops: Sequence[int], replicas: int, devices: int) -> float:
        whole = min(stage_s(tuple(ops), m * replicas) for m in range(1, devices + 1))
        split = (
            max(inside(ops[:cut], replicas, devices - m), stage_s(tuple(ops[cut:]), m * replicas))
            for cut in range(1, len(ops))
            for m in range(1, devices)
        )
        return min([whole, *split])

    def outside(end: int, left: int) -> float:
        if end == 0:
            return 0.0
        return min(
            (
                max(outside(start, left - replicas), inside(order[start:end], replicas, per_server))
                for start in range(end)
                for replicas in range(1, left + 1)
                if micro_batch % replicas == 0
            ),
            default=math.inf,
        )

    return outside(len(order), servers)


def test_pipedream_equals_its_two_level_recursion() -> None:
    replicated = split = 0
    for seed in range(40):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=5)
        cluster = toy_cluster(4 if seed % 4 else 6, per_node=2)
        prices = Prices(case.graph, cluster, case.batch_size)
        servers = len(cluster.nodes)
        expected = min(
            hierarchical(leaf_order(case.graph), prices, b, servers, 2) for b in case.micro_batches
        )
        found = plan(
            case.graph,
            cluster,
            batch_size=case.batch_size,
            method="pipedream",
            objective="bottleneck",
            training=TRAINING,
            micro_batches=case.micro_batches,
            cost=ToyCost(),
        )
        assert found.bottleneck_s == pytest.approx(expected, rel=1e-12), seed
        replicated += any(stage.dp > 1 for stage in found.stages)
        split += found.num_stages > 1
    assert replicated > 5
    assert split > 5


def test_pipedream_keeps_stages_on_whole_servers() -> None:
    # Three equal layers of weight 2 on two servers of two: whole servers hold 1 and 2 layers or a
    # replica each, and the least bottleneck is one layer on a server, two layers on two devices.
    found = toy(chain(3), 4, method="pipedream", objective="bottleneck", micro_batches=(2,))
    assert (
        found.bottleneck_s
        <= toy(
            chain(3), 4, method="data-parallel", objective="bottleneck", micro_batches=(2,)
        ).bottleneck_s
    )
    for stage in found.stages:
        nodes = {found.cluster.devices[device].node for device in stage.devices}
        assert len(nodes) == 1 or stage.dp % 2 == 0


def toy(graph: Graph, num_devices: int, **options: Any) -> TrainPlan:
    options = {"batch_size": 16, "cost": ToyCost(), "training": TRAINING} | options
    cluster = options.pop("cluster", None) or toy_cluster(num_devices)
    return plan(graph, cluster, **options)


@pytest.mark.parametrize(("branches", "layers"), [(2, 3), (3, 2), (7, 2)])
def test_downsets_number_layers_plus_one_to_the_branches(branches: int, layers: int) -> None:
    found = enumerate_downsets(towers(branches, layers), 40_000)
    assert found is not None
    assert len(found) == 1 + (layers + 1) ** branches


def test_seven_branches_of_four_layers_are_beyond_pipers_limit() -> None:
    with pytest.raises(PlanError, match=r"more than 40,000 downsets.*use method='graphpipe'"):
        toy(towers(7, 4), 4, method="piper")
    assert 5**7 > 40_000


def test_megatron_splits_layers_evenly_over_p_t_d() -> None:
    graph = chain(8, weights=4)
    cluster = toy_cluster(4)
    table = CostTable(graph, cluster, ToyCost(), training=TRAINING, batch_size=16)
    problem = Problem(table=table, micro_batches=(1, 2, 4, 8, 16), evaluate=step_time_s)
    segments = layer_segments(graph, problem.linear_order)
    # The embedding joins the first layer, head and loss the last.
    assert [len(segment) for segment in segments] == [2, 1, 1, 1, 1, 1, 1, 3]
    shapes = set()
    for configuration in ranked_configurations(problem, segments):
        assert configuration.p * configuration.t * configuration.d == 4
        assert configuration.t <= 2, "tensor parallelism stays inside a node"
        assert configuration.micro_batch % configuration.d == 0
        found = to_plan(problem, segments, configuration)
        assert found is not None
        counts = {sum(op.startswith("layers") for op in stage.ops) for stage in found.stages}
        assert counts == {8 // (configuration.p * configuration.v)}
        assert found.schedule == ("interleaved" if configuration.v > 1 else "1f1b")
        # The bound decides what graphpipe never simulates.
        assert configuration.bound_s <= step_time_s(found)
        shapes.add((configuration.p, configuration.t, configuration.d))
    assert shapes == {(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2)}


def test_tensor_parallel_stages_are_priced_by_hand() -> None:
    graph = chain(2, weights=100)
    # One device holds 5 operators of 800 bytes of state only if each keeps half of it.
    cluster = with_memory(toy_cluster(2), 2600)
    found = toy(graph, 2, cluster=cluster, method="megatron", micro_batches=(1,))
    (stage,) = found.stages if found.num_stages == 1 else (found.stages[0],)
    assert stage.tp * found.num_stages == 2
    if stage.tp == 2:
        work = sum(op.flops_forward for op in graph.ops) / 2 * 1e-3
        rings = sum(
            table_s
            for op in graph.ops
            if op.param_ids
            for table_s in [ToyCost().all_reduce_s(op.output_bytes, (0, 1), cluster)]
        )
        assert stage.forward_s[1] == pytest.approx(work + rings, rel=1e-12)
        assert stage.state_bytes == 2000


def test_2bw_takes_the_best_of_its_algorithm_1() -> None:
    graph = chain(4, weights=6, saved_bytes=5)
    order = leaf_order(graph)
    for memory in (10**9, 900, 500, 330):
        cluster = with_memory(toy_cluster(4), memory)
        table = CostTable(graph, cluster, ToyCost(), training=TRAINING, batch_size=16)
        segments = layer_segments(graph, order)
        rates: dict[tuple[int, int], float] = {}
        for depth in range(1, 5):
            counts = even_split(len(segments), depth)
            starts = [sum(counts[:i]) for i in range(depth + 1)]
            parts = [
                [op for segment in segments[a:b] for op in segment]
                for a, b in itertools.pairwise(starts)
            ]
            for width in range(1, 4 // depth + 1):
                for recompute in (False, True):
                    rate = _largest_that_fits(table, parts, width, recompute, memory)
                    if rate > rates.get((width, depth), 0.0):
                        rates[width, depth] = rate
        if not rates:
            with pytest.raises(InfeasiblePlanError, match="two weight versions"):
                toy(graph, 4, cluster=cluster, method="2bw")
            continue
        found = toy(graph, 4, cluster=cluster, method="2bw")
        validate_plan(found, graph)
        width, depth = max(rates, key=rates.__getitem__)
        chosen = (found.stages[0].dp, found.num_stages)
        assert rates[chosen] == pytest.approx(rates[width, depth], rel=1e-12), memory
        assert all(stage.dp == chosen[0] for stage in found.stages)


def _largest_that_fits(
    table: CostTable, parts: Sequence[Sequence[int]], width: int, recompute: bool, memory: int
) -> float:
    """Samples per second at the largest micro-batch that fits: Algorithm 1 of 2BW, inner loop."""
    graph, batch = table.graph, table.batch_size
    depth = len(parts)
    for b in (16, 8, 4, 2, 1):
        if b % width or batch // b < depth:
            continue
        slowest = 0.0
        fits = True
        for number, part in enumerate(parts):
            ops = [graph.ops[i] for i in part]
            names = {op.id for op in ops}
            weights = sum(graph.parameter_by_id[p].num_elements for op in ops for p in op.param_ids)
            into = sum(
                e.bytes_per_sample
                for e in graph.edges
                if e.target in names and e.source not in names
            )
            out = sum(
                e.bytes_per_sample
                for e in graph.edges
                if e.source in names and e.target not in names
            )
            saved = sum(op.saved_bytes for op in ops)
            held = min((depth - number) * b, batch)
            activations = into * held + saved * b if recompute else saved * held
            versions = 2 if depth > 1 else 1
            state = weights * 8 + weights * 4 * (versions - 1)
            fits &= state + activations / width <= memory
            local = b // width
            forward = sum(op.flops_forward for op in ops) * local * 1e-3
            backward = sum(op.flops_backward for op in ops) * local * 1e-3
            moved = 2 * (into + out) * local
            message = table.cost.transfer_s(moved, table.link) if moved else 0.0
            total = forward * (2 if recompute else 1) + backward + message
            reduce = table.cost.all_reduce_s(4.0 * weights, range(width), table.cluster)
            slowest = max(slowest, total, reduce * b / batch)
        if fits:
            return b / slowest
    return 0.0


def test_data_parallel_is_one_stage_on_what_divides_the_micro_batch() -> None:
    found = toy(chain(3), 5, method="data-parallel", micro_batches=(4,), objective="bottleneck")
    assert found.num_stages == 1
    assert found.stages[0].dp == 4
    work = sum(op.flops_forward + op.flops_backward for op in chain(3).ops)
    assert found.bottleneck_s == pytest.approx(work * 1e-3 / 4, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(random_graphs())
def test_every_method_plans_random_graphs_validly_and_without_deadlock(model: RandomGraph) -> None:
    cluster = toy_cluster(4)
    for method in METHODS:
        if method == "brute-force" and len(model.graph.ops) > 7:
            continue
        found = plan(
            model.graph,
            cluster,
            batch_size=12,
            method=method,
            objective="bottleneck",
            training=TRAINING,
            cost=ToyCost(),
        )
        validate_plan(found, model.graph, cluster)
        try:
            schedule = generate(found)
        except ScheduleError as refused:
            if method == "2bw" and "this plan has frozen ones" in str(refused):
                continue
            raise
        check_deadlock(schedule)
        assert step_time_s(found) > 0


def problem_of(graph: Graph, cluster: Cluster, batch_size: int) -> Problem:
    table = CostTable(graph, cluster, ToyCost(), training=TRAINING, batch_size=batch_size)
    sizes = micro_batch_sizes(batch_size, None)
    return Problem(table=table, micro_batches=sizes, evaluate=step_time_s)


def test_a_likely_bottleneck_does_not_change_the_plan_of_pipedream() -> None:
    num_limited = 0
    for seed in range(60):
        rng = random.Random(seed)
        graph = build_graph(RandomChooser(rng), max_ops=9, min_ops=4).graph
        problem = problem_of(graph, toy_cluster(rng.randint(1, 6)), 8)
        linear = linear_search(problem)
        for size in problem.micro_batches:
            solution = linear.least(size)
            whole = plan_of_size(problem, linear, size)
            assert (solution is None) == (whole is None)
            if solution is None or whole is None:
                continue
            for slack in (0.5, 1.0, 1.1, 3.0):
                likely_s = solution.bottleneck_s * slack
                assert plan_of_size(problem, linear, size, likely_s) == whole
                num_limited += likely_s > whole.bottleneck_s
    assert num_limited > 50


def test_piper_looks_at_no_more_states_than_it_says() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        graph = build_graph(RandomChooser(rng), max_ops=9, min_ops=4).graph
        problem = problem_of(graph, toy_cluster(rng.randint(1, 6)), 8)
        downsets = enumerate_downsets(graph, 4000)
        assert downsets is not None
        most = num_states(problem, downsets, problem.micro_batches)
        search = linear_search(problem)
        for size in problem.micro_batches:
            search.least(size)
        before = problem.effort.num_states
        list(candidates(problem, downsets, search))
        assert problem.effort.num_states - before <= most
