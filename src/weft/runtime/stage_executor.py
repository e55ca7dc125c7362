"""Trains a plan for real: every rank runs its actions, and one step equals one of one process.

Semantics: gradients of the loss's sum are added over all micro-batches and ranks, divided by the
loss's global weight, clipped by their global norm, and given to the optimizer; so a flushing
schedule computes what a single process does with the same global batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from weft.base.errors import ConfigError, UnsupportedError, WeftError
from weft.graph.capture import Capture
from weft.plan.action import COMPUTE_KINDS, RECV_KINDS, SEND_KINDS, ActionKind
from weft.plan.executor import require_kinds
from weft.plan.schedule import Schedule
from weft.plan.schedules import generate
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.validate import validate_plan
from weft.runtime.batch_source import SampleSource
from weft.runtime.grad_sync import GradientGroup, GradientSync
from weft.runtime.param_init import ModuleWeights, WeightSource
from weft.runtime.rank_loop import RankLoop, StageRun
from weft.runtime.rank_program import RankPlan, rank_plans
from weft.runtime.stage_cut import StageCut, check_edges, cut_stages
from weft.runtime.stage_module import StageModule
from weft.runtime.transport import Handle, RankProgram, Transport, World

SUPPORTED_KINDS = (
    COMPUTE_KINDS | SEND_KINDS | RECV_KINDS | {ActionKind.REDUCE_GRAD, ActionKind.STEP}
) - {ActionKind.I, ActionKind.W}
"""What the runtime runs; it refuses other kinds by name."""

OptimizerFactory = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes a rank's optimizer from its trainable parameters by name."""


class LossScope(StrEnum):
    """Which samples a loss relates to each other."""

    SAMPLE = "sample"
    """None: the loss is a sum over samples."""
    MICRO_BATCH = "micro_batch"
    """Those of a micro-batch, as one rank sees it (contrastive losses within groups)."""
    GLOBAL = "global"
    """All of the batch."""


