"""`weft simulate`: run a plan (or, with --serve, a serving trace) under the virtual clock."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from weft.base.errors import ConfigError
from weft.cli.console import stdout_console
from weft.cli.parsing import check_outputs
from weft.cluster.presets import load_cluster
from weft.plan.deadlock import check_deadlock
from weft.plan.reprice import on_cluster
from weft.plan.schedule import Schedule, parse_schedule
from weft.plan.schedules import SCHEDULES, generate
from weft.plan.train_plan import TrainPlan
from weft.plan.validate import validate_plan
from weft.sim.render.layout import seconds, size
from weft.sim.render.perfetto import write_perfetto
from weft.sim.render.png import write_png
from weft.sim.render.svg import write_svg
from weft.sim.render.text import text_grid
from weft.sim.repair import repair_in_flight
from weft.sim.stage_executor import simulate as run
from weft.sim.timeline import Timeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_SCHEDULE = f"One of {', '.join(SCHEDULES)}, or a file in the schedule grammar; default: the plan's"


@app.command(name="simulate")
def simulate(
    plan: Annotated[Path, typer.Argument(help="A plan, written by `weft plan --out`")],
    schedule: Annotated[str | None, typer.Option(help=_SCHEDULE)] = None,
    num_steps: Annotated[int | None, typer.Option(help="Optimizer steps to run")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Price messages on this cluster (file or preset) instead")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Price operators by this profile; needs --model")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The plan's MODEL, to price its operators again")
    ] = None,
    contention: Annotated[
        bool, typer.Option(help="Queue messages at links and network cards")
    ] = True,
    overlap: Annotated[bool, typer.Option(help="Compute while outputs leave")] = True,
    repair: Annotated[
        bool, typer.Option(help="Raise samples in flight where it shortens the step and fits")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the schedule's chart as SVG")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the chart as PNG (needs matplotlib)")
    ] = None,
    perfetto: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev")] = None,
    schedule_out: Annotated[
        Path | None, typer.Option(help="Write the schedule in the published grammar")
    ] = None,
    grid: Annotated[bool, typer.Option(help="Print the schedule as a grid")] = True,
    critical_path: Annotated[
        bool, typer.Option("--critical-path", help="Print what the step time consists of")
    ] = False,
    width: Annotated[int, typer.Option(help="Characters of the grid's time axis", min=10)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Run a plan under the virtual clock and report its step time, bubbles and memory."""
    check_outputs(svg=svg, png=png, perfetto=perfetto, schedule_out=schedule_out)
    priced = _priced(_read(plan), cluster, profile, model)
    if repair:
        priced = repair_in_flight(priced, contention=contention).plan
    chosen = _schedule(priced, schedule)
    check_deadlock(chosen)
    timeline = run(priced, chosen, num_steps=num_steps, contention=contention, overlap=overlap)
    if svg is not None:
        write_svg(timeline, svg)
    if png is not None:
        write_png(timeline, png)
    if perfetto is not None:
        write_perfetto(timeline, perfetto)
    if schedule_out is not None:
        schedule_out.write_text(chosen.to_text())
    if as_json:
        print(json.dumps(_summary(priced, timeline, critical_path)))
        return
    if grid:
        print(text_grid(timeline, width=width))
    _print(priced, timeline, critical_path)


def main(argv: list[str]) -> None:
    """Run the verb: with --serve anywhere, serving; else the simulation of a training plan."""
    if "--serve" in argv:
        import_module("weft.cli.simulate_serve").main(argv)
        return
    app(args=argv, prog_name="weft simulate")


def _read(path: Path) -> TrainPlan:
    try:
        return validate_plan(TrainPlan.from_json(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read plan {path}: {error.strerror}") from None


def _priced(
    plan: TrainPlan, cluster: str | None, profile: Path | None, model: str | None
) -> TrainPlan:
    """The plan, at other prices where the command line asks for them."""
    target = plan.cluster if cluster is None else load_cluster(cluster)
    if profile is not None and model is None:
        raise ConfigError(
            "--profile prices operators, which a plan does not list in full; add --model MODEL"
        )
    if model is not None:
        # Capture needs torch, which a simulation from a file alone never loads.
        return import_module("weft.cli.pricing").reprice_model(plan, model, profile, target)
    return plan if cluster is None else on_cluster(plan, target)


def _schedule(plan: TrainPlan, name: str | None) -> Schedule:
    if name is None or name in SCHEDULES:
        return generate(plan, name)
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"schedule {name!r} is neither a file nor one of {', '.join(SCHEDULES)}")
    return parse_schedule(path.read_text())


def _summary(plan: TrainPlan, timeline: Timeline, with_path: bool) -> dict[str, Any]:
    names = dict(zip(timeline.devices, timeline.device_names, strict=True))
    summary: dict[str, Any] = {
        "simulated": True,
        "schedule": timeline.name,
        "method": plan.method,
        "graph": plan.graph_name,
        "cluster": plan.cluster.name,
        "num_steps": timeline.num_steps,
        "step_time_s": timeline.step_time_s,
        "throughput_per_s": timeline.throughput_per_s,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_memory_bytes": timeline.peak_memory_bytes,
        "devices_over_capacity": [names[d] for d in timeline.devices_over_capacity],
        "num_stages": plan.num_stages,
        "depth": plan.depth,
        "num_actions": len(timeline),
        "num_messages": len(timeline.messages),
        "peak_memory_by_device": {
            names[device]: peak for device, peak in timeline.peak_memory_by_device.items()
        },
    }
    if with_path:
        summary["critical_path_s"] = _critical_seconds(timeline)
    return summary


def _critical_seconds(timeline: Timeline) -> dict[str, float]:
    """Seconds of the critical path by stage and kind, and what it spends on messages."""
    found: dict[str, float] = {}
    last_s = 0.0
    for row in timeline.critical_rows.tolist():
        action = timeline.actions[row]
        waiting_s = float(timeline.start_s[row]) - last_s
        duration_s = float(timeline.end_s[row] - timeline.start_s[row])
        for name, value in (
            ("messages", waiting_s),
            (f"stage {action.stage} {action.kind}", duration_s),
        ):
            if value > 0:
                found[name] = found.get(name, 0.0) + value
        last_s = float(timeline.end_s[row])
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _print(plan: TrainPlan, timeline: Timeline, with_path: bool) -> None:
    console = stdout_console()
    table = Table(title=f"{plan.graph_name} by {plan.method} on {plan.cluster.name} (simulated)")
    for column in ("step time", "samples/s", "bubble", "peak memory", "stages", "depth"):
        table.add_column(column, justify="right")
    table.add_row(
        seconds(timeline.step_time_s),
        f"{timeline.throughput_per_s:,.4g}",
        f"{100 * timeline.bubble_fraction:.1f} %",
        size(timeline.peak_memory_bytes),
        str(plan.num_stages),
        str(plan.depth),
    )
    console.print(table)
    names = dict(zip(timeline.devices, timeline.device_names, strict=True))
    for device in timeline.devices_over_capacity:
        capacity = plan.cluster.devices[device].type.memory_bytes
        console.print(
            f"device {names[device]} needs {size(timeline.peak_memory_by_device[device])} of its "
            f"{size(capacity)}"
        )
    if with_path:
        path = Table(title="Critical path")
        path.add_column("what")
        path.add_column("time", justify="right")
        path.add_column("share", justify="right")
        for name, value in _critical_seconds(timeline).items():
            path.add_row(name, seconds(value), f"{100 * value / timeline.makespan_s:.1f} %")
        console.print(path)
