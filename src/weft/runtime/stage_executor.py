"""Trains a plan for real: every rank runs its actions, and one step equals one of one process.

Semantics: gradients of the loss's sum are added over all micro-batches and ranks, divided by the
loss's global weight, clipped by their global norm, and given to the optimizer; so a flushing
schedule computes what a single process does with the same global batch. A schedule without flushes
(PipeDream-2BW) computes gradients at the weights of one step before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.base.errors import ConfigError, UnsupportedError, WeftError
from weft.graph.capture import Capture
from weft.plan.action import COMPUTE_KINDS, RECV_KINDS, SEND_KINDS, ActionKind
from weft.plan.executor import require_kinds
from weft.plan.schedule import Schedule, ScheduleError
from weft.plan.schedules import generate
from weft.plan.schedules.build import synchronous
from weft.plan.schedules.order import forward_only
from weft.plan.train_plan import PlanError, TrainPlan
from weft.plan.validate import validate_plan
from weft.runtime.batch_source import SampleSource
from weft.runtime.executor_config import ExecutorConfig, LossScope
from weft.runtime.heap import keep_freed_memory
from weft.runtime.measured import LoopRecord, timeline_of
from weft.runtime.param_init import ModuleWeights, WeightSource
from weft.runtime.rank_program import RankPlan, rank_plans
from weft.runtime.rank_state import RankBuilder, RankState, gradient_groups
from weft.runtime.stage_cut import check_edges, cut_stages
from weft.runtime.transport import Handle, RankProgram, World
from weft.sim.timeline import Timeline

_log = logging.getLogger("weft.runtime")

SUPPORTED_KINDS = (
    COMPUTE_KINDS | SEND_KINDS | RECV_KINDS | {ActionKind.REDUCE_GRAD, ActionKind.STEP}
)
"""What the runtime runs; it refuses other kinds by name."""

OptimizerFactory = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes a rank's optimizer from its trainable parameters by name."""


class NonFiniteLossError(WeftError, ArithmeticError):
    """A loss that is NaN or infinite; the message names step and rank. Weights are unchanged."""


@dataclass(kw_only=True, slots=True)
class LossTotals:
    """Loss and weight summed over all ranks, and the gradient's norm before clipping.

    They may still be under way; `resolve` waits for them. `gradient_weight` is what the gradients
    that `norm` is of still have to be divided by, None for the loss's own weight.
    """

    step: int
    gradient_weight: float | None = None
    shared: Tensor | None = None
    handle: Handle | None = None
    loss_sum: float = 0.0
    weight: float = 0.0
    norm: float = 0.0

    def resolve(self) -> LossTotals:
        """Wait, and check: raises NonFiniteLossError for a loss that is NaN or infinite."""
        if self.shared is None:
            return self
        if self.handle is not None:
            self.handle.wait()
        values: list[float] = self.shared.tolist()
        self.shared = self.handle = None
        bad = [str(rank) for rank, flag in enumerate(values[3:]) if flag]
        if bad:
            raise NonFiniteLossError(
                f"the loss of step {self.step} is not finite on rank {', '.join(bad)}; lower the "
                "learning rate, or look at the batch"
            )
        self.loss_sum, self.weight = values[0], values[1]
        if not self.weight > 0:
            raise ConfigError(
                f"the loss of step {self.step} has weight {self.weight}; every batch needs "
                "something to learn from"
            )
        divisor = self.weight if self.gradient_weight is None else self.gradient_weight
        self.norm = values[2] ** 0.5 / divisor
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimizer step, equal on every rank.

    `loss` = `loss_sum` / `weight` over the whole batch. Under a schedule without flushes reading it
    waits until the slowest rank has reached the step's end. `grad_norm` is the norm before
    clipping, None where nothing is clipped.
    """

    step: int
    num_samples: int
    duration_s: float
    clips: bool
    totals: LossTotals

    @property
    def loss(self) -> float:
        """Mean loss of the step's samples."""
        totals = self.totals.resolve()
        return totals.loss_sum / totals.weight

    @property
    def loss_sum(self) -> float:
        """Sum of the losses."""
        return self.totals.resolve().loss_sum

    @property
    def weight(self) -> float:
        """What the sum is divided by."""
        return self.totals.resolve().weight

    @property
    def grad_norm(self) -> float | None:
        """Norm of the whole gradient before clipping."""
        return self.totals.resolve().norm if self.clips else None


