"""`weft explain`: say in words what binds a plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from weft.base.errors import ConfigError
from weft.cli.console import stdout_console
from weft.plan.explain import explain as explain_plan
from weft.plan.train_plan import TrainPlan
from weft.plan.validate import validate_plan
from weft.sim.render.layout import seconds, size

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(name="explain")
def explain(
    plan: Annotated[Path, typer.Argument(help="A plan, written by `weft plan --out`")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say what limits a plan's speed and where its memory goes."""
    try:
        text = plan.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {str(plan)!r}: {error.strerror}") from None
    found = explain_plan(validate_plan(TrainPlan.from_json(text)))
    if as_json:
        rows = [asdict(report) for report in found.stages]
        devices = [asdict(report) for report in found.devices]
        print(
            json.dumps(
                {
                    "rows": rows,
                    "devices": devices,
                    "binds": list(found.binds),
                    "sentences": list(found.sentences),
                }
            )
        )
        return
    table = Table()
    for column in ("stage", "first operator"):
        table.add_column(column)
    for column in ("devices", "per sample", "all-reduce", "in flight", "memory", "of device"):
        table.add_column(column, justify="right")
    for row in found.stages:
        table.add_row(
            f"{row.stage}{' *' if row.is_bottleneck else ''}",
            row.first_op,
            str(row.num_devices),
            seconds(row.compute_s_per_sample),
            seconds(row.all_reduce_s),
            str(row.num_in_flight),
            size(row.memory_bytes),
            f"{100 * row.memory_fraction:.0f} %",
        )
    stdout_console().print(table)
    for sentence in found.sentences:
        print(f"- {sentence}")


def main(argv: list[str] | None = None) -> int:
    """Run the verb on its arguments; SystemExit on --help and on a wrong option."""
    app(args=argv, prog_name="weft explain")
    return 0
