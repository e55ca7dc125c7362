"""Replay a request trace on the real engine, in process and in real time (open loop).

The report is that of `weft simulate --serve`, by the same definitions: TTFT from arrival to the
first token, TPOT = (t_last - t_first) / (n_out - 1). `--trace-out` and `--requests-out` write the
same files. `simulator_truth.py` runs this beside the simulator and prints the ratios.

    python benchmarks/replay_trace.py MODEL_DIR --trace AzureLLMInferenceTrace_conv.csv \
        --num-requests 300 --mean-prompt 256 --rate 1.5
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

from simulator_truth import OUTPUT_RANGE, PROMPT_RANGE, real_run

from weft.runtime.build import ExecutorConfig, build_executor
from weft.sim.trace_readers import read_trace
from weft.sim.workload import Workload


def main() -> None:
    options = parse_options()
    built = build_executor(
        ExecutorConfig(
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            num_threads=options.threads,
        )
    )
    workload = choose_workload(options)
    gc.collect()
    gc.freeze()  # As the engine's process does.
    report = real_run(built, workload)
    if options.trace_out:
        report.trace().write(options.trace_out)
    if options.requests_out:
        options.requests_out.write_text(report.requests.to_csv(), encoding="utf-8")
    print(json.dumps(report.summary() | {"rate_per_s": workload.rate_per_s}, indent=1))


def choose_workload(options: argparse.Namespace) -> Workload:
    """The first requests of the trace, scaled and clipped as for the 110 M model, at the rate."""
    workload = read_trace(options.trace).first(options.num_requests)
    if options.mean_prompt is not None:
        workload = workload.with_mean_prompt(
            options.mean_prompt, prompt_range=PROMPT_RANGE, output_range=OUTPUT_RANGE
        )
    return workload.with_rate(options.rate) if options.rate is not None else workload


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--mean-prompt", type=float, help="scale lengths to this, and clip them")
    parser.add_argument("--rate", type=float, help="requests/s; default: the trace's own")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trace-out", type=Path)
    parser.add_argument("--requests-out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
