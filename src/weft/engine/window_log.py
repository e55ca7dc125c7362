"""What windows a finetuning job went through, written down, and the same windows again.

Which windows a job gets under load depends on what its neighbours leave, and windows decide in
which order its gradients are summed. A recorded job can be trained again, alone, in the very same
windows, and so to the very same bits (`weft.engine.window_policies`).

A log holds one job, as JSON lines. A line `{"job": ..., "start_step": k}` says that the job started
with k steps done; what was logged beyond them was lost in a crash and is done again. Every other
line is an iteration: how many tokens of others stood beside the job's, and what the job was
granted, in order: `["f", sample, tokens, only_cheap]` forward, `["b", sample, [[begin, end,
first_layer, end_layer], ...]]` backward, `["s"]` an optimizer step.
"""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from weft.base.errors import ConfigError
from weft.engine.backward_cursor import BackwardCursor, BackwardSpan
from weft.engine.finetune import BackwardOrder
from weft.engine.finetune_part import ActiveSample, FinetunePart, Room
from weft.engine.job_plan import steps_of_checkpoint

Grant = list[Any]
_Backward = tuple[tuple[BackwardSpan, ...], BackwardCursor]
_STEP: Grant = ["s"]


class WindowObserver(Protocol):
    """Stands between jobs and the room that they fill."""

    def begin(self, room: Room) -> Room:
        """The room to ask instead, for one iteration."""
        ...

    def end(self, part: FinetunePart | None) -> None:
        """What came of it."""
        ...


@dataclass(kw_only=True, slots=True)
class LoggedIteration:
    """What one job was granted in one iteration."""

    is_timed: bool
    """As the room's."""
    num_beside: int = 0
    """Tokens of requests and of other jobs in the same batch."""
    grants: list[Grant] = field(default_factory=lambda: [])


# ---- writing ----


class WindowRecorder:
    """Appends each job's windows to a file of its own, `DIRECTORY/JOB.jsonl`.

    Raises:
        ConfigError: the directory cannot be made.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot hold window logs: {error.strerror}") from error
        self._room: _RecordingRoom | None = None
        self._broken: set[str] = set()

    def begin(self, room: Room) -> Room:
        """The same room, listened to."""
        self._room = _RecordingRoom(room)
        return self._room

    def end(self, part: FinetunePart | None) -> None:
        """Nothing yet: what stands beside is known when the batch is made."""

    def write(self, part: FinetunePart, *, num_tokens: int) -> None:
        """Write down what each job got, in a batch of so many tokens of requests.

        A log that cannot be written harms no job.
        """
        room, self._room = self._room, None
        if room is None:
            return
        lines: dict[str, list[str]] = {}
        for start in part.job_starts:
            done = steps_of_checkpoint(start.resume_from) if start.resume_from else 0
            # On a line of its own, whatever a killed process has left behind.
            head = "\n" + json.dumps({"job": start.job_id, "start_step": done})
            lines.setdefault(start.job_id, []).append(head)
        # A step is granted to whoever asks; who it was, the part knows.
        stepped = iter(step.job_id for step in part.steps)
        by_job: dict[str, list[Grant]] = {}
        for job_id, grant in room.grants:
            by_job.setdefault(next(stepped) if job_id is None else job_id, []).append(grant)
        num_all = num_tokens + part.num_forward_tokens
        for job_id, grants in by_job.items():
            own = sum(row.end - row.begin for row in part.forward if row.job_id == job_id)
            entry = {"timed": room.is_timed, "beside": num_all - own, "grants": grants}
            lines.setdefault(job_id, []).append(json.dumps(entry, separators=(",", ":")))
        for job_id, texts in lines.items():
            self._append(job_id, texts)

    def _append(self, job_id: str, lines: Iterable[str]) -> None:
        if job_id in self._broken:
            return
        path = self._directory / f"{quote(job_id, safe='')}.jsonl"
        try:
            # Opened anew each time: what is written survives the death of the process.
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            self._broken.add(job_id)
            warnings.warn(f"the window log of job {job_id} ends here: {error}", stacklevel=2)


class _RecordingRoom:
    """Passes every question on, and keeps what was granted: (job or None for a step, grant)."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.grants: list[tuple[str | None, Grant]] = []

    @property
    def is_timed(self) -> bool:
        return self._room.is_timed

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
        count = self._room.forward(sample, row_begin=row_begin, only_cheap=only_cheap)
        if count:
            self.grants.append((sample.job_id, ["f", sample.planned.number, count, only_cheap]))
        return count

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        spans, behind = self._room.backward(sample, cursor)
        if spans:
            rows = [[s.begin, s.end, s.first_layer, s.end_layer] for s in spans]
            self.grants.append((sample.job_id, ["b", sample.planned.number, rows]))
        return spans, behind

    def step(self) -> bool:
        is_granted = self._room.step()
        if is_granted:
            self.grants.append((None, _STEP))
        return is_granted


# ---- reading ----


