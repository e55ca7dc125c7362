"""`weft finetune`: train an adapter on a file, offline, with the serving engine."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated

import typer

from weft.base.errors import ConfigError
from weft.engine.finetune import (
    LossNormalization,
    OptimizerName,
    OptimizerSpec,
    ScheduleName,
    StepMetrics,
)
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat
from weft.serve.finetune_data import OverlongSamples
from weft.serve.llm import LLM
from weft.serve.offline_finetune import FinetuneJob

CHECKPOINTS = "checkpoints"
SUMMARY = "finetune.json"
_LINES_OF_LOG = 20
"""Where no terminal shows a bar: so many lines in all."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(name="finetune")
def finetune(
    model: Annotated[str, typer.Option(help="Model directory or hub id")],
    data: Annotated[Path, typer.Option(help="Training file: JSON lines")],
    out: Annotated[Path, typer.Option(help="Directory for the adapter; made if missing")],
    validation: Annotated[Path | None, typer.Option(help="Held-out file: JSON lines")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data")] = 3,
    batch_size: Annotated[int, typer.Option(help="Samples of an optimizer step")] = 1,
    rank: Annotated[int, typer.Option(help="LoRA rank")] = 16,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; default: 2 x rank")] = None,
    dropout: Annotated[float, typer.Option(help="LoRA dropout")] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or a regular expression")
    ] = "all-linear",
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer")] = OptimizerName.ADAMW,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate")] = 2e-4,
    schedule: Annotated[ScheduleName, typer.Option(help="Of the rate")] = ScheduleName.CONSTANT,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Weight decay")] = 0.0,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip gradients by norm")] = None,
    loss_normalization: Annotated[
        LossNormalization, typer.Option(help="What a step's loss is divided by")
    ] = LossNormalization.TOKEN,
    overlong_samples: Annotated[
        OverlongSamples, typer.Option(help="What becomes of samples that are too long")
    ] = OverlongSamples.REFUSE,
    max_sample_tokens: Annotated[
        int | None, typer.Option(help="Longest sample; default: the model's context")
    ] = None,
    remat: Annotated[
        Remat, typer.Option(help="What a sample keeps for its backward pass")
    ] = Remat.PRUNED,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout")] = 0,
    initial_adapter: Annotated[
        Path | None, typer.Option(help="Adapter directory to start from")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint in --out")
    ] = False,
    replay_windows: Annotated[
        Path | None,
        typer.Option(help="Window log of an earlier run (weft serve --record-windows) to repeat"),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Context to make room for; default: the model's own")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(help="Memory of keys and values; default: what is free")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
) -> None:
    """Train a LoRA adapter; it is written in PEFT's format."""
    if resume and replay_windows is not None:
        raise ConfigError(
            "--resume and --replay-windows are both given; a replay runs from its start"
        )
    _check_out(out, resume=resume)
    spec = AdapterSpec(
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        dropout=dropout,
        target_modules=_targets(target_modules),
    )
    rate = OptimizerSpec(
        name=optimizer,
        lr=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        num_warmup_steps=warmup_steps,
        max_grad_norm=max_grad_norm,
    )
    checkpoints = out / CHECKPOINTS
    latest = latest_checkpoint(checkpoints) if resume else None
    begun = 0 if latest is None else _step_of(latest)
    started_s = time.monotonic()
    with LLM(
        model,
        dtype=dtype,
        device=device,
        num_threads=num_threads,
        max_num_seqs=1,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        finetune_config=FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY),
        replay_windows=replay_windows,
    ) as llm:
        job = llm.finetune(
            data,
            adapter=out.name or "adapter",
            lora=spec,
            validation=validation,
            optimizer=rate,
            num_epochs=epochs,
            batch_size=batch_size,
            loss_normalization=loss_normalization.value,
            seed=seed,
            max_sample_tokens=max_sample_tokens,
            overlong_samples=overlong_samples.value,
            checkpoint_every=checkpoint_every,
            output_dir=checkpoints,
            resume_from=latest,
            initial_adapter=initial_adapter,
            remat=remat.value,
        )
        try:
            with _shown() as show:
                job.wait(show)
        except KeyboardInterrupt:
            done = job.metrics[-1].step if job.metrics else begun
            print(
                f"interrupted after step {done}; `--resume` goes on from the latest "
                f"checkpoint in {checkpoints}",
                file=sys.stderr,
            )
            raise
    _keep(out, job, time.monotonic() - started_s, begun=begun)
    print(f"the adapter is in {out}")


def latest_checkpoint(directory: Path) -> Path:
    """The checkpoint with the most steps.

    Raises:
        ConfigError: there is none.
    """
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    if not found:
        raise ConfigError(f"{directory} holds no checkpoint to resume from; leave out --resume")
    return max(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def main(argv: list[str]) -> int:
    """Parse and run; returns the exit code."""
    try:
        app(args=argv, prog_name="weft finetune")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _check_out(out: Path, *, resume: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be used: {error.strerror}") from error
    if (out / SUMMARY).exists():
        raise ConfigError(f"--out {out} holds a finished adapter already; choose another")
    if not resume and any((out / CHECKPOINTS).glob("step-*")):
        raise ConfigError(
            f"--out {out} holds checkpoints of an earlier run; go on with --resume, or choose "
            "another directory"
        )


def _targets(text: str) -> tuple[str, ...] | str:
    names = text.split(",")
    is_names = all(re.fullmatch(r"[A-Za-z0-9_.]+", name) for name in names)
    return text if text == "all-linear" or not is_names else tuple(names)


def _keep(out: Path, job: FinetuneJob, elapsed_s: float, *, begun: int) -> None:
    """Move the finished adapter to its place and drop what only an unfinished run needs."""
    final = out / CHECKPOINTS / "final"
    for path in final.iterdir():
        path.replace(out / path.name)
    summary = {
        "num_steps": job.metrics[-1].step if job.metrics else begun,
        # Of the losses and tokens below; more than 1 after --resume.
        "first_step": begun + 1,
        "num_tokens": job.num_tokens,
        "elapsed_s": round(elapsed_s, 3),
        "loss": [metrics.loss for metrics in job.metrics],
        "validation_loss": {
            str(metrics.step): metrics.validation_loss
            for metrics in job.metrics
            if metrics.validation_loss is not None
        },
    }
    (out / SUMMARY).write_text(json.dumps(summary) + "\n")
    shutil.rmtree(out / CHECKPOINTS)


@contextlib.contextmanager
def _shown() -> Generator[Callable[[StepMetrics], None]]:
    """A bar with loss, tokens/s and time left on a terminal; a few lines elsewhere."""
    started_s = time.monotonic()
    num_tokens = 0

    def speed(metrics: StepMetrics) -> float:
        nonlocal num_tokens
        num_tokens += metrics.num_tokens
        return num_tokens / max(1e-9, time.monotonic() - started_s)

    if not sys.stderr.isatty():

        def line(metrics: StepMetrics) -> None:
            rate = speed(metrics)
            every = max(1, metrics.num_steps // _LINES_OF_LOG)
            if metrics.step % every and metrics.step != metrics.num_steps:
                return
            checked = metrics.validation_loss
            print(
                f"step {metrics.step}/{metrics.num_steps}  loss {metrics.loss:.4f}"
                + ("" if checked is None else f"  validation {checked:.4f}")
                + f"  {rate:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        "finetuning",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, text="")

        def bar(metrics: StepMetrics) -> None:
            text = f"loss {metrics.loss:.4f}  {speed(metrics):.0f} tokens/s"
            progress.update(task, total=metrics.num_steps, completed=metrics.step, text=text)

        yield bar
