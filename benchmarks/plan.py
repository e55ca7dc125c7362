"""Planning and simulation: every promised figure, and the figures of the GraphPipe paper.

All throughputs and step times are simulated; search and simulation speeds are measured here. Every
point is printed, losing ones too. Parts can be run alone; `--json` of a partial run is partial.

    python benchmarks/plan.py --json plan-cpu.json --markdown plan-cpu.md --figures figures
    python benchmarks/plan.py --quick
    python benchmarks/plan.py --only grid,branches
    python benchmarks/plan.py --merge one.json other.json --markdown plan-cpu.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from plan_bench import best_step, exactness, reproduction, scale, search
from plan_bench.figures import draw
from plan_bench.report import print_tables, write_markdown
from plan_bench.setting import Findings
from rows import Row, describe_machine, print_rows, write_json

TESTS = Path(__file__).resolve().parent.parent / "tests"

LLAMA_70B = {
    "num_layers": 80,
    "hidden": 8192,
    "num_heads": 64,
    "num_kv_heads": 8,
    "ffn_hidden": 28672,
    "vocab": 32000,
    "seq": 2048,
}


def main() -> None:
    options = parse_options()
    if options.merge:
        write_report(options, *merged(options.merge))
        return
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10} {value}")
    parts = all_parts(options.quick)
    chosen = options.only.split(",") if options.only else list(parts)
    unknown = sorted(set(chosen) - set(parts))
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}; parts: {', '.join(parts)}")
    found = Findings()
    seconds: dict[str, float] = {}
    for name in chosen:
        started = time.perf_counter()
        part = parts[name]()
        seconds[name] = round(time.perf_counter() - started, 1)
        if part.rows:
            print_rows(part.rows, title=f"{name} ({seconds[name]} s; above 1 is in our favour)")
        print_tables(part)
        found.add(part)
        # Written after every part: a run that is cut short leaves what it measured.
        command = " ".join([Path(sys.executable).name, *sys.argv])
        write_report(options, found, machine, command, seconds)


def write_report(
    options: argparse.Namespace,
    found: Findings,
    machine: Mapping[str, str],
    command: str,
    seconds: Mapping[str, float],
) -> None:
    """Write the files that the command line asks for."""
    if options.json is not None:
        write_json(
            options.json,
            found.rows,
            machine,
            state="simulated (search and simulation speeds measured)",
            command=command,
            remarks=found.remarks,
            tables=found.tables,
            part_seconds=seconds,
        )
    if options.figures is not None:
        draw(found, options.figures)
    if options.markdown is not None:
        write_markdown(options.markdown, found, machine, command, seconds)


def merged(paths: Sequence[Path]) -> tuple[Findings, dict[str, str], str, dict[str, float]]:
    """The findings of several runs of different parts, with what they ran on and how."""
    found, seconds = Findings(), dict[str, float]()
    machines: list[dict[str, str]] = []
    commands: list[str] = []
    for path in paths:
        data = json.loads(path.read_text())
        again = sorted(set(seconds) & set(data["part_seconds"]))
        if again:
            sys.exit(f"{path} holds part {', '.join(again)}, which an earlier file holds too")
        found.add(
            Findings(
                rows=[Row(**row) for row in data["rows"]],
                tables=data["tables"],
                remarks=data["remarks"],
            )
        )
        seconds |= data["part_seconds"]
        machines.append(data["machine"])
        commands.append(data["command"])
    machine = {
        name: "; ".join(dict.fromkeys(one.get(name, "") for one in machines))
        for name in machines[0]
    }
    return found, machine, " ; ".join(commands), seconds


def all_parts(quick: bool) -> Mapping[str, Callable[[], Findings]]:
    """Every part by name, in the order of running; the quick ones are subsets."""
    models = ("mmt",) if quick else ("mmt", "dlrm", "candle-uno")
    devices = (8,) if quick else (4, 8, 16, 32)
    return {
        "logs": exactness.artifact_logs,
        "identities": lambda: exactness.identities(helper("plans")),
        "in-flight": lambda: exactness.in_flight(
            helper("plans"), helper("unlimited").unlimited_s, 10 if quick else 100
        ),
        "oracle": lambda: exactness.oracle(
            helper("graphs"), helper("longest_path"), 25 if quick else 500
        ),
        "speed": lambda: scale.speed(helper("plans"), 2 if quick else 5),
        "thousand": lambda: scale.thousand(str(TESTS), *((64, 64) if quick else (1024, 1024))),
        "search": lambda: search.search_time(
            (0,) if quick else range(5),
            (32,) if quick else (32, 1024),
            1 if quick else 5,
            ("pipedream", "piper"),
        ),
        "work": lambda: search.branches((2, 4) if quick else (2, 4, 8, 16)),
        "case-study": reproduction.case_study,
        "layer-stages": reproduction.one_layer_a_stage,
        "chain": reproduction.chain_is_equal,
        "micro-batches": reproduction.micro_batch_sweep,
        "ablation": lambda: reproduction.ablation(models, 8 if quick else 32),
        "branches": lambda: reproduction.branch_sweep(
            (2, 4) if quick else (2, 4, 8, 16), (8,) if quick else (4, 8, 16)
        ),
        "grid": lambda: reproduction.grid(models, devices, fractions=1 if quick else 3),
        "best-step": lambda: best_step.best_of_all(
            (0,) if quick else range(len(best_step.CASES)), (8,) if quick else (8, 32)
        ),
        "capture": lambda: capture(quick),
    }


def capture(quick: bool) -> Findings:
    """Llama of 80 layers in the 70 B shape (two layers in a quick run) against its formula."""
    shape: dict[str, Any] = LLAMA_70B | ({"num_layers": 2} if quick else {})
    layers, hidden, ffn = shape["num_layers"], shape["hidden"], shape["ffn_hidden"]
    kv = hidden * shape["num_kv_heads"] // shape["num_heads"]
    seq, vocab = shape["seq"], shape["vocab"]
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn) + vocab * hidden
    parameters = matrices + vocab * hidden + (2 * layers + 1) * hidden
    # Two FLOP a weight and token, and per layer the two attention products over all positions.
    flops = 2.0 * seq * matrices + layers * 4.0 * seq * seq * hidden
    return scale.capture_llama({"parameters": parameters, "flops": flops}, shape)


def helper(name: str) -> ModuleType:
    """A helper module of the tests: oracles and hand-made plans live there once."""
    here = str(Path(__file__).resolve().parent)
    before = list(sys.path)
    # This file is called plan.py, and so is the folder of the tests: leave ourselves out.
    sys.path[:] = [
        str(TESTS),
        *(path for path in before if Path(path or ".").resolve() != Path(here)),
    ]
    try:
        return importlib.import_module(f"plan.{name}")
    finally:
        sys.path[:] = before


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small subset, minutes not hours")
    parser.add_argument("--only", help="parts to run, separated by commas")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="run nothing; join the JSON of runs of other parts"
    )
    parser.add_argument("--json", type=Path, help="write rows and tables; - for stdout")
    parser.add_argument("--markdown", type=Path, help="write a readable report")
    parser.add_argument("--figures", type=Path, help="draw the paper's figures into this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
