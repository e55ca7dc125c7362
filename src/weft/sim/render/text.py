"""A timeline as a grid of characters."""

from __future__ import annotations

from weft.sim.render.layout import Block, Chart, chart
from weft.sim.timeline import Timeline

_LETTER = {"F": "F", "B": "B", "I": "I", "W": "W", "RECOMPUTE": "R", "REDUCE_GRAD": "A"}


def text_grid(timeline: Timeline, *, width: int = 100) -> str:
    """Lanes as lines, time from left to right; `width` characters for the time.

    A block shows its kind and micro-batch (`F3`) where it has room, else its letter; dots are idle
    time. F forward, B backward, I and W its halves, R recompute, A all-reduce.
    """
    drawing = chart(timeline)
    margin = max((len(name) for name in drawing.lanes), default=0)
    lines = [drawing.title, drawing.caption]
    for lane, name in enumerate(drawing.lanes):
        cells = ["·"] * width
        for block in drawing.blocks:
            if block.lane == lane:
                _draw(cells, block, drawing, width)
        lines.append(f"{name:<{margin}} |{''.join(cells)}|")
    return "\n".join(lines)


def _draw(cells: list[str], block: Block, drawing: Chart, width: int) -> None:
    scale = width / drawing.makespan_s
    first = min(round(block.start_s * scale), width - 1)
    last = max(first + 1, round(block.end_s * scale))
    letter = _LETTER.get(block.kind, block.kind[0].upper())
    room = last - first
    label = f"{letter}{block.text}" if len(block.text) + 1 < room else letter
    for i in range(first, min(last, width)):
        offset = i - first
        cells[i] = label[offset] if offset < len(label) else "─"
