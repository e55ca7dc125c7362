"""Closed forms of pipeline schedules that the simulator must hit exactly (Megatron sheet §1-2)."""

from __future__ import annotations

from fractions import Fraction

import pytest

from plan.plans import chain, stage_plan
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan
from weft.sim.stage_executor import simulate
from weft.sim.timeline import Timeline

SIZES = [(1, 1), (2, 3), (4, 8), (8, 8), (8, 16), (16, 64), (5, 3)]


def run(plan: TrainPlan, name: str) -> Timeline:
    return simulate(plan, generate(plan, name))


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("tf", "tb"), [(1.0, 2.0), (3.0, 3.0), (2.0, 1.0)])
def test_gpipe_and_1f1b_take_m_plus_p_minus_1_rounds(
    name: str, p: int, m: int, tf: float, tb: float
) -> None:
    timeline = run(chain(p, m, forward_s=tf, backward_s=tb), name)
    assert timeline.step_time_s == (m + p - 1) * (tf + tb)
    assert timeline.bubble_fraction == float(1 - Fraction(m, m + p - 1))
    ideal_s = m * (tf + tb)
    assert Fraction(timeline.step_time_s - ideal_s) / Fraction(ideal_s) == Fraction(p - 1, m)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_peak_stashes(p: int, m: int) -> None:
    gpipe = run(chain(p, m), "gpipe").peak_memory_by_device
    flush = run(chain(p, m), "1f1b").peak_memory_by_device
    assert gpipe == dict.fromkeys(range(p), m)
    assert flush == {r: min(p - r, m) for r in range(p)}


@pytest.mark.parametrize(
    ("p", "m", "v", "bubble"), [(4, 8, 2, 0.1875), (8, 16, 4, 0.109375), (16, 64, 2, 0.1171875)]
)
def test_interleaving_divides_the_bubble_by_the_chunks(
    p: int, m: int, v: int, bubble: float
) -> None:
    plan = chain(p * v, m, devices=[(s % p,) for s in range(p * v)])
    timeline = run(plan, "interleaved")
    ideal_s = 2.0 * m * v
    assert timeline.step_time_s / ideal_s - 1 == bubble == (p - 1) / m / v
    stashed = timeline.peak_memory_by_device
    assert stashed[0] == v * p + p - 1
    assert stashed == {r: min(2 * (p - r - 1) + (v - 1) * p, m * v) + 1 for r in range(p)}


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 16), (3, 3)])
def test_zero_bubble_leaves_a_third_of_the_bubble(p: int, m: int) -> None:
    """ZB-H1: (p-1)(tF + tI - tW), at no more stashes than the first stage of 1F1B."""
    timeline = run(chain(p, m, forward_s=1.0, backward_s=2.0), "zero-bubble")
    assert timeline.step_time_s == 3 * m + (p - 1) * (1 + 1 - 1)
    assert timeline.peak_memory_bytes == min(p, m)


@pytest.mark.parametrize(("p", "m"), [(4, 4), (4, 8), (8, 8)])
def test_2bw_has_one_fill_and_one_drain_for_the_whole_run(p: int, m: int) -> None:
    plan = chain(p, m, forward_s=1.0, backward_s=2.0)
    timeline = simulate(plan, generate(plan, "2bw"), num_steps=10)
    assert timeline.makespan_s == 10 * m * 3 + (p - 1) * 3
    assert timeline.step_time_s == m * 3
    assert timeline.bubble_fraction == 0
    flush = simulate(plan, generate(plan, "1f1b"))
    assert flush.step_time_s / timeline.step_time_s == 1 + (p - 1) / m


def test_graph_pipeline_warms_up_by_its_depth() -> None:
    """Case study of GraphPipe §7.5: two branches of four stages against eight in a row."""
    m = 16
    branches = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 3), (3, 7)]
    graph = stage_plan(branches, 8, batch_size=m)
    assert graph.depth == 5
    balanced = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7), (3, 7)]
    assert simulate(stage_plan(balanced, 8, batch_size=m)).step_time_s == 2 * (m + 5 - 1)
    two_towers = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 3)]
    tower = stage_plan(two_towers, 7, batch_size=m)
    chain_time_s = simulate(chain(8, m)).step_time_s
    assert simulate(tower).step_time_s == 2 * (m + 3)
    assert Fraction(chain_time_s) / Fraction(simulate(tower).step_time_s) == Fraction(m + 7, m + 3)


def test_runs_are_bit_identical() -> None:
    plan = stage_plan(
        [(0, 1), (0, 2), (1, 3), (2, 3)],
        4,
        batch_size=24,
        forward_s=[0.1, 0.7, 0.3, 0.2],
        backward_s=[0.2, 0.9, 0.4, 0.8],
        micro_batch=2,
    )
    first, second = simulate(plan), simulate(plan)
    assert first.start_s.tobytes() == second.start_s.tobytes()
    assert first.end_s.tobytes() == second.end_s.tobytes()
    assert first.message_arrival_s.tobytes() == second.message_arrival_s.tobytes()
    assert first.actions == second.actions
