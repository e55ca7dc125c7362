"""What every picture of a timeline shows: lanes, blocks, colours, a caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.action import RECV_KINDS, SEND_KINDS, ActionKind
from weft.plan.program import CODE, KINDS
from weft.sim.timeline import Timeline

COLORS: Mapping[str, str] = {
    "F": "#4c78a8",
    "B": "#59a14f",
    "I": "#59a14f",
    "W": "#a3cf9a",
    "RECOMPUTE": "#9ebcda",
    "REDUCE_GRAD": "#e0a458",
    "STEP": "#b07aa1",
    "fill": "#e8d3a9",
    "mixed": "#548591",
}
"""Fill colour by action kind; `fill` is another job's work, `mixed` several kinds."""

CRITICAL = "#c8102e"
IDLE = "#f1f2f4"
INK = "#22262b"
FAINT = "#8a9099"

LABELS: Mapping[str, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward: inputs",
    "W": "backward: weights",
    "RECOMPUTE": "recompute",
    "REDUCE_GRAD": "all-reduce",
    "STEP": "update",
    "fill": "fill job",
    "mixed": "several, too short to draw",
}
"""Words for the legend."""

_HIDDEN = [CODE[kind] for kind in SEND_KINDS | RECV_KINDS | {ActionKind.LOAD}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One rectangle: an action, or several that a picture cannot tell apart."""

    lane: int
    start_s: float
    end_s: float
    kind: str
    text: str
    micro_batch: int
    is_critical: bool
    is_merged: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """All of a picture but its pixels."""

    lanes: tuple[str, ...]
    blocks: tuple[Block, ...]
    makespan_s: float
    title: str
    caption: str
    kinds: tuple[str, ...]


def chart(timeline: Timeline, *, min_block_s: float = 0.0) -> Chart:
    """Lay a timeline out; neighbours merge where they are shorter than `min_block_s`.

    Lanes are devices; devices that run the same stages at the same times share one, so that
    data-parallel replicas take one row.
    """
    groups = _equal_devices(timeline)
    critical = np.zeros(len(timeline), dtype=bool)
    critical[timeline.critical_rows] = True
    blocks: list[Block] = []
    for lane, devices in enumerate(groups):
        rows = _lane_rows(timeline, devices[0])
        on_path = np.isin(timeline.device, devices) & critical
        names = {_identity(timeline, row) for row in np.nonzero(on_path)[0].tolist()}
        blocks += _blocks(timeline, rows, lane, names, min_block_s)
    kinds = {block.kind for block in blocks}
    return Chart(
        lanes=tuple(_lane_name(timeline, devices) for devices in groups),
        blocks=tuple(blocks),
        makespan_s=timeline.makespan_s,
        title=f"{timeline.name}: {seconds(timeline.step_time_s)} per step (simulated)",
        caption=(
            f"{timeline.throughput_per_s:,.4g} samples/s  ·  bubble "
            f"{100 * timeline.bubble_fraction:.1f} %  ·  peak memory "
            f"{size(timeline.peak_memory_bytes)}  ·  {timeline.num_devices} devices"
        ),
        kinds=tuple(kind for kind in LABELS if kind in kinds),
    )


def _equal_devices(timeline: Timeline) -> list[list[int]]:
    """Devices grouped by what they ran and when."""
    groups: dict[tuple[bytes, ...], list[int]] = {}
    bounds = np.searchsorted(timeline.device, [*timeline.devices, timeline.devices[-1] + 1])
    for device, a, b in zip(timeline.devices, bounds, bounds[1:], strict=False):
        columns = (
            timeline.actions.kind,
            timeline.actions.stage,
            timeline.actions.micro_batch,
            timeline.start_s,
            timeline.end_s,
        )
        groups.setdefault(tuple(c[a:b].tobytes() for c in columns), []).append(device)
    return list(groups.values())


def _lane_rows(timeline: Timeline, device: int) -> NDArray[np.int64]:
    shown = (timeline.device == device) & (timeline.end_s > timeline.start_s)
    shown &= ~np.isin(timeline.actions.kind, _HIDDEN)
    return np.nonzero(shown)[0]


def _identity(timeline: Timeline, row: int) -> tuple[int, int, int]:
    actions = timeline.actions
    return int(actions.kind[row]), int(actions.stage[row]), int(actions.micro_batch[row])


def _blocks(
    timeline: Timeline,
    rows: NDArray[np.int64],
    lane: int,
    critical: set[tuple[int, int, int]],
    min_block_s: float,
) -> list[Block]:
    blocks: list[Block] = []
    several = len(np.unique(timeline.actions.stage[rows])) > 1
    for row in rows.tolist():
        kind = "fill" if timeline.job[row] else str(KINDS[timeline.actions.kind[row]])
        micro_batch = int(timeline.actions.micro_batch[row])
        start_s, end_s = float(timeline.start_s[row]), float(timeline.end_s[row])
        stage = f"{timeline.actions.stage[row]}·" if several else ""
        block = Block(
            lane=lane,
            start_s=start_s,
            end_s=end_s,
            kind=kind,
            text=timeline.jobs[timeline.job[row]]
            if kind == "fill"
            else f"{stage}{micro_batch}"
            if micro_batch >= 0
            else "",
            micro_batch=micro_batch,
            is_critical=_identity(timeline, row) in critical,
        )
        last = blocks[-1] if blocks else None
        if (
            last is not None
            and (last.is_merged or last.end_s - last.start_s < min_block_s)
            and end_s - start_s < min_block_s
            and start_s - last.end_s < min_block_s
        ):
            blocks[-1] = Block(
                lane=lane,
                start_s=last.start_s,
                end_s=end_s,
                kind=kind if kind == last.kind else "mixed",
                is_merged=True,
                text="",
                micro_batch=-1,
                is_critical=last.is_critical and block.is_critical,
            )
        else:
            blocks.append(block)
    return blocks


def _lane_name(timeline: Timeline, devices: list[int]) -> str:
    rows = timeline.device == devices[0]
    stages = np.unique(timeline.actions.stage[rows]).tolist()
    shown = ",".join(map(str, stages[:4])) + ("…" if len(stages) > 4 else "")
    names = dict(zip(timeline.devices, timeline.device_names, strict=True))
    where = names[devices[0]] if len(devices) == 1 else f"{names[devices[0]]} ×{len(devices)}"
    return f"stage {shown}  {where}"


def seconds(value_s: float) -> str:
    """A duration in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value_s >= scale:
            return f"{value_s / scale:.4g} {unit}"
    return f"{value_s:.4g} s"


def size(num_bytes: float) -> str:
    """A size in the unit that suits it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def ticks_s(makespan_s: float, count: int = 8) -> list[float]:
    """About `count` round times from 0 to the end."""
    if makespan_s <= 0:
        return [0.0]
    raw = makespan_s / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * m for m in (1.0, 2.0, 5.0, 10.0) if raw <= power * m)
    return [float(t) for t in np.arange(0.0, makespan_s * 1.0001, step)]
