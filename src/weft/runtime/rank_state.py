"""A local rank of a training run, and how it is built from a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from weft.base.errors import UnsupportedError
from weft.graph.capture import Capture
from weft.plan.train_plan import TrainPlan
from weft.runtime.batch_source import SampleSource
from weft.runtime.executor_config import ExecutorConfig
from weft.runtime.grad_sync import GradientGroup, GradientSync
from weft.runtime.param_init import WeightSource
from weft.runtime.rank_loop import RankLoop, StageRun
from weft.runtime.rank_program import RankPlan
from weft.runtime.stage_module import StageModule, weights_in_order
from weft.runtime.stage_program import StageCut
from weft.runtime.transport import Transport


@dataclass(kw_only=True)
class RankState:
    """One local rank: its parameters and buffers by the model's names, and its optimizer.

    `previous` are the weights before the newest ones, where the schedule keeps two versions; then
    `parameters` and `previous` change places at every step. `owned` are the names that this rank
    alone writes to checkpoints and counts in norms.
    """

    rank: int
    device: int
    stages: tuple[int, ...]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    owned: frozenset[str]
    loop: RankLoop
    sync: GradientSync | None = None
    optimizer: torch.optim.Optimizer | None = None
    previous: dict[str, nn.Parameter] | None = None
    previous_sync: GradientSync | None = None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer changes."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @property
    def peak_in_flight(self) -> Mapping[int, int]:
        """By stage, the most micro-batches that were ever forwarded and not yet backwarded."""
        return self.loop.peak_in_flight

    @property
    def graded(self) -> dict[str, nn.Parameter]:
        """The parameters that this step's gradients belong to: the older version where two are."""
        held = self.parameters if self.previous is None else self.previous
        return {name: p for name, p in held.items() if p.requires_grad}

    @property
    def graded_sync(self) -> GradientSync | None:
        """What sums this step's gradients."""
        return self.sync if self.previous is None else self.previous_sync

    def advance_version(self) -> None:
        """Make the older weights a copy of the newest, and the ones that the optimizer updates.

        W(t+1) = W(t) - update(gradient at W(t-1)): the older set holds that gradient and nobody
        needs its values any more (PipeDream-2BW, arXiv 2006.09503 §3.1).
        """
        if self.previous is None:
            return
        with torch.no_grad():
            for name, older in self.previous.items():
                if older.requires_grad:
                    older.copy_(self.parameters[name])
        if self.optimizer is not None:
            moved = {id(p): self.previous[name] for name, p in self.parameters.items()}
            for group in self.optimizer.param_groups:
                group["params"] = [moved[id(p)] for p in group["params"]]
            for p in list(self.optimizer.state):
                self.optimizer.state[moved[id(p)]] = self.optimizer.state.pop(p)
        self.parameters, self.previous = self.previous, self.parameters
        self.sync, self.previous_sync = self.previous_sync, self.sync
        for run in self.loop.stages.values():
            if run.weights is not None:
                run.weights = (run.weights[1], run.weights[0])
        self.loop.sync = self.previous_sync


def _is_sharded(parameter: Tensor) -> bool:
    """Whether somebody else sums this parameter's gradient."""
    return isinstance(parameter, DTensor)


def gradient_groups(plan: TrainPlan, cut: StageCut, capture: Capture) -> tuple[GradientGroup, ...]:
    """Trainable parameters by the ranks that hold them; a shared one belongs to no stage."""
    rank_of = {device: rank for rank, device in enumerate(plan.used_devices)}
    users: dict[str, list[int]] = {}
    for program in cut.stages:
        for name in program.held_parameters:
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


