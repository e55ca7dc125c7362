"""What the training examples share: this machine as several devices, and weft's verbs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from weft.cluster.cluster import Cluster, Link
from weft.cluster.device import SAME_DEVICE
from weft.cluster.device_types import cpu_device_type
from weft.cluster.presets import local_cluster
from weft.cost.profiled import BlockProfile
from weft.cost.training import TrainingSpec
from weft.plan.train_plan import TrainPlan

ADAMW = TrainingSpec(name="adamw-fp32", state_bytes_per_param=16.0)
LOOPBACK = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4)
"""gloo between two processes of one machine, in round numbers."""


def local_devices(num_devices: int) -> Cluster:
    """This machine's CPU as several devices, one core each."""
    local = local_cluster().nodes[0]
    memory_bytes = local.device_type.memory_bytes // num_devices
    node = replace(
        local,
        device_type=cpu_device_type(1, memory_bytes),
        num_devices=num_devices,
        intra=LOOPBACK,
    )
    return Cluster(name=f"local-{num_devices}", nodes=(node,), inter=SAME_DEVICE)


def shared_by_ranks(profile: BlockProfile, num_ranks: int) -> BlockProfile:
    """The profile of a rank that has its share of a core: ranks may outnumber the cores."""
    factor = max(1.0, num_ranks / (os.cpu_count() or 1))
    blocks = {
        signature: replace(
            times,
            forward_s=tuple(factor * value for value in times.forward_s),
            backward_s=tuple(factor * value for value in times.backward_s),
        )
        for signature, times in profile.blocks.items()
    }
    return replace(profile, blocks=blocks)


def show(plan: TrainPlan) -> None:
    """Print the stage graph."""
    for stage in plan.stages:
        fed = [edge.target for edge in plan.edges if edge.source == stage.index]
        print(
            f"stage {stage.index} on rank {', '.join(map(str, stage.devices))}: "
            f"{len(stage.ops)} operators from {stage.ops[0]}, "
            f"{1e3 * stage.forward_s[stage.micro_batch]:.1f} ms forward, "
            f"feeds {', '.join(map(str, fed)) or 'no stage'}"
        )


def weft(*arguments: str) -> None:
    """Run a verb of weft, whose ranks can import what lies here; ends where it fails."""
    here = str(Path(__file__).resolve().parent)
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    print("$ weft", *arguments, flush=True)
    ended = subprocess.run([sys.executable, "-m", "weft", *arguments], env=environment)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def newest_checkpoint(run_dir: Path) -> Path:
    """The last checkpoint of a finished run."""
    return max((run_dir / "checkpoints").glob("step-*[0-9]"))
