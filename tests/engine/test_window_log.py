"""Window logs: restarts, half lines, and cursors behind the rows of a log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.base.errors import ConfigError
from weft.engine.backward_cursor import BackwardCursor
from weft.engine.finetune import BackwardOrder
from weft.engine.window_log import cursor_behind, read_window_log


def write(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def iteration(*grants: object) -> dict[str, object]:
    return {"timed": False, "beside": 3, "grants": list(grants)}


def start(step: int) -> dict[str, object]:
    return {"job": "j", "start_step": step}


def forward(sample: int) -> list[object]:
    return ["f", sample, 8, False]


STEP = ["s"]


def test_what_a_crash_has_undone_is_read_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log",
        start(0),
        iteration(forward(0)),
        iteration(STEP, forward(1)),  # Behind a step begins the next one.
        iteration(STEP),
        iteration(forward(2)),
        start(1),
        iteration(forward(1)),
        iteration(STEP),
        start(2),
        iteration(forward(2), STEP),
    )
    found = [entry.grants for entry in read_window_log(path)]
    assert found == [
        [forward(0)],
        [STEP],
        [forward(1)],
        [STEP],
        [forward(2), STEP],
    ]


def test_a_restart_from_nothing_forgets_everything(tmp_path: Path) -> None:
    path = write(tmp_path / "log", start(0), iteration(forward(0)), start(0), iteration(forward(5)))
    assert [entry.grants for entry in read_window_log(path)] == [[forward(5)]]


def test_half_lines_of_killed_processes_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "log", start(0), iteration(STEP))
    path.write_text(path.read_text() + '{"timed": fal\n' + json.dumps(start(1)) + "\n")
    path.write_text(path.read_text() + json.dumps(iteration(forward(1))) + '\n{"tim')
    assert [entry.grants for entry in read_window_log(path)] == [[STEP], [forward(1)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"timed": true, "beside": 0, "grants": []}\n', "does not say where its job starts"),
        ('{"job": "j", "start_step": 0}\nx\n{"timed": true, "beside": 0, "grants": []}', "line 2"),
        ('{"job": "j", "start_step": 3}\n', "lacks steps before step 3"),
    ],
)
def test_what_is_no_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_window_log(tmp_path / "log")


@given(
    order=st.sampled_from(BackwardOrder),
    num_tokens=st.integers(1, 40),
    lowest_layer=st.integers(0, 3),
    max_window=st.integers(1, 40),
    takes=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    granule=st.integers(1, 8),
)
def test_a_cursor_is_known_from_the_rows_that_it_gave(
    order: BackwardOrder,
    num_tokens: int,
    lowest_layer: int,
    max_window: int,
    takes: list[int],
    granule: int,
) -> None:
    cursor = BackwardCursor.at_top(
        order=order,
        num_tokens=num_tokens,
        lowest_layer=lowest_layer,
        num_layers=4,
        max_window=max(granule, max_window),
    )
    for most in takes:
        if cursor.is_done:
            break
        spans, behind = cursor.take(most, granule=granule)
        if spans:
            found = cursor_behind(cursor, spans)
            # A window may be open there that has no rows yet; a log knows of none.
            assert (found.layer, found.end) == (behind.layer, behind.end)
            assert (found.is_done, found.num_left) == (behind.is_done, behind.num_left)
        cursor = behind
