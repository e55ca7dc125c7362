"""The grammar of actions prints and parses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.plan.action import (
    COMPUTE_KINDS,
    RECV_KINDS,
    SEND_KINDS,
    Action,
    ActionKind,
    ActionSyntaxError,
    parse_action,
)
from weft.plan.program import EMPTY_PROGRAM, Program


@st.composite
def actions(draw: st.DrawFn) -> Action:
    kind = draw(st.sampled_from(list(ActionKind)))
    traffic = kind in SEND_KINDS | RECV_KINDS
    counted = kind in COMPUTE_KINDS or traffic
    return Action(
        kind=kind,
        stage=draw(st.integers(0, 2000)),
        micro_batch=draw(st.integers(0, 5000)) if counted else -1,
        peer=draw(st.integers(0, 99)) if traffic or kind is ActionKind.TRANSMIT else -1,
        version=draw(st.integers(-2, 3)),
        task=draw(st.from_regex(r"[A-Za-z0-9_.-]{0,6}", fullmatch=True)),
    )


@given(actions())
def test_every_action_prints_and_parses_back(action: Action) -> None:
    assert parse_action(str(action)) == action


@given(st.lists(actions(), max_size=12))
def test_a_program_is_the_sequence_of_its_actions(rows: list[Action]) -> None:
    program = Program.of(rows)
    assert list(program) == rows
    assert Program.concat([program, program]) == Program.of(rows + rows)
    assert list(program[1:]) == rows[1:]
    assert program == Program.of(map(parse_action, str(program).split()))


def test_the_text_is_what_the_reference_says() -> None:
    action = Action(
        kind=ActionKind.SEND_B, stage=3, micro_batch=5, peer=1, version=-1, task="vision"
    )
    assert str(action) == "3SEND_B5>1~-1@vision"
    assert str(Action(kind=ActionKind.REDUCE_GRAD, stage=2)) == "2REDUCE_GRAD"
    assert parse_action("7I4") == Action(kind=ActionKind.I, stage=7, micro_batch=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an action"),
        ("F0", "is not an action"),
        ("2X0", "kinds: F, B, I, W"),
        ("2F", "needs a micro-batch"),
        ("2STEP1", "takes no micro-batch"),
        ("2SEND_F1", "needs a peer"),
        ("2F1>3", "takes no peer"),
        ("2F1 3", "is not an action"),
    ],
)
def test_bad_text_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ActionSyntaxError, match=message):
        parse_action(text)


def test_a_task_that_the_grammar_cannot_express_is_refused() -> None:
    with pytest.raises(ActionSyntaxError, match="may hold only letters"):
        Action(kind=ActionKind.F, stage=0, micro_batch=0, task="a b")


def test_programs_differ_in_every_field() -> None:
    base = Program.of([parse_action("1F2")])
    for other in ("2F2", "1B2", "1F3", "1F2~1", "1F2@t"):
        assert base != Program.of([parse_action(other)])
    assert base != EMPTY_PROGRAM
