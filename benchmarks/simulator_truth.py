"""Does the simulator tell the truth? One trace on the real engine and under the virtual clock.

The 110 M model serves 300 requests in real time, open loop; the simulator of
`weft simulate --serve` serves the same requests from a profile that was measured just before, as
`weft profile --serve` measures it. Both run the production policy and fill the same report. With
`--trace` the lengths are an Azure, BurstGPT or Mooncake trace's, scaled to a mean prompt of 256
tokens and clipped; without it, Poisson arrivals of 256 + 128 tokens. Arrivals come at `--load`
times the rate that the simulated server can sustain, so that queues form and drain.

    python benchmarks/simulator_truth.py --trace AzureLLMInferenceTrace_conv.csv --json truth.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
from pathlib import Path

from bench_models import open_model
from real_engine import build_engine, measure_profile, serve_in_real_time, warm_up
from rows import Row, describe_machine, print_rows, write_json

from weft.base.clock import WallClock
from weft.cost.fitted_step_time import StepTimeProfile
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.runtime.build import BuiltModel
from weft.sim.serving_report import ServingReport
from weft.sim.serving_setup import ServingLimits, ServingSetup, setup_from_profile
from weft.sim.trace_readers import read_trace
from weft.sim.workload import LengthRange, Workload, synthetic

PROMPT_RANGE = LengthRange(low=16, high=768)
OUTPUT_RANGE = LengthRange(low=4, high=128)
MEAN_PROMPT = 256
TOLERANCES = {
    "throughput": 0.10,
    "ttft p50": 0.15,
    "tpot p50": 0.15,
    "ttft p99": 0.25,
    "tpot p99": 0.25,
}


def main() -> None:
    options = parse_options()
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10} {value}")
    model = open_model(options.model, options.cache, options.embedded_model)
    built = build_engine(model, dtype=options.dtype, num_threads=options.threads)
    if options.profile is None:
        profile = measure_profile(
            built, model=options.model, dtype=options.dtype, time_limit_s=options.profile_time_s
        )
        profile.write(options.cache / f"profile-{options.model}-{options.dtype}.json")
    else:
        profile = StepTimeProfile.read(options.profile)
    setup = simulated_server(built, profile)
    workload = choose_workload(setup, options)
    print(
        f"{len(workload)} requests at {workload.rate_per_s:.3g}/s, mean prompt "
        f"{workload.num_prompt_tokens.mean():.0f}, mean output "
        f"{workload.num_output_tokens.mean():.0f} tokens; profile fit: median error "
        f"{setup.origin['fit_median_error']:.1%}, p95 {setup.origin['fit_p95_error']:.1%}"
    )
    gc.collect()
    gc.freeze()  # As the engine's process does.
    real = [real_run(built, workload) for _ in range(options.rounds)]
    simulated = setup.run(workload)
    rows = truth_rows(simulated, real, f"{options.model} {options.dtype}")
    print_rows(rows, title="simulated (ours) against real (peer)")
    if options.json:
        summaries = {"real": [r.summary() for r in real], "simulated": simulated.summary()}
        write_json(options.json, rows, machine, **summaries, settings=setup.settings())


def simulated_server(built: BuiltModel, profile: StepTimeProfile) -> ServingSetup:
    """The profile's step times, with exactly the pages and limits of the engine under test."""
    info, resolved = built.executor.info, built.resolved
    return setup_from_profile(
        profile,
        limits=ServingLimits(
            max_model_len=resolved.max_model_len,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            kv_cache_memory_bytes=info.num_pages * info.page_bytes,
            max_in_flight=built.executor.max_in_flight,
        ),
    )


def choose_workload(setup: ServingSetup, options: argparse.Namespace) -> Workload:
    """The trace's or drawn lengths, at a share of the simulated server's saturated rate."""
    if options.trace is None:
        workload = synthetic(
            options.num_requests,
            1.0,
            num_prompt_tokens=MEAN_PROMPT,
            num_output_tokens=OUTPUT_RANGE.high,
        )
    else:
        workload = (
            read_trace(options.trace)
            .first(options.num_requests)
            .with_mean_prompt(MEAN_PROMPT, prompt_range=PROMPT_RANGE, output_range=OUTPUT_RANGE)
        )
    rate_per_s = options.rate
    if rate_per_s is None:
        saturated = setup.run(workload.with_rate(1e6))
        rate_per_s = options.load * len(workload) / saturated.duration_s
    return workload.with_rate(rate_per_s)


def real_run(built: BuiltModel, workload: Workload) -> ServingReport:
    """Serve the workload in real time on the real executor, with a fresh policy."""
    config = PolicyConfig(
        max_model_len=built.resolved.max_model_len,
        max_num_batched_tokens=built.resolved.max_num_batched_tokens,
        eos_token_ids=tuple(built.generation.eos_token_ids),
    )
    info, clock = built.executor.info, WallClock()
    warm_up(built, ContinuousBatching(config, info, clock), workload)
    return serve_in_real_time(built, ContinuousBatching(config, info, clock), workload)


def figures(report: ServingReport) -> dict[str, float]:
    """The five figures that are compared, in the units of the row."""
    summary = report.summary()
    return {
        "throughput": summary["throughput_tokens_per_s"],
        "ttft p50": summary["ttft_s"]["p50"],
        "tpot p50": summary["tpot_s"]["p50"],
        "ttft p99": summary["ttft_s"]["p99"],
        "tpot p99": summary["tpot_s"]["p99"],
    }


def truth_rows(simulated: ServingReport, real: list[ServingReport], what: str) -> list[Row]:
    """Simulated over real: 1 is the truth, and each figure has its tolerance around it."""
    ours = figures(simulated)
    theirs = [figures(report) for report in real]
    rows: list[Row] = []
    for name, tolerance in TOLERANCES.items():
        ratios = [ours[name] / figure[name] for figure in theirs]
        rows.append(
            Row(
                claim=f"{what} {name}",
                unit="tokens/s" if name == "throughput" else "s",
                ours=ours[name],
                peer=statistics.median(figure[name] for figure in theirs),
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
                tolerance=tolerance,
                simulated=True,
            )
        )
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, help="Azure or BurstGPT CSV, or Mooncake JSONL")
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--model", choices=["rand110", "embedded"], default="rand110")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--profile", type=Path, help="a file instead of a fresh measurement")
    parser.add_argument("--profile-time-s", type=float, default=90.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the saturated rate")
    parser.add_argument("--rate", type=float, help="requests/s instead of --load")
    parser.add_argument("--rounds", type=int, default=1, help="real runs; the spread is theirs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--embedded-model", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".bench"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.cache = options.cache.resolve()
    options.cache.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
