"""Chain plans for other people's runtimes: torchtitan, Megatron-LM and torch's schedule CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from weft.graph.graph import Graph
from weft.plan.action import COMPUTE_KINDS
from weft.plan.layers import layer_segments
from weft.plan.schedule import Schedule
from weft.plan.train_plan import PlanError, TrainPlan


def module_fqns_per_model_part(plan: TrainPlan, graph: Graph) -> list[list[str]]:
    """torchtitan's `module_fqns_per_model_part`: the modules of every stage of a chain plan.

    A module is named at the shallowest level at which one stage holds all of it. Raises PlanError
    when the plan is no chain, or two stages share a module that holds operators of its own.
    """
    _require_chain(plan, "torchtitan")
    holders: dict[str, set[int]] = {}
    path_of: dict[str, str] = {}
    for op in graph.ops:
        path_of[op.id] = op.module_path
        parts = op.module_path.split(".") if op.module_path else []
        for length in range(1, len(parts) + 1):
            holders.setdefault(".".join(parts[:length]), set()).add(plan.stage_of[op.id])
    found: list[list[str]] = []
    for stage in plan.stages:
        names: list[str] = []
        for op in stage.ops:
            name = _owned_module(path_of[op], holders)
            if name is None:
                # Operators of no module (losses, glue) run wherever the runtime puts them.
                continue
            names.append(name)
        found.append(list(dict.fromkeys(names)))
    return found


def _owned_module(path: str, holders: dict[str, set[int]]) -> str | None:
    parts = path.split(".") if path else []
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        if len(holders[name]) == 1:
            return name
    return None


def megatron_layout(plan: TrainPlan, graph: Graph) -> str:
    """Megatron's `--pipeline-model-parallel-layout`: E embedding, t layer, L loss, | stage border.

    Runs of equal layers are written with `*`. Raises PlanError when the plan is no chain or cuts a
    layer in two.
    """
    _require_chain(plan, "Megatron-LM")
    segments = layer_segments(graph, range(len(graph.ops)))
    names = [[graph.ops[op].id for op in segment] for segment in segments]
    layers = [""] * plan.num_stages
    for number, segment in enumerate(names):
        holders = {plan.stage_of[op] for op in segment if _is_layer(graph, op)}
        if len(holders) > 1:
            raise PlanError(
                f"stages {sorted(holders)} share layer {number} ({segment[0]!r} ...): Megatron "
                "places whole layers; plan with KeepTogether for each layer"
            )
        stage = next(iter(holders), plan.stage_of[segment[0]])
        layers[stage] += "t"
    parts: list[str] = []
    for stage, body in enumerate(layers):
        text = f"t*{len(body)}" if len(body) > 1 else body
        text = ("E" if stage == 0 else "") + text + ("L" if stage == plan.num_stages - 1 else "")
        parts.append(text)
    return "|".join(parts)


def _is_layer(graph: Graph, op: str) -> bool:
    return any(part.isdigit() for part in graph.op_by_id[op].module_path.split("."))


def torch_schedule_csv(plan: TrainPlan, schedule: Schedule) -> str:
    """torch's schedule CSV ("compute_only"): a row per rank, a cell per forward or backward.

    torch adds messages itself (`_PipelineScheduleRuntime._load_csv`); its stages have one rank of
    the pipeline each, so data-parallel replicas share a row. Raises PlanError when the plan is no
    chain, or the schedule uses weight versions.
    """
    _require_chain(plan, "torch.distributed.pipelining")
    if not schedule.is_synchronous:
        raise PlanError(
            f"schedule {schedule.name!r} does not flush; torch's schedules do, so export 1f1b, "
            "gpipe, interleaved or zero-bubble"
        )
    groups = list(dict.fromkeys(stage.devices for stage in plan.stages))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for group in groups:
        program = schedule.program(group[0])
        writer.writerow(
            f"{action.stage}{action.kind}{action.micro_batch}"
            for action in program
            if action.kind in COMPUTE_KINDS
        )
    return text.getvalue()


def _require_chain(plan: TrainPlan, runtime: str) -> None:
    expected: Sequence[tuple[int, ...]] = [
        (stage + 1,) if stage + 1 < plan.num_stages else () for stage in range(plan.num_stages)
    ]
    for stage, (found, wanted) in enumerate(zip(plan.successors, expected, strict=True)):
        if found != wanted:
            raise PlanError(
                f"{runtime} runs chains of stages, but stage {stage} feeds {list(found)}; plan "
                "with method='spp' on a model without branches, or run it with Weft"
            )
    sizes = {stage.micro_batch for stage in plan.stages}
    if len(sizes) > 1:
        raise PlanError(
            f"{runtime} has one micro-batch size, the plan has {sorted(sizes)}; plan without "
            "per_stage_micro_batch"
        )
