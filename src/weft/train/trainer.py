"""The step loop over a StageExecutor: data, optimizer, validation, checkpoints, metrics."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from weft.base.errors import ConfigError, ModelLoadError
from weft.graph.capture import Capture
from weft.model.zoo.registry import ZooModel
from weft.plan.expand import at_operators
from weft.plan.train_plan import PlanError, TrainPlan
from weft.runtime.dist_transport import DistWorld
from weft.runtime.loopback import LoopbackWorld
from weft.runtime.param_init import ModuleWeights, SafetensorsWeights, SeededWeights, WeightSource
from weft.runtime.stage_executor import (
    ExecutorConfig,
    OptimizerFactory,
    RankState,
    StepResult,
    TorchStageExecutor,
)
from weft.runtime.transport import World
from weft.sim.render.perfetto import write_perfetto
from weft.train.checkpoint import (
    CheckpointStore,
    TrainState,
    check_model,
    load_checkpoint,
    optimizer_scalars,
)
from weft.train.config import (
    SchedulerFactory,
    TrainConfig,
    optimizer_factory,
    scheduler_factory,
)
from weft.train.data import ColumnSource, TrainData
from weft.train.groups import (
    GroupState,
    group_states,
    initial_values,
    plain_values,
    restore_groups,
    restore_scheduler,
)
from weft.train.run_dir import RunDirectory
from weft.train.timeline_file import write_timeline

_log = logging.getLogger("weft.train")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """How a run ended."""

    num_steps: int
    """Optimizer steps done, those before a resume included."""
    first_step: int
    """Where this process began."""
    loss: float
    """Of the last step; NaN where none was left to do."""
    validation_loss: float | None
    samples_per_s: float
    was_stopped: bool
    """By SIGTERM; a checkpoint was written first."""


class Progress(Protocol):
    """Who wants to see every step, on rank 0."""

    def __call__(self, result: StepResult, num_steps: int, row: dict[str, Any]) -> None: ...


class Trainer:
    """Trains a model by a plan; every rank of the run makes one.

    `weights` gives the first values, independent of the plan: by default those that the module
    holds, or where it was built with `empty_parameters()` its modules' own initialisation, seeded
    by `config.seed`. Without `world`, all ranks of the plan run in this process where
    torch.distributed is not initialised.

    Raises:
        PlanError: the plan is of another model, of another number of ranks, or not the same on all.
        ConfigError: the data does not fit the model or is shorter than one step; the run directory
            cannot be written; ranks hold different first values of a parameter that they share.
        ModelLoadError: the checkpoint to resume from is of another model.
    """

    def __init__(
        self,
        *,
        plan: TrainPlan,
        model: ZooModel,
        data: TrainData,
        config: TrainConfig,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        weights: WeightSource | None = None,
        world: World | None = None,
        capture: Capture | None = None,
        resumes: bool = True,
    ) -> None:
        self.config = config
        self.run_dir = RunDirectory(config.run_dir)
        self.world = world if world is not None else _world(plan, config)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        _check_same(self.world, plan, config)
        if self.is_first:
            self.run_dir.create()
        self.capture = capture if capture is not None else model.trace()
        self.plan = at_operators(plan, self.capture.graph)
        batch_samples = self.plan.batch_size * config.accumulate
        self.source = ColumnSource(
            data, self.capture, batch_samples, seed=config.seed, shuffles=config.shuffles
        )
        if data.validation is None and config.validate_every:
            raise ConfigError(
                f"validate_every is {config.validate_every}, but the data holds no validation "
                "samples; give TrainData(validation=...), or leave it out"
            )
        self._validation = (
            None
            if data.validation is None
            else ColumnSource(
                data.validation,
                self.capture,
                self.plan.batch_size,
                shuffles=False,
                what="validation data",
            )
        )
        if isinstance(weights, SafetensorsWeights):
            weights.fill_buffers(model.module)
        self.executor = TorchStageExecutor(
            plan=self.plan,
            capture=self.capture,
            module=model.module,
            world=self.world,
            source=self.source,
            optimizer=optimizer or optimizer_factory(config),
            weights=weights if weights is not None else _own_weights(model.module, config.seed),
            config=ExecutorConfig(
                loss_scope=config.loss_scope,
                accumulate=config.accumulate,
                clip_norm=config.clip_norm,
                autocast=config.autocast_dtype,
                seed=config.seed,
                device=config.device,
                record=config.record,
                own_modules=config.own_modules,
            ),
        )
        make_scheduler = scheduler or scheduler_factory(config)
        self.schedulers: list[LRScheduler] = [
            make_scheduler(rank.optimizer)
            for rank in self.executor.ranks
            if rank.optimizer is not None
        ]
        if not self.schedulers and scheduler is None:
            # This rank trains nothing, and yet tells the learning rate.
            self.schedulers.append(_idle_scheduler(config))
        self._constants = _constants(model.module, self.capture)
        self._initial = [
            [] if rank.optimizer is None else initial_values(rank.optimizer)
            for rank in self.executor.ranks
        ]
        self.checkpoints = CheckpointStore(self.run_dir.checkpoints, keep=config.keep_checkpoints)
        _check_weights(self.world, self.executor.ranks)
        self.first_step = self._resume() if resumes else 0
        self.on_step: Progress | None = None

    # ---- the loop ----

    def run(self) -> TrainReport:
        """Train to `config.num_steps`; SIGTERM writes a checkpoint and returns early.

        Raises:
            NonFiniteLossError: the loss of a step is NaN or infinite.
            PeerTimeoutError: another rank is gone or hangs.
        """
        config = self.config
        if self.is_first:
            self.run_dir.describe(self.plan, config.to_dict())
            self.run_dir.drop_metrics_after(self.first_step)
        done, result = self.first_step, None
        validation: float | None = None
        started_s, was_stopped = time.perf_counter(), False
        with _stop_signal() as stop_asked, self._writer() as writer:
            for result in self._steps():
                done = result.step + 1
                lr = float(self.schedulers[0].get_last_lr()[0]) if self.schedulers else None
                for scheduler in self.schedulers:
                    scheduler.step()
                is_last = done == config.num_steps
                is_validated = self._is_due(config.validate_every, done, is_last)
                if is_validated:
                    validation = self._validate()
                self._report(result, lr, validation if is_validated else None, writer)
                was_stopped = not is_last and self._agree(stop_asked.is_set())
                if was_stopped or self._is_due(config.checkpoint_every, done, is_last):
                    self.save(done)
                else:
                    self.checkpoints.poll()
                if was_stopped:
                    break
            self.checkpoints.wait()
        if config.record and result is not None:
            self._write_timeline()
        self.world.barrier()
        elapsed_s = time.perf_counter() - started_s
        num_samples = (done - self.first_step) * self.plan.batch_size * config.accumulate
        return TrainReport(
            num_steps=done,
            first_step=self.first_step,
            loss=float("nan") if result is None else result.loss,
            validation_loss=validation,
            samples_per_s=num_samples / elapsed_s,
            was_stopped=was_stopped,
        )

    def save(self, num_steps: int, *, blocking: bool = False) -> None:
        """Write a checkpoint of the state after `num_steps` steps; training may go on at once."""
        ranks = self.executor.ranks
        gathered = self._gather_state(ranks)
        state = TrainState(
            num_steps=num_steps,
            plan_digest=_digest(self.plan),
            seed=self.config.seed,
            samples_per_step=self.plan.batch_size * self.config.accumulate,
            optimizer_name=gathered["name"],
            scheduler=gathered["scheduler"],
            groups=tuple(GroupState(**group) for group in gathered["groups"]),
            optimizer=gathered["scalars"],
            has_previous=any(rank.previous is not None for rank in ranks),
        )
        self.checkpoints.save(ranks, state, constants=self._constants, blocking=blocking)

    # ---- pieces ----

    def _steps(self) -> Iterator[StepResult]:
        """The steps that are left.

        Without flushes micro-batches of the next step are under way after each, and a validation
        would meet their messages: so the executor is taken to an end before every validation.
        """
        first, last, every = self.first_step, self.config.num_steps, self.config.validate_every
        has_ends = not self.executor.schedule.is_synchronous and self._validation is not None
        while first < last:
            end = min(last, (first // every + 1) * every) if has_ends and every else last
            yield from self.executor.steps(end - first, first_step=first)
            first = end

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the steps it has done."""
        path = self.checkpoints.latest() if self.is_first else None
        name = self.world.all_gather_bytes(
            [(path.name if path else "").encode()] * len(self.world.transports)
        )[0].decode()
        if self.is_first and not name:
            self.checkpoints.sweep()
        if not name:
            return 0
        path = self.run_dir.checkpoints / name
        check_model(path, {parameter.id for parameter in self.capture.graph.parameters})
        state = load_checkpoint(path, self.executor.ranks)
        if state.seed != self.config.seed:
            raise ModelLoadError(
                f"checkpoint {name} was written with seed {state.seed}, this run has "
                f"{self.config.seed}: the order of samples would differ; set the same seed or "
                "another run directory"
            )
        self._check_optimizer(name, state)
        for rank in self.executor.ranks:
            restore_groups(rank, state.groups)
        for scheduler in self.schedulers:
            restore_scheduler(scheduler, state.scheduler)
        samples = self.plan.batch_size * self.config.accumulate
        if self.is_first and state.samples_per_step != samples:
            _log.warning(
                "checkpoint %s was written with %d samples a step, this run takes %d: the order "
                "of samples goes on at step %d of the new length, so that some come twice or are "
                "left out in this epoch",
                *(name, state.samples_per_step, samples, state.num_steps),
            )
        if self.is_first:
            self.checkpoints.sweep()
            _log.info("resuming from %s", name)
        return state.num_steps

    def _check_optimizer(self, name: str, state: TrainState) -> None:
        """Refuse another optimizer's state."""
        names = {type(r.optimizer).__name__ for r in self.executor.ranks if r.optimizer is not None}
        if names and state.optimizer_name not in names:
            raise ModelLoadError(
                f"checkpoint {name} was written by optimizer {state.optimizer_name or 'none'}, "
                f"this run has {', '.join(sorted(names))}; use the same, or export the weights and "
                "start another run directory with them"
            )

    def _gather_state(self, ranks: Sequence[RankState]) -> dict[str, Any]:
        """What all ranks know of optimizers and schedulers beside tensors: any may have none."""
        optimizers = [rank.optimizer for rank in ranks if rank.optimizer is not None]
        groups = [
            state
            for rank, initial in zip(ranks, self._initial, strict=True)
            for state in group_states(rank, initial)
        ]
        mine = {
            "scalars": optimizer_scalars(ranks),
            "groups": [asdict(group) for group in groups],
            "scheduler": plain_values(self.schedulers[0].state_dict()) if self.schedulers else {},
            "name": type(optimizers[0]).__name__ if optimizers else "",
        }
        parts = [json.dumps(mine).encode()] * len(self.world.transports)
        found: dict[str, Any] = {"scalars": {}, "groups": [], "scheduler": {}, "name": ""}
        held: set[str] = set()
        for part in map(json.loads, self.world.all_gather_bytes(parts)):
            found["scalars"] |= part["scalars"]
            found["scheduler"] = found["scheduler"] or part["scheduler"]
            found["name"] = found["name"] or part["name"]
            for group in part["groups"]:
                # Replicas hold the same.
                if not held.issuperset(group["names"]):
                    found["groups"].append(group)
                    held.update(group["names"])
        return found

    def _validate(self) -> float | None:
        if self._validation is None:
            return None
        num_batches = self._validation.order.steps_per_epoch
        totals = self.executor.evaluate(self._validation, num_batches)
        return totals.loss_sum / totals.weight

    def _agree(self, is_asked: bool) -> bool:
        """Whether any rank was told to stop; all ranks learn it after the same step."""
        if not dist.is_initialized():
            return is_asked
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([float(is_asked)], device=device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def _is_due(self, every: int, done: int, is_last: bool) -> bool:
        return is_last or (every > 0 and done % every == 0)

    def _report(
        self, result: StepResult, lr: float | None, validation: float | None, writer: Any
    ) -> None:
        if not self.is_first:
            return
        row: dict[str, Any] = {
            "step": result.step + 1,
            "loss": result.loss,
            "samples_per_s": result.num_samples / result.duration_s,
            "step_time_s": result.duration_s,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "validation_loss": validation,
            "mfu": self._mfu(result),
            "time_s": time.time(),
        }
        self.run_dir.add_metrics({key: value for key, value in row.items() if value is not None})
        if writer is not None:
            for key in ("loss", "samples_per_s", "lr", "grad_norm", "validation_loss", "mfu"):
                if row[key] is not None:
                    writer.add_scalar(key, row[key], row["step"])
        if self.on_step is not None:
            self.on_step(result, self.config.num_steps, row)

    def _mfu(self, result: StepResult) -> float | None:
        """Model FLOP over what the devices could do; only where their peak is the device's own."""
        if not self.config.device.startswith("cuda"):
            return None  # A CPU's peak depends on what else its cores do.
        dtype = self.config.autocast or "float32"
        devices = [self.plan.cluster.devices[index].type for index in self.plan.used_devices]
        if any(dtype not in device.peak_flops for device in devices):
            return None
        ops = self.capture.graph.ops
        per_sample = sum(op.flops_forward + op.flops_backward for op in ops)
        peak = sum(device.peak(dtype) for device in devices)
        return per_sample * result.num_samples / result.duration_s / peak

    def _write_timeline(self) -> None:
        timeline = self.executor.gather_timeline()
        peaks: dict[str, int] = {}
        mine = json.dumps(
            {
                str(stage): peak
                for rank in self.executor.ranks
                for stage, peak in rank.peak_in_flight.items()
            }
        ).encode()
        for part in self.world.all_gather_bytes([mine] * len(self.world.transports)):
            for stage, peak in json.loads(part).items():
                peaks[stage] = max(peak, peaks.get(stage, 0))
        if self.is_first and timeline is not None:
            write_timeline(timeline, self.run_dir.timeline, {"peak_in_flight": peaks})
            write_perfetto(timeline, self.run_dir.trace)

    @contextlib.contextmanager
    def _writer(self) -> Generator[Any]:
        """TensorBoard's writer on rank 0, where it was asked for."""
        if not (self.config.tensorboard and self.is_first):
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard needs the tensorboard package ({error}); install "
                "weft[tensorboard] or leave the option out"
            ) from None
        path = str(self.run_dir.path / "tensorboard")
        # Steps that a resumed run does again are told once.
        with SummaryWriter(path, purge_step=self.first_step + 1) as writer:
            yield writer