def read_window_log(path: str | Path) -> list[LoggedIteration]:
    """The iterations of a job from its first step to the end, none of them twice.

    Raises:
        ConfigError: it cannot be read, or is no window log.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"window log {path} cannot be read: {error}") from error
    found: list[LoggedIteration] = []
    has_start, half = False, 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            start_step = int(entry["start_step"]) if "start_step" in entry else None
            if start_step is None:
                found.append(_iteration(entry))
        except (ValueError, TypeError, KeyError):
            # A process that dies may leave half a line: the last one, or the one before a restart.
            half = half or number
            continue
        if start_step is not None:
            if not _forget_after(found, start_step):
                raise ConfigError(
                    f"window log {path} lacks steps before step {start_step}, where its job went "
                    "on; only a job that was recorded from its start can be replayed"
                )
            has_start, half = True, 0
        elif half:
            raise ConfigError(f"window log {path}, line {half} is no entry")
    if not has_start:
        raise ConfigError(f"window log {path} does not say where its job starts; it is no such log")
    return [iteration for iteration in found if iteration.grants]


def _iteration(entry: Mapping[str, Any]) -> LoggedIteration:
    return LoggedIteration(
        is_timed=entry["timed"], num_beside=entry["beside"], grants=entry["grants"]
    )


def _forget_after(found: list[LoggedIteration], num_steps: int) -> bool:
    """Drop what was logged behind a number of steps; False if there are not so many."""
    left = num_steps
    for index, iteration in enumerate(found):
        for place, grant in enumerate(iteration.grants):
            if left == 0:
                del iteration.grants[place:]
                del found[index + 1 :]
                return True
            left -= grant == _STEP
    return left == 0


class WindowReplay:
    """Grants exactly what a log says. For one job alone in its engine."""

    def __init__(self, path: str | Path) -> None:
        """Read a log; raises as `read_window_log`."""
        self._path = path
        self._left = deque(read_window_log(path))
        self._room: _ReplayRoom | None = None
        self.num_iterations = 0
        """Replayed so far."""
        self.num_beside = 0
        """Of the iteration that is being filled: tokens of others in its batch."""

    def begin(self, room: Room) -> Room:
        """The next iteration of the log; nothing behind its end."""
        entry = self._left.popleft() if self._left else LoggedIteration(is_timed=False)
        self._room = _ReplayRoom(entry)
        self.num_beside = entry.num_beside
        return self._room

    def end(self, part: FinetunePart | None) -> None:
        """Check that the job took all that it was granted.

        Raises:
            ConfigError: the log is not of this job, or ends before it.
        """
        room, self._room = self._room, None
        if room is None:
            return
        self.num_iterations += bool(room.num_granted)
        if room.grants:
            raise ConfigError(
                f"window log {self._path} does not fit this job: in iteration "
                f"{self.num_iterations} it grants {room.grants[0]}, which the job does not ask "
                "for; give the data and the settings of the job that was recorded"
            )
        if part is None:
            raise ConfigError(
                f"window log {self._path} ends before the job does, after {self.num_iterations} "
                "iterations; give the data and the settings of the job that was recorded"
            )


class _ReplayRoom:
    def __init__(self, entry: LoggedIteration) -> None:
        self.is_timed = entry.is_timed
        self.grants = deque(entry.grants)
        self.num_granted = len(entry.grants)

    def forward(
        self, sample: ActiveSample, *, row_begin: int | None = None, only_cheap: bool = False
    ) -> int:
        match self._head:
            case ["f", number, int(count), cheap] if (number, cheap) == (
                sample.planned.number,
                only_cheap,
            ) and count <= sample.num_forward_left:
                self.grants.popleft()
                return count
            case _:
                return 0

    def backward(self, sample: ActiveSample, cursor: BackwardCursor) -> _Backward:
        match self._head:
            case ["b", number, [*rows]] if number == sample.planned.number:
                self.grants.popleft()
                spans = tuple(
                    BackwardSpan(begin=begin, end=end, first_layer=first, end_layer=stop)
                    for begin, end, first, stop in rows
                )
                return spans, cursor_behind(cursor, spans)
            case _:
                return (), cursor

    def step(self) -> bool:
        is_next = self._head == _STEP
        if is_next:
            self.grants.popleft()
        return is_next

    @property
    def _head(self) -> Sequence[Any] | None:
        return self.grants[0] if self.grants else None


def cursor_behind(cursor: BackwardCursor, spans: Sequence[BackwardSpan]) -> BackwardCursor:
    """Where a cursor stands once it has given these rows."""
    last = spans[-1]
    if cursor.order is BackwardOrder.WINDOW_MAJOR:
        is_through = last.first_layer == cursor.lowest_layer
        layer = cursor.top_layer if is_through else last.first_layer - 1
        end = last.begin if is_through else last.end
        return replace(cursor, layer=layer, end=end, begin=last.begin)
    if last.begin == 0:
        layer, end = last.first_layer - 1, cursor.num_tokens
    else:
        layer, end = last.first_layer, last.begin
    return replace(cursor, layer=layer, end=end, begin=end)
