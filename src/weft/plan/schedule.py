"""A schedule: for every device the ordered actions of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from weft.base.errors import ConfigError
from weft.plan.action import ActionKind, parse_action
from weft.plan.program import CODE, EMPTY_PROGRAM, Program
from weft.plan.train_plan import StageEdge


class ScheduleError(ConfigError):
    """A schedule that contradicts itself or its plan; the message names stage and action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a stage runs: its devices in rank order (data parallel first, then tensor parallel).

    Stages of different waves may share devices; each wave has its own stage-to-device map because
    each has its own stages.
    """

    stage: int
    devices: tuple[int, ...]
    tp: int = 1
    wave: int = 0

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return len(self.devices) // self.tp


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Ordered actions per device: `prologue` once, `body` per optimizer step, `epilogue` once.

    `devices` are the global indices of the devices used; `prologue[i]`, `body[i]` and `epilogue[i]`
    belong to `devices[i]`. Data-parallel devices of one stage run equal programs, each on its own
    samples; every step trains `batch_size` samples, and `edges` say what crosses between stages,
    so that a schedule alone tells every message. Synchronous schedules have an empty prologue and
    epilogue. The micro-batch of an action counts from the start of its repetition of the body;
    stage s has `num_micro_batches[s]` of them per step, and an asynchronous body may reach into
    the next step (PipeDream-2BW does).
    """

    name: str
    batch_size: int
    placements: tuple[Placement, ...]
    edges: tuple[StageEdge, ...]
    num_micro_batches: tuple[int, ...]
    devices: tuple[int, ...]
    body: tuple[Program, ...]
    prologue: tuple[Program, ...] = ()
    epilogue: tuple[Program, ...] = ()

    def __post_init__(self) -> None:
        if [p.stage for p in self.placements] != list(range(len(self.placements))):
            raise ScheduleError(
                f"schedule {self.name!r} places stages {[p.stage for p in self.placements]}; "
                f"list every stage once, in order"
            )
        if len(self.num_micro_batches) != len(self.placements):
            raise ScheduleError(
                f"schedule {self.name!r} gives micro-batch counts for "
                f"{len(self.num_micro_batches)} stages of {len(self.placements)}"
            )
        for stage, count in enumerate(self.num_micro_batches):
            dp = self.placements[stage].dp
            if count < 1 or self.batch_size % (count * dp):
                raise ScheduleError(
                    f"stage {stage} cuts a batch of {self.batch_size} samples into {count} "
                    f"micro-batches on {dp} data-parallel devices, which does not divide it"
                )
        for part in ("prologue", "epilogue"):
            if not getattr(self, part):
                object.__setattr__(self, part, (EMPTY_PROGRAM,) * len(self.devices))
        for part in ("prologue", "body", "epilogue"):
            if len(getattr(self, part)) != len(self.devices):
                raise ScheduleError(
                    f"schedule {self.name!r}: {part} has {len(getattr(self, part))} programs for "
                    f"{len(self.devices)} devices"
                )

    @property
    def num_devices(self) -> int:
        """Devices that the schedule uses."""
        return len(self.devices)

    @property
    def num_stages(self) -> int:
        """Stages that the schedule runs."""
        return len(self.placements)

    @property
    def is_synchronous(self) -> bool:
        """Whether every step flushes: nothing before or after the body."""
        return not any(map(len, self.prologue)) and not any(map(len, self.epilogue))

    @cached_property
    def kinds(self) -> frozenset[ActionKind]:
        """The action kinds that occur."""
        programs = {id(p): p for p in (*self.prologue, *self.body, *self.epilogue)}
        return frozenset().union(*(program.kinds for program in programs.values()))

    @cached_property
    def steps_in_epilogue(self) -> int:
        """Optimizer steps that the epilogue completes: 0, or 1 for a schedule without flushes."""
        return int(any(ActionKind.STEP in program.kinds for program in self.epilogue))

    @cached_property
    def device_positions(self) -> NDArray[np.int64]:
        """Index into the programs by global device, -1 for devices that are not used."""
        position = np.full(max(self.devices, default=0) + 1, -1, dtype=np.int64)
        position[list(self.devices)] = np.arange(self.num_devices)
        return position

    def program(self, device: int) -> Program:
        """The body of global device `device`."""
        return self.body[self.devices.index(device)]

    def unrolled(self, num_steps: int) -> Schedule:
        """The whole run of `num_steps` optimizer steps as one schedule without flush parts.

        Its batch holds the samples of all steps; micro-batches and weight versions count from the
        start of the run.
        """
        if num_steps < 1:
            raise ScheduleError(f"num_steps is {num_steps}; it must be at least 1")
        if self.is_synchronous and num_steps == 1:
            return self
        num_bodies = num_steps - self.steps_in_epilogue
        shift = np.array(self.num_micro_batches, dtype=np.int32)
        made: dict[tuple[int, int, int], Program] = {}
        for before, body, after in zip(self.prologue, self.body, self.epilogue, strict=True):
            key = (id(before), id(body), id(after))
            if key not in made:
                steps = [_shifted(body, step, shift) for step in range(num_bodies)]
                made[key] = Program.concat(
                    [_shifted(before, 0, shift), *steps, _shifted(after, num_bodies, shift)]
                )
        parts = zip(self.prologue, self.body, self.epilogue, strict=True)
        return replace(
            self,
            batch_size=self.batch_size * num_steps,
            num_micro_batches=tuple(count * num_steps for count in self.num_micro_batches),
            prologue=(),
            body=tuple(made[id(before), id(body), id(after)] for before, body, after in parts),
            epilogue=(),
        )

    def to_text(self) -> str:
        """The schedule in the published grammar; `parse_schedule` reads it back."""
        lines = [f"schedule {self.name} batch-size {self.batch_size}"]
        for place, count in zip(self.placements, self.num_micro_batches, strict=True):
            where = ",".join(map(str, place.devices))
            extra = f" tp {place.tp}" if place.tp > 1 else ""
            extra += f" wave {place.wave}" if place.wave else ""
            lines.append(f"stage {place.stage} devices {where} micro-batches {count}{extra}")
        for edge in self.edges:
            lines.append(
                f"edge {edge.source} {edge.target} forward-bytes {edge.forward_bytes_per_sample} "
                f"backward-bytes {edge.backward_bytes_per_sample}"
            )
        for part in ("prologue", "body", "epilogue"):
            for device, program in zip(self.devices, getattr(self, part), strict=True):
                if len(program) or part == "body":
                    lines.append(f"{part} {device}: {program}".rstrip())
        return "\n".join(lines) + "\n"


