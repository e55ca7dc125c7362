"""A Gantt chart as SVG, written by hand: no library needed."""

from __future__ import annotations

from html import escape
from pathlib import Path

from weft.sim.render.layout import (
    COLORS,
    CRITICAL,
    FAINT,
    IDLE,
    INK,
    LABELS,
    Block,
    Chart,
    chart,
    seconds,
    ticks_s,
)
from weft.sim.timeline import Timeline

_LEFT, _TOP, _RIGHT, _BOTTOM = 190, 84, 24, 40
_LANE, _GAP = 26, 6
_FONT = 'font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"'


def svg(timeline: Timeline, *, width: int = 1200) -> str:
    """The chart as SVG text, `width` pixels wide; the critical path is outlined."""
    inner = width - _LEFT - _RIGHT
    drawing = chart(timeline, min_block_s=timeline.makespan_s / inner * 0.75)
    height = _TOP + len(drawing.lanes) * (_LANE + _GAP) + _BOTTOM
    scale = inner / drawing.makespan_s if drawing.makespan_s > 0 else 0.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" {_FONT} font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="600">{escape(drawing.title)}</text>',
        f'<text x="{_LEFT}" y="42" fill="{FAINT}">{escape(drawing.caption)}</text>',
        *_legend(drawing),
        *_axis(drawing, scale, height),
    ]
    for lane, name in enumerate(drawing.lanes):
        y = _y(lane)
        parts.append(
            f'<text x="{_LEFT - 10}" y="{y + _LANE / 2 + 4}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{inner}" height="{_LANE}" fill="{IDLE}"/>')
    parts += [_block(block, scale) for block in drawing.blocks if not block.is_critical]
    # Drawn last, so that neighbours do not cover the outline.
    parts += [_block(block, scale) for block in drawing.blocks if block.is_critical]
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_svg(timeline: Timeline, path: str | Path) -> None:
    """Write the chart to a file."""
    Path(path).write_text(svg(timeline))


def _y(lane: int) -> int:
    return _TOP + lane * (_LANE + _GAP)


def _block(block: Block, scale: float) -> str:
    x = _LEFT + block.start_s * scale
    width = max((block.end_s - block.start_s) * scale, 0.3)
    y = _y(block.lane)
    stroke = CRITICAL if block.is_critical else "#ffffff"
    line = (1.4 if block.is_critical else 0.5) if width > 3 else 0
    tip = f"{LABELS.get(block.kind, block.kind)} {block.text}: {seconds(block.start_s)} to "
    rect = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_LANE}" '
        f'fill="{COLORS.get(block.kind, FAINT)}" stroke="{stroke}" stroke-width="{line}">'
        f"<title>{escape(tip + seconds(block.end_s))}</title></rect>"
    )
    if width < 6.5 * len(block.text) + 3 or not block.text:
        return rect
    dark = block.kind in ("W", "RECOMPUTE", "fill", "REDUCE_GRAD")
    return rect + (
        f'<text x="{x + width / 2:.2f}" y="{y + _LANE / 2 + 4}" text-anchor="middle" '
        f'fill="{INK if dark else "#ffffff"}" pointer-events="none">{escape(block.text)}</text>'
    )


def _legend(drawing: Chart) -> list[str]:
    parts: list[str] = []
    x = float(_LEFT)
    for name, color, outline in [
        *((LABELS[kind], COLORS[kind], "") for kind in drawing.kinds),
        ("idle", IDLE, ""),
        ("critical path", "#ffffff", CRITICAL),
    ]:
        stroke = f' stroke="{outline}" stroke-width="1.4"' if outline else ""
        parts.append(f'<rect x="{x}" y="54" width="12" height="12" fill="{color}"{stroke}/>')
        parts.append(f'<text x="{x + 17}" y="64">{escape(name)}</text>')
        x += 17 + 6.4 * len(name) + 18
    return parts


def _axis(drawing: Chart, scale: float, height: int) -> list[str]:
    bottom = height - _BOTTOM + 4
    parts: list[str] = []
    for tick in ticks_s(drawing.makespan_s):
        x = _LEFT + tick * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" '
            f'stroke="#d5d8dd" stroke-width="0.6"/>'
        )
        label = "0" if tick == 0 else seconds(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="{FAINT}">'
            f"{escape(label)}</text>"
        )
    return parts
