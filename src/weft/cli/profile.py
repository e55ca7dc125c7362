"""`weft profile`: measure a model's blocks on this machine and write a profile file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from weft.base.durable import write_file
from weft.base.errors import ConfigError
from weft.cli import profile_serve
from weft.cli.console import stdout_console
from weft.cli.parsing import whole_numbers
from weft.cluster.presets import local_cluster

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="Built-in name, or package.module:function")],
    out: Annotated[Path, typer.Option(help="File to write")] = Path("profile.json"),
    batch_sizes: Annotated[
        str, typer.Option(help="Samples per run, rising, separated by commas")
    ] = "1,2,4,8,16,32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto")] = "auto",
    device_type: Annotated[
        str, typer.Option(help="Device type that the figures hold for (default: this machine's)")
    ] = "",
    max_blocks: Annotated[int, typer.Option(help="Blocks that the model is cut into")] = 150,
    num_repeats: Annotated[int, typer.Option(help="Runs behind each median")] = 5,
    slow_s: Annotated[
        float, typer.Option(help="No larger batch once a block takes this long")
    ] = 2.0,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the model, as key=value; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Measure each distinct block of MODEL forward and backward, and write the medians."""
    sizes = whole_numbers(batch_sizes, "--batch-sizes")
    options = parse_options(option or [])
    # Imported here, so that --help and wrong options answer without loading torch.
    import torch

    from weft.model.zoo.registry import resolve_model
    from weft.runtime.profiler import ProfilerConfig, profile_blocks

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True)
    captured = resolve_model(model, options).trace()
    measured = profile_blocks(
        captured,
        ProfilerConfig(
            batch_sizes=sizes,
            num_repeats=num_repeats,
            max_blocks=max_blocks,
            slow_s=slow_s,
            device=device,
        ),
        device_name=device_type or _local_device_type(device),
        progress=lambda done, total, name: console.print(f"[{done + 1}/{total}] {name}"),
    )
    write_file(out, measured.profile.to_json().encode())
    rows = [
        {
            "block": times.op_id,
            "num_uses": measured.num_uses[signature],
            "batch_size": size,
            "forward_s": times.forward_s[i],
            "backward_s": times.backward_s[i],
        }
        for signature, times in measured.profile.blocks.items()
        for i, size in enumerate(times.batch_sizes)
    ]
    if as_json:
        print(json.dumps({"out": str(out), "device": measured.profile.device, "rows": rows}))
    else:
        _print(rows, measured.profile.device, out)


def main(argv: list[str] | None = None) -> int:
    """Run the verb; with --serve it measures a serving engine's iterations instead of blocks."""
    if argv is not None and "--serve" in argv:
        profile_serve.main(argv)
        return 0
    app(args=argv, prog_name="weft profile")
    return 0


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs with values read as YAML scalars; keys may use dashes."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--option is {pair!r}; write key=value, as in num_layers=12")
        options[key.replace("-", "_")] = yaml.safe_load(value)
    return options


def _local_device_type(device: str) -> str:
    kind = local_cluster().devices[0].type.name
    return "cpu" if device == "cpu" else kind


def _print(rows: list[dict[str, Any]], device: str, out: Path) -> None:
    table = Table(title=f"Blocks on {device} (medians)")
    for heading in ("block", "uses", "batch", "forward ms", "backward ms"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for row in rows:
        table.add_row(
            str(row["block"]),
            str(row["num_uses"]),
            str(row["batch_size"]),
            f"{row['forward_s'] * 1e3:.3f}",
            f"{row['backward_s'] * 1e3:.3f}",
        )
    stdout_console().print(table)
    print(f"wrote {out}")
