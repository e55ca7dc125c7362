"""Chain plans for other people's runtimes: torchtitan, Megatron-LM and torch's schedule CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from itertools import groupby

from weft.graph.graph import Graph, Op
from weft.plan.action import ActionKind
from weft.plan.constraints import KeepTogether
from weft.plan.schedule import Schedule
from weft.plan.train_plan import PlanError, TrainPlan

_TORCH_KINDS = frozenset({ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W})


def whole_layers(graph: Graph) -> tuple[KeepTogether, ...]:
    """Constraints that keep each layer in one stage, as torchtitan and Megatron-LM need it.

    A layer is a numbered child of a module list, the outermost one on an operator's path.
    """
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        for path in _module_paths(op):
            layer = _layer(path)
            if layer:
                found.setdefault(layer, []).append(op.id)
    return tuple(
        KeepTogether(ops=ops)
        for ops in (tuple(dict.fromkeys(names)) for names in found.values())
        if len(ops) > 1
    )


def module_fqns_per_model_part(plan: TrainPlan, graph: Graph) -> list[list[str]]:
    """torchtitan's `module_fqns_per_model_part`: the modules of every stage of a chain plan.

    Layers are named whole (`layers.3`), other modules at the shallowest level at which one stage
    holds all of it; operators of no module of their own (glue, losses) are left to the runtime.
    Raises PlanError when the plan is no chain or cuts a layer.
    """
    _require_chain(plan, "torchtitan")
    _require_whole_layers(plan, graph, "torchtitan")
    holders: dict[str, set[int]] = {}
    for op in graph.ops:
        for path in _module_paths(op):
            for prefix in _prefixes(path):
                holders.setdefault(prefix, set()).add(plan.stage_of[op.id])
    parts: list[dict[str, None]] = [{} for _ in plan.stages]
    for op in graph.ops:
        for path in _module_paths(op):
            name = _layer(path) or _owned_module(path, holders)
            if name:
                parts[plan.stage_of[op.id]][name] = None
    return [[*part] for part in parts]


def megatron_layout(plan: TrainPlan, graph: Graph) -> str:
    """Megatron's `--pipeline-model-parallel-layout`: E embedding, t layer, L loss, | new stage.

    Runs of layers are written with `*`. Raises PlanError when the plan is no chain, cuts a layer,
    or has layers in more than one module list.
    """
    _require_chain(plan, "Megatron-LM")
    stage_of_layer = _require_whole_layers(plan, graph, "Megatron-LM")
    lists = sorted({layer.rpartition(".")[0] for layer in stage_of_layer})
    if len(lists) != 1:
        named = f"those of {', '.join(lists)}" if lists else "none"
        raise PlanError(
            f"Megatron-LM lays out the layers of one module list, but graph {graph.name!r} has "
            f"{named}; export to torchtitan, or run the plan with Weft"
        )
    counts = [0] * plan.num_stages
    for stage in stage_of_layer.values():
        counts[stage] += 1
    parts: list[str] = []
    for stage, count in enumerate(counts):
        layers = f"t*{count}" if count > 1 else "t" * count
        first, last = "E" if stage == 0 else "", "L" if stage == plan.num_stages - 1 else ""
        parts.append(first + layers + last)
    return "|".join(parts)


def torch_schedule_csv(plan: TrainPlan, schedule: Schedule) -> str:
    """torch's schedule CSV ("compute_only"): a row per rank, a cell per forward or backward.

    torch adds messages itself (`_PipelineScheduleRuntime._load_csv`); its stages have one rank of
    the pipeline each, so data-parallel replicas share a row. Raises PlanError when the plan is no
    chain, has stages without a backward, or a schedule that does not flush.
    """
    _require_chain(plan, "torch.distributed.pipelining")
    if not schedule.is_synchronous:
        raise PlanError(
            f"schedule {schedule.name!r} does not flush; torch's schedules do, so export 1f1b, "
            "gpipe, interleaved or zero-bubble"
        )
    frozen = [stage.index for stage in plan.stages if stage.frozen]
    if frozen:
        raise PlanError(
            f"stages {frozen} are frozen and have no backward, but torch's schedules run one for "
            "every forward; run the plan with Weft"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for group in dict.fromkeys(stage.devices for stage in plan.stages):
        writer.writerow(
            f"{action.stage}{action.kind}{action.micro_batch}"
            for action in schedule.program(group[0])
            if action.kind in _TORCH_KINDS
        )
    return text.getvalue()


def _module_paths(op: Op) -> Iterator[str]:
    """Paths of the modules behind an operator or a block; ids of operators begin with theirs."""
    if not op.members:
        yield op.module_path
        return
    for path, _ in groupby(member.rpartition(":")[0].strip(".") for member in op.members):
        yield path


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _layer(path: str) -> str:
    """The outermost numbered module on a path, or nothing."""
    parts = path.split(".")
    for length, part in enumerate(parts[1:], 2):
        if part.isdigit():
            return ".".join(parts[:length])
    return ""


def _owned_module(path: str, holders: Mapping[str, set[int]]) -> str:
    return next((name for name in _prefixes(path) if len(holders[name]) == 1), "")


def _require_whole_layers(plan: TrainPlan, graph: Graph, runtime: str) -> dict[str, int]:
    """The stage of every layer; PlanError names one that is cut."""
    found: dict[str, int] = {}
    for op in graph.ops:
        if op.id not in plan.stage_of:
            raise PlanError(
                f"the plan has no operator {op.id!r} of graph {graph.name!r}; give the graph that "
                "was planned"
            )
        stage = plan.stage_of[op.id]
        for path in _module_paths(op):
            layer = _layer(path)
            if layer and found.setdefault(layer, stage) != stage:
                raise PlanError(
                    f"{runtime} places whole layers, but {layer!r} is cut between stages "
                    f"{found[layer]} and {stage} (at operator {op.id!r}); plan with the "
                    "constraints of whole_layers(graph)"
                )
    return found


def _require_chain(plan: TrainPlan, runtime: str) -> None:
    for stage, found in enumerate(plan.successors):
        wanted = (stage + 1,) if stage + 1 < plan.num_stages else ()
        if found != wanted:
            feeds = f"feeds stages {list(found)}" if found else "feeds no stage"
            raise PlanError(
                f"{runtime} runs chains of stages, but stage {stage} "
                f"({plan.stages[stage].ops[0]} ...) {feeds}; plan with method='spp' on a model "
                "without branches, or run the plan with Weft"
            )
    sizes = {stage.micro_batch for stage in plan.stages}
    if len(sizes) > 1:
        raise PlanError(
            f"{runtime} has one micro-batch size, the plan has {sorted(sizes)}; plan without "
            "per_stage_micro_batch"
        )
