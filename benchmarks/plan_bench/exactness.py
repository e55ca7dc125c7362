"""Claims that hold exactly or not at all: the oracle, the artifact's logs, closed forms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

from rows import Row

from plan_bench.setting import Findings, count_row, ratio_row
from weft.base.errors import WeftError
from weft.cluster.cluster import Link
from weft.plan.api import plan as make_plan
from weft.plan.brute_force import best_bottleneck
from weft.plan.deadlock import check_deadlock
from weft.plan.estimate import estimate_step_time_s
from weft.plan.replay import step_time_s
from weft.plan.schedules import generate
from weft.sim.repair import repair_in_flight
from weft.sim.stage_executor import simulate


def oracle(graphs: ModuleType, longest_path: ModuleType, num_cases: int, seed: int = 0) -> Findings:
    """`graphpipe` against enumeration on random problems; and every plan through the simulator."""
    rng = random.Random(seed)
    found = Findings()
    equal = beaten = infeasible = simulated = 0
    loss: list[float] = []
    worst = 0.0
    for _ in range(num_cases):
        case = graphs.build_case(graphs.RandomChooser(rng))
        arguments: dict[str, Any] = {
            "training": case.training,
            "batch_size": case.batch_size,
            "micro_batches": case.micro_batches,
        }
        problem = (case.graph, case.cluster, graphs.ToyCost())
        in_class = best_bottleneck(
            *problem, recompute_choices=case.recompute_choices, **arguments
        ).bottleneck_s
        anything = best_bottleneck(
            *problem, recompute_choices=case.recompute_choices, any_convex=True, **arguments
        ).bottleneck_s
        try:
            plan = make_plan(
                case.graph,
                case.cluster,
                cost=graphs.ToyCost(),
                objective="bottleneck",
                per_stage_recompute=len(case.recompute_choices) > 1,
                **arguments,
            )
        except WeftError:
            plan = None
        ours = math.inf if plan is None else plan.bottleneck_s
        same = ours == in_class or math.isclose(ours, in_class, rel_tol=1e-12)
        equal += same
        if math.isfinite(ours) and math.isfinite(in_class):
            worst = max(worst, abs(ours / in_class - 1))
        infeasible += math.isinf(in_class)
        if math.isfinite(anything) and math.isfinite(in_class):
            loss.append(in_class / anything - 1)
            beaten += in_class > anything * (1 + 1e-12)
        elif math.isfinite(anything):
            beaten += 1
        if plan is not None:
            schedule = generate(plan)
            check_deadlock(schedule)
            simulated += step_time_s(plan) == longest_path.makespan_s(plan, schedule)
    found.rows += [
        count_row("bottleneck of graphpipe equals brute force over its class", equal, num_cases),
        count_row(
            "simulated without contention = independent longest path, bit for bit",
            simulated,
            num_cases - infeasible,
        ),
    ]
    found.remarks += [
        f"oracle: {num_cases} random graphs, {infeasible} of them infeasible for both; largest "
        f"relative difference {worst:.1e}",
        f"against all convex stage graphs, cross-branch stages included: the class loses in "
        f"{beaten} of {num_cases} ({100 * beaten / num_cases:.1f} %), by "
        f"{100 * sum(loss) / max(len(loss), 1):.2f} % on average and at most "
        f"{100 * max(loss, default=0.0):.1f} %",
    ]
    return found


LOGS: tuple[tuple[str, int, int, float, tuple[float, ...], str], ...] = (
    (
        "partition1 (graph pipeline)", 1024, 8, 3.70979,
        (3.3873, 3.70934, 3.38062, 3.70895, 3.38075, 3.70786, 3.49199), "3996.96",
    ),
    (
        "partition2 (linearised)", 32768, 128, 2.66969,
        (1.19433, 2.06478, 2.32473, 2.66956), "88536.9",
    ),
    (
        "partition3 (graph pipeline)", 32768, 128, 2.62976,
        (1.1707, 2.26306, 2.18379, 2.62927), "87227.5",
    ),
)  # fmt: skip
"""(log, mini-batch, micro-batch, bottleneck, longest path, printed time); GraphPipe sheet §2.5."""


def artifact_logs() -> Findings:
    """The closed form against three logs of the authors' planner, to the digits printed there."""
    found = Findings()
    for name, batch, micro_batch, bottleneck, path, printed in LOGS:
        ours = estimate_step_time_s(
            batch_size=batch,
            bottleneck_s=bottleneck,
            micro_batch=micro_batch,
            time_per_sample_s=path,
            successors=[[i + 1] if i + 1 < len(path) else [] for i in range(len(path))],
        )
        # The inputs are printed to 6 digits: half a unit of each, and of the printed result.
        slack = 5e-6 * (batch + micro_batch * len(path)) + 0.5 * 10.0 ** -_decimals(printed)
        same = abs(ours - float(printed)) <= slack
        found.rows.append(count_row(f"estimate of {name} prints {printed}", int(same), 1))
    return found


