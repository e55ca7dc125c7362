"""Training runs: beside torch.distributed.pipelining, beside the simulator, and their checkpoints.

    python benchmarks/train.py --json train.json                 # about 15 minutes
    python benchmarks/train.py --only branches,link

Parts: chain2, chain4, overhead, branches, predicted (sleep and real), link, memory, save. Stages
that sleep (20 ms and more around a tiny product) let two cores stand for many devices. Ratios above
1 are in our favour.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rows import Row, compare, describe_machine, print_rows, single, write_json
from train_bench import saving
from train_bench.pool import on_ranks

NAP = (0.04, 0.08)
GPT = {"num_layers": 8, "hidden": 256, "num_heads": 4, "vocab": 1024, "seq": 64}
REPEATABLE = 0.03
"""Two runs of a plan that differ by more are printed and not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        default=",".join(p for p in PARTS if p not in ("sleep", "real")),
        help="parts, with commas",
    )
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--scratch", default=None, help="directory of the checkpoints")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10} {value}")
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for part in options.only.split(","):
        started_s = time.perf_counter()
        found, raw[part] = PARTS[part](options)
        rows += found
        print(f"{part}: {time.perf_counter() - started_s:.0f} s", flush=True)
        print_rows(found, title=part)
    if options.json is not None:
        write_json(options.json, rows, machine, raw=raw)


def chain(num_ranks: int) -> Callable[[argparse.Namespace], tuple[list[Row], Any]]:
    """Step time over torch's, with the 95 % interval of the median of paired ratios."""

    def measure(options: argparse.Namespace) -> tuple[list[Row], Any]:
        found = on_ranks(
            num_ranks,
            "train_bench.chain:compare",
            num_pairs=options.pairs,
            num_micro_batches=8,
            micro_batch=4,
            **GPT,
        )
        ours, peer = zip(*found["pairs"], strict=True)
        claim = f"GPT, {num_ranks} stages on {num_ranks} ranks, 8 micro-batches: step time"
        row = compare_medians(claim, ours, peer)
        bound = replace(
            row,
            claim=claim + ", the interval's lower end",
            ratio=row.ratio_low,
            target=1 / 1.03,
        )
        print(f"largest difference between losses: {found['loss_gap']:.2g}")
        return [row, bound], found

    return measure


