"""Simulated serving reproduces its recorded run bit for bit.

A refactor of policy, pages, loop or simulator must leave the files in `tests/golden` as they are. A
change that is meant to alter schedules rewrites them, in a commit that says why:

    python tests/sim/test_serving_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from weft.cluster.device import DeviceType
from weft.cost.shapes import MODEL_SHAPES
from weft.sim.serving_report import ServingReport
from weft.sim.serving_setup import ServingLimits, setup_from_shape
from weft.sim.workload import Workload, draw_arrivals

GOLDEN = Path(__file__).parents[1] / "golden"
CARD = DeviceType(
    name="card",
    memory_bytes=2**34,
    peak_flops={"float16": 2e12},
    memory_bandwidth_bytes_per_s=5e10,
    launch_s=1e-5,
)


def recorded_run() -> ServingReport:
    """Bursty arrivals, shared prefixes, long and short requests, too few pages for all of them."""
    size = 80
    index = np.arange(size)
    workload = Workload(
        name="golden",
        arrival_s=draw_arrivals(size, 12.0, burstiness=0.4, seed=7),
        num_prompt_tokens=40 + 37 * index % 400,
        num_output_tokens=5 + 53 * index % 90,
        block_ids=tuple((i % 5, 100 + i % 11, 1000 + i) for i in range(size)),
        block_tokens=48,
    )
    page = 16 * MODEL_SHAPES["110m"].kv_bytes_per_token("float16")
    setup = setup_from_shape(
        MODEL_SHAPES["110m"],
        CARD,
        dtype="float16",
        host_overhead_s=2e-4,
        limits=ServingLimits(
            max_model_len=512,
            max_num_seqs=24,
            max_num_batched_tokens=96,
            kv_cache_memory_bytes=120 * page,
            max_in_flight=2,
        ),
    )
    return setup.run(workload)


def test_the_recorded_run_is_reproduced_bit_for_bit() -> None:
    report = recorded_run()
    assert report.num_preempted > 0
    assert report.prefix_cache_hit_share > 0.05
    assert report.summary() == json.loads((GOLDEN / "serving_summary.json").read_text())
    assert report.requests.to_csv() == (GOLDEN / "serving_requests.csv").read_text()


if __name__ == "__main__":
    run = recorded_run()
    (GOLDEN / "serving_summary.json").write_text(json.dumps(run.summary(), indent=1) + "\n")
    (GOLDEN / "serving_requests.csv").write_text(run.requests.to_csv())
