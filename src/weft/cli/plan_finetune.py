"""`weft plan --finetune`: what a finetuning job takes, and how its bypasses are partitioned."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer
from rich.table import Table

from weft.cli.console import stdout_console
from weft.cluster.presets import load_cluster
from weft.cost.finetune_memory import (
    SHEET_BYTES,
    FinetuneBytes,
    FinetuneSetting,
    ablation,
    finetune_bytes,
    layer_widths,
)
from weft.cost.shapes import ModelShape, dtype_bytes, load_shape
from weft.engine.finetune import OptimizerName
from weft.graph.adapter_spec import AdapterKind, AdapterSpec, resolve_targets
from weft.graph.pruning import Remat
from weft.plan.bypass_partition import PartitionSetting, bypass_candidates
from weft.sim.render.layout import size

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_DEFAULT_TARGETS = {
    AdapterKind.LORA: "all-linear",
    AdapterKind.IA3: "k_proj,v_proj,down_proj",
    AdapterKind.BOTTLENECK: "self_attn,mlp",
}
_SHEET_COLUMNS = (AdapterKind.LORA, AdapterKind.BOTTLENECK, AdapterKind.IA3)
_OPTIMIZER_VALUES = {OptimizerName.ADAMW: 2, OptimizerName.SGD: 1}


@app.command(name="plan --finetune")
def plan_finetune(
    model: Annotated[str, typer.Argument(help="Shape name, model directory or config.json")],
    finetune: Annotated[bool, typer.Option("--finetune", hidden=True)] = True,
    seq_len: Annotated[int, typer.Option(help="Tokens of the longest sample")] = 2048,
    adapter: Annotated[AdapterKind, typer.Option("--kind", help="Kind")] = AdapterKind.LORA,
    rank: Annotated[int, typer.Option("--lora-rank", "--rank", help="Rank or width")] = 16,
    target_modules: Annotated[
        str | None, typer.Option(help="Names separated by commas, all-linear, or one pattern")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model")] = "bfloat16",
    num_samples: Annotated[int, typer.Option(help="Samples that hold state at once")] = 1,
    window: Annotated[int, typer.Option(help="Most tokens of a backward window")] = 256,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer")] = OptimizerName.ADAMW,
    qk_norm: Annotated[bool, typer.Option(help="Queries and keys are normed (Qwen3)")] = False,
    kv_tokens: Annotated[int, typer.Option(help="Tokens of KV cache kept for inference")] = 0,
    compare_sheet: Annotated[
        bool, typer.Option("--ablation", help="FlexLLM's memory figure beside ours")
    ] = False,
    tensor_parallel: Annotated[
        int, typer.Option(help="Partition the bypasses over this many devices")
    ] = 1,
    cluster: Annotated[str, typer.Option(help="Whose devices and links price that")] = "a100-80-8",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Report what a finetuning job takes, before anything is allocated."""
    shape = load_shape(model)
    spec = AdapterSpec(kind=adapter, rank=rank, target_modules=_targets(target_modules, adapter))
    report: dict[str, Any] = {
        "model": shape.name,
        "rows": _memory_rows(shape, spec, dtype, locals()),
    }
    if compare_sheet:
        report["ablation"] = _ablation_rows(shape, spec, seq_len, window)
    if tensor_parallel > 1:
        report["partition"] = _partition_rows(shape, spec, dtype, window, tensor_parallel, cluster)
    if as_json:
        print(json.dumps(report))
    else:
        _print_report(report)


def main(argv: list[str]) -> int:
    """Run on the arguments of `weft plan`; SystemExit on --help and on a wrong option."""
    app(args=argv, prog_name="weft plan --finetune")
    return 0


def _targets(text: str | None, kind: AdapterKind) -> tuple[str, ...] | str:
    text = _DEFAULT_TARGETS[kind] if text is None else text
    if text == "all-linear" or any(character in text for character in "*()[]\\|"):
        return text
    return tuple(part.strip() for part in text.split(","))


