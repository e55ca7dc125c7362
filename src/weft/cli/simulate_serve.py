"""`weft simulate --serve`: a request trace through the production policy, in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from weft.base.errors import ConfigError
from weft.cli.console import stdout_console
from weft.cluster.device import Link
from weft.cluster.device_types import DEVICE_TYPES
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.shapes import load_shape
from weft.engine.finetune import FinetuneJobSpec, TrainingSample
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy, LatencySlo
from weft.graph.adapter_spec import AdapterSpec
from weft.sim.serving import CoServed
from weft.sim.serving_report import ServingReport
from weft.sim.serving_setup import (
    ServingLimits,
    ServingSetup,
    setup_from_profile,
    setup_from_shape,
)
from weft.sim.trace_readers import read_trace
from weft.sim.workload import LengthRange, Workload, synthetic

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DEFAULT_DEVICE = "h100"
_TRACE = "Request trace: Azure LLM CSV, BurstGPT CSV or Mooncake JSON lines"
_MODEL = "Name of a shape (llama-3.1-8b, ...), or a model directory or config.json"
_PROFILE = "Measured step times, from `weft profile --serve`; else a roofline of --device"


@app.command()
def simulate_serve(
    trace: Annotated[Path | None, typer.Option(help=_TRACE)] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    profile: Annotated[Path | None, typer.Option(help=_PROFILE)] = None,
    device: Annotated[
        str | None, typer.Option(help=f"Device type of the roofline (default {DEFAULT_DEVICE})")
    ] = None,
    num_devices: Annotated[
        int | None, typer.Option(help="Tensor-parallel devices of the roofline (default 1)")
    ] = None,
    link_bytes_per_s: Annotated[
        float | None, typer.Option(help="Bandwidth between them, one way (default 300e9)")
    ] = None,
    link_latency_s: Annotated[
        float | None, typer.Option(help="Latency of one message between them (default 5e-6)")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights and KV cache of the roofline (default bfloat16)")
    ] = None,
    host_overhead_s: Annotated[
        float | None, typer.Option(help="Policy and loop per iteration, with a roofline")
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(help="First N of the trace, or N drawn ones (default 1000)")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Mean requests/s; without --trace, of Poisson arrivals")
    ] = None,
    rate_scale: Annotated[float | None, typer.Option(help="Times the trace's own rate")] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(help="Draw arrivals with gamma gaps of this shape (1: Poisson); needs --rate"),
    ] = None,
    length_scale: Annotated[float, typer.Option(help="Times all lengths")] = 1.0,
    mean_prompt: Annotated[
        float | None, typer.Option(help="Scale all lengths to this mean prompt")
    ] = None,
    prompt_range: Annotated[
        str | None, typer.Option(help="Clip prompts to LOW:HIGH tokens")
    ] = None,
    output_range: Annotated[
        str | None, typer.Option(help="Clip outputs to LOW:HIGH tokens")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of drawn arrivals (default 0)")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a sequence")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most running sequences")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an iteration")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(help="Memory of keys and values")
    ] = None,
    max_in_flight: Annotated[
        int | None, typer.Option(help="Batches submitted before the oldest is collected")
    ] = None,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Share equal prompt starts")] = True,
    slo_ttft_s: Annotated[float | None, typer.Option(help="Report the share within both")] = None,
    slo_tpot_s: Annotated[float | None, typer.Option(help="Report the share within both")] = None,
    finetune: Annotated[
        FinetunePolicy | None,
        typer.Option(help="Run a finetuning job beside the requests, sharing iterations so"),
    ] = None,
    finetune_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each of its samples (default 512)")
    ] = None,
    finetune_batch_size: Annotated[
        int | None, typer.Option(help="Samples of an optimizer step (default 1)")
    ] = None,
    finetune_min_share: Annotated[
        float | None, typer.Option(help="coserve: least share of the time (default 0)")
    ] = None,
    max_iteration_ms: Annotated[
        float | None, typer.Option(help="coserve: longest iteration with finetuning (default 100)")
    ] = None,
    temporal_iterations: Annotated[
        int | None,
        typer.Option(help="temporal: inference iterations between samples; 0 adapts (default 64)"),
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option(help="budget: tokens of an iteration (default 256)")
    ] = None,
    budget_layers: Annotated[
        int | None, typer.Option(help="budget: backward layers of an iteration (default 1)")
    ] = None,
    trace_out: Annotated[Path | None, typer.Option(help="Write a Perfetto trace")] = None,
    requests_out: Annotated[Path | None, typer.Option(help="Write a CSV line a request")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    serve: Annotated[bool, typer.Option("--serve", hidden=True)] = True,
) -> None:
    """Replay a request trace through the production scheduler under the virtual clock."""
    workload = _workload(
        trace,
        num_requests=num_requests,
        rate=rate,
        rate_scale=rate_scale,
        burstiness=burstiness,
        seed=seed,
    )
    workload = _scaled(
        workload, length_scale, mean_prompt, prompt_range=prompt_range, output_range=output_range
    )
    limits = ServingLimits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_in_flight=max_in_flight,
        enable_prefix_caching=enable_prefix_caching,
    )
    roofline = {
        "device": device,
        "num_devices": num_devices,
        "link_bytes_per_s": link_bytes_per_s,
        "link_latency_s": link_latency_s,
        "dtype": dtype,
        "host_overhead_s": host_overhead_s,
    }
    given = {name: value for name, value in roofline.items() if value is not None}
    setup = _setup(model, profile, given, limits)
    settings = {
        "finetune_tokens": finetune_tokens,
        "finetune_batch_size": finetune_batch_size,
        "finetune_min_share": finetune_min_share,
        "max_iteration_ms": max_iteration_ms,
        "temporal_iterations": temporal_iterations,
        "budget_tokens": budget_tokens,
        "budget_layers": budget_layers,
    }
    co_served = _co_served(finetune, settings, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s)
    report = setup.run(workload, co_served)
    summary = _summary(report, setup, workload, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s)
    if trace_out is not None:
        report.trace().write(trace_out)
    if requests_out is not None:
        requests_out.write_text(report.requests.to_csv(), encoding="utf-8")
    if as_json:
        print(json.dumps(summary))
    else:
        _print(summary)


def main(argv: list[str]) -> None:
    """Run the verb on its arguments; SystemExit on --help and on a wrong option."""
    app(args=argv, prog_name="weft simulate --serve")


def _setup(
    model: str | None, profile: Path | None, roofline: dict[str, Any], limits: ServingLimits
) -> ServingSetup:
    if profile is not None:
        if roofline:
            names = ", ".join("--" + name.replace("_", "-") for name in roofline)
            raise ConfigError(f"a profile fixes what {names} would set; leave out one or the other")
        shape = load_shape(model) if model is not None else None
        return setup_from_profile(StepTimeProfile.read(profile), shape=shape, limits=limits)
    if model is None:
        raise ConfigError("name what to simulate: --model SHAPE, or --profile FILE, or both")
    device = roofline.get("device", DEFAULT_DEVICE)
    if device not in DEVICE_TYPES:
        raise ConfigError(f"unknown device {device!r}; known: {', '.join(DEVICE_TYPES)}")
    return setup_from_shape(
        load_shape(model),
        DEVICE_TYPES[device],
        dtype=roofline.get("dtype", "bfloat16"),
        num_devices=roofline.get("num_devices", 1),
        link=Link(
            bandwidth_bytes_per_s=roofline.get("link_bytes_per_s", 300e9),
            latency_s=roofline.get("link_latency_s", 5e-6),
        ),
        host_overhead_s=roofline.get("host_overhead_s", 0.0),
        limits=limits,
    )


def _workload(
    trace: Path | None,
    *,
    num_requests: int | None,
    rate: float | None,
    rate_scale: float | None,
    burstiness: float | None,
    seed: int | None,
) -> Workload:
    if seed is not None and trace is not None and burstiness is None:
        raise ConfigError("--seed draws arrivals; a trace needs it with --burstiness only")
    if rate is not None and rate_scale is not None:
        raise ConfigError("--rate and --rate-scale both set the rate; give one of them")
    if trace is None:
        if rate is None:
            raise ConfigError("name what arrives: --trace FILE, or --rate R for drawn arrivals")
        return synthetic(
            1000 if num_requests is None else num_requests,
            rate,
            burstiness=1.0 if burstiness is None else burstiness,
            seed=seed or 0,
        )
    workload = read_trace(trace)
    if num_requests is not None:
        workload = workload.first(num_requests)
    if burstiness is not None:
        if rate is None:
            raise ConfigError("--burstiness draws arrivals anew and needs --rate")
        return workload.with_arrivals(rate, burstiness=burstiness, seed=seed or 0)
    if rate is not None:
        return workload.with_rate(rate)
    return workload.with_rate_scaled(rate_scale) if rate_scale is not None else workload


def _scaled(
    workload: Workload,
    length_scale: float,
    mean_prompt: float | None,
    *,
    prompt_range: str | None,
    output_range: str | None,
) -> Workload:
    prompts, outputs = _range(prompt_range), _range(output_range)
    if mean_prompt is not None:
        if length_scale != 1.0:
            raise ConfigError("--mean-prompt and --length-scale both set lengths; give one")
        return workload.with_mean_prompt(mean_prompt, prompt_range=prompts, output_range=outputs)
    return workload.with_lengths_scaled(
        prompt_factor=length_scale,
        output_factor=length_scale,
        prompt_range=prompts,
        output_range=outputs,
    )


_OPTIONS_OF = {
    FinetunePolicy.COSERVE: ("finetune_min_share", "max_iteration_ms"),
    FinetunePolicy.TEMPORAL: ("temporal_iterations",),
    FinetunePolicy.BUDGET: ("budget_tokens", "budget_layers"),
}
"""What only one way of sharing understands."""
_MOST_SAMPLES = 100_000


def _co_served(
    policy: FinetunePolicy | None,
    settings: dict[str, Any],
    *,
    slo_ttft_s: float | None,
    slo_tpot_s: float | None,
) -> CoServed | None:
    """A job that outlasts the requests, and how it shares their iterations."""
    given = {name: value for name, value in settings.items() if value is not None}
    own = ("finetune_tokens", "finetune_batch_size")
    known = () if policy is None else (*own, *_OPTIONS_OF.get(policy, ()))
    ignored = ["--" + name.replace("_", "-") for name in given if name not in known]
    if ignored:
        raise ConfigError(
            f"{', '.join(ignored)} would set nothing: "
            + ("there is no --finetune" if policy is None else f"not with --finetune {policy}")
        )
    if policy is None:
        return None
    num_tokens = given.pop("finetune_tokens", 512)
    if num_tokens < 2:
        raise ConfigError(f"--finetune-tokens is {num_tokens}; a sample needs at least 2")
    sample = TrainingSample(
        token_ids=np.ones(num_tokens, np.int32), label_weights=np.ones(num_tokens, np.float32)
    )
    job = FinetuneJobSpec(
        id="job",
        adapter=AdapterSpec(),
        samples=(sample,) * _MOST_SAMPLES,
        batch_size=given.pop("finetune_batch_size", 1),
        shuffles=False,
    )
    if "finetune_min_share" in given:
        given["min_share"] = given.pop("finetune_min_share")
    if "max_iteration_ms" in given:
        given["max_iteration_s"] = given.pop("max_iteration_ms") / 1e3
    if "temporal_iterations" in given:
        given["temporal_iterations"] = given["temporal_iterations"] or None
    slo = None
    if slo_ttft_s is not None and slo_tpot_s is not None:
        slo = LatencySlo(tpot_s=slo_tpot_s, ttft_s=slo_ttft_s, ttft_prefills=0.0)
    elif slo_ttft_s is not None or slo_tpot_s is not None:
        raise ConfigError("--finetune needs both objectives: give --slo-ttft-s and --slo-tpot-s")
    return CoServed(config=FinetuneConfig(policy=policy, slo=slo, **given), jobs=(job,))


def _range(text: str | None) -> LengthRange | None:
    if text is None:
        return None
    low, separator, high = text.partition(":")
    if not (separator and low.isdigit() and high.isdigit()):
        raise ConfigError(f"length range is {text!r}; write LOW:HIGH, such as 16:768")
    return LengthRange(low=int(low), high=int(high))


def _summary(
    report: ServingReport,
    setup: ServingSetup,
    workload: Workload,
    *,
    slo_ttft_s: float | None,
    slo_tpot_s: float | None,
) -> dict[str, Any]:
    summary = report.summary() | {
        "workload": workload.name,
        "rate_per_s": workload.rate_per_s,
        "settings": setup.settings(),
    }
    if slo_ttft_s is not None or slo_tpot_s is not None:
        infinite = float("inf")
        summary["slo_attainment"] = report.attainment(
            ttft_s=infinite if slo_ttft_s is None else slo_ttft_s,
            tpot_s=infinite if slo_tpot_s is None else slo_tpot_s,
        )
    return summary


def _print(summary: dict[str, Any]) -> None:
    settings = summary["settings"]
    console = stdout_console()
    console.print(
        f"[bold]{settings['model']}[/bold] on {settings['device']}, {settings['dtype']}, step "
        f"times from a {settings['step_time']} (simulated)",
        highlight=False,
    )
    latency = Table(title="Latency, ms")
    for column in ("", "p50", "p90", "p99"):
        latency.add_column(column, justify="right" if column else "left")
    for key, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "inter-token")):
        values = summary[key].values()
        latency.add_row(label, *("-" if v is None else f"{v * 1e3:.1f}" for v in values))
    console.print(latency)
    counts = Table(title=f"{summary['workload']} at {summary['rate_per_s']:.3g} requests/s")
    counts.add_column("")
    counts.add_column("", justify="right")
    rows = [
        ("requests finished", f"{summary['num_finished']:,} of {summary['num_requests']:,}"),
        ("output tokens/s", f"{summary['throughput_tokens_per_s']:,.1f}"),
        ("simulated time, s", f"{summary['duration_s']:,.1f}"),
        ("device busy", f"{summary['busy_share']:.1%}"),
        ("KV peak", f"{summary['kv_peak_share']:.1%}"),
        ("prefix cache hits", f"{summary['prefix_cache_hit_share']:.1%}"),
        ("preemptions", f"{summary['num_preempted']:,}"),
    ]
    # Named only where they happened: most runs have none.
    rows += [
        (label, f"{summary[key]:,}")
        for key, label in (
            ("num_rejected", "rejected (longer than the context)"),
            ("num_truncated", "cut off by the context"),
            ("num_skipped", "trace rows without tokens, left out"),
        )
        if summary[key]
    ]
    if "finetune_tokens_per_s" in summary:
        rows += [
            ("finetuning tokens/s", f"{summary['finetune_tokens_per_s']:,.1f}"),
            ("optimizer steps", f"{summary['num_finetune_steps']:,}"),
        ]
    if "slo_attainment" in summary:
        rows.append(("within the SLO", f"{summary['slo_attainment']:.1%}"))
    for row in rows:
        counts.add_row(*row)
    console.print(counts)
