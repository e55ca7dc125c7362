"""The paper's figures from the tables of a run; every one says that it is simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plan_bench.setting import Findings, graph_of, planned, summit
from weft.sim.render.svg import write_svg
from weft.sim.stage_executor import simulate

_COLORS = {
    "graphpipe": "#4c78a8",
    "parallel": "#9ebcda",
    "spp": "#59a14f",
    "pipedream": "#e0a458",
    "piper": "#b07aa1",
}
Rows = Sequence[dict[str, Any]]


def draw(found: Findings, folder: Path) -> list[Path]:
    """Write every figure whose table is there; needs matplotlib (the `bench` extra)."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    drawers: dict[str, tuple[str, Callable[[Any, Rows], None]]] = {
        "end-to-end (Fig. 6)": ("end_to_end", _end_to_end),
        "branches (Fig. 7 left)": ("branches", _branches),
        "micro-batch sizes (Fig. 7 right)": ("micro_batches", _micro_batches),
    }
    for title, rows in found.tables.items():
        name, drawer = drawers.get(title, ("", None))
        if title.startswith("ablation"):
            name, drawer = "ablation", _ablation
        if drawer is not None and rows:
            made.append(_figure(folder / f"{name}.png", title, rows, drawer))
    if "case study (§7.5)" in found.tables:
        made += _schedules(folder)
    return made


def _figure(path: Path, title: str, rows: Rows, drawer: Callable[[Any, Rows], None]) -> Path:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 3.6), dpi=130)
    drawer(figure, rows)
    figure.suptitle(f"{title}, simulated", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, facecolor="white")
    pyplot.close(figure)
    return path


def _end_to_end(figure: Any, rows: Rows) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    for i, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), i + 1)
        own = [row for row in rows if row["model"] == model]
        reading = "artifact" if any(row["reading"] == "artifact" for row in own) else "largest"
        chosen = [row for row in own if row["reading"] == reading]
        counts = sorted({row["devices_available"] for row in chosen})
        methods = list(dict.fromkeys(row["method"] for row in chosen))
        for j, method in enumerate(methods):
            heights = [
                max(
                    row["samples_per_s"]
                    for row in chosen
                    if row["method"] == method and row["devices_available"] == count
                )
                for count in counts
            ]
            places = [k + (j - len(methods) / 2 + 0.5) * 0.2 for k in range(len(counts))]
            axes.bar(places, heights, 0.19, label=method, color=_COLORS[method])
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_title(f"{model} ({reading} batch)", fontsize=9)
        axes.set_xlabel("devices")
        axes.set_ylabel("samples/s")
        if i == 0:
            axes.legend(fontsize=7, frameon=False)


def _branches(figure: Any, rows: Rows) -> None:
    axes = figure.add_subplot()
    for count in sorted({row["devices_available"] for row in rows}):
        own = [row for row in rows if row["devices_available"] == count]
        branches = sorted({row["branches"] for row in own})
        ratios = []
        for number in branches:
            rate = {row["method"]: row["samples_per_s"] for row in own if row["branches"] == number}
            ratios.append(rate["graphpipe"] / rate["pipedream"] if rate["pipedream"] else 0.0)
        axes.plot(branches, ratios, marker="o", label=f"{count} devices")
    axes.axhline(1.0, color="#8a9099", linewidth=0.8)
    axes.set_xlabel("branches")
    axes.set_ylabel("throughput over pipedream")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8, frameon=False)


def _micro_batches(figure: Any, rows: Rows) -> None:
    axes = figure.add_subplot()
    for method in ("graphpipe", "spp"):
        own = [row for row in rows if row["method"] == method and row["micro_batch"]]
        axes.plot(
            [row["micro_batch"] for row in own],
            [row["samples_per_s"] for row in own],
            marker="o",
            label=method,
            color=_COLORS[method],
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("micro-batch size")
    axes.set_ylabel("samples/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)


def _ablation(figure: Any, rows: Rows) -> None:
    axes = figure.add_subplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    for j, method in enumerate(("spp", "parallel", "graphpipe")):
        heights = []
        for model in models:
            rate = {row["method"]: row["samples_per_s"] for row in rows if row["model"] == model}
            heights.append(rate[method] / rate["spp"])
        places = [k + (j - 1) * 0.26 for k in range(len(models))]
        axes.bar(places, heights, 0.25, label=method, color=_COLORS[method])
    axes.set_xticks(range(len(models)), models)
    axes.set_ylabel("throughput over spp")
    axes.legend(fontsize=8, frameon=False)


def _schedules(folder: Path) -> list[Path]:
    """The case study's two schedules (Fig. 8 and 10), as charts."""
    made: list[Path] = []
    for method in ("graphpipe", "spp"):
        outcome = planned(method, graph_of("case-study"), summit(8), 64, micro_batches=(4,))
        if outcome.plan is not None:
            made.append(folder / f"case_study_{method}.svg")
            write_svg(simulate(outcome.plan), made[-1])
    return made
