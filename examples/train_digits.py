"""`make demo-train`: capture, plan, simulate, train and compare two towers on four processes.

Usage: python examples/train_digits.py [--steps N] [--run-dir DIR]

A tower for images of handwritten digits and one for their captions are planned as two branches of
a stage graph, trained by `weft train` on four local ranks, and tested on digits that training never
saw with a sentence that it never saw. Needs no network and no GPU; two cores take two minutes.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from digits_towers import class_captions, held_out, model
from local_ranks import ADAMW, local_devices, newest_checkpoint, shared_by_ranks, show, weft

from weft.cost.profiled import BlockProfile
from weft.graph.capture import Capture
from weft.graph.graph import Graph
from weft.plan.api import plan as make_plan
from weft.plan.constraints import Constraint, ForceCut, Pin
from weft.plan.train_plan import TrainPlan
from weft.runtime.profiler import ProfilerConfig, profile_blocks
from weft.train.checkpoint import model_tensors
from weft.train.run_dir import RunDirectory, read_metrics

NUM_RANKS = 4
BATCH_SIZE = 64
MICRO_BATCH = 16
MAX_BLOCKS = 60
"""Fewer than the model's operators: the planner and the profiler cut the same blocks."""


def main() -> int:
    """Run the demonstration; non-zero when the accuracy is below 80 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--run-dir", type=Path, default=Path("run-digits"))
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run_dir)
    shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True)
    torch.set_num_threads(1)

    say("1/5  capture and profile")
    capture = model().trace()
    graph = capture.graph
    print(f"{len(graph.ops)} operators, {graph.num_parameters / 1e6:.1f} M parameters")
    profile = shared_by_ranks(measure(capture), NUM_RANKS)

    say("2/5  plan")
    plan = two_branches(graph, profile)
    planned = run.path / "planned.json"
    planned.write_text(plan.to_json())
    show(plan)

    say("3/5  simulate")
    weft("simulate", str(planned), "--png", str(run.path / "simulated.png"))

    say(f"4/5  train on {NUM_RANKS} ranks")
    started_s = time.perf_counter()
    train(planned, run, arguments.steps)
    print(f"trained in {time.perf_counter() - started_s:.0f} s")
    show_losses(run)
    accuracy = zero_shot_accuracy(run)
    print(f"zero-shot accuracy on {len(held_out()[1])} held-out digits: {accuracy:.1%}")

    say("5/5  compare measured with simulated")
    figure = run.path / "compared.png"
    weft("compare-timeline", str(run.path), "--png", str(figure))
    print(f"\nboth Gantt charts: {figure}\ntrace for ui.perfetto.dev: {run.trace}")
    return 0 if accuracy >= 0.8 else 1


def measure(capture: Capture) -> BlockProfile:
    """Time every block of the model on this machine, by one thread."""
    config = ProfilerConfig(batch_sizes=(4, 8, MICRO_BATCH), max_blocks=MAX_BLOCKS)
    return profile_blocks(capture, config, device_name="cpu").profile


def two_branches(graph: Graph, profile: BlockProfile) -> TrainPlan:
    """A plan in which each tower is a branch of two stages; the planner finds the rest."""
    wanted: list[Constraint] = []
    for tower, devices in (("image", (0, 1)), ("text", (2, 3))):
        names = tuple(op.id for op in graph.ops if op.id.startswith(tower))
        before = [name for name in names if name.startswith(f"{tower}.layers.1")]
        after = [name for name in names if name.startswith(f"{tower}.layers.2")]
        wanted.append(Pin(ops=names, devices=devices))
        wanted.append(ForceCut(source=before[-1], target=after[0]))
    return make_plan(
        graph,
        local_devices(NUM_RANKS),
        batch_size=BATCH_SIZE,
        micro_batches=(MICRO_BATCH,),
        training=ADAMW,
        profile=profile,
        constraints=wanted,
        max_blocks=MAX_BLOCKS,
    )


def train(plan: Path, run: RunDirectory, num_steps: int) -> None:
    """`weft train`, validating four times; the loss relates the samples of a micro-batch."""
    weft(
        "train",
        str(plan),
        *("--module", "digits_towers:model", "--data", "digits_towers:data"),
        *("--steps", str(num_steps), "--run-dir", str(run.path), "--record"),
        *("--loss-scope", "micro_batch", "--lr", "1e-3", "--schedule", "cosine"),
        *("--warmup", "20", "--clip-norm", "1.0", "--validate-every", str(max(1, num_steps // 4))),
    )


def show_losses(run: RunDirectory) -> None:
    """Print the losses where they were validated."""
    for row in read_metrics(run.metrics):
        if "validation_loss" in row:
            print(
                f"step {row['step']:4d}  loss {row['loss']:.3f}  validation "
                f"{row['validation_loss']:.3f}  {row['samples_per_s']:.0f} samples/s"
            )


def zero_shot_accuracy(run: RunDirectory) -> float:
    """Share of held-out digits whose most similar sentence names them."""
    towers = model().module.eval()
    towers.load_state_dict(model_tensors(newest_checkpoint(run.path)))
    image, digit_B = held_out()
    with torch.no_grad():
        similarity = towers(image, class_captions())
    return float((similarity.argmax(1) == digit_B).float().mean())


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text} ==", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