def _shifted(program: Program, step: int, shift: np.ndarray) -> Program:
    """`program` with micro-batches and versions counted from the start of the run."""
    if not len(program):
        return program
    moved = np.where(
        program.micro_batch >= 0, program.micro_batch + step * shift[program.stage], -1
    )
    return Program(
        kind=program.kind,
        stage=program.stage,
        micro_batch=moved.astype(np.int32),
        peer=program.peer,
        version=np.maximum(program.version + step, 0).astype(np.int32),
        task=program.task,
        tasks=program.tasks,
    )


def parse_schedule(text: str) -> Schedule:
    """The schedule that `Schedule.to_text` wrote; ScheduleError names the line that is wrong."""
    name, batch_size = "", 0
    placements: list[Placement] = []
    counts: list[int] = []
    edges: list[StageEdge] = []
    parts: dict[str, dict[int, Program]] = {"prologue": {}, "body": {}, "epilogue": {}}
    for number, line in _lines(text):
        words = line.split()
        if words[0] in parts and len(words) > 1 and words[1].endswith(":"):
            device = _integer(words[1][:-1], number)
            parts[words[0]][device] = Program.of(map(parse_action, words[2:]))
        elif words[0] == "schedule" and len(words) == 4:
            name, batch_size = words[1], _integer(words[3], number)
        elif words[0] == "edge" and len(words) == 7:
            source, target, forward, backward = (_integer(words[i], number) for i in (1, 2, 4, 6))
            edges.append(
                StageEdge(
                    source=source,
                    target=target,
                    forward_bytes_per_sample=forward,
                    backward_bytes_per_sample=backward,
                )
            )
        elif words[0] == "stage" and len(words) in (6, 8, 10):
            settings = dict(zip(words[2::2], words[3::2], strict=True))
            placements.append(
                Placement(
                    stage=_integer(words[1], number),
                    devices=tuple(_integer(d, number) for d in settings["devices"].split(",")),
                    tp=_integer(settings.get("tp", "1"), number),
                    wave=_integer(settings.get("wave", "0"), number),
                )
            )
            counts.append(_integer(settings.get("micro-batches", ""), number))
        else:
            raise ScheduleError(
                f"line {number} of the schedule is {line!r}; expected "
                f"'schedule NAME batch-size B', 'stage S devices D,D micro-batches M', "
                f"'edge S T forward-bytes N backward-bytes N' or 'body D: ACTION ...'"
            )
    devices = tuple(sorted(parts["body"]))
    return Schedule(
        name=name,
        batch_size=batch_size,
        placements=tuple(placements),
        edges=tuple(edges),
        num_micro_batches=tuple(counts),
        devices=devices,
        prologue=tuple(parts["prologue"].get(d, EMPTY_PROGRAM) for d in devices),
        body=tuple(parts["body"][d] for d in devices),
        epilogue=tuple(parts["epilogue"].get(d, EMPTY_PROGRAM) for d in devices),
    )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _integer(word: str, line: int) -> int:
    if not word.isdigit():
        raise ScheduleError(f"line {line} of the schedule has {word!r} where a number belongs")
    return int(word)


def count_actions(programs: tuple[Program, ...], kind: ActionKind) -> int:
    """How many actions of `kind` all programs hold together."""
    return sum(int(np.count_nonzero(program.kind == CODE[kind])) for program in programs)
