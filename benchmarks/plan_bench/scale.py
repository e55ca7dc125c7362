"""Speed and size of simulator and capture, each measured in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

from plan_bench.setting import Findings, count_row, limit_row, rate_row
from weft.plan.lower import lower
from weft.plan.replay import replay
from weft.plan.schedules import generate
from weft.sim.stage_executor import simulate

_SIMULATE = """
import json, resource, sys, time
sys.path[:] = [p for p in sys.path if not p.endswith('benchmarks')]
sys.path.insert(0, {tests!r})
from plan.plans import chain, nodes_cluster
from weft.cluster.cluster import Link
from weft.sim.stage_executor import simulate
link = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5)
plan = chain({n}, {m}, cluster=nodes_cluster([8] * ({n} // 8), link, link), edge_bytes=1000)
started = time.perf_counter()
timeline = simulate(plan)
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_SELF)
peak = usage.ru_maxrss * 1024
print(json.dumps(dict(seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime,
                      peak_bytes=peak, actions=len(timeline),
                      messages=len(timeline.messages), step_time_s=timeline.step_time_s)))
"""

_CAPTURE = """
import json, resource, time
from weft.model.zoo.registry import load
started = time.perf_counter()
graph = load('llama', **{options!r}).graph()
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(seconds=seconds, peak_bytes=peak, ops=len(graph.ops),
                      parameters=sum(p.num_elements for p in graph.parameters),
                      flops=sum(op.flops_forward for op in graph.ops))))
"""


def speed(plans: ModuleType, repeats: int) -> Findings:
    """Actions per second of the event kernel (a whole `simulate`) and of the replay."""
    found = Findings()
    plan = plans.chain(64, 256, backward_s=2.0)
    schedule = generate(plan)
    kernel: list[float] = []
    replayed: list[float] = []
    # Processor seconds: one thread runs, and other users of the machine are not our speed.
    for _ in range(repeats):
        started = time.process_time()
        timeline = simulate(plan, schedule)
        kernel.append(len(timeline) / (time.process_time() - started))
        tasks = lower(plan, schedule)
        started = time.process_time()
        result = replay(tasks)
        replayed.append(tasks.num_actions / (time.process_time() - started))
        if result.makespan_s != timeline.step_time_s:
            found.remarks.append("replay and kernel DISAGREE")
    found.rows += [
        rate_row(
            "event kernel, 64 stages x 256 micro-batches, all of simulate()",
            "actions/cpu-s",
            kernel,
            1e5,
        ),
        rate_row("max-plus replay of the same schedule", "actions/cpu-s", replayed, 1e6),
    ]
    found.remarks.append(
        f"kernel {statistics.median(kernel):,.0f} and replay {statistics.median(replayed):,.0f} "
        "actions per processor second (medians)"
    )
    return found


def thousand(tests: str, num_devices: int, num_micro_batches: int) -> Findings:
    """A whole run of `simulate` on many devices: at most 60 s and 4 GiB."""
    got = _child(_SIMULATE.format(tests=tests, n=num_devices, m=num_micro_batches))
    name = f"simulate {num_devices} devices x {num_micro_batches} micro-batches"
    return Findings(
        rows=[
            limit_row(name, "s", [got["seconds"]], 60.0),
            limit_row(f"{name}: processor time", "s", [got["cpu_seconds"]], 60.0),
            limit_row(f"{name}: peak memory", "bytes", [got["peak_bytes"]], 4 * 2**30),
        ],
        tables={name: [got]},
    )


def capture_llama(formula: dict[str, float], options: dict[str, Any]) -> Findings:
    """Capture of transformers' Llama in its 70 B shape on meta tensors."""
    got = _child(_CAPTURE.format(options=options))
    off = {key: abs(got[key] / value - 1) for key, value in formula.items()}
    return Findings(
        rows=[
            limit_row("capture Llama 70 B, 80 layers", "s", [got["seconds"]], 60.0),
            limit_row("capture Llama 70 B: peak memory", "bytes", [got["peak_bytes"]], 4 * 2**30),
            count_row(
                "captured parameters and FLOP within 1 % of the formula",
                sum(value <= 0.01 for value in off.values()),
                len(off),
            ),
        ],
        tables={"capture": [{**got, **{f"{key}_off": value for key, value in off.items()}}]},
    )


def _child(code: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
