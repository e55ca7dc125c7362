"""A Gantt chart as PNG (or any format of matplotlib, the `plots` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from weft.base.errors import UnsupportedError
from weft.sim.render.layout import (
    COLORS,
    CRITICAL,
    FAINT,
    IDLE,
    INK,
    LABELS,
    Chart,
    chart,
    seconds,
    ticks_s,
)
from weft.sim.timeline import Timeline


def write_png(timeline: Timeline, path: str | Path, *, width_in: float = 12.0) -> None:
    """Write the chart as a picture; the file's suffix chooses the format.

    Raises UnsupportedError when matplotlib is not installed.
    """
    write_comparison((timeline,), path, width_in=width_in)


def write_comparison(
    timelines: Sequence[Timeline], path: str | Path, *, width_in: float = 12.0
) -> None:
    """Write the charts of several timelines below each other, on one scale of time.

    Raises UnsupportedError when matplotlib is not installed.
    """
    plt = _pyplot()
    span = max(timeline.makespan_s for timeline in timelines) or 1.0
    drawings = [chart(timeline, min_block_s=span / (width_in * 90)) for timeline in timelines]
    heights_in = [1.4 + 0.34 * len(drawing.lanes) for drawing in drawings]
    figure, rows = plt.subplots(
        len(drawings),
        figsize=(width_in, sum(heights_in)),
        dpi=150,
        squeeze=False,
        gridspec_kw={"height_ratios": heights_in, "hspace": 0.5},
    )
    for (axes,), drawing in zip(rows, drawings, strict=True):
        _draw(axes, drawing, span, width_in * 0.8)
        _decorate(plt, axes, drawing, span)
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _draw(axes: Any, drawing: Chart, span: float, inner_in: float) -> None:
    for lane in range(len(drawing.lanes)):
        axes.broken_barh([(0, span)], (lane - 0.4, 0.8), facecolors=IDLE, zorder=0)
    for block in drawing.blocks:
        length_s = block.end_s - block.start_s
        wide = length_s / span * inner_in > 0.03
        axes.broken_barh(
            [(block.start_s, length_s)],
            (block.lane - 0.4, 0.8),
            facecolors=COLORS.get(block.kind, FAINT),
            edgecolors=CRITICAL if block.is_critical else "white",
            linewidth=(1.2 if block.is_critical else 0.4) if wide else 0,
            zorder=3 if block.is_critical else 2,
        )
        if block.text and length_s / span * inner_in > 0.07 * len(block.text) + 0.02:
            dark = block.kind in ("W", "RECOMPUTE", "fill", "REDUCE_GRAD")
            axes.text(
                (block.start_s + block.end_s) / 2,
                block.lane,
                block.text,
                ha="center",
                va="center",
                fontsize=7,
                color=INK if dark else "white",
                zorder=4,
            )


def _decorate(plt: Any, axes: Any, drawing: Chart, span: float) -> None:
    axes.set_xlim(0, span)
    axes.set_ylim(len(drawing.lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(drawing.lanes)), drawing.lanes, fontsize=8)
    ticks = ticks_s(span)
    axes.set_xticks(ticks, ["0" if t == 0 else seconds(t) for t in ticks], fontsize=8)
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(axis="x", color="#d5d8dd", linewidth=0.5, zorder=1)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    patch = plt.matplotlib.patches.Patch
    handles = [patch(facecolor=COLORS[k], label=LABELS[k]) for k in drawing.kinds]
    handles += [
        patch(facecolor=IDLE, label="idle"),
        patch(facecolor="white", edgecolor=CRITICAL, label="critical path"),
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handlelength=1.1,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    axes.annotate(
        drawing.title,
        (0, 1),
        (0, 36),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    axes.annotate(
        drawing.caption,
        (0, 1),
        (0, 23),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )


def _pyplot() -> Any:
    try:
        matplotlib = import_module("matplotlib")
    except ImportError:
        raise UnsupportedError(
            "PNG charts need matplotlib, which is not installed; install the extra "
            "(`pip install 'weft[plots]'`), or write SVG, which needs nothing"
        ) from None
    matplotlib.use("Agg")
    return import_module("matplotlib.pyplot")
