"""Finetuning beside inference: what co-serving keeps, gains and promises, against its baselines.

`--cells sheet` compares the simulator with FlexLLM's published measurements; `simulated` runs the
cells under the virtual clock on step times of `--profile` (made by `weft profile --serve`), or on a
roofline of `--device`; `real` runs them in real time on the 110 M or the embedded model. Traces of
`--trace` have their lengths scaled to a mean prompt of 256 tokens; capacity is the highest rate at
which inference alone keeps both objectives for 99 % of the requests, and the loads are 30, 60 and
90 % of it. Of real cells it is searched under the virtual clock on the profile that was measured on
the executor, with 1,000 requests whatever the cells have (`--capacity-search real` does it in real
time). Every (load, policy) is a cell; a command may run any of them, and keeps capacity, profile
and finetune-only speed in `--state` for the next. Real cells are written one by one, and `--resume`
goes on behind them; `--cell-time-s` takes the first requests only where all would take longer.
`--merge` puts the files of several commands together.

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
import math
import os
from collections.abc import Callable, Sequence
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
from coserve_bench.state import ServerState
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
        others = list(cells)
        cells += real_cells(options, lambda done: write(options, rows, others + done, machine))
    found = write(options, rows, cells, machine)
    print_rows(found, title=TITLE)


def write(
    options: argparse.Namespace,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    machine: dict[str, str],
) -> list[Row]:
    """The files that were asked for; returns these rows and the cells' own."""
    found = [*rows, *(row for cell in cells for row in cell_rows(cell))]
    if options.json:
        write_json(options.json, found, machine, cells=cells)
    if options.markdown:
        options.markdown.write_text(markdown(found, cells, machine), encoding="utf-8")
    return found


# ---- simulated ----


def simulated_cells(trace: Path, job_text: str, options: argparse.Namespace) -> list[Cell]:
    """All loads of one trace and one shape of steps."""
    server, half = simulated_servers(options, job_of(job_text))
    server.name += f", {trace_name(trace)}, steps of {job_text}"
    workload = trace_workload(trace, options.num_requests)
    wanted = objectives(server.step_time, workload)
    rate = options.capacity or capacity(server, workload, wanted)
    alone = server.finetune_tokens_per_s()
    say_server(server.name, wanted, rate, alone)
    cells: list[Cell] = []
    for load in options.loads:
        at_load = workload.with_rate(rate * LOADS[load])
        print(f"{load} ({at_load.rate_per_s:.3g} requests/s)")
        found = [run_and_say(server, at_load, wanted, name) for name in options.policies]
        if half is not None and options.with_spatial:
            found.append(run_spatial(half, at_load, wanted))
            print(f"  {line(found[-1])}")
        cell = cell_of(
            server.name, load, at_load, wanted, rate, alone, options.dtype, simulated=True
        )
        cells.append(cell | {"outcomes": as_data(found)})
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


def real_cells(options: argparse.Namespace, save: Callable[[list[Cell]], object]) -> list[Cell]:
    """Cells of the real engine; what was found out before comes from `--state`.

    `save` is called after every run, so that `--resume` can go on behind the last one.
    """
    # Imported here, so that the other cells run without torch.
    from coserve_bench.real import real_server, run_spatial_real

    job = job_of(options.jobs[0])
    name = f"{options.real_model} {options.dtype}, {trace_name(options.trace[0])}, "
    name += f"steps of {options.jobs[0]}"
    profile_path = options.profile or options.cache / f"profile-ft-{name.split(',')[0]}.json"
    workload = trace_workload(options.trace[0], options.num_requests)
    server = None
    if options.policies != [SPATIAL]:
        server = real_server(options, job, profile_path)
        server.name = name
        server.warm_up(workload)
    elif not profile_path.exists():
        raise SystemExit(f"spatial cells need {profile_path}: run another policy first")
    state = ServerState.read(options.state, name, profile_path)
    profile = StepTimeProfile.read(profile_path)
    wanted = objectives(profile, workload)
    how = capacity_search(options)
    rate = state.capacities_per_s[how] = real_capacity(options, state, profile, job, server)
    if server is not None:
        # Also where it is known: kernels are compiled when they are first met.
        alone = server.finetune_tokens_per_s()
        state.finetune_only_tokens_per_s = state.finetune_only_tokens_per_s or alone
    state.write()
    if state.finetune_only_tokens_per_s is None:
        raise SystemExit("spatial cells need the job's speed alone: run another policy first")
    alone = state.finetune_only_tokens_per_s
    say_server(name, wanted, rate, alone)
    for search, found in state.capacities_per_s.items():
        print(f"  capacity ({search}): {found:.3g} requests/s", flush=True)
    earlier = earlier_cells(options)
    cells: list[Cell] = []
    for load in options.loads:
        at_load = cell_workload(options, workload, rate * LOADS[load])
        wanted = objectives(profile, at_load)
        what = f"{load} ({at_load.rate_per_s:.3g} requests/s, {len(at_load)} requests)"
        print(what, flush=True)
        cell = cell_of(name, load, at_load, wanted, rate, alone, options.dtype, simulated=False)
        cell["capacity_search"] = how
        cells.append(cell)
        for policy in options.policies:
            found = run_before(earlier, cell, policy, len(at_load))
            if found is not None:
                print(f"  {line(found)} (run before)", flush=True)
            elif server is None:
                found = run_spatial_real(options, job, at_load, wanted)
                print(f"  {line(found)}", flush=True)
            else:
                found = run_and_say(server, at_load, wanted, policy)
            cell["outcomes"] += as_data([found])
            save(cells)
    return cells


