"""Finetuning beside inference: what co-serving keeps, gains and promises, against its baselines.

`--cells sheet` compares the simulator with FlexLLM's published measurements; `simulated` runs the
cells under the virtual clock on step times of `--profile` (made by `weft profile --serve`), or on a
roofline of `--device`; `real` runs them in real time on the 110 M or the embedded model. Traces of
`--trace` have their lengths scaled to a mean prompt of 256 tokens; capacity is the highest rate at
which inference alone keeps both objectives for 99 % of the requests, and the loads are 30, 60 and
90 % of it. Every (load, policy) is a cell; a command may run any of them, and keeps capacity,
profile and finetune-only speed in `--state` for the next. `--merge` puts the files of several
commands together.

    python benchmarks/coserve.py --cells sheet --json sheet.json
    python benchmarks/coserve.py --cells simulated --trace AzureLLMInferenceTrace_conv.csv \
        conversation_trace.jsonl --jobs 4x512 1x2048 --json simulated.json
    python benchmarks/coserve.py --cells real --real-model embedded --dtype float32 --trace AZURE \
        --loads light --policies inference-only coserve --json light.json
    python benchmarks/coserve.py --cells real --real-model embedded --dtype float32 --trace AZURE \
        --loads light --policies spatial --json light-spatial.json
    python benchmarks/coserve.py --merge light.json light-spatial.json --markdown coserve-cpu.md
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coserve_bench.cells import (
    LOADS,
    SPATIAL,
    Objectives,
    Outcome,
    Server,
    as_data,
    capacity,
    cell_rows,
    line,
    objectives,
    outcome,
    policies,
    run_policy,
    trace_workload,
)
from coserve_bench.sheet import sheet_rows
from coserve_bench.simulated import SimulatedServer, endless_job, half_device
from rows import Row, describe_machine, print_rows, write_json

from weft.cluster.device_types import DEVICE_TYPES
from weft.cost.fitted_step_time import StepTimeProfile
from weft.cost.shapes import load_shape
from weft.engine.finetune import FinetuneJobSpec
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.sim.serving_setup import ServingLimits, setup_from_profile, setup_from_shape
from weft.sim.workload import Workload

TITLE = "co-serving (ours) against baselines (peer)"
Cell = dict[str, Any]


def main() -> None:
    options = parse_options()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    if options.finetune_worker:
        from coserve_bench.real import finetune_worker

        finetune_worker(options)
        return
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10} {value}")
    rows: list[Row] = sheet_rows() if "sheet" in options.cells else []
    cells: list[Cell] = []
    if options.merge:
        rows, cells = merged(options.merge)
    if "simulated" in options.cells:
        for trace in options.trace:
            for job in options.jobs:
                cells += simulated_cells(trace, job, options)
    if "real" in options.cells:
        cells += real_cells(options)
    rows += [row for cell in cells for row in cell_rows(cell)]
    print_rows(rows, title=TITLE)
    if options.json:
        write_json(options.json, rows, machine, cells=cells)
    if options.markdown:
        options.markdown.write_text(markdown(rows, cells, machine), encoding="utf-8")


# ---- simulated ----


def simulated_cells(trace: Path, job_text: str, options: argparse.Namespace) -> list[Cell]:
    """All loads of one trace and one shape of steps."""
    server, half = simulated_servers(options, job_of(job_text))
    server.name += f", {trace_name(trace)}, steps of {job_text}"
    workload = trace_workload(trace, options.num_requests)
    wanted = objectives(server.step_time, workload)
    rate = options.capacity or capacity(server, workload, wanted)
    alone = server.finetune_tokens_per_s()
    say_server(server, wanted, rate, alone)
    cells: list[Cell] = []
    for load in options.loads:
        at_load = workload.with_rate(rate * LOADS[load])
        print(f"{load} ({at_load.rate_per_s:.3g} requests/s)")
        found = [run_and_say(server, at_load, wanted, name) for name in options.policies]
        if half is not None and options.with_spatial:
            found.append(run_spatial(half, at_load, wanted))
            print(f"  {line(found[-1])}")
        cells.append(
            cell_of(server.name, load, at_load, wanted, rate, alone, found, options.dtype, True)
        )
    return cells


def simulated_servers(
    options: argparse.Namespace, job: FinetuneJobSpec
) -> tuple[SimulatedServer, SimulatedServer | None]:
    """The server, and half of it for spatial sharing where half of it is known."""
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


def run_spatial(half: Server, workload: Workload, wanted: Objectives) -> Outcome:
    """Two processes with half of the machine each: one serves, the other finetunes."""
    config = FinetuneConfig(policy=FinetunePolicy.INFERENCE_ONLY, slo=wanted.slo)
    served = outcome(SPATIAL, half.run(workload, config, has_job=False), wanted)
    return Outcome(**{**asdict(served), "finetune_tokens_per_s": half.finetune_tokens_per_s()})


# ---- real ----


def real_cells(options: argparse.Namespace) -> list[Cell]:
    """Cells of the real engine; what was found out before comes from `--state`."""
    # Imported here, so that the other cells run without torch.
    from coserve_bench.real import real_server, run_spatial_real

    job = job_of(options.jobs[0])
    name = f"{options.real_model} {options.dtype}, {trace_name(options.trace[0])}, "
    name += f"steps of {options.jobs[0]}"
    state = read_state(options.state)
    known: dict[str, Any] = state.setdefault(name, {})
    profile_path = options.profile or options.cache / f"profile-ft-{name.split(',')[0]}.json"
    workload = trace_workload(options.trace[0], options.num_requests)
    cells: list[Cell] = []
    if options.policies == [SPATIAL]:
        if "capacity_per_s" not in known:
            raise SystemExit("spatial cells need a capacity: run another policy first")
        wanted = objectives(StepTimeProfile.read(profile_path), workload)
        server: Server | None = None
    else:
        real = real_server(options, job, profile_path)
        real.name = name
        server = real
        wanted = objectives(real.step_time, workload)
        if options.capacity:
            known["capacity_per_s"] = options.capacity
        if "capacity_per_s" not in known:
            few = workload.first(options.capacity_requests)
            few_wanted = objectives(real.step_time, few)
            known["capacity_per_s"] = capacity(real, few, few_wanted, rounds=4)
        # Also where it is known: kernels are compiled when they are first met.
        alone = real.finetune_tokens_per_s()
        known.setdefault("finetune_only_tokens_per_s", alone)
        write_state(options.state, state)
        say_server(real, wanted, known["capacity_per_s"], known["finetune_only_tokens_per_s"])
    rate, alone = known["capacity_per_s"], known["finetune_only_tokens_per_s"]
    for load in options.loads:
        at_load = workload.with_rate(rate * LOADS[load])
        print(f"{load} ({at_load.rate_per_s:.3g} requests/s)", flush=True)
        if server is None:
            found = [run_spatial_real(options, job, at_load, wanted)]
            print(f"  {line(found[0])}", flush=True)
        else:
            found = [run_and_say(server, at_load, wanted, policy) for policy in options.policies]
        cells.append(cell_of(name, load, at_load, wanted, rate, alone, found, options.dtype, False))
    return cells


def read_state(path: Path) -> dict[str, Any]:
    """What earlier commands found out, by server."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """For later commands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


