"""Claim (b): the step-time objective against the best of all sequential plans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from plan_bench.setting import (
    Findings,
    graph_of,
    planned,
    point,
    ratio_row,
    summit,
)
from weft.cost.training import ADAM_FP32, SGD_FP32, TrainingSpec

BASELINES = ("spp", "pipedream", "piper", "megatron", "data-parallel")
"""Synchronous planners: any depth, any data parallelism, and pure data parallelism."""

CASES: tuple[tuple[str, dict[str, Any], TrainingSpec, int], ...] = (
    ("mmt", {}, SGD_FP32, 512),
    ("candle-uno", {}, SGD_FP32, 1024),
    ("dlrm", {}, SGD_FP32, 1024),
    ("clip", {}, SGD_FP32, 512),
    ("unet", {}, SGD_FP32, 128),
    # Pure data parallelism does not fit these on 16 GiB cards.
    ("mmt", {"num_layers": 24}, ADAM_FP32, 512),
    ("dlrm", {}, ADAM_FP32, 1024),
    ("candle-uno", {"num_branches": 16}, ADAM_FP32, 1024),
)
"""(model, options, training, batch)"""


def best_of_all(cases: Iterable[int], device_counts: Iterable[int]) -> Findings:
    """Every case on every cluster; planner and judge are the contention-free simulation."""
    found = Findings()
    table: list[dict[str, Any]] = []
    never_slower: list[bool] = []
    for index in cases:
        model, options, training, batch = CASES[index]
        graph = graph_of(model, **options)
        name = model + "".join(f" {k}={v}" for k, v in options.items())
        for count in device_counts:
            outcomes = [
                planned(
                    method,
                    graph,
                    summit(count),
                    batch,
                    objective="step_time",
                    training=training,
                    contention=False,
                    time_limit_s=60.0,
                )
                for method in ("graphpipe", *BASELINES)
            ]
            table += [
                {**point(name, count, batch, training=training.name), **outcome.fields}
                for outcome in outcomes
            ]
            ours, *others = outcomes
            best = min(others, key=lambda outcome: outcome.step_time_s)
            if ours.plan is None or best.plan is None:
                found.remarks.append(
                    f"{name} on {count} devices ({training.name}): "
                    + ("no plan at all" if ours.plan is None else "only graphpipe finds a plan")
                )
                continue
            never_slower.append(ours.step_time_s <= best.step_time_s * (1 + 1e-12))
            pure = next(outcome for outcome in others if outcome.method == "data-parallel")
            note = "" if pure.plan else ", pure data parallelism does not fit"
            found.rows.append(
                ratio_row(
                    f"{name}, {training.name}, {count} devices: over the best sequential plan "
                    f"({best.method}{note})",
                    "samples/s",
                    [ours.throughput_per_s],
                    [best.throughput_per_s],
                    target=1.0,
                )
            )
    found.remarks.append(
        f"step_time objective: never slower than the best sequential plan in "
        f"{sum(never_slower)} of {len(never_slower)} points"
    )
    found.tables["step-time objective"] = table
    return found
