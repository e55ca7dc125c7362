"""`weft compare-timeline`: what a run measured beside what the simulator said."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from weft.base.errors import ConfigError
from weft.cli.console import stdout_console
from weft.plan.train_plan import TrainPlan
from weft.sim.render.layout import seconds
from weft.sim.render.png import write_comparison
from weft.train.compare import Comparison, compare, last_step
from weft.train.run_dir import RunDirectory
from weft.train.timeline_file import read_timeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(name="compare-timeline")
def compare_timeline(
    run: Annotated[Path, typer.Argument(help="A run directory of `weft train --record`")],
    plan: Annotated[
        Path | None, typer.Argument(help="The plan to simulate; default: the run's own")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write both Gantt charts as a picture")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Print predicted and measured times of each action kind, and the error of the step time."""
    directory = RunDirectory(run)
    path = directory.plan if plan is None else plan
    try:
        planned = TrainPlan.from_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read plan {path}: {error.strerror}") from None
    measured, extra = read_timeline(directory.timeline)
    found = compare(planned, measured, extra.get("peak_in_flight", {}))
    if png is not None:
        write_comparison(
            (
                replace(found.predicted, name="predicted (simulated)"),
                replace(last_step(measured), name="measured (last step)"),
            ),
            png,
        )
    if as_json:
        print(json.dumps(_as_dict(found)))
    else:
        _print(found)


def main(argv: list[str]) -> int:
    """Run the verb; SystemExit on --help and on a wrong option."""
    app(args=argv, prog_name="weft compare-timeline")
    return 0


def _as_dict(found: Comparison) -> dict[str, object]:
    return {
        "predicted_step_time_s": found.predicted.step_time_s,
        "measured_step_time_s": found.measured.step_time_s,
        "step_time_error": found.step_time_error,
        "predicted_bubble_fraction": found.predicted.bubble_fraction,
        "measured_bubble_fraction": found.measured.bubble_fraction,
        "num_steps": found.measured.num_steps,
        "is_in_flight_as_planned": found.is_in_flight_as_planned,
        "kinds": [asdict(row) for row in found.kinds],
        "stages": [asdict(row) for row in found.stages],
    }


def _print(found: Comparison) -> None:
    console = stdout_console()
    table = Table(title="Device-seconds a step", title_justify="left")
    for name in ("action", "predicted (simulated)", "measured"):
        table.add_column(name, justify="left" if name == "action" else "right")
    for row in found.kinds:
        table.add_row(row.kind, seconds(row.predicted_s), seconds(row.measured_s))
    console.print(table)
    stages = Table(title="Micro-batches in flight, at most", title_justify="left")
    for name in ("stage", "planned", "measured"):
        stages.add_column(name, justify="right")
    for row in found.stages:
        stages.add_row(*map(str, (row.stage, row.planned_in_flight, row.measured_in_flight)))
    console.print(stages)
    console.print(
        f"step time: predicted {seconds(found.predicted.step_time_s)} (simulated), measured "
        f"{seconds(found.measured.step_time_s)} over {found.measured.num_steps} steps, error "
        f"{found.step_time_error:+.1%}; idle share {found.predicted.bubble_fraction:.0%} and "
        f"{found.measured.bubble_fraction:.0%}"
    )