def identities(plans: ModuleType) -> Findings:
    """Step times, bubbles and stashes of Megatron's §1-2, exactly."""
    found = Findings()
    good = total = 0
    for p in (1, 2, 4, 8, 16):
        for m in (1, 4, 8, 64):
            for name in ("gpipe", "1f1b"):
                timeline = simulate(
                    plans.chain(p, m, backward_s=2.0), generate(plans.chain(p, m), name)
                )
                stashes = {r: m if name == "gpipe" else min(p - r, m) for r in range(p)}
                total += 1
                good += (
                    timeline.step_time_s == (m + p - 1) * 3.0
                    and math.isclose(timeline.bubble_fraction, (p - 1) / (m + p - 1), abs_tol=1e-15)
                    and timeline.peak_memory_by_device == stashes
                )
    for p, m, v in ((4, 8, 2), (8, 16, 4), (16, 64, 2)):
        plan = plans.chain(p * v, m, devices=[(s % p,) for s in range(p * v)])
        timeline = simulate(plan, generate(plan, "interleaved"))
        total += 1
        good += (
            timeline.step_time_s / (2 * m * v) - 1 == (p - 1) / (m * v)
            and timeline.peak_memory_by_device[0] == v * p + p - 1
        )
    found.rows.append(count_row("schedule identities: time, bubble, stashes", good, total))
    return found


def in_flight(plans: ModuleType, unlimited: Callable[[Any], float], num_random: int) -> Findings:
    """The DAG rule is enough without communication; with it, repair comes within 2 %."""
    shapes = {
        "chain": [(0, 1), (1, 2), (2, 3)],
        "join": [(0, 3), (1, 3), (2, 3)],
        "diamond": [(0, 1), (0, 2), (1, 3), (2, 3)],
        "skip": [(0, 1), (1, 2), (2, 3), (0, 3)],
    }
    exact = 0
    gaps: list[tuple[float, float]] = []
    for arcs in shapes.values():
        plan = plans.stage_plan(arcs, 4, batch_size=32)
        exact += step_time_s(plan) == unlimited(plan)
    rng = random.Random(1)
    for _ in range(num_random):
        arcs = shapes[rng.choice(sorted(shapes))]
        sizes = [rng.choice((1, 2, 4)) for _ in range(4)]
        plan = plans.stage_plan(
            arcs,
            4,
            batch_size=64,
            micro_batch=sizes,
            forward_s=[float(size) for size in sizes],
            backward_s=[2.0 * size for size in sizes],
            cluster=plans.flat_cluster(
                4, Link(bandwidth_bytes_per_s=1e12, latency_s=rng.uniform(0.0, 1.0))
            ),
        )
        gaps.append((1 / repair_in_flight(plan).step_time_s, 1 / unlimited(plan)))
    row: Row = ratio_row(
        f"repaired samples in flight over unlimited buffers, {num_random} random stage graphs",
        "steps/s",
        [a for a, _ in gaps],
        [b for _, b in gaps],
        target=0.98,
    )
    close = sum(a / b >= 0.98 for a, b in gaps)
    return Findings(
        rows=[
            count_row("in-flight rule reaches unlimited buffers, no communication", exact, 4),
            row,
        ],
        remarks=[f"repair: within 2 % of unlimited buffers in {close} of {len(gaps)}"],
    )


def _decimals(printed: str) -> int:
    return len(printed.partition(".")[2])