# ---- both ----


def run_and_say(server: Server, workload: Workload, wanted: Objectives, policy: str) -> Outcome:
    """One cell, printed when it is done."""
    found = run_policy(server, workload, wanted, policy)
    print(f"  {line(found)}", flush=True)
    return found


def say_server(server: Server, wanted: Objectives, rate: float, alone: float) -> None:
    """One line."""
    print(
        f"{server.name}: TPOT {wanted.tpot_s * 1e3:.0f} ms, capacity {rate:.3g} requests/s, "
        f"finetune-only {alone:,.0f} tokens/s",
        flush=True,
    )


def cell_of(
    server: str,
    load: str,
    workload: Workload,
    wanted: Objectives,
    rate: float,
    alone: float,
    found: Sequence[Outcome],
    dtype: str,
    simulated: bool,
) -> Cell:
    """A cell's file."""
    return {
        "server": server,
        "simulated": simulated,
        "dtype": dtype,
        "load": load,
        "rate_per_s": workload.rate_per_s,
        "capacity_per_s": rate,
        "tpot_slo_s": wanted.tpot_s,
        "finetune_only_tokens_per_s": alone,
        "outcomes": as_data(found),
    }


def merged(paths: Sequence[Path]) -> tuple[list[Row], list[Cell]]:
    """Rows that belong to no cell, and cells with the outcomes of all files; the last one wins."""
    rows: list[Row] = []
    cells: dict[tuple[str, str], Cell] = {}
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not data["cells"]:
            rows += [Row(**row) for row in data["rows"]]
        for cell in data["cells"]:
            known = cells.setdefault((cell["server"], cell["load"]), {**cell, "outcomes": []})
            names = [o["policy"] for o in cell["outcomes"]]
            kept = [o for o in known["outcomes"] if o["policy"] not in names]
            known["outcomes"] = [*kept, *cell["outcomes"]]
    return rows, list(cells.values())