def _world(plan: TrainPlan, config: TrainConfig) -> World:
    if dist.is_initialized():
        return DistWorld(config.timeout_s)
    return LoopbackWorld(len(plan.used_devices))


def _check_same(world: World, plan: TrainPlan, config: TrainConfig) -> None:
    """Refuse ranks that were started with different plans or settings, before they could hang."""
    mine = f"{_digest(plan)} {_config_digest(config)}".encode()
    found = world.all_gather_bytes([mine] * len(world.transports))
    first = found[0].decode().split()
    for rank, other in enumerate(found):
        for what, ours, theirs in zip(
            ("plan", "configuration"), first, other.decode().split(), strict=True
        ):
            if ours != theirs:
                raise PlanError(
                    f"rank {rank} was started with another {what} than rank 0 ({theirs} and "
                    f"{ours}); give every rank the same"
                )


def _idle_scheduler(config: TrainConfig) -> LRScheduler:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=config.lr)
    scheduler = scheduler_factory(config)(optimizer)
    optimizer.step()  # A scheduler warns where its optimizer never steps.
    return scheduler


def _own_weights(module: nn.Module, seed: int) -> WeightSource:
    """The module's values where it has them all, else its modules' own initialisation."""
    is_empty = any(parameter.is_meta for parameter in module.parameters())
    return SeededWeights(seed) if is_empty else ModuleWeights()