def _memory_rows(
    shape: ModelShape, spec: AdapterSpec, dtype: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for remat in Remat:
        job = finetune_bytes(
            shape,
            spec,
            FinetuneSetting(
                dtype=dtype,
                seq_len=options["seq_len"],
                num_samples=options["num_samples"],
                window=options["window"],
                remat=remat,
                qk_norm=options["qk_norm"],
                optimizer_values=_OPTIMIZER_VALUES[options["optimizer"]],
            ),
        )
        weights = shape.weight_bytes(dtype)
        kv = options["kv_tokens"] * shape.kv_bytes_per_token(dtype)
        rows.append(
            {
                "remat": remat.value,
                "weights": weights,
                "inference_kv": kv,
                **{part.name: getattr(job, part.name) for part in fields(FinetuneBytes)},
                "job_total": job.total,
                "total": weights + kv + job.total,
            }
        )
    return rows


def _ablation_rows(
    shape: ModelShape, spec: AdapterSpec, seq_len: int, window: int
) -> list[dict[str, Any]]:
    """Ours beside the figure's, with what each operator's tensors take of the difference."""
    column = _SHEET_COLUMNS.index(spec.kind)
    base = SHEET_BYTES["conventional"][column]
    setting = FinetuneSetting(dtype="float16", seq_len=seq_len, window=window)
    return [
        {
            **asdict(row),
            "sheet_bytes": SHEET_BYTES[row.variant][column],
            "sheet_saving": 1 - SHEET_BYTES[row.variant][column] / base,
        }
        for row in ablation(shape, spec, setting)
    ]


def _partition_rows(
    shape: ModelShape,
    spec: AdapterSpec,
    dtype: str,
    num_tokens: int,
    num_devices: int,
    cluster: str,
) -> list[dict[str, Any]]:
    machine = load_cluster(cluster)
    setting = PartitionSetting(
        num_devices=num_devices,
        num_tokens=num_tokens,
        device_type=machine.devices[0].type,
        link=machine.link(0, min(1, machine.num_devices - 1)),
        dtype=dtype,
        element_bytes=dtype_bytes(dtype),
    )
    targets = resolve_targets(spec, num_layers=shape.num_layers, widths=layer_widths(shape))
    rows: list[dict[str, Any]] = []
    for target in targets:
        if target.layer != targets[0].layer:
            break  # Every layer is partitioned alike.
        best, *others = bypass_candidates(target, setting)
        rows.append(
            {
                "module": target.module.value,
                "partition": best.name,
                "forward": list(best.forward),
                "backward": list(best.backward),
                "forward_us": best.forward_s * 1e6,
                "backward_us": best.backward_s * 1e6,
                "params_per_device": best.weight_params,
                "next_best": others[0].name if others else "",
            }
        )
    return rows


def _print_report(report: dict[str, Any]) -> None:
    console = stdout_console()
    table = Table(title=f"Finetuning {report['model']}: bytes on one device", title_justify="left")
    table.add_column("part")
    for row in report["rows"]:
        table.add_column(row["remat"], justify="right")
    for part in report["rows"][0]:
        if part != "remat":
            table.add_row(part.replace("_", " "), *(size(row[part]) for row in report["rows"]))
    console.print(table)
    if "ablation" in report:
        console.print(_ablation_table(report["ablation"]))
    if "partition" in report:
        console.print(_partition_table(report["partition"]))


def _ablation_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Activations, FlexLLM's variants (sheet: its figure)", title_justify="left")
    for name in ("variant", "ours", "saving", "sheet", "saving", "widths kept, a token and layer"):
        table.add_column(
            name, justify="left" if name.startswith(("variant", "widths")) else "right"
        )
    for row in rows:
        widths = ", ".join(f"{name} {width:g}" for name, width in row["widths"].items())
        table.add_row(
            row["variant"],
            size(row["activation_bytes"]),
            f"{row['saving']:.1%}",
            size(row["sheet_bytes"]),
            f"{row['sheet_saving']:.1%}",
            widths,
        )
    return table


def _partition_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Partition of each bypass (dependent parallelization)", title_justify="left"
    )
    for name in ("module", "partition", "forward", "backward", "next best"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["module"],
            row["partition"],
            f"{row['forward_us']:.1f} us {', '.join(row['forward'])}",
            f"{row['backward_us']:.1f} us {', '.join(row['backward'])}",
            row["next_best"],
        )
    return table
