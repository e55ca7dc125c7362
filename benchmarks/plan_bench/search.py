"""How long planning takes, and how much work it is, beside PipeDream and Piper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

from rows import Row

from plan_bench.setting import Findings, graph_of, limit_row, point, summit
from weft.base.errors import WeftError
from weft.cost.roofline import RooflineCost
from weft.plan.api import plan as make_plan
from weft.plan.train_plan import TrainPlan

CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("mmt", {}, 1024),
    ("dlrm", {}, 1024),
    ("candle-uno", {}, 1024),
    ("gpt", {"num_layers": 96}, 512),
    ("mmt", {}, 16384),
)
"""(model, options, batch)"""

MOST_BLOCKS = 150
"""Blocks that the search-time claim allows."""

LIMITS_S = {32: 1.0, 1024: 5.0}
"""Most seconds of a search by devices."""


def search_time(
    cases: Iterable[int], device_counts: Iterable[int], repeats: int, peers: Sequence[str]
) -> Findings:
    """Seconds and candidate evaluations; capture and import are not counted."""
    found = Findings()
    table: list[dict[str, Any]] = []
    for index in cases:
        model, options, batch = CASES[index]
        graph = graph_of(model, max_blocks=MOST_BLOCKS, **options)
        name = f"{graph.name} batch {batch}"
        for count in device_counts:
            ours: dict[str, list[float]] = {}
            for objective in ("bottleneck", "step_time"):
                seconds, plan, reason = timed(
                    "graphpipe", graph, count, batch, repeats, objective=objective
                )
                ours[objective] = seconds
                table.append(
                    _entry(name, count, batch, "graphpipe", objective, seconds, plan, reason)
                )
                found.rows.append(
                    limit_row(
                        f"search {name}, {count} devices, {objective}",
                        "s",
                        seconds,
                        LIMITS_S[count],
                    )
                )
            for peer in peers:
                seconds, plan, reason = timed(
                    peer, graph, count, batch, 1, objective="bottleneck", time_limit_s=20.0
                )
                table.append(_entry(name, count, batch, peer, "bottleneck", seconds, plan, reason))
                if plan is None:
                    continue
                mine = statistics.median(ours["bottleneck"])
                found.rows.append(
                    Row(
                        claim=f"search {name}, {count} devices: graphpipe against {peer} "
                        "(paper: 9 to 21)",
                        unit="s",
                        ours=mine,
                        peer=seconds[0],
                        ratio=seconds[0] / mine,
                        ratio_low=seconds[0] / max(ours["bottleneck"]),
                        ratio_high=seconds[0] / min(ours["bottleneck"]),
                    )
                )
    found.tables["search time"] = table
    return found


def branches(counts: Iterable[int], num_devices: int = 32) -> Findings:
    """Work against the number of branches: linear for us, downsets (n+1)^p for Piper."""
    found = Findings()
    table: list[dict[str, Any]] = []
    for num_branches in counts:
        graph = graph_of("candle-uno", max_blocks=MOST_BLOCKS, num_branches=num_branches)
        seconds, plan, reason = timed("graphpipe", graph, num_devices, 1024, 1)
        piper_s, piper, why = timed("piper", graph, num_devices, 1024, 1, time_limit_s=20.0)
        table.append(
            {
                "branches": num_branches,
                "ops": len(graph.ops),
                "graphpipe_s": round(seconds[0], 4),
                "graphpipe_candidates": plan.search.num_candidates if plan else None,
                "graphpipe_states": plan.search.num_states if plan else None,
                "candidates_per_branch": plan.search.num_candidates / num_branches
                if plan
                else None,
                "downsets_of_the_branches": 5**num_branches,
                "piper_s": round(piper_s[0], 3),
                "piper": "planned" if piper else why or reason,
            }
        )
    found.tables["work by branches (4 layers each)"] = table
    pairs = [(row["branches"], row["graphpipe_candidates"]) for row in table]
    if len(pairs) > 1 and all(pairs[i][1] for i in (0, -1)):
        growth = math.log(pairs[-1][1] / pairs[0][1]) / math.log(pairs[-1][0] / pairs[0][0])
        found.remarks.append(
            f"candidate evaluations grow as branches^{growth:.2f} from {pairs[0][0]} to "
            f"{pairs[-1][0]} branches"
        )
    return found


def timed(
    method: str,
    graph: Any,
    num_devices: int,
    batch: int,
    repeats: int,
    *,
    objective: str = "bottleneck",
    time_limit_s: float | None = None,
) -> tuple[list[float], TrainPlan | None, str]:
    """Seconds of each repetition, the plan, and why there is none."""
    seconds: list[float] = []
    plan: TrainPlan | None = None
    for _ in range(repeats):
        started_s = perf_counter()
        try:
            plan = make_plan(
                graph,
                summit(num_devices),
                batch_size=batch,
                method=method,
                objective=objective,
                cost=RooflineCost(),
                time_limit_s=time_limit_s,
            )
        except WeftError as error:
            return [perf_counter() - started_s], None, str(error)[:120]
        seconds.append(perf_counter() - started_s)
    return seconds, plan, ""


def _entry(
    name: str,
    count: int,
    batch: int,
    method: str,
    objective: str,
    seconds: list[float],
    plan: TrainPlan | None,
    reason: str,
) -> dict[str, Any]:
    return {
        **point(name, count, batch),
        "method": method,
        "objective": objective,
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "candidates": plan.search.num_candidates if plan else None,
        "states": plan.search.num_states if plan else None,
        "timed_out": plan.search.timed_out if plan else None,
        "reason": reason,
    }
