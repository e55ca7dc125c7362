"""Four real processes over gloo compute what one process computes; one pool for all cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dist.cases import CASES, planned, sgd
from dist.pool import NUM_RANKS, RankPool
from runtime.train_reference import train_plain

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks are started once."""
    ranks = RankPool()
    yield ranks
    ranks.close()


def check(pool: RankPool, name: str, **options: Any) -> None:
    found = pool.run("dist.cases:train", name, *options.values())
    case, plan = planned(name)
    assert len(plan.used_devices) == NUM_RANKS
    assert case.model.loss is not None
    wanted = train_plain(case.model.module, case.model.loss, case.batches, sgd, **options)
    values = {key: p.detach().numpy() for key, p in wanted.module.named_parameters()}
    held: set[str] = set()
    for rank in found:
        assert rank["losses"] == pytest.approx(wanted.losses, abs=TOLERANCE)
        if options:
            assert rank["norms"] == pytest.approx(wanted.norms, abs=TOLERANCE)
        for key, value in rank["parameters"].items():
            np.testing.assert_allclose(value, values[key], rtol=0, atol=TOLERANCE, err_msg=key)
            held.add(key)
        for stage, peak in rank["in_flight"].items():
            assert peak == plan.stages[stage].num_in_flight
    assert held == {parameter.id for parameter in case.capture.graph.parameters}


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
