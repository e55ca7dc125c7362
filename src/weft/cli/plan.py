"""`weft plan`: find a stage graph for a model on a cluster."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from weft.base.errors import ConfigError
from weft.cli.console import stdout_console
from weft.cli.parsing import check_outputs, whole_numbers
from weft.cli.pricing import load_cost, load_graph, load_training
from weft.cli.profile import parse_options
from weft.cluster.presets import load_cluster
from weft.graph.graph import Graph
from weft.plan.api import CONSTRAINED_METHODS, METHODS
from weft.plan.api import plan as make_plan
from weft.plan.constraints import Constraint, FixedStage, ForbidCut, ForceCut, KeepTogether, Pin
from weft.plan.constraints import freeze as keep_stages
from weft.plan.diff import diff
from weft.plan.explain import explain
from weft.plan.export import (
    megatron_layout,
    module_fqns_per_model_part,
    torch_schedule_csv,
    whole_layers,
)
from weft.plan.problem import Objective
from weft.plan.replay import step_time_s
from weft.plan.schedules import generate
from weft.plan.train_plan import TrainPlan
from weft.sim.render.layout import seconds, size
from weft.sim.stage_executor import simulate

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Export(StrEnum):
    """Runtimes that a chain plan can be written for."""

    TORCHTITAN = "torchtitan"
    MEGATRON = "megatron"
    TORCH_CSV = "torch-csv"


@app.command(name="plan")
def plan(
    model: Annotated[str, typer.Argument(help="Built-in name, or package.module:function")],
    cluster: Annotated[str, typer.Option(help="Cluster file or preset, such as summit-32")],
    batch_size: Annotated[int, typer.Option(help="Samples of one optimizer step")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}")] = "graphpipe",
    objective: Annotated[
        Objective, typer.Option(help="What the plan is chosen for")
    ] = Objective.STEP_TIME,
    training: Annotated[str, typer.Option(help="Training preset")] = "sgd-fp32",
    micro_batches: Annotated[
        str | None, typer.Option(help="Micro-batch sizes to try, separated by commas")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured prices, written by `weft profile`")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds to search; the best so far is marked")
    ] = None,
    k: Annotated[int, typer.Option(help="Forwards, then backwards, in a group (kFkB)")] = 1,
    per_stage_recompute: Annotated[
        bool, typer.Option(help="Each stage decides whether to recompute activations")
    ] = False,
    per_stage_micro_batch: Annotated[
        bool, typer.Option(help="Stages get micro-batches and k of their own where faster")
    ] = False,
    contention: Annotated[
        bool, typer.Option(help="Simulate candidates with messages queueing at links")
    ] = False,
    constraints: Annotated[
        Path | None,
        typer.Option(help="JSON list of constraints, as {kind: keep-together, ops: [...]}"),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(help="Keep stages of a plan: plan.json, or plan.json:0,2 for some of them"),
    ] = None,
    export: Annotated[
        Export | None, typer.Option(help="Print a chain plan for this runtime instead")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Print what differs from this plan")] = None,
    list_ops: Annotated[bool, typer.Option(help="Print the operators' ids and stop")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the model, as key=value; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Find a stage graph for MODEL on a cluster, and say what it costs (simulated)."""
    check_outputs(out=out)
    graph = load_graph(model, parse_options(option or []))
    if list_ops:
        names = [op.id for op in graph.ops]
        print(json.dumps({"rows": [{"op": n} for n in names]}) if as_json else "\n".join(names))
        return
    spec = load_training(training)
    wanted = load_constraints(constraints) + frozen_stages(freeze)
    if export in (Export.TORCHTITAN, Export.MEGATRON) and method in CONSTRAINED_METHODS:
        # These runtimes place whole layers.
        wanted += whole_layers(graph)

    def evaluate(candidate: TrainPlan) -> float:
        return simulate(candidate).step_time_s

    found = make_plan(
        graph,
        load_cluster(cluster),
        batch_size=batch_size,
        method=method,
        objective=objective,
        training=spec,
        micro_batches=_sizes(micro_batches),
        cost=load_cost(profile, spec),
        constraints=wanted,
        time_limit_s=time_limit,
        k=k,
        per_stage_recompute=per_stage_recompute,
        per_stage_micro_batch=per_stage_micro_batch,
        evaluate=evaluate if contention else step_time_s,
    )
    if out is not None:
        out.write_text(found.to_json())
    if export is not None:
        print(exported(found, graph, export), end="")
    elif against is not None:
        print(diff(TrainPlan.from_json(_read(against)), found))
    elif as_json:
        print(json.dumps({"simulated": True, "rows": [_row(found, contention)]}))
    else:
        print_plan(found, contention)