def overhead(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """Seconds that one more micro-batch costs where there is nothing to compute."""
    counts = [8, 32, 64, 128]
    found = on_ranks(
        2, "train_bench.chain:overhead", counts=counts, num_rounds=max(5, options.pairs)
    )
    slopes: list[list[float]] = [[], []]
    for round_ in range(len(found["rounds"]["8"])):
        for side in (0, 1):
            times = [found["rounds"][str(count)][round_][side] for count in counts]
            slopes[side].append(statistics.linear_regression(counts, times).slope)
    claim = "overhead of a micro-batch, 2 ranks, next to no work"
    row = compare_medians(claim, slopes[0], slopes[1], target=1.0)
    return [row], found


def branches(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """4 branches x 2 sleeping stages on 8 ranks: the graph, and the same stages as a chain."""
    case = {"naps": [[NAP] * 2] * 4, "num_micro_batches": 8}
    found = on_ranks(
        8,
        "train_bench.sleep_runs:graph_and_chain",
        num_rounds=max(5, options.pairs // 2),
        case=case,
    )
    graph, line = zip(*found["rounds"], strict=True)
    claim = "4 branches x 2 sleeping stages on 8 ranks, 8 micro-batches: graph over chain"
    rows = [compare_medians(claim, graph, line, target=1.35)]
    for name, measured, predicted in zip(
        ("graph", "chain"), (graph, line), found["predicted_s"], strict=True
    ):
        claim = f"the same, {name}: simulated (ours) and measured (peer)"
        rows.append(
            replace(
                compare_medians(claim, [predicted] * len(measured), measured),
                tolerance=0.05,
            )
        )
    return rows, found


def predicted(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """Ten sleeping and ten real plans, predicted and measured; the errors of all of them."""
    found = {"sleep": _sleep(options), "real": _real(options)}
    rows = [
        *errors("plans of sleeping stages on 4 to 8 ranks", found["sleep"]),
        *errors("plans of GPTs on 2 ranks", found["real"]),
        *errors("all plans", [*found["sleep"], *found["real"]], prints=False),
    ]
    return rows, found


def sleep(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """Plans of sleeping stages on 4 to 8 ranks, predicted and measured."""
    found = _sleep(options)
    return errors("plans of sleeping stages on 4 to 8 ranks", found), found


def real(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """Plans of small GPTs on two ranks, predicted from a profile made while both cores work."""
    found = _real(options)
    return errors("plans of GPTs on 2 ranks", found), found


def _sleep(options: argparse.Namespace) -> list[Any]:
    draw = random.Random(1)
    found: list[Any] = []
    for num_ranks, count in ((4, 4), (6, 3), (8, 3)):
        cases = [sleeping_plan(num_ranks, draw) for _ in range(count)]
        results = on_ranks(
            num_ranks,
            "train_bench.sleep_runs:predictions",
            cases=cases,
            num_steps=max(options.pairs, 20),
        )
        found += [{**case, **result} for case, result in zip(cases, results, strict=True)]
    return found


def sleeping_plan(num_ranks: int, draw: random.Random) -> dict[str, Any]:
    """Branches of random lengths and naps."""
    left, naps = num_ranks, []
    while left:
        length = draw.randint(1, left)
        naps.append([(draw.uniform(0.02, 0.03), draw.uniform(0.02, 0.04)) for _ in range(length)])
        left -= length
    return {"naps": naps, "num_micro_batches": draw.choice((3, 4))}


def _real(options: argparse.Namespace) -> list[Any]:
    draw = random.Random(2)
    cases = [
        {
            "sizes": {**GPT, "num_layers": draw.choice((2, 4)), "seq": draw.choice((32, 64))},
            "cut": draw.uniform(0.3, 0.7),
            "micro_batch": 4,
            "batch_size": 4 * draw.choice((4, 8)),
        }
        for _ in range(10)
    ]
    return on_ranks(
        2,
        "train_bench.real_plans:predictions",
        cases=cases,
        num_steps=max(options.pairs, 20),
    )


def errors(claim: str, found: Sequence[Any], *, prints: bool = True) -> list[Row]:
    """Median and worst error of the predictions whose two runs agree."""
    counted: list[float] = []
    for plan in found:
        first, second = plan["measured_s"]
        error = plan["predicted_s"] / statistics.mean((first, second)) - 1
        repeats = abs(second / first - 1) <= REPEATABLE
        if prints:
            print(
                f"predicted {plan['predicted_s']:.4f} s, measured {first:.4f} and {second:.4f} s, "
                f"error {error:+.1%}{'' if repeats else ' (runs differ: not counted)'}"
            )
        if repeats:
            counted.append(abs(error))
    if not counted:
        print(f"{claim}: no plan's two runs agree")
        return []
    return [
        limit(f"{claim}: median error of {len(counted)} counted", statistics.median(counted), 0.10),
        limit(f"{claim}: worst error", max(counted), 0.25),
    ]


def link(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """A chain of four sleeping stages whose messages take 10 ms longer."""
    case = {"naps": [[NAP] * 4], "num_micro_batches": 8}
    found = on_ranks(
        4,
        "train_bench.sleep_runs:predictions",
        cases=[case],
        num_steps=options.pairs,
        delay_s=0.01,
    )
    (plan,) = found
    measured = statistics.median(plan["measured_s"])
    claim = "messages delayed by 10 ms: measured over simulated step"
    return [limit(claim, measured / plan["predicted_s"], 1.1)], found


def memory(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """Peak bytes of tensors on each of two ranks, predicted and measured."""
    del options
    sizes = {"num_layers": 6, "hidden": 512, "num_heads": 8, "vocab": 1024, "seq": 176}
    common = {"sizes": sizes, "micro_batch": 8, "batch_size": 32}
    cases = [
        {**common, "schedule": "1f1b", "recompute": False},
        {**common, "schedule": "gpipe", "recompute": False},
        {**common, "schedule": "1f1b", "recompute": True},
    ]
    found = on_ranks(2, "train_bench.memory:peaks", cases=cases)
    rows: list[Row] = []
    for case, ranks in zip(cases, found, strict=True):
        how = case["schedule"] + (", recomputing" if case["recompute"] else "")
        for rank, (planned, measured) in enumerate(ranks):
            claim = f"peak tensor bytes, GPT with Adam, {how}, rank {rank}: predicted, measured"
            sizes_mb = (planned / 1e6, measured / 1e6)
            rows.append(single(claim, "MB", *sizes_mb, lower_is_better=True, tolerance=0.10))
    return rows, found


def save(options: argparse.Namespace) -> tuple[list[Row], Any]:
    """110 M parameters with Adam: time added until an asynchronous checkpoint is on disk."""
    found = saving.cost(110_000_000, 5, options.scratch)
    for added, blocking in found:
        print(f"asynchronous save adds {added:.2f} s, a synchronous one takes {blocking:.2f} s")
    shares = [added / blocking for added, blocking in found]
    claim = "checkpoint of 110 M parameters with Adam: time added over a synchronous save"
    row = limit(claim, statistics.median(shares), 0.3)
    return [
        replace(row, ratio_low=0.3 / max(shares), ratio_high=0.3 / max(1e-9, min(shares)))
    ], found


def limit(claim: str, value: float, most: float) -> Row:
    """A figure that must stay below a limit; the ratio is limit over figure."""
    return single(claim, "x", value, most, lower_is_better=True, target=1.0)


def compare_medians(
    claim: str, ours: Sequence[float], peer: Sequence[float], target: float | None = None
) -> Row:
    """Seconds in pairs; low and high are the 95 % interval of the median ratio."""
    row = compare(claim, "s", ours, peer, lower_is_better=True, target=target)
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    low, high = interval(ratios)
    return replace(row, ratio_low=low, ratio_high=high)


def interval(ratios: Sequence[float], num_draws: int = 4000) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(num_draws)
    )
    return medians[round(0.025 * num_draws)], medians[round(0.975 * num_draws) - 1]


PARTS: dict[str, Callable[[argparse.Namespace], tuple[list[Row], Any]]] = {
    "chain2": chain(2),
    "chain4": chain(4),
    "overhead": overhead,
    "branches": branches,
    "predicted": predicted,
    "sleep": sleep,
    "real": real,
    "link": link,
    "memory": memory,
    "save": save,
}

if __name__ == "__main__":
    main()