def markdown(rows: Sequence[Row], cells: Sequence[Cell], machine: dict[str, str]) -> str:
    """Tables for a results page."""
    lines = [f"{name}: {value}  " for name, value in machine.items()]
    lines += [
        "",
        "| claim | unit | ours | peer | ratio | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = {None: "", True: "met", False: "**missed**"}[row.is_met]
        mark = "simulated: " if row.simulated else ""
        lines.append(
            f"| {mark}{row.claim} | {row.unit} | {row.ours:.4g} | {row.peer:.4g} | "
            f"{row.ratio:.2f} | {row.promise} | {met} |"
        )
    for cell in cells:
        mark = ", simulated" if cell["simulated"] else ""
        lines += [
            "",
            f"### {cell['server']}, {cell['load']}{mark}",
            f"{cell['rate_per_s']:.3g} of {cell['capacity_per_s']:.3g} requests/s, TPOT "
            f"{cell['tpot_slo_s'] * 1e3:.0f} ms, finetune-only "
            f"{cell['finetune_only_tokens_per_s']:,.0f} tokens/s",
            "",
            "| policy | requests | within SLO | finetuning tokens/s | busy | finetuning's share | "
            "TPOT p50, p99 ms | ITL p99 ms | TTFT p99 ms |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for data in cell["outcomes"]:
            o = Outcome(**data)
            lines.append(
                f"| {o.policy} | {o.num_requests} | {o.attainment:.1%} | "
                f"{o.finetune_tokens_per_s:,.0f} | {o.busy_share:.0%} | {o.finetune_share:.0%} | "
                f"{_ms(o.tpot_p50_s)}, {_ms(o.tpot_p99_s)} | {_ms(o.itl_p99_s)} | "
                f"{_ms(o.ttft_p99_s)} |"
            )
    return "\n".join(lines) + "\n"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}"


def job_of(text: str) -> FinetuneJobSpec:
    """`4x512`: steps of 4 samples of 512 tokens."""
    batch_size, _, num_tokens = text.partition("x")
    return endless_job(int(num_tokens), batch_size=int(batch_size))


def trace_name(path: Path) -> str:
    """Of a trace's file."""
    return "Azure" if "Azure" in path.name else path.parent.name or path.stem


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", nargs="+", choices=["sheet", "simulated", "real"], default=[])
    parser.add_argument("--merge", nargs="+", type=Path, help="files of earlier commands")
    parser.add_argument("--trace", nargs="+", type=Path, help="Azure or BurstGPT CSV, or Mooncake")
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=[*policies(), SPATIAL],
        help="default: all; spatial on the real engine only by itself",
    )
    parser.add_argument("--jobs", nargs="+", default=["4x512"], help="samples x tokens of a step")
    parser.add_argument("--capacity", type=float, help="requests/s instead of a search")
    parser.add_argument("--capacity-requests", type=int, default=200, help="of a real search")
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
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--finetune-worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--embedded-model", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".bench"))
    parser.add_argument("--state", type=Path, help="default: coserve-state.json in --cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if {"simulated", "real"} & set(options.cells) and options.trace is None:
        parser.error("--trace is needed for cells other than sheet")
    options.with_spatial = options.policies is None or SPATIAL in options.policies
    if options.policies is None:
        options.policies = policies()
    elif "simulated" in options.cells:
        options.policies = [name for name in options.policies if name != SPATIAL]
    elif SPATIAL in options.policies and options.policies != [SPATIAL]:
        parser.error("spatial runs by itself on the real engine: one core each")
    if options.state is None:
        options.state = options.cache / "coserve-state.json"
    return options


if __name__ == "__main__":
    main()
