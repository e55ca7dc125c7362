"""Train the shapes of DLRM and CANDLE-Uno on data with a known rule, down to the noise.

Usage: python examples/train_dlrm.py [--steps N] [--model dlrm|candle-uno] [--run-dir DIR]

Prints the loss on held-out samples beside the least that the data allows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from known_rules import RESPONSE_NOISE, least_click_loss
from local_ranks import ADAMW, local_devices, show, weft

from weft.model.zoo.registry import load
from weft.plan.api import plan as make_plan
from weft.plan.constraints import Constraint, FixedStage
from weft.plan.train_plan import TrainPlan
from weft.train.run_dir import read_metrics

BATCH_SIZE = 128
SIZES = {
    "dlrm": {
        "num_dense": 2,
        "num_sparse": 2,
        "width": 32,
        "num_layers": 2,
        "num_entries": 50,
        "embedding_width": 8,
        "bag_size": 4,
    },
    "candle-uno": {"num_branches": 3, "width": 32, "num_layers": 2},
}
DATA = {
    "dlrm": ("clicks", ("num_dense", "num_sparse", "width", "num_entries", "bag_size")),
    "candle-uno": ("responses", ("num_branches", "width")),
}


def main() -> None:
    """Both models, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--model", choices=list(SIZES), default=None)
    parser.add_argument("--run-dir", type=Path, default=None, help="keep the runs here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in [arguments.model] if arguments.model else SIZES:
            loss = train(name, arguments.steps, (arguments.run_dir or Path(scratch)) / name)
            print(f"{name}: held-out loss {loss:.4f}, the data's noise is {noise_of(name):.4f}\n")


def train(name: str, num_steps: int, run_dir: Path) -> float:
    """Plan and train; returns the validation loss."""
    plan = branches(name)
    show(plan)
    run_dir.mkdir(parents=True)
    planned = run_dir / "planned.json"
    planned.write_text(plan.to_json())
    function, taken = DATA[name]
    sizes = SIZES[name]
    options = [part for key, value in sizes.items() for part in ("--option", f"{key}={value}")]
    for key in taken:
        options += ["--data-option", f"{key}={sizes[key]}"]
    weft(
        *("train", str(planned), "--module", name, "--data", f"known_rules:{function}", *options),
        *("--steps", str(num_steps), "--run-dir", str(run_dir)),
        *("--lr", "3e-3", "--schedule", "cosine", "--warmup", "20"),
    )
    return read_metrics(run_dir / "metrics.jsonl")[-1]["validation_loss"]


def branches(name: str) -> TrainPlan:
    """Each of the first two branches on a rank of its own; the planner places the others."""
    graph = load(name, **SIZES[name]).graph()
    group = {"dlrm": "dense", "candle-uno": "encoders"}[name]
    wanted: list[Constraint] = [
        FixedStage(
            ops=tuple(op.id for op in graph.ops if op.id.startswith(f"{group}.{i}.")),
            num_devices=1,
        )
        for i in range(2)
    ]
    return make_plan(
        graph,
        local_devices(3),
        batch_size=BATCH_SIZE,
        micro_batches=(BATCH_SIZE // 4,),
        training=ADAMW,
        constraints=wanted,
    )


def noise_of(name: str) -> float:
    """The least expected loss."""
    if name == "candle-uno":
        return RESPONSE_NOISE**2
    return least_click_loss(**{key: SIZES["dlrm"][key] for key in DATA["dlrm"][1]})


if __name__ == "__main__":
    main()
