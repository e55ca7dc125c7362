"""`weft profile --serve`: measure a model's iterations on this machine into a profile."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft.cli.console import stdout_console
from weft.cost.fitted_step_time import MeasuredStep, StepFit, StepTimeProfile
from weft.cost.online_step_time import REFIT_PARTS
from weft.cost.step_time import IterationShape
from weft.engine.pacing import slo_from
from weft.serve.step_times import kept_refits

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_FINETUNE_SAMPLES = 2
_BUSY_SPREAD = 0.15
"""Median spread of repetitions above which the machine was not quiet."""


@app.command()
def profile_serve(
    model: Annotated[
        str, typer.Argument(help="Model directory or hub id; default: the embedded")
    ] = "",
    out: Annotated[Path, typer.Option(help="File to write")] = Path("profile.json"),
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64 or auto")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a sequence")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most running sequences")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an iteration")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(help="Memory of keys and values")
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
    num_rounds: Annotated[int, typer.Option(help="Passes over all points")] = 5,
    time_limit_s: Annotated[float, typer.Option(help="No pass starts after this")] = 75.0,
    finetune: Annotated[
        bool, typer.Option(help="Also train an adapter of rank 16 on random tokens")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    serve: Annotated[bool, typer.Option("--serve", hidden=True)] = True,
) -> None:
    """Measure a model's iterations on this machine, fit them, and write the profile."""
    # Imported here, so that --help and wrong options answer without loading torch.
    import torch

    from weft.model.embedded import embedded_model_path
    from weft.runtime.build import ExecutorConfig, build_executor
    from weft.runtime.serve_profiler import ProfileConfig, processor_name, profile_serving

    built = build_executor(
        ExecutorConfig(
            model=model or str(embedded_model_path()),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_threads=num_threads,
            max_finetune_samples=_FINETUNE_SAMPLES if finetune else 0,
        )
    )
    resolved = built.resolved
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("measuring", total=1.0)
        profile = profile_serving(
            built.executor,
            ProfileConfig(
                max_model_len=resolved.max_model_len,
                max_num_batched_tokens=resolved.max_num_batched_tokens,
                num_rounds=num_rounds,
                time_limit_s=time_limit_s,
            ),
            model=resolved.model_path.name,
            dtype=str(resolved.dtype).removeprefix("torch."),
            device=f"{processor_name(resolved.device)}, {torch.get_num_threads()} threads",
            progress=lambda text, done: bar.update(task, description=text, completed=done),
        )
    built.executor.close()
    profile.write(out)
    spread = _median_spread(profile)
    if spread > _BUSY_SPREAD:
        print(
            f"warning: repetitions of the same iteration differ by {spread:.0%}: something else "
            "used this machine; measure again when it is quiet",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps(_summary(profile, out)))
    else:
        _print(profile, out)


def main(argv: list[str]) -> None:
    """Run the verb on its arguments; SystemExit on --help and on a wrong option."""
    app(args=argv, prog_name="weft profile --serve")


def _median_spread(profile: StepTimeProfile) -> float:
    spreads = [point.spread for point in profile.device_points if point.num_repeats > 1]
    return statistics.median(spreads) if spreads else 0.0


def _summary(profile: StepTimeProfile, out: Path) -> dict[str, Any]:
    residuals = profile.device_fit.residuals
    return {
        "out": str(out),
        "model": profile.model,
        "dtype": profile.dtype,
        "device": profile.device,
        "num_points": len(profile.device_points),
        "num_repeats": min(point.num_repeats for point in profile.device_points),
        "fit_error": {"median": residuals.median, "p95": residuals.p95, "max": residuals.max},
        "median_spread": _median_spread(profile),
        "decode_step_s": {
            str(point.shape.num_decode_rows): point.seconds
            for point in _shortest_decodes(profile.device_points)
        },
        "objectives": asdict(slo_from(profile)),
        "fit": {
            "constant_s": profile.device_fit.constant_s,
            "curves": {name: asdict(c) for name, c in profile.device_fit.curves.items()},
            "slopes_s": dict(profile.device_fit.slopes),
        },
        "refits": [
            {"file": str(kept.path), **asdict(refit)}
            for kept in kept_refits(profile)
            if (refit := kept.read()) is not None
        ],
        "settings": dict(profile.settings),
    }