class NonFiniteLossError(WeftError, ArithmeticError):
    """A loss that is NaN or infinite; the message names step and rank. Weights are unchanged."""


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """How to run a plan.

    `accumulate` batches make one optimizer step. `autocast` is the dtype of autocast regions around
    every stage, in which tensors between stages then travel; parameters and sums of gradients keep
    theirs. `receive_ahead` is the number of receives posted before they are needed. `parallelize`
    may wrap a stage's module (FSDP2, tensor parallelism) given its ranks' mesh.
    """

    loss_scope: LossScope = LossScope.SAMPLE
    accumulate: int = 1
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    seed: int = 0
    bucket_bytes: int = 25 * 2**20
    receive_ahead: int = 4
    device: str = "cpu"
    record: bool = False

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError(f"accumulate is {self.accumulate}; it must be at least 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}; it must be positive, or None")
        if self.receive_ahead < 1:
            raise ConfigError(f"receive_ahead is {self.receive_ahead}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimizer step: `loss` = `loss_sum` / `weight` over the whole batch, on every rank.

    `grad_norm` is the norm before clipping, None where nothing is clipped.
    """

    step: int
    loss: float
    loss_sum: float
    weight: float
    num_samples: int
    duration_s: float
    grad_norm: float | None = None


@dataclass(kw_only=True)
class RankState:
    """One local rank: its parameters and buffers by the model's names, and its optimizer.

    `previous` are the weights before the newest ones, where the schedule keeps two versions.
    `owned` are the names that this rank alone writes to checkpoints and counts in norms.
    """

    rank: int
    device: int
    stages: tuple[int, ...]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    owned: frozenset[str]
    loop: RankLoop
    syncs: list[GradientSync] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    previous: dict[str, nn.Parameter] | None = None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer changes."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @property
    def peak_in_flight(self) -> Mapping[int, int]:
        """By stage, the most micro-batches that were ever forwarded and not yet backwarded."""
        return self.loop.peak_in_flight


class TorchStageExecutor:
    """Runs a plan's schedule on real tensors (a `weft.plan.executor.StageExecutor`).

    `ranks` are those of this process: one over torch.distributed, all over loopback. Rank r runs
    device `plan.used_devices[r]`.
    """

    def __init__(
        self,
        *,
        plan: TrainPlan,
        capture: Capture,
        module: nn.Module,
        world: World,
        source: SampleSource,
        optimizer: OptimizerFactory | None = None,
        weights: WeightSource | None = None,
        schedule: Schedule | None = None,
        config: ExecutorConfig | None = None,
    ) -> None:
        validate_plan(plan, capture.graph)
        self.plan, self.capture, self.world = plan, capture, world
        self.config = config if config is not None else ExecutorConfig()
        self.schedule = schedule if schedule is not None else generate(plan)
        require_kinds(self.schedule, self.supported_kinds, "training runtime")
        if world.num_ranks != len(plan.used_devices):
            raise PlanError(
                f"the plan runs on {len(plan.used_devices)} devices, but the world has "
                f"{world.num_ranks} ranks; start {len(plan.used_devices)}"
            )
        self._check_schedule()
        self.before_step: Callable[[RankState, int], None] | None = None
        self._device = torch.device(self.config.device)
        mixing = self.config.loss_scope is not LossScope.SAMPLE
        self.cut = cut_stages(capture, plan, self._device, allow_mixing=mixing)
        check_edges(self.cut, plan)
        plans = rank_plans(self.schedule, self.cut, plan.used_devices)
        groups = _gradient_groups(plan, self.cut, capture)
        channels = sorted(
            {
                (rank_plan.rank, piece.peer)
                for rank_plan in plans
                for bound in (*rank_plan.first, *rank_plan.middle)
                if bound.action.kind in SEND_KINDS
                for piece in bound.pieces
            }
        )
        world.prepare(sorted({g.ranks for g in groups if len(g.ranks) > 1}), channels)
        builder = _RankBuilder(self, module, source, weights or ModuleWeights(), groups)
        self.ranks = tuple(
            builder.build(plans[transport.rank], transport) for transport in world.transports
        )
        for rank in self.ranks:
            if optimizer is not None and rank.trainable:
                rank.optimizer = _checked(optimizer(rank.trainable))

    @property
    def supported_kinds(self) -> frozenset[ActionKind]:
        """The action kinds that this executor runs."""
        return frozenset(SUPPORTED_KINDS)

    def execute(self, schedule: Schedule, *, num_steps: int = 1) -> list[StepResult]:
        """Run `num_steps` steps of the schedule that the executor was made for."""
        require_kinds(schedule, self.supported_kinds, "training runtime")
        if schedule != self.schedule:
            raise ConfigError(
                f"the executor was made for schedule {self.schedule.name!r}; make another for "
                f"{schedule.name!r}"
            )
        return list(self.steps(num_steps))

    def steps(self, num_steps: int, *, first_step: int = 0) -> Iterator[StepResult]:
        """Run optimizer steps first_step, first_step + 1, ...; one result after each.

        Between results all parameters are those after the step. Raises NonFiniteLossError before
        anything changes, PeerTimeoutError where a rank waits in vain.
        """
        for rank in self.ranks:
            rank.loop.first_step = first_step
        for step in range(num_steps):
            started_s = time.perf_counter()
            totals = [_Totals() for _ in self.ranks]
            self.world.drive(
                [
                    self._step(rank, total, first_step, step, num_steps)
                    for rank, total in zip(self.ranks, totals, strict=True)
                ]
            )
            yield StepResult(
                step=first_step + step,
                loss=totals[0].loss_sum / totals[0].weight,
                loss_sum=totals[0].loss_sum,
                weight=totals[0].weight,
                num_samples=self.plan.batch_size * self.config.accumulate,
                duration_s=time.perf_counter() - started_s,
                grad_norm=totals[0].norm if self.config.clip_norm is not None else None,
            )

    def _check_schedule(self) -> None:
        if self.schedule.is_synchronous:
            return
        if self.config.accumulate > 1 or self.config.clip_norm is not None:
            what = "accumulate" if self.config.accumulate > 1 else "clip_norm"
            raise UnsupportedError(
                f"schedule {self.schedule.name!r} never flushes, so {what} would make all stages "
                "wait for each other in every step; use schedule '1f1b' with it"
            )

    def _step(
        self, rank: RankState, totals: _Totals, first_step: int, step: int, num_steps: int
    ) -> RankProgram:
        """One optimizer step of one rank."""
        plan, config = rank.loop.plan, self.config
        segment, base = plan.segment(step, num_steps)
        is_synchronous = self.schedule.is_synchronous
        for flush in range(config.accumulate):
            yield from rank.loop.run(
                segment,
                base=0 if is_synchronous else base,
                step=first_step + step,
                flush=flush,
                is_last_flush=flush == config.accumulate - 1,
                keep_sends=not is_synchronous and step < num_steps - 1,
            )
        rank.loop.current = "STEP"
        for sync in self._current_syncs(rank):
            for stage in sync.stages:
                # Those that a REDUCE_GRAD has finished have nothing left to wait for.
                yield from sync.finish(stage)
        yield from self._share_totals(rank, totals, first_step + step)
        self._update(rank, totals, first_step + step)

    def _current_syncs(self, rank: RankState) -> Sequence[GradientSync]:
        return rank.syncs

    def _share_totals(self, rank: RankState, totals: _Totals, step: int) -> Iterator[Handle]:
        """Sum loss, weight and squared norm over all ranks."""
        loss_sum, weight = rank.loop.take_losses()
        num_ranks = self.world.num_ranks
        shared = torch.zeros(3 + num_ranks, dtype=torch.float64, device=self._device)
        is_finite = loss_sum - loss_sum == 0
        shared[0], shared[1] = (loss_sum if is_finite else 0.0), weight
        shared[3 + rank.rank] = 0.0 if is_finite else 1.0
        if self.config.clip_norm is not None:
            held = [p.grad for name, p in rank.trainable.items() if name in rank.owned]
            shared[2] = _squared_norm([gradient for gradient in held if gradient is not None])
        yield rank.loop.transport.all_reduce(shared, range(num_ranks))
        values = shared.tolist()
        bad = [r for r in range(num_ranks) if values[3 + r]]
        if bad:
            raise NonFiniteLossError(
                f"the loss of step {step} is not finite on rank {', '.join(map(str, bad))}; "
                "weights are those before the step; lower the learning rate, or look at the batch"
            )
        totals.loss_sum, totals.weight = values[0], values[1]
        totals.norm = values[2] ** 0.5 / values[1] if values[1] else 0.0

    def _update(self, rank: RankState, totals: _Totals, step: int) -> None:
        if rank.optimizer is not None:
            scale = 1.0 / totals.weight
            limit = self.config.clip_norm
            if limit is not None:
                # As torch.nn.utils.clip_grad_norm_ does.
                scale *= min(1.0, limit / (totals.norm + 1e-6))
            gradients = [p.grad for p in rank.trainable.values() if p.grad is not None]
            if scale != 1.0 and gradients:
                torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
            if self.before_step is not None:
                self.before_step(rank, step)
            rank.optimizer.step()
        for p in rank.parameters.values():
            p.grad = None
        for sync in rank.syncs:
            sync.clear()


@dataclass(kw_only=True, slots=True)
class _Totals:
    loss_sum: float = 0.0
    weight: float = 1.0
    norm: float = 0.0


def _squared_norm(gradients: list[Tensor]) -> Tensor | float:
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.double() for norm in norms]).square().sum()


def _checked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS evaluates the loss several times a step through a closure, which a pipeline "
            "cannot; use an optimizer that updates each parameter from its gradient"
        )
    return optimizer


def _gradient_groups(plan: TrainPlan, cut: StageCut, capture: Capture) -> tuple[GradientGroup, ...]:
    """Trainable parameters by the ranks that hold them; a shared one belongs to no stage."""
    rank_of = {device: rank for rank, device in enumerate(plan.used_devices)}
    users: dict[str, list[int]] = {}
    for program in cut.stages:
        for name in program.parameters:
            if capture.graph.parameter_by_id[name].trainable:
                users.setdefault(name, []).append(program.index)
    members: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for name, stages in users.items():
        ranks = sorted({rank_of[d] for stage in stages for d in plan.stages[stage].devices})
        owner = stages[0] if len(stages) == 1 else -1
        members.setdefault((tuple(ranks), owner), []).append(name)
    return tuple(
        GradientGroup(ranks=ranks, stage=stage, names=tuple(names))
        for (ranks, stage), names in sorted(members.items())
    )


class _RankBuilder:
    """Builds the local ranks: weights, modules, gradient sums, loops."""

    def __init__(
        self,
        executor: TorchStageExecutor,
        module: nn.Module,
        source: SampleSource,
        weights: WeightSource,
        groups: Sequence[GradientGroup],
    ) -> None:
        self.executor, self.module, self.source = executor, module, source
        self.weights, self.groups = weights, groups
        self.plan, self.cut = executor.plan, executor.cut
        self.owner_of = self._owners()

    def build(self, rank_plan: RankPlan, transport: Transport) -> RankState:
        """One rank with weights of its own."""
        config, device = self.executor.config, self.executor._device
        stages = tuple(sorted(rank_plan.shapes))
        names = list(dict.fromkeys(n for s in stages for n in self.cut.stages[s].parameters))
        values = self.weights.load(names, self.module)
        parameters = {name: self._parameter(name, values[name]) for name in names}
        buffers = {name: self._buffer(name) for s in stages for name in self.cut.stages[s].buffers}
        groups = [g for g in self.groups if rank_plan.rank in g.ranks and len(g.ranks) > 1]
        syncs = [GradientSync(transport, groups, parameters, config.bucket_bytes)] if groups else []
        runs = {s: self._stage_run(s, rank_plan, parameters, buffers) for s in stages}
        loop = RankLoop(
            plan=rank_plan,
            cut=self.cut,
            stages=runs,
            transport=transport,
            source=self.source,
            sync=syncs,
            seed=config.seed,
            receive_ahead=config.receive_ahead,
            autocast=config.autocast,
            device=device,
            batch_size=self.plan.batch_size,
        )
        return RankState(
            rank=rank_plan.rank,
            device=rank_plan.device,
            stages=stages,
            parameters=parameters,
            buffers=buffers,
            owned=frozenset(n for n in names if self.owner_of[n] == rank_plan.rank),
            loop=loop,
            syncs=syncs,
        )

    def _owners(self) -> dict[str, int]:
        """The lowest rank that holds each parameter."""
        found: dict[str, int] = {}
        for rank, device in enumerate(self.plan.used_devices):
            for stage in self.plan.stages:
                if device in stage.devices:
                    for name in self.cut.stages[stage.index].parameters:
                        found.setdefault(name, rank)
        return found

    def _parameter(self, name: str, value: Tensor) -> nn.Parameter:
        trainable = self.executor.capture.graph.parameter_by_id[name].trainable
        # A copy: ranks of one process must not share weights.
        value = value.detach().to(self.executor._device, copy=True)
        return nn.Parameter(value, requires_grad=trainable)

    def _buffer(self, name: str) -> Tensor:
        held = dict(self.module.named_buffers(remove_duplicate=False))
        value = held.get(name)
        if value is None:
            constants = self.executor.capture.program.constants
            value = constants.get(name, constants.get(f"module.{name}"))
        if not isinstance(value, Tensor) or value.is_meta:
            raise UnsupportedError(
                f"buffer {name!r} has no value (it is on the meta device); build the module with "
                "`weft.runtime.param_init.empty_parameters()`, which keeps buffers"
            )
        return value.detach().to(self.executor._device, copy=True)

    def _stage_run(
        self,
        index: int,
        rank_plan: RankPlan,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
    ) -> StageRun:
        program, stage = self.cut.stages[index], self.plan.stages[index]
        incoming = [edge for pair, edge in self.cut.edges.items() if pair[1] == index]
        grad_inputs = sorted(
            position
            for edge in incoming
            for spec, position in zip(edge.tensors, edge.inputs, strict=True)
            if spec.needs_grad
        )
        return StageRun(
            program=program,
            module=StageModule(program, parameters, buffers),
            shape=rank_plan.shapes[index],
            leaves=tuple(leaf.leaf for leaf in program.leaves),
            grad_inputs=() if stage.frozen else tuple(grad_inputs),
            has_backward=not stage.frozen,
            recompute=stage.recompute,
            output_dtypes=self._output_dtypes(index),
        )

    def _output_dtypes(self, index: int) -> tuple[torch.dtype | None, ...]:
        found: list[torch.dtype | None] = [None] * self.cut.stages[index].num_outputs
        if self.executor.config.autocast is None:
            return tuple(found)
        for pair, edge in self.cut.edges.items():
            if pair[0] == index:
                for spec, output in zip(edge.tensors, edge.outputs, strict=True):
                    if spec.dtype.is_floating_point:
                        found[output] = spec.dtype
        return tuple(found)