def _constants(module: nn.Module, capture: Capture) -> dict[str, Tensor]:
    """What belongs to the model's files though no step changes it.

    These are persistent buffers, and parameters that the forward pass does not use.
    """
    trained = {parameter.id for parameter in capture.graph.parameters}
    return {
        name: value.detach()
        for name, value in module.state_dict().items()
        if capture.canonical.get(name, name) not in trained
        and isinstance(value, Tensor)
        and not value.is_meta
    }


def _check_weights(world: World, ranks: Sequence[RankState]) -> None:
    """Refuse ranks whose copies of one parameter differ: each rank built the model for itself."""
    sums = [
        {
            name: float(value.detach().sum(dtype=torch.float64))
            for name, value in rank.parameters.items()
            if not isinstance(value, DTensor)  # Each rank has a shard of its own.
        }
        for rank in ranks
    ]
    seen: dict[str, tuple[int, float]] = {}
    gathered = world.all_gather_bytes([json.dumps(held).encode() for held in sums])
    for rank, part in enumerate(gathered):
        for name, total in json.loads(part).items():
            first, wanted = seen.setdefault(name, (rank, total))
            if total != wanted and total == total:
                raise ConfigError(
                    f"rank {rank} begins with other values of parameter {name!r} than rank "
                    f"{first}; build the model from one seed on every rank (torch.manual_seed), "
                    "or pass `weights`"
                )


def _digest(plan: TrainPlan) -> str:
    data = plan.to_dict()
    data.pop("search", None)
    return hashlib.blake2b(json.dumps(data).encode(), digest_size=8).hexdigest()


def _config_digest(config: TrainConfig) -> str:
    data = json.dumps(config.to_dict(), default=str)
    return hashlib.blake2b(data.encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _stop_signal() -> Generator[threading.Event]:
    """Set by SIGTERM while the loop runs: a preempted machine gives notice with it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def print_progress(stream: Any = sys.stderr) -> Progress:
    """One line a step, rewritten in place on a terminal; nothing elsewhere."""
    begun_s = time.perf_counter()
    count = 0

    def show(result: StepResult, num_steps: int, row: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if not stream.isatty():
            return
        done = result.step + 1
        left_s = (time.perf_counter() - begun_s) / count * (num_steps - done)
        mfu = f"  MFU {row['mfu']:.1%}" if row["mfu"] is not None else ""
        stream.write(
            f"\rstep {done}/{num_steps}  loss {result.loss:.4f}  "
            f"{row['samples_per_s']:.1f} samples/s{mfu}  {left_s:.0f} s left \x1b[K"
        )
        if done == num_steps:
            stream.write("\n")
        stream.flush()

    return show