@dataclass(frozen=True, kw_only=True)
class RankBuilder:
    """Builds local ranks: weights, modules, gradient sums, loops.

    `two_versions` keeps the weights of two steps, for schedules without flushes.
    """

    plan: TrainPlan
    capture: Capture
    cut: StageCut
    module: nn.Module
    source: SampleSource
    weights: WeightSource
    config: ExecutorConfig
    groups: Sequence[GradientGroup]
    two_versions: bool
    splits_backward: bool
    mesh_of: Callable[[Sequence[int], str], DeviceMesh | None]

    def build(self, rank_plan: RankPlan, transport: Transport) -> RankState:
        """One rank with weights of its own."""
        stages = tuple(sorted(rank_plan.shapes))
        names = list(dict.fromkeys(n for s in stages for n in self.cut.stages[s].held_parameters))
        values = self.weights.load(names, self.module)
        parameters = {name: self._parameter(name, values[name]) for name in names}
        programs = [self.cut.stages[s] for s in stages]
        buffers = {name: self._buffer(name) for p in programs for name in p.held_buffers}

        runs = {s: self._stage_run(s, rank_plan, parameters, buffers) for s in stages}
        parameters |= self._sharded(runs)
        groups = [
            replace(group, names=tuple(n for n in group.names if not _is_sharded(parameters[n])))
            for group in self.groups
            if rank_plan.rank in group.ranks and len(group.ranks) > 1
        ]
        groups = [group for group in groups if group.names]

        def sync_of(held: Mapping[str, nn.Parameter]) -> GradientSync | None:
            if not groups:
                return None
            return GradientSync(transport, groups, held, self.config.bucket_bytes)

        previous = self._second_version(parameters) if self.two_versions else None
        if previous is not None:
            for run in runs.values():
                newest = weights_in_order(run.program, parameters, buffers)
                run.weights = (newest, weights_in_order(run.program, previous, buffers))
        sync = sync_of(parameters)
        previous_sync = None if previous is None else sync_of(previous)
        owned = frozenset(n for n in names if self._owner(n) == rank_plan.rank)
        return RankState(
            rank=rank_plan.rank,
            device=rank_plan.device,
            stages=stages,
            parameters=parameters,
            buffers=buffers,
            owned=owned,
            loop=self._loop(
                rank_plan, runs, transport, sync if previous is None else previous_sync
            ),
            sync=sync,
            previous=previous,
            previous_sync=previous_sync,
        )

    def _sharded(self, runs: Mapping[int, StageRun]) -> dict[str, nn.Parameter]:
        """Let the `parallelize` hook have its way with each stage; the parameters that it made."""
        found: dict[str, nn.Parameter] = {}
        if self.config.parallelize is None:
            return found
        for run in runs.values():
            mesh = self.mesh_of(run.group, torch.device(self.config.device).type)
            run.module = self.config.parallelize(run.module, mesh)
            divide = getattr(run.module, "set_gradient_divide_factor", None)
            if divide is not None:
                divide(1.0)  # Sums, as everywhere here; the loss's weight divides later.
            for name, p in run.module.named_parameters():
                if name not in run.program.held_parameters:
                    raise UnsupportedError(
                        f"`parallelize` renamed a parameter of stage {run.program.index} to "
                        f"{name!r}; it must keep the model's names"
                    )
                found[name] = p
        return found

    def forward_only(
        self, rank: RankState, rank_plan: RankPlan, transport: Transport, source: SampleSource
    ) -> RankLoop:
        """A loop over the newest weights of a rank that evaluates and keeps nothing."""
        runs = {
            s: replace(run, has_backward=False, grad_inputs=(), weights=None)
            for s, run in rank.loop.stages.items()
        }
        if self.config.parallelize is not None:
            # A sharded stage gathers its own weights when it is called.
            return replace(self, source=source)._loop(
                rank_plan, runs, transport, None, training=False
            )
        for run in runs.values():
            run.forced_weights = weights_in_order(run.program, rank.parameters, rank.buffers)
        builder = replace(self, source=source)
        return builder._loop(rank_plan, runs, transport, None, training=False)

    def _loop(
        self,
        rank_plan: RankPlan,
        runs: dict[int, StageRun],
        transport: Transport,
        sync: GradientSync | None,
        *,
        training: bool = True,
    ) -> RankLoop:
        return RankLoop(
            plan=rank_plan,
            cut=self.cut,
            stages=runs,
            transport=transport,
            source=self.source,
            sync=sync,
            seed=self.config.seed,
            receive_ahead=self.config.receive_ahead,
            autocast=self.config.autocast,
            device=torch.device(self.config.device),
            batch_size=self.plan.batch_size,
            splits_backward=self.splits_backward,
            training=training,
        )

    def _owner(self, name: str) -> int:
        """The lowest rank that holds a parameter."""
        users = [s for s in self.plan.stages if name in self.cut.stages[s.index].held_parameters]
        lowest = min(device for stage in users for device in stage.devices)
        return self.plan.used_devices.index(lowest)

    def _second_version(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(p.detach().clone()) if p.requires_grad else p
            for name, p in parameters.items()
        }

    def _parameter(self, name: str, value: Tensor) -> nn.Parameter:
        trainable = self.capture.graph.parameter_by_id[name].trainable
        # A copy: ranks of one process must not share weights.
        value = value.detach().to(torch.device(self.config.device), copy=True)
        return nn.Parameter(value, requires_grad=trainable)

    def _buffer(self, name: str) -> Tensor:
        held = dict(self.module.named_buffers(remove_duplicate=False))
        value = held.get(name)
        if value is None:
            constants = self.capture.program.constants
            value = constants.get(name, constants.get(f"module.{name}"))
        if not isinstance(value, Tensor) or value.is_meta:
            raise UnsupportedError(
                f"buffer {name!r} has no value (it is on the meta device); build the module with "
                "`weft.runtime.param_init.empty_parameters()`, which keeps buffers"
            )
        return value.detach().to(torch.device(self.config.device), copy=True)

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
            tail=None
            if program.tail is None
            else StageModule(program.tail.program, parameters, buffers),
            group=tuple(self.plan.used_devices.index(device) for device in stage.devices),
            shape=rank_plan.shapes[index],
            leaves=tuple(leaf.leaf for leaf in program.leaves),
            grad_inputs=() if stage.frozen else tuple(grad_inputs),
            has_backward=not stage.frozen,
            recompute=stage.recompute,
            output_dtypes=self._output_dtypes(index),
        )

    def _output_dtypes(self, index: int) -> tuple[torch.dtype | None, ...]:
        found: list[torch.dtype | None] = [None] * self.cut.stages[index].num_outputs
        if self.config.autocast is None:
            return tuple(found)
        for pair, edge in self.cut.edges.items():
            if pair[0] == index:
                for spec, output in zip(edge.tensors, edge.outputs, strict=True):
                    if spec.dtype.is_floating_point:
                        found[output] = spec.dtype
        return tuple(found)
