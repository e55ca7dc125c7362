"""Four real processes over gloo compute what one process computes; one pool for all cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dist.cases import (
    AXES,
    BATCH,
    CASES,
    LARGER,
    case_of_row,
    is_valid,
    options_of,
    plan_of_row,
    planned,
    sgd,
)
from dist.pool import NUM_RANKS, RankPool
from pairwise import Row, name_of, pairwise
from runtime import plan_matrix as matrix
from runtime.matrix_models import MODELS, loss_group, loss_scope, named_case, reference
from runtime.test_stage_numerics import run
from runtime.train_plans import Case, chain_cut, plan_of_cut
from runtime.train_reference import train_plain
from weft.plan.train_plan import TrainPlan

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks are started once."""
    ranks = RankPool()
    yield ranks
    ranks.close()


def compare(
    found: list[Any], plan: TrainPlan, values: dict[str, np.ndarray], **wanted: Any
) -> None:
    """Every rank holds the wanted parameters and saw the wanted losses; together they hold all."""
    held: set[str] = set()
    for rank in found:
        for name, numbers in wanted.items():
            assert rank[name] == pytest.approx(numbers, abs=TOLERANCE), name
        for key, value in rank["parameters"].items():
            np.testing.assert_allclose(value, values[key], rtol=0, atol=TOLERANCE, err_msg=key)
            held.add(key)
        for stage, peak in rank["in_flight"].items():
            assert peak <= plan.stages[stage].num_in_flight or plan.schedule != "1f1b"
    assert held == set(values)


def values_of(case: Case, module: Any) -> dict[str, np.ndarray]:
    trained = dict(module.named_parameters())
    return {p.id: trained[p.id].detach().numpy() for p in case.capture.graph.parameters}


def check(pool: RankPool, name: str, **options: Any) -> None:
    found = pool.run("dist.cases:train", name, *options.values())
    case, plan = planned(name)
    assert len(plan.used_devices) == NUM_RANKS
    assert case.model.loss is not None
    wanted = train_plain(case.model.module, case.model.loss, case.batches, sgd, **options)
    expected: dict[str, Any] = {"losses": wanted.losses}
    if options:
        expected["norms"] = wanted.norms
    compare(found, plan, values_of(case, wanted.module), **expected)
    for rank in found:
        for stage, peak in rank["in_flight"].items():
            assert peak == plan.stages[stage].num_in_flight


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("groups", "recompute") else ())
        for name in CASES
    ],
)
def test_four_processes_equal_one(pool: RankPool, name: str) -> None:
    check(pool, name)


def test_clipping_uses_the_norm_over_all_processes(pool: RankPool) -> None:
    check(pool, "data-parallel", clip_norm=0.01)


def check_trained(
    found: list[Any], case: Case, plan: TrainPlan, model: str, batch: int, **options: Any
) -> None:
    """Compare with plain torch; with a run on one rank where dropout draws its own numbers."""
    if model == "dropout":
        # Plain torch cannot draw the numbers that depend on the sample alone.
        micro_batch = batch // options.get("accumulate", 1)
        cut = chain_cut(case.capture.graph, 1, micro_batch=micro_batch)
        one = plan_of_cut(case.capture.graph, cut, micro_batch)
        executor, results = run(case, one, loss_scope=loss_scope(model), **options)
        values = {k: p.detach().numpy() for k, p in executor.ranks[0].parameters.items()}
        compare(found, plan, values, losses=[result.loss for result in results])
        return
    clip_norm = options.get("clip_norm")
    group = loss_group(model, plan, batch)
    wanted = reference(model, batch, group, clip_norm)
    expected: dict[str, Any] = {"losses": wanted.losses}
    if clip_norm is not None:
        expected["norms"] = wanted.norms
    compare(found, plan, values_of(case, wanted.module), **expected)


def check_row(pool: RankPool, row: Row) -> None:
    found = pool.run("dist.cases:train_row", row)
    case, plan = case_of_row(row), plan_of_row(row)
    assert len(plan.used_devices) == NUM_RANKS
    batch = BATCH * row["accumulate"]
    check_trained(found, case, plan, row["model"], batch, **options_of(row))


@pytest.mark.parametrize("row", pairwise(AXES, is_valid), ids=name_of)
def test_every_two_options_together(pool: RankPool, row: Row) -> None:
    check_row(pool, row)


@pytest.mark.long
@pytest.mark.parametrize("row", pairwise(LARGER, is_valid), ids=name_of)
def test_every_two_options_together_on_larger_models(pool: RankPool, row: Row) -> None:
    check_row(pool, row)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MODELS)
def test_every_plan_of_four_devices_equals_one_process(pool: RankPool, name: str) -> None:
    """The planners' matrix on processes; plans that leave a device idle have no rank for it."""
    num_run = 0
    for row in matrix.EVERY:
        if row["model"] != name or row["num_devices"] != NUM_RANKS or not matrix.is_valid(row):
            continue
        case = named_case(name, matrix.BATCH)
        plan = matrix.planned(row)
        if len(plan.used_devices) != NUM_RANKS or any(s.tp > 1 for s in plan.stages):
            continue
        found = pool.run("dist.cases:train_planned", row)
        check_trained(found, case, plan, name, matrix.BATCH)
        num_run += 1
    assert num_run >= 6