def _shortest_decodes(points: tuple[MeasuredStep, ...]) -> list[MeasuredStep]:
    """For each number of decodes alone, the point with the least context."""
    best: dict[int, MeasuredStep] = {}
    for point in points:
        rows = point.shape.num_decode_rows
        if point.shape.num_prefill_rows or point.shape.has_finetuning or not rows:
            continue
        if (
            rows not in best
            or point.shape.decode_context_tokens < best[rows].shape.decode_context_tokens
        ):
            best[rows] = point
    return [best[rows] for rows in sorted(best)]


def _describe(shape: IterationShape) -> str:
    parts: list[str] = []
    if shape.num_decode_rows:
        context = shape.decode_context_tokens / shape.num_decode_rows
        parts.append(f"{shape.num_decode_rows} decodes at context {context:.0f}")
    if shape.num_prefill_rows:
        parts.append(f"{shape.num_prefill_rows} x {_chunk(shape)} prefill tokens")
    if shape.num_ft_tokens:
        parts.append(f"{shape.num_ft_tokens} tokens forward")
    if shape.num_ft_layer_rows:
        tokens = shape.num_ft_token_layers / shape.num_ft_layer_rows
        parts.append(f"{shape.num_ft_layer_rows} layers x {tokens:.0f} tokens backward")
    if shape.num_ft_steps:
        parts.append("optimizer step")
    return " + ".join(parts)


def _chunk(shape: IterationShape) -> int:
    return shape.num_prefill_tokens // max(shape.num_prefill_rows, 1)


def _print(profile: StepTimeProfile, out: Path) -> None:
    console = stdout_console()
    table = Table(title=f"{profile.model}, {profile.dtype}, {profile.device}")
    for column in ("iteration", "measured, ms", "fitted, ms", "spread"):
        table.add_column(column, justify="left" if column == "iteration" else "right")
    for point in profile.device_points:
        table.add_row(
            _describe(point.shape),
            f"{point.seconds * 1e3:.2f}",
            f"{profile.device_fit.seconds(point.shape) * 1e3:.2f}",
            f"{point.spread:.0%}",
        )
    console.print(table)
    residuals = profile.device_fit.residuals
    console.print(
        f"fit: median error {residuals.median:.1%}, p95 {residuals.p95:.1%}, "
        f"worst {residuals.max:.1%}"
        + (f" ({_describe(residuals.worst)})" if residuals.worst is not None else ""),
        highlight=False,
    )
    _print_fit(console, profile.device_fit)
    for line in _refit_lines(profile):
        console.print(line, highlight=False)
    slo = slo_from(profile)
    console.print(
        f"objectives that follow: {slo.tpot_s * 1e3:.1f} ms per output token, "
        f"{slo.ttft_s:g} s to the first or {slo.ttft_prefills:g} x the prompt alone",
        highlight=False,
    )
    console.print(f"wrote {out}", highlight=False)


def _refit_lines(profile: StepTimeProfile) -> list[str]:
    """What servers of this model have learnt about their own sweeps here."""
    lines: list[str] = []
    for kept in kept_refits(profile):
        refit = kept.read()
        if refit is None:
            continue
        parts = ", ".join(
            f"{part} x {factor:.2f}"
            for part, factor in zip(REFIT_PARTS, refit.factors, strict=True)
        )
        lines.append(
            f"refitted while serving ({refit.num_observed} iterations): {parts}; 95 % within "
            f"{refit.residual:.0%} above ({kept.path})"
        )
    return lines


def _print_fit(console: Console, fit: StepFit) -> None:
    """f(c, s): what each thing that an iteration carries adds to its time."""
    table = Table(title="the fit: seconds of an iteration are the sum of these")
    for column in ("term", "adds"):
        table.add_column(column)
    table.add_row("every iteration", f"{fit.constant_s * 1e3:.3f} ms")
    for name, curve in fit.curves.items():
        points = zip(curve.knots, curve.heights, strict=True)
        table.add_row(name, ", ".join(f"{at}: {height * 1e3:.2f} ms" for at, height in points))
    for name, slope in fit.slopes.items():
        if slope:
            table.add_row(name, f"{slope * 1e6:.4g} µs each")
    console.print(table)
