"""`weft train`: run a plan for real, on this machine's processes or as a rank of torchrun."""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from weft.base.errors import ConfigError, WeftError
from weft.cli.profile import parse_options
from weft.engine.finetune import ScheduleName
from weft.model.zoo.registry import ZooModel, resolve_model
from weft.plan.train_plan import PlanError, TrainPlan
from weft.runtime.param_init import SafetensorsWeights, SeededWeights, empty_parameters
from weft.runtime.stage_executor import LossScope
from weft.train.config import OptimizerName, TrainConfig
from weft.train.data import TrainData
from weft.train.launch import (
    final_failure,
    forget_failure,
    is_restarted,
    is_worker,
    launch,
    log_to,
    note_failure,
    process_group,
)
from weft.train.trainer import Trainer, TrainReport, print_progress

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(name="train")
def train(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="A plan, written by `weft plan --out`")],
    module: Annotated[
        str, typer.Option(help="The plan's MODEL: a name or package.module:function")
    ],
    data: Annotated[
        str, typer.Option(help="package.module:function that returns a weft.train.TrainData")
    ],
    steps: Annotated[int, typer.Option(help="Optimizer steps in all")],
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept")] = Path("run"),
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the model")] = None,
    data_option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the data")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="First weights: a safetensors file or directory")
    ] = None,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer")] = OptimizerName.ADAMW,
    lr: Annotated[float, typer.Option(help="Learning rate")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay")] = 0.0,
    momentum: Annotated[float, typer.Option(help="SGD's momentum")] = 0.0,
    schedule: Annotated[
        ScheduleName, typer.Option(help="Learning-rate schedule")
    ] = ScheduleName.CONSTANT,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up")] = 0,
    clip_norm: Annotated[float | None, typer.Option(help="Clip gradients by global norm")] = None,
    accumulate: Annotated[int, typer.Option(help="Batches of one optimizer step")] = 1,
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16")] = None,
    loss_scope: Annotated[
        LossScope, typer.Option(help="Which samples the loss relates")
    ] = LossScope.SAMPLE,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle samples in every epoch")] = True,
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0: at the end")] = 0,
    keep_checkpoints: Annotated[int, typer.Option(help="Newest to keep; 0: all")] = 2,
    validate_every: Annotated[int, typer.Option(help="Steps; 0: at the end")] = 0,
    record: Annotated[bool, typer.Option(help="Keep a timeline of the last steps")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events")] = False,
    own_modules: Annotated[
        bool, typer.Option(help="Call the model's own submodules where they lie whole in a stage")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    timeout_s: Annotated[float, typer.Option(help="Seconds until a silent peer is given up")] = 600,
    max_restarts: Annotated[int, typer.Option(help="Restarts after a rank has died")] = 3,
) -> None:
    """Train the plan's model; a run directory that holds a checkpoint is resumed."""
    config = TrainConfig(
        num_steps=steps,
        run_dir=run_dir,
        seed=seed,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        schedule=schedule,
        num_warmup_steps=warmup,
        clip_norm=clip_norm,
        accumulate=accumulate,
        autocast=autocast,
        loss_scope=loss_scope,
        shuffles=shuffle,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        validate_every=validate_every,
        record=record,
        tensorboard=tensorboard,
        own_modules=own_modules,
        device=device,
        timeout_s=timeout_s,
    )
    read = _read_plan(plan)
    if is_worker():
        _work(read, module, data, config, option, data_option, weights)
        return
    launch(
        context.obj,
        num_ranks=len(read.used_devices),
        max_restarts=max_restarts,
        run_dir=run_dir,
    )


def main(argv: list[str]) -> int:
    """Run the verb; SystemExit on --help and on a wrong option."""
    # The arguments travel with the context: the ranks are started with the same.
    app(args=argv, prog_name="weft train", obj=list(argv))
    return 0


def _read_plan(path: Path) -> TrainPlan:
    try:
        return TrainPlan.from_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read plan {path}: {error.strerror}") from None


def load_model(spec: str, options: list[str] | None, *, has_weights: bool = False) -> ZooModel:
    """The model with large parameters on the meta device: a rank fills in only its own.

    Raises:
        ConfigError: its function loads trained weights, which would be lost, and none are given.
    """
    with empty_parameters():
        found = resolve_model(spec, parse_options(options or []), device="cpu")
    # transformers' from_pretrained notes where it read, and returns a model in eval mode; one made
    # from a configuration's file has the path, too.
    source = next((p for m in found.module.modules() if (p := _pretrained_path(m))), "")
    if source and not has_weights:
        raise ConfigError(
            f"--module {spec!r} loads the weights of {source!r}, but ranks build the model without "
            "values and fill in their own parts; give the directory as --weights, and build the "
            "module from its configuration"
        )
    return found


def _pretrained_path(module: Any) -> str:
    path = getattr(module, "name_or_path", "")
    return path if isinstance(path, str) and not module.training else ""


def load_data(spec: str, options: list[str] | None) -> TrainData:
    """The data that `package.module:function` returns.

    Raises:
        ConfigError: it cannot be imported, or returns something else.
    """
    path, _, name = spec.partition(":")
    try:
        function = getattr(import_module(path), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--data {spec!r} cannot be imported ({error}); give package.module:function, and run "
            "where it can be imported"
        ) from None
    found: Any = function(**parse_options(options or []))
    if not isinstance(found, TrainData):
        raise ConfigError(
            f"--data {spec!r} returned {type(found).__name__}; it must return a "
            "weft.train.TrainData"
        )
    return found


def _work(
    plan: TrainPlan,
    module: str,
    data: str,
    config: TrainConfig,
    option: list[str] | None,
    data_option: list[str] | None,
    weights: Path | None,
) -> None:
    """One rank's life: any failure is noted for the launcher and ends the process at once."""
    rank = int(os.environ["RANK"])
    if is_restarted():
        # Another machine's agent may restart ranks after a failure that comes again.
        reason = final_failure(config.run_dir)
        if reason:
            print(f"weft train: not restarted: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
    else:
        forget_failure(config.run_dir, rank)
    log_to(config.run_dir, rank)
    try:
        _check_world(plan)
        with process_group(config.device, config.timeout_s):
            # For parameters whose modules cannot initialise themselves.
            torch.manual_seed(config.seed)
            trainer = Trainer(
                plan=plan,
                model=load_model(module, option, has_weights=weights is not None),
                data=load_data(data, data_option),
                config=config,
                weights=SeededWeights(config.seed)
                if weights is None
                else SafetensorsWeights(weights),
            )
            if trainer.is_first:
                trainer.on_step = print_progress()
            report = trainer.run()
            if trainer.is_first:
                print(_account(report, config), flush=True)
    except Exception as error:
        if not isinstance(error, WeftError):
            logging.getLogger("weft.train").exception("rank %d failed", rank)
        note_failure(config.run_dir, rank, error, time.time())
        logging.shutdown()
        # Not through the interpreter's exit: communicators would wait there for dead ranks.
        os._exit(1)


def _check_world(plan: TrainPlan) -> None:
    world, wanted = int(os.environ["WORLD_SIZE"]), len(plan.used_devices)
    if world != wanted:
        raise PlanError(
            f"the plan runs on {wanted} devices, but torchrun started {world} ranks; start {wanted}"
        )


def _account(report: TrainReport, config: TrainConfig) -> str:
    """One line on how the run ended."""
    done, where = report.num_steps, f"run in {config.run_dir}"
    if report.first_step >= config.num_steps:
        return f"nothing left to do: {done} steps were done before; {where}"
    stopped = f", of {config.num_steps}: stopped by SIGTERM, with a checkpoint"
    return (
        f"{done} steps{stopped if report.was_stopped else ''}, loss {report.loss:.5g}, "
        f"{report.samples_per_s:.1f} samples/s; {where}"
    )
