"""The planners' own plans on real tensors: what they decide, one process computes too.

`make test` runs a choice in which every two options meet; `make test-long` runs all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pairwise import Row, name_of
from runtime.matrix_models import MODELS, loss_group, loss_scope, named_case, reference
from runtime.plan_matrix import BATCH, CHOSEN, EVERY, PLANNERS, is_valid, planned
from runtime.test_stage_numerics import TOLERANCE, assert_equal, run
from runtime.train_plans import chain_cut, plan_of_cut
from weft.base.errors import UnsupportedError
from weft.plan.train_plan import TrainPlan


@cache
def one_rank(name: str) -> Any:
    """The whole model as one stage: what dropout's seeded draws make of it."""
    of = named_case(name, BATCH)
    cut = chain_cut(of.capture.graph, 1, micro_batch=BATCH)
    executor, results = run(of, plan_of_cut(of.capture.graph, cut, BATCH), own_modules=False)
    return dict(executor.ranks[0].parameters), [result.loss for result in results]


def check_row(row: Row) -> TrainPlan:
    """Train by the row's plan, and compare with one process."""
    name = row["model"]
    of = named_case(name, BATCH)
    plan = planned(row)
    if any(stage.tp > 1 for stage in plan.stages):
        with pytest.raises(UnsupportedError, match="split tensor-parallel"):
            run(of, plan, loss_scope=loss_scope(name))
        return plan
    executor, results = run(of, plan, loss_scope=loss_scope(name))
    losses = [result.loss for result in results]
    if name == "dropout":
        values, wanted = one_rank(name)
        assert losses == pytest.approx(wanted, abs=TOLERANCE)
        for rank in executor.ranks:
            for key, p in rank.parameters.items():
                assert torch.allclose(p, values[key], rtol=0, atol=TOLERANCE), key
        return plan
    wanted = reference(name, BATCH, loss_group(name, plan, BATCH))
    assert losses == pytest.approx(wanted.losses, abs=TOLERANCE)
    assert_equal(executor, wanted.module)
    return plan


@pytest.mark.parametrize("row", CHOSEN, ids=name_of)
def test_planned_training_equals_one_process(row: Row) -> None:
    check_row(row)


def test_the_chosen_plans_hold_what_plans_differ_in() -> None:
    plans = [planned(row) for row in CHOSEN]
    stages = [stage for plan in plans for stage in plan.stages]
    assert max(plan.num_stages for plan in plans) >= 3
    assert any(stage.dp > 1 for stage in stages)
    assert any(stage.k > 1 for stage in stages)
    assert any(stage.recompute for stage in stages)
    assert any(stage.frozen for stage in stages)
    assert any(len({stage.micro_batch for stage in plan.stages}) > 1 for plan in plans)
    assert any(len({stage.dp for stage in plan.stages}) > 1 for plan in plans)
    assert any(len(after) > 1 for plan in plans for after in plan.successors)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MODELS)
def test_every_plan_equals_one_process(name: str) -> None:
    rows = [row for row in EVERY if row["model"] == name and is_valid(row)]
    assert len(rows) >= len(PLANNERS) * 6
    for row in rows:
        try:
            check_row(row)
        except Exception as error:
            raise AssertionError(name_of(row)) from error