class TorchStageExecutor:
    """Runs a plan's schedule on real tensors (a `weft.plan.executor.StageExecutor`).

    `ranks` are those of this process: one over torch.distributed, all over loopback. Rank r runs
    device `plan.used_devices[r]`. `before_step(rank, step)` is called right before each optimizer
    step.
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
        self.before_step: Callable[[RankState, int], None] | None = None
        self._check()
        if torch.device(self.config.device).type == "cpu":
            keep_freed_memory()
        splits_backward = ActionKind.W in self.schedule.kinds
        self.cut = cut_stages(
            capture,
            plan,
            torch.device(self.config.device),
            allow_mixing=self.config.loss_scope is not LossScope.SAMPLE,
            split_backward=splits_backward,
            edge_dtype=self.config.autocast,
            whole_batch=self.config.loss_scope is LossScope.GLOBAL,
            # Who shards a stage (`parallelize`) finds all of its weights in one module.
            module=module if self.config.own_modules and not self.config.parallelize else None,
        )
        check_edges(self.cut, plan)
        plans = rank_plans(self.schedule, self.cut, plan.used_devices)
        self._check_fixed_batch()
        self._check_whole_batch()
        groups = gradient_groups(plan, self.cut, capture)
        sums = {g.ranks for g in groups if len(g.ranks) > 1}
        gathers = {tuple(map(plan.used_devices.index, s.devices)) for s in plan.stages if s.dp > 1}
        # Collectives must start in one order on all ranks; with no other the losses' may be early.
        self._sums_losses_early = (
            not sums
            and not gathers
            and self.schedule.is_synchronous
            and self.config.clip_norm is None
            and torch.device(self.config.device).type == "cpu"
        )
        world.prepare(sorted(sums | gathers), _channels(plans))
        self._builder = RankBuilder(
            plan=plan,
            capture=capture,
            cut=self.cut,
            module=module,
            source=source,
            weights=weights or ModuleWeights(),
            config=self.config,
            groups=groups,
            two_versions=not self.schedule.is_synchronous,
            splits_backward=splits_backward,
            mesh_of=world.mesh,
        )
        self.ranks = tuple(
            self._builder.build(plans[transport.rank], transport) for transport in world.transports
        )
        for rank in self.ranks:
            for stage in rank.stages:
                _log.info("stage %d: %s", stage, self.cut.stages[stage].how_built)
            if optimizer is not None and rank.trainable:
                rank.optimizer = _checked(optimizer(rank.trainable))
            if self.config.record:
                rank.loop.record = LoopRecord()
            if not self._has_pair:
                # A mean's weight is the batch, known before: no pass over the gradients later.
                rank.loop.loss_scale = 1.0 / self._batch_samples
        self._forward_plans: tuple[RankPlan, ...] = ()
        self._is_open = False

    @property
    def supported_kinds(self) -> frozenset[ActionKind]:
        """The action kinds that this executor runs."""
        return SUPPORTED_KINDS

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
        anything changes, PeerTimeoutError where a rank waits in vain. Without flushes the run must
        be taken to its end, or be the executor's last.
        """
        if self._is_open:
            raise ConfigError(
                f"an earlier run of schedule {self.schedule.name!r} was left before its last step, "
                "with micro-batches under way; make a new executor"
            )
        for rank in self.ranks:
            rank.loop.first_step = first_step
        for index in range(num_steps):
            started_s = time.perf_counter()
            totals = [
                LossTotals(step=first_step + index, gradient_weight=None if self._has_pair else 1.0)
                for _ in self.ranks
            ]
            self._is_open = not self.schedule.is_synchronous and index < num_steps - 1
            self.world.drive(
                [
                    self._step(rank, total, first_step, index, num_steps)
                    for rank, total in zip(self.ranks, totals, strict=True)
                ]
            )
            yield StepResult(
                step=first_step + index,
                num_samples=self._batch_samples,
                duration_s=time.perf_counter() - started_s,
                clips=self.config.clip_norm is not None,
                totals=totals[0],
            )

    def evaluate(
        self, source: SampleSource, num_batches: int, *, first_batch: int = 0
    ) -> LossTotals:
        """The loss of batches first_batch, ... of `source`, without dropout; changes nothing.

        `source` is asked for these batches as for steps. Raises ConfigError between the steps of a
        schedule without flushes: its messages under way would meet those of the evaluation.
        """
        if self._is_open:
            raise ConfigError(
                f"schedule {self.schedule.name!r} has micro-batches of the next step under way; "
                "take `steps` to its end before evaluating, and go on with steps(first_step=...)"
            )
        if not self._forward_plans:
            orders = [
                forward_only(stage.index, self.plan.num_micro_batches(stage.index))
                for stage in self.plan.stages
            ]
            schedule = synchronous(self.plan, "forward", orders)
            self._forward_plans = rank_plans(schedule, self.cut, self.plan.used_devices)
        totals = [LossTotals(step=first_batch) for _ in self.ranks]
        self.world.drive(
            [
                self._evaluate(rank, total, source, range(first_batch, first_batch + num_batches))
                for rank, total in zip(self.ranks, totals, strict=True)
            ]
        )
        return totals[0].resolve()

    def gather_timeline(self) -> Timeline:
        """What was measured in the last steps (`ExecutorConfig.record`), on every rank.

        All ranks must call it. Raises ConfigError where nothing was recorded.
        """
        parts = [
            b"" if rank.loop.record is None else rank.loop.record.to_bytes(self.schedule)
            for rank in self.ranks
        ]
        return timeline_of(
            self.plan,
            self.schedule,
            self.world.all_gather_bytes(parts),
            shifts=self.config.accumulate == 1,
        )

    def _check(self) -> None:
        require_kinds(self.schedule, self.supported_kinds, "training runtime")
        expected = len(self.plan.used_devices)
        if self.world.num_ranks != expected:
            raise PlanError(
                f"the plan runs on {expected} devices, but the world has {self.world.num_ranks} "
                f"ranks; start {expected}"
            )
        if self.config.parallelize is not None and self.config.clip_norm is not None:
            raise UnsupportedError(
                "clip_norm does not know how `parallelize` shards parameters; clip in the hook's "
                "own way before the step (`before_step`), or leave one of the two out"
            )
        if self.schedule.is_synchronous:
            return
        refused = {
            "parallelize": self.config.parallelize is not None,
            "accumulate": self.config.accumulate > 1,
            "clip_norm": self.config.clip_norm is not None,
            "loss_scope='global'": self.config.loss_scope is LossScope.GLOBAL,
        }
        for what in (name for name, is_set in refused.items() if is_set):
            raise UnsupportedError(
                f"schedule {self.schedule.name!r} never flushes, so {what} would make all stages "
                "wait for each other in every step; use schedule '1f1b' with it"
            )

    def _check_fixed_batch(self) -> None:
        """Refuse shares of another size where torch.export fixed the batch of an input."""
        for name, size in self.cut.fixed_batches.items():
            for stage in self.plan.stages:
                share = stage.micro_batch // stage.dp
                if share != size:
                    raise UnsupportedError(
                        f"the batch of input {name!r} is fixed at {size} by the code of the model "
                        f"or loss (int(), float() or len() of a size does that; use x.shape[0] as "
                        f"it is), but stage {stage.index} runs {share} samples at a time; change "
                        f"the code, or plan with micro-batches of {size} per device"
                    )

    def _check_whole_batch(self) -> None:
        """A loss over the whole batch needs every forward before the first backward."""
        if self.config.loss_scope is not LossScope.GLOBAL:
            return
        if self.config.accumulate > 1:
            raise UnsupportedError(
                f"loss_scope='global' relates all samples of a step, so it cannot be accumulated "
                f"over {self.config.accumulate} flushes; use accumulate=1 and a larger batch"
            )
        if len(self.cut.loss_stages) > 1:
            raise UnsupportedError(
                f"loss_scope='global' needs all losses in one stage; they are in stages "
                f"{list(self.cut.loss_stages)}"
            )
        stage = max(self.cut.loss_stages)
        program = self.schedule.program(self.plan.stages[stage].devices[0])
        kinds = [a.kind for a in program if a.stage == stage and a.kind in COMPUTE_KINDS]
        if ActionKind.F in kinds[kinds.count(ActionKind.F) :]:
            raise ScheduleError(
                f"loss_scope='global' needs every forward of stage {stage} before its first "
                f"backward; schedule {self.schedule.name!r} mixes them, schedule 'gpipe' does not"
            )

    def _step(
        self, rank: RankState, totals: LossTotals, first_step: int, index: int, num_steps: int
    ) -> RankProgram:
        """One optimizer step of one rank."""
        config, is_synchronous = self.config, self.schedule.is_synchronous
        segment, base = rank.loop.plan.segment(index, num_steps)

        def share_losses() -> None:
            self._share_totals(rank, rank.loop.take_losses(totals.step), totals)

        for flush in range(config.accumulate):
            is_last_flush = flush == config.accumulate - 1
            yield from rank.loop.run(
                segment,
                base=0 if is_synchronous else base,
                step=first_step + index,
                flush=flush,
                is_last_flush=is_last_flush,
                keep_sends=not is_synchronous and index < num_steps - 1,
                after_forwards=(
                    share_losses if is_last_flush and self._sums_losses_early else None
                ),
            )
        rank.loop.current = "the sum of gradients"
        sync = rank.graded_sync
        if sync is not None:
            for stage in sync.stages:
                # Those that a REDUCE_GRAD has finished have nothing left to wait for.
                yield from sync.finish(stage)
        if not self._sums_losses_early:
            share_losses()
        if is_synchronous or self._has_pair:
            rank.loop.current = "the sum of losses"
            if totals.handle is not None:
                yield totals.handle
            totals.handle = None
            totals.resolve()
        self._update(rank, totals)
        if rank.loop.record is not None:
            rank.loop.record.end_step(time.perf_counter())

    @property
    def _has_pair(self) -> bool:
        return any(loss.total for loss in self.capture.losses)

    def _evaluate(
        self, rank: RankState, totals: LossTotals, source: SampleSource, batches: range
    ) -> RankProgram:
        transport = rank.loop.transport
        loop = self._builder.forward_only(rank, self._forward_plans[rank.rank], transport, source)
        loss_sum, weight = 0.0, 0.0
        for batch in batches:
            yield from loop.run(
                self._forward_plans[rank.rank].first,
                base=0,
                step=batch,
                flush=0,
                is_last_flush=False,
                keep_sends=False,
            )
            found = loop.take_losses(batch)
            loss_sum, weight = loss_sum + found[0], weight + found[1]
        self._share_totals(rank, (loss_sum, weight), totals, with_norm=False)
        if totals.handle is not None:
            yield totals.handle
        totals.handle = None

    def _share_totals(
        self,
        rank: RankState,
        losses: tuple[float, float],
        totals: LossTotals,
        *,
        with_norm: bool = True,
    ) -> None:
        """Start summing loss, weight, squared norm and who saw no finite loss over all ranks."""
        loss_sum, weight = losses
        num_ranks = self.world.num_ranks
        is_finite = loss_sum - loss_sum == 0
        values = [loss_sum if is_finite else 0.0, weight, 0.0, *([0.0] * num_ranks)]
        values[3 + rank.rank] = 0.0 if is_finite else 1.0
        shared = torch.tensor(values, dtype=torch.float64, device=self.config.device)
        if with_norm and self.config.clip_norm is not None:
            held = [p.grad for name, p in rank.graded.items() if name in rank.owned]
            shared[2] = _squared_norm([gradient for gradient in held if gradient is not None])
        totals.shared = shared
        totals.handle = rank.loop.transport.all_reduce(shared, range(num_ranks))

    def _update(self, rank: RankState, totals: LossTotals) -> None:
        graded = rank.graded
        sync = rank.graded_sync
        if rank.optimizer is not None:
            # Without a weight of the loss's own the gradients are already divided.
            scale = 1.0 / totals.weight if self._has_pair else 1.0
            limit = self.config.clip_norm
            if limit is not None:
                # As torch.nn.utils.clip_grad_norm_ does.
                scale *= min(1.0, limit / (totals.norm + 1e-6))
            gradients = [p.grad for p in graded.values() if p.grad is not None]
            if scale != 1.0 and gradients:
                torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
            rank.advance_version()
            if self.before_step is not None:
                self.before_step(rank, totals.step)
            rank.optimizer.step()
        for p in graded.values():
            p.grad = None
        if sync is not None:
            sync.clear()

    @property
    def _batch_samples(self) -> int:
        """Samples of an optimizer step."""
        return self.plan.batch_size * self.config.accumulate


def _channels(plans: Sequence[RankPlan]) -> list[tuple[int, int]]:
    """(sender, receiver) of every pair of ranks that exchange messages."""
    found = {
        (plan.rank, piece.peer)
        for plan in plans
        for bound in (*plan.first, *plan.middle)
        if bound.action.kind in SEND_KINDS
        for piece in bound.pieces
    }
    return sorted(found)


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