def cell_workload(options: argparse.Namespace, workload: Workload, rate_per_s: float) -> Workload:
    """A cell's requests: all, or the first of them, as many as `--cell-time-s` has time for."""
    if options.cell_time_s is not None:
        workload = workload.first(max(2, round(options.cell_time_s * rate_per_s)))
    return workload.with_rate(rate_per_s)


def capacity_search(options: argparse.Namespace) -> str:
    """How the capacity is found, in words: the state file and the page tell it."""
    if options.capacity:
        return f"given as {options.capacity:g}"
    count = options.capacity_requests
    if options.capacity_search == "real":
        return f"real, {count} requests"
    return f"simulated on the measured profile, {count} requests"


def real_capacity(
    options: argparse.Namespace,
    state: ServerState,
    profile: StepTimeProfile,
    job: FinetuneJobSpec,
    server: Server | None,
) -> float:
    """Requests/s: given, found by an earlier command, or searched now.

    A search in real time takes an hour where few requests a second are served; that under the
    virtual clock runs the same policy on the step times that were measured on this executor.
    """
    if options.capacity:
        return options.capacity
    known = state.capacities_per_s.get(capacity_search(options))
    if known is not None:
        return known
    workload = trace_workload(options.trace[0], options.capacity_requests)
    wanted = objectives(profile, workload)
    if options.capacity_search == "simulated":
        limits = ServingLimits(max_num_seqs=options.max_num_seqs)
        simulated = SimulatedServer(state.server, setup_from_profile(profile, limits=limits), job)
        return capacity(simulated, workload, wanted)
    if server is None:
        raise SystemExit("spatial cells need a capacity: run another policy first")
    return capacity(server, workload, wanted, rounds=4)


def earlier_cells(options: argparse.Namespace) -> list[Cell]:
    """What an interrupted command wrote to the same `--json`; nothing without `--resume`."""
    if not (options.resume and options.json and options.json.exists()):
        return []
    return json.loads(options.json.read_text(encoding="utf-8"))["cells"]


def run_before(
    earlier: Sequence[Cell], cell: Cell, policy: str, num_requests: int
) -> Outcome | None:
    """The same policy's outcome on the same server, load, rate and requests, if it is there."""
    for old in earlier:
        is_same = all(old[key] == cell[key] for key in ("server", "load", "simulated"))
        if is_same and math.isclose(old["rate_per_s"], cell["rate_per_s"], rel_tol=1e-6):
            for data in old["outcomes"]:
                if data["policy"] == policy and data["num_requests"] == num_requests:
                    return Outcome(**data)
    return None


# ---- both ----


def run_and_say(server: Server, workload: Workload, wanted: Objectives, policy: str) -> Outcome:
    """One cell, printed when it is done."""
    found = run_policy(server, workload, wanted, policy)
    print(f"  {line(found)}", flush=True)
    return found


def say_server(server: str, wanted: Objectives, rate: float, alone: float) -> None:
    """One line."""
    print(
        f"{server}: TPOT {wanted.tpot_s * 1e3:.0f} ms, capacity {rate:.3g} requests/s, "
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
    dtype: str,
    *,
    simulated: bool,
) -> Cell:
    """A cell's part of the file, without outcomes."""
    return {
        "server": server,
        "simulated": simulated,
        "dtype": dtype,
        "load": load,
        "rate_per_s": workload.rate_per_s,
        "capacity_per_s": rate,
        "tpot_slo_s": wanted.tpot_s,
        "finetune_only_tokens_per_s": alone,
        "outcomes": [],
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
            if not math.isclose(known["rate_per_s"], cell["rate_per_s"], rel_tol=1e-6):
                raise SystemExit(
                    f"{path}: {cell['server']} {cell['load']} is at {cell['rate_per_s']:.4g} "
                    f"requests/s, in an earlier file at {known['rate_per_s']:.4g}: cells of one "
                    "load must share a rate; run them with one --capacity or one --state"
                )
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
            f"{cell['rate_per_s']:.3g} of {cell['capacity_per_s']:.3g} requests/s (capacity: "
            f"{cell.get('capacity_search', 'searched')}), TPOT "
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
    parser.add_argument("--cell-time-s", type=float, help="fewer requests where they take longer")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=[*policies(), SPATIAL],
        help="default: all; spatial on the real engine only by itself",
    )
    parser.add_argument("--jobs", nargs="+", default=["4x512"], help="samples x tokens of a step")
    parser.add_argument("--capacity", type=float, help="requests/s instead of a search")
    parser.add_argument(
        "--capacity-search",
        choices=["simulated", "real"],
        default="simulated",
        help="of real cells: on the measured profile, under the virtual clock; or in real time",
    )
    parser.add_argument(
        "--capacity-requests", type=int, help="of the search; default: 1000, in real time 200"
    )
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
    parser.add_argument("--resume", action="store_true", help="keep real runs that --json holds")
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
    if options.capacity_requests is None:
        options.capacity_requests = 200 if options.capacity_search == "real" else 1000
    if options.state is None:
        options.state = options.cache / "coserve-state.json"
    return options


if __name__ == "__main__":
    main()