def main(argv: list[str] | None = None) -> int:
    """Run the verb: with --finetune anywhere, the report on a finetuning job."""
    if argv is not None and "--finetune" in argv:
        return import_module("weft.cli.plan_finetune").main(argv)
    app(args=argv, prog_name="weft plan")
    return 0


_KINDS: dict[str, Any] = {
    "keep-together": KeepTogether,
    "forbid-cut": ForbidCut,
    "force-cut": ForceCut,
    "pin": Pin,
    "fixed-stage": FixedStage,
}


def load_constraints(path: Path | None) -> tuple[Constraint, ...]:
    """Constraints from a JSON list; ConfigError names the entry that is wrong."""
    if path is None:
        return ()
    try:
        entries = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"constraints file {str(path)!r} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"constraints file {str(path)!r} must hold a list of objects")
    found: list[Constraint] = []
    for number, entry in enumerate(entries):
        fields = dict(entry) if isinstance(entry, dict) else {}
        kind = fields.pop("kind", None)
        if kind not in _KINDS:
            raise ConfigError(f"constraint {number} has kind {kind!r}; known: {', '.join(_KINDS)}")
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()
        }
        try:
            found.append(_KINDS[kind](**values))
        except TypeError:
            valid = ", ".join(_KINDS[kind].__dataclass_fields__)
            raise ConfigError(
                f"constraint {number} ({kind}) has keys {sorted(fields)}; it takes {valid}"
            ) from None
    return tuple(found)


def frozen_stages(text: str | None) -> tuple[Constraint, ...]:
    """Constraints that keep what `--freeze` names; ConfigError for a stage that is not there."""
    if text is None:
        return ()
    path, _, numbers = text.rpartition(":") if not text.endswith(".json") else (text, "", "")
    old = TrainPlan.from_json(_read(Path(path)))
    try:
        stages = [int(number) for number in numbers.split(",")] if numbers else None
    except ValueError:
        raise ConfigError(
            f"--freeze is {text!r}; give a plan, or a plan and stages as in plan.json:0,2"
        ) from None
    for stage in stages or ():
        if not 0 <= stage < old.num_stages:
            raise ConfigError(
                f"--freeze names stage {stage}; {path} has stages 0 to {old.num_stages - 1}"
            )
    return keep_stages(old, stages)


def exported(found: TrainPlan, graph: Graph, export: Export) -> str:
    """A chain plan in the form of another runtime."""
    if export is Export.TORCHTITAN:
        return json.dumps(module_fqns_per_model_part(found, graph)) + "\n"
    if export is Export.MEGATRON:
        return megatron_layout(found, graph) + "\n"
    return torch_schedule_csv(found, generate(found))


def print_plan(found: TrainPlan, contention: bool = False) -> None:
    """The plan as a table of stages, its simulated figures, and what binds it."""
    table = Table(
        title=f"{found.graph_name}, batch {found.batch_size}, on {found.cluster.name}: "
        f"{found.method}, stages: {found.num_stages}, depth: {found.depth}"
    )
    for column in ("stage", "first operator", "operators", "devices", "feeds"):
        table.add_column(column)
    for column in ("micro-batch", "in flight", "memory", "time of a micro-batch"):
        table.add_column(column, justify="right")
    for stage in found.stages:
        table.add_row(
            str(stage.index),
            stage.ops[0],
            str(len(stage.ops)),
            _ranges(stage.devices),
            ",".join(map(str, found.successors[stage.index])),
            str(stage.micro_batch),
            str(stage.in_flight),
            size(stage.memory_bytes),
            seconds(stage.micro_batch_s),
        )
    stdout_console().print(table)
    row = _row(found, contention)
    print(
        f"step {seconds(row['step_time_s'])}, {row['throughput_per_s']:,.4g} samples/s, bubble "
        f"{100 * row['bubble_fraction']:.1f} %, peak {size(row['peak_memory_bytes'])} (simulated); "
        f"search {seconds(found.search.search_time_s)}"
    )
    for sentence in explain(found).sentences:
        print(f"- {sentence}")


def _row(found: TrainPlan, contention: bool) -> dict[str, Any]:
    timeline = simulate(found, contention=contention)
    return {
        "method": found.method,
        "search_time_s": found.search.search_time_s,
        "step_time_s": timeline.step_time_s,
        "bottleneck_s": found.bottleneck_s,
        "throughput_per_s": timeline.throughput_per_s,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_memory_bytes": timeline.peak_memory_bytes,
        "num_stages": found.num_stages,
        "depth": found.depth,
        "micro_batch": found.micro_batch,
        "reason": "; ".join(found.notes),
    }


def _ranges(devices: tuple[int, ...]) -> str:
    if len(devices) > 1 and devices == tuple(range(devices[0], devices[-1] + 1)):
        return f"{devices[0]}-{devices[-1]}"
    return ",".join(map(str, devices))


def _sizes(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else whole_numbers(text, "--micro-batches")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from None
