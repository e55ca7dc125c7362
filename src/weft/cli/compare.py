"""`weft compare`: several planning methods on one model and cluster, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.table import Table

from weft.base.errors import ConfigError, WeftError
from weft.cli.console import stdout_console
from weft.cli.parsing import whole_numbers
from weft.cli.pricing import load_cost, load_graph, load_training
from weft.cli.profile import parse_options
from weft.cluster.cluster import Cluster
from weft.cluster.presets import load_cluster
from weft.cost.model import CostModel
from weft.cost.training import TrainingSpec
from weft.graph.graph import Graph
from weft.plan.api import METHODS, plan
from weft.plan.problem import Objective
from weft.plan.replay import step_time_s
from weft.plan.train_plan import TrainPlan
from weft.sim.render.layout import seconds, size
from weft.sim.stage_executor import simulate

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method's plan and its simulation; figures are None where it found no plan.

    `reason` says why there is no plan, or what is unusual about it.
    """

    method: str
    search_time_s: float | None
    step_time_s: float | None = None
    bottleneck_s: float | None = None
    throughput_per_s: float | None = None
    bubble_fraction: float | None = None
    peak_memory_bytes: int | None = None
    num_stages: int | None = None
    depth: int | None = None
    micro_batch: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods plan for."""

    graph: Graph
    cluster: Cluster
    cost: CostModel
    batch_size: int
    training: TrainingSpec
    objective: Objective = Objective.STEP_TIME
    micro_batches: tuple[int, ...] | None = None
    time_limit_s: float | None = None
    contention: bool = False


@app.command(name="compare")
def compare(
    model: Annotated[str, typer.Argument(help="Built-in name, or package.module:function")],
    cluster: Annotated[str, typer.Option(help="Cluster file or preset, such as summit-32")],
    batch_size: Annotated[int, typer.Option(help="Samples of one optimizer step")] = 64,
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas, of: {', '.join(METHODS)}")
    ] = "graphpipe,spp,pipedream,piper,megatron,2bw,data-parallel",
    objective: Annotated[
        Objective, typer.Option(help="What every method plans for")
    ] = Objective.STEP_TIME,
    training: Annotated[str, typer.Option(help="Training preset")] = "sgd-fp32",
    micro_batches: Annotated[
        str | None, typer.Option(help="Micro-batch sizes to try, separated by commas")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured prices, written by `weft profile`")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a method may search")] = None,
    contention: Annotated[
        bool, typer.Option(help="Plan and simulate with messages queueing at links")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the model, as key=value; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Plan MODEL by several methods and simulate every plan; all share one cost model."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--methods names no method; known: {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method {name!r} is unknown; known: {', '.join(METHODS)}")
    spec, sizes = load_training(training), _sizes(micro_batches)
    setting = Setting(
        graph=load_graph(model, parse_options(option or [])),
        cluster=load_cluster(cluster),
        cost=load_cost(profile, spec),
        batch_size=batch_size,
        training=spec,
        objective=objective,
        micro_batches=sizes,
        time_limit_s=time_limit,
        contention=contention,
    )
    rows = [row_of(name, setting) for name in names]
    if as_json:
        print(json.dumps({"simulated": True, "rows": [asdict(row) for row in rows]}))
    else:
        _print(rows, setting)


def main(argv: list[str]) -> None:
    """Run the verb on its arguments; SystemExit on --help and on a wrong option."""
    app(args=argv, prog_name="weft compare")


def row_of(method: str, setting: Setting) -> Row:
    """Plan by one method and simulate the plan; what cannot be planned gives a reason."""
    started_s = perf_counter()
    try:
        found = planned(method, setting)
    except WeftError as error:
        return Row(method=method, search_time_s=perf_counter() - started_s, reason=str(error))
    search_time_s = perf_counter() - started_s
    timeline = simulate(found, contention=setting.contention)
    notes = list(found.notes)
    if found.schedule == "2bw":
        notes.append("asynchronous: gradients are one step old")
    return Row(
        method=method,
        search_time_s=search_time_s,
        step_time_s=timeline.step_time_s,
        bottleneck_s=found.bottleneck_s,
        throughput_per_s=timeline.throughput_per_s,
        bubble_fraction=timeline.bubble_fraction,
        peak_memory_bytes=timeline.peak_memory_bytes,
        num_stages=found.num_stages,
        depth=found.depth,
        micro_batch=found.micro_batch,
        reason="; ".join(notes),
    )


def planned(method: str, setting: Setting) -> TrainPlan:
    """The plan of one method."""

    def evaluate(candidate: TrainPlan) -> float:
        return simulate(candidate).step_time_s

    return plan(
        setting.graph,
        setting.cluster,
        batch_size=setting.batch_size,
        method=method,
        objective=setting.objective,
        training=setting.training,
        micro_batches=setting.micro_batches,
        cost=setting.cost,
        time_limit_s=setting.time_limit_s,
        evaluate=evaluate if setting.contention else step_time_s,
    )


def _sizes(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else whole_numbers(text, "--micro-batches")


def _print(rows: Sequence[Row], setting: Setting) -> None:
    table = Table(
        title=f"{setting.graph.name}, batch {setting.batch_size}, on {setting.cluster.name}, "
        f"objective {setting.objective} (simulated)"
    )
    columns = ("method", "step time", "samples/s", "bubble", "peak memory")
    for column in (*columns, "stages", "depth", "micro-batch", "search"):
        justify = "left" if column == "method" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    best_s = min((row.step_time_s for row in rows if row.step_time_s is not None), default=None)
    ranked = sorted(rows, key=lambda row: (row.step_time_s is None, row.step_time_s or 0.0))
    for row in ranked:
        if row.step_time_s is None:
            table.add_row(row.method, *["–"] * 7, seconds(row.search_time_s or 0.0))
            continue
        times = "" if row.step_time_s == best_s else f" ({row.step_time_s / (best_s or 1):.2f}×)"
        table.add_row(
            row.method,
            seconds(row.step_time_s) + times,
            f"{row.throughput_per_s:,.4g}",
            f"{100 * (row.bubble_fraction or 0.0):.1f} %",
            size(row.peak_memory_bytes or 0),
            str(row.num_stages),
            str(row.depth),
            str(row.micro_batch),
            seconds(row.search_time_s or 0.0),
        )
    # A pipe or a file has no width to fit: a cut table is of no use there.
    console = stdout_console()
    console.print(table)
    for row in ranked:
        if row.reason:
            console.print(f"{row.method}: {row.reason}", highlight=False)
