"""Finetuning beside inference: what co-serving keeps, gains and promises, against its baselines.

`--cells sheet` compares the simulator with FlexLLM's published measurements; `simulated` runs the
cells under the virtual clock on step times of `--profile` (made by `weft profile --serve`), or on a
roofline of `--device`; `real` runs them in real time on the 110 M or the embedded model. Traces of
`--trace` have their lengths scaled to a mean prompt of 256 tokens; capacity is the highest rate at
which inference alone keeps both objectives for 99 % of the requests, and the loads are 30, 60 and
90 % of it.

    python benchmarks/coserve.py --cells sheet --json sheet.json
    python benchmarks/coserve.py --cells simulated --trace AzureLLMInferenceTrace_conv.csv \
        --profile profile.json --half-profile profile-1-thread.json --json coserve.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coserve_bench.cells import (
    FREQUENCIES,
    LOADS,
    Objectives,
    Outcome,
    Server,
    as_data,
    capacity,
    load_rows,
    objectives,
    outcome,
    run_load,
    trace_workload,
)
from coserve_bench.sheet import sheet_rows
from coserve_bench.simulated import SimulatedServer, endless_job, half_device
from rows import Row, describe_machine, print_rows, write_json

from weft.cluster.device_types import DEVICE_TYPES
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.shapes import load_shape
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.sim.serving_setup import ServingLimits, setup_from_profile, setup_from_shape
from weft.sim.workload import Workload

KEPT_TARGET = {"float32": 0.8, "bfloat16": 1.0}


def main() -> None:
    options = parse_options()
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10} {value}")
    rows: list[Row] = []
    more: dict[str, Any] = {}
    if "sheet" in options.cells:
        rows += sheet_rows()
    if "simulated" in options.cells:
        server, half = simulated_servers(options)
        rows += run_cells(server, half, options, more)
    if "real" in options.cells:
        # Imported here, so that the other cells run without torch.
        from coserve_bench.real import real_server

        rows += run_cells(real_server(options), None, options, more)
    print_rows(rows, title="co-serving (ours) against baselines (peer)")
    if options.json:
        write_json(options.json, rows, machine, **more)


def simulated_servers(options: argparse.Namespace) -> tuple[Server, Server | None]:
    """The server, and half of it for spatial sharing where half of it is known."""
    job = endless_job(options.sample_tokens, batch_size=options.batch_size)
    limits = ServingLimits(max_num_seqs=options.max_num_seqs, max_model_len=options.max_model_len)
    half = None
    if options.profile is not None:
        profile = StepTimeProfile.read(options.profile)
        server = SimulatedServer(
            f"{profile.model} {profile.dtype}", setup_from_profile(profile, limits=limits), job
        )
        if options.half_profile is not None:
            halved = StepTimeProfile.read(options.half_profile)
            half = SimulatedServer("half", setup_from_profile(halved, limits=limits), job)
        return server, half
    device, shape = DEVICE_TYPES[options.device], load_shape(options.model)
    setups = [
        setup_from_shape(shape, each, dtype=options.dtype, limits=limits)
        for each in (device, half_device(device))
    ]
    name = f"{options.model} {options.dtype} on {options.device}"
    return SimulatedServer(name, setups[0], job), SimulatedServer("half", setups[1], job)


def run_cells(
    server: Server, half: Server | None, options: argparse.Namespace, more: dict[str, Any]
) -> list[Row]:
    """Capacity, then every load."""
    workload = trace_workload(options.trace, options.num_requests)
    wanted = objectives(server.step_time, workload)
    rate = options.capacity or capacity(server, workload, wanted)
    alone = server.finetune_tokens_per_s()
    print(
        f"{server.name}: TPOT {wanted.tpot_s * 1e3:.0f} ms, capacity {rate:.3g} requests/s, "
        f"finetune-only {alone:,.0f} tokens/s"
    )
    rows: list[Row] = []
    outcomes: dict[str, Any] = {}
    for load in options.loads:
        at_load = workload.with_rate(rate * LOADS[load])
        print(f"{load} ({at_load.rate_per_s:.3g} requests/s)")
        found = run_load(server, at_load, wanted, frequencies=options.frequencies, say=print)
        spatial = None if half is None else run_spatial(half, at_load, wanted)
        if spatial is not None:
            print(
                f"  spatial: attainment {spatial.attainment:.1%}, finetuning "
                f"{spatial.finetune_tokens_per_s:,.0f} tokens/s"
            )
        rows += load_rows(
            f"{server.name} {load}",
            found,
            alone,
            spatial=spatial,
            kept_target=KEPT_TARGET["bfloat16" if "bfloat16" in server.name else "float32"],
            checks_attainment=load != "heavy",
            simulated=server.simulated,
        )
        outcomes[load] = as_data([*found, *([spatial] if spatial is not None else [])])
    more[server.name] = {
        "capacity_per_s": rate,
        "tpot_slo_s": wanted.tpot_s,
        "finetune_only_tokens_per_s": alone,
        "outcomes": outcomes,
    }
    return rows


def run_spatial(half: Server, workload: Workload, wanted: Objectives) -> Outcome:
    """Two processes with half of the machine each: one serves, the other finetunes."""
    config = FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY, slo=wanted.slo)
    served = outcome("spatial", half.run(workload, config, has_job=False), wanted)
    return Outcome(
        **{
            **as_data([served])[0],
            "finetune_tokens_per_s": half.finetune_tokens_per_s(),
        }
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cells", nargs="+", choices=["sheet", "simulated", "real"], default=["sheet"]
    )
    parser.add_argument("--trace", type=Path, help="Azure or BurstGPT CSV, or Mooncake JSONL")
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--frequencies", nargs="+", type=_frequency, default=list(FREQUENCIES))
    parser.add_argument("--capacity", type=float, help="requests/s instead of a search")
    parser.add_argument("--sample-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--profile", type=Path, help="step times instead of a roofline")
    parser.add_argument("--half-profile", type=Path, help="the same with half of the threads")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="a100-80")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--real-model", choices=["rand110", "embedded"], default="rand110")
    parser.add_argument("--profile-time-s", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--embedded-model", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".bench"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cells != ["sheet"] and options.trace is None:
        parser.error("--trace is needed for cells other than sheet")
    return options


def _frequency(text: str) -> int | None:
    return None if text == "dynamic" else int(text)


if __name__ == "__main__":
    main()
