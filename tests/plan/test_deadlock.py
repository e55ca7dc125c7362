"""The deadlock check: a committed set of broken schedules, and sound ones."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from plan.plans import chain, stage_plan
from weft.plan.communicate import insert_communication
from weft.plan.deadlock import DeadlockError, check_deadlock
from weft.plan.schedule import ScheduleError, parse_schedule
from weft.plan.schedules import generate

BROKEN = sorted((Path(__file__).parent / "broken_schedules").glob("*.txt"))


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_schedules_are_rejected_for_their_reason(path: Path) -> None:
    text = path.read_text()
    expected = text.splitlines()[1].removeprefix("# expect: ")
    with pytest.raises(ScheduleError) as caught:
        check_deadlock(parse_schedule(text), num_steps=1)
    assert expected in str(caught.value)
    assert isinstance(caught.value, DeadlockError) == (expected == "deadlocks")


def test_the_set_of_broken_schedules_is_whole() -> None:
    assert len(BROKEN) == 20
    assert sum("# expect: deadlocks" in path.read_text() for path in BROKEN) == 7


def test_the_cycle_is_named_action_by_action() -> None:
    text = generate(chain(2, 2)).to_text()
    text = text.replace("0F0 0F1 0B0", "0F0 0B0 0F1").replace("1F0 1B0 1F1", "1F0 1F1 1B0")
    with pytest.raises(DeadlockError) as caught:
        check_deadlock(parse_schedule(text))
    chain_of_waiting = str(caught.value).split(": ", 1)[1].split(" -> ")
    assert chain_of_waiting[0] == chain_of_waiting[-1]
    assert "1SEND_B0>0 on device 1" in chain_of_waiting
    assert "0F1 on device 0" in chain_of_waiting


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "kfkb", "zero-bubble", "2bw"])
@pytest.mark.parametrize(
    "arcs",
    [
        [(0, 1), (1, 2), (2, 3)],
        [(0, 3), (1, 3), (2, 3)],
        [(0, 1), (0, 2), (1, 3), (2, 3)],
        [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2)],
    ],
)
def test_generated_schedules_are_safe_over_several_steps(
    name: str, arcs: list[tuple[int, int]]
) -> None:
    schedule = generate(stage_plan(arcs, 4, batch_size=8), name)
    check_deadlock(schedule, num_steps=3)


def test_interleaved_and_shared_devices_are_safe() -> None:
    for ranks, chunks in itertools.product((2, 3), (2, 3)):
        devices = [(s % ranks,) for s in range(ranks * chunks)]
        plan = chain(ranks * chunks, 6, devices=devices)
        check_deadlock(generate(plan, "interleaved"))
        check_deadlock(generate(plan, "1f1b"))


def test_communication_of_the_schedule_itself_is_what_is_checked() -> None:
    full = insert_communication(generate(chain(3, 4)))
    check_deadlock(full, num_steps=1)
