"""Errors that cross processes, clocks, and trace files."""

from __future__ import annotations

import json
import pickle

import pytest

from weft.base import errors
from weft.base.clock import VirtualClock, WallClock
from weft.base.errors import ConfigError
from weft.base.trace import TraceWriter

ALL_ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.WeftError)
]


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_errors_pickle_and_refine_a_standard_type(kind):
    error = kind("something is 3; it must be 2")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "something is 3; it must be 2"
    assert kind is errors.WeftError or len(kind.__mro__) > len(errors.WeftError.__mro__) + 1


def test_fields_of_errors_survive_a_process_border():
    error = errors.InvalidRequestError("no", param="top_p", code="bad")
    again = pickle.loads(pickle.dumps(error))
    assert (again.param, again.code) == ("top_p", "bad")
    assert pickle.loads(pickle.dumps(errors.QueueFullError("full", 3.0))).retry_after_s == 3.0


def test_virtual_time_moves_only_forward():
    clock = VirtualClock()
    clock.advance_to(2.0)
    clock.advance_to(2.0)
    assert clock.now_s() == 2.0
    with pytest.raises(errors.IntegrityError, match="cannot go back"):
        clock.advance_to(1.0)
    assert WallClock().now_s() <= WallClock().now_s()


def test_traces_name_their_tracks_once_and_count_in_microseconds(tmp_path):
    trace = TraceWriter()
    trace.slice("engine", "batch", "step", start_s=0.5, duration_s=0.25, args={"rows": 3})
    trace.slice("engine", "batch", "step", start_s=1.0, duration_s=0.25)
    trace.counter("engine", "pages", time_s=1.0, values={"held": 4})
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["ts"] for event in slices] == [0.5e6, 1.0e6]
    assert slices[0]["args"] == {"rows": 3}
    assert len([event for event in events if event["ph"] == "M"]) == 2
    assert {event["pid"] for event in events} == {1}
    assert not list(tmp_path.glob("*.partial"))


def test_a_trace_path_that_cannot_be_written_is_found_beforehand(tmp_path):
    TraceWriter.check_path(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, tmp_path / "missing" / "trace.json", file / "trace.json"):
        with pytest.raises(ConfigError, match="cannot be written"):
            TraceWriter.check_path(path)
