"""`weft export`: an adapter merged into its base, as a model directory of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.base.errors import UnsupportedError
from weft.model.adapters.merge import merge_adapter

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(name="export")
def export(
    model: Annotated[str, typer.Option(help="Base model directory")],
    adapter: Annotated[Path, typer.Option(help="Adapter directory")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist, or be empty")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the base's weights")
    ] = False,
) -> None:
    """Write a model with an adapter merged in."""
    if not merge:
        raise UnsupportedError(
            "an adapter directory is in PEFT's format already; give --merge for a whole model"
        )
    num_merged = merge_adapter(Path(model), adapter, out)
    print(f"{num_merged} weights merged; the model is in {out}")


def main(argv: list[str]) -> int:
    """Parse and run; returns the exit code."""
    try:
        app(args=argv, prog_name="weft export")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
