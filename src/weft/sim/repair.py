"""Raises samples in flight where the rule of equal, communication-free stages is too low."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from weft.plan.in_flight import source_in_flight
from weft.plan.lower import EdgeDirection
from weft.plan.replay import step_time_s
from weft.plan.replicas import merge_replicas
from weft.plan.train_plan import TrainPlan
from weft.sim.stage_executor import simulate

_STRETCHES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
"""How much of a message's round trip the first guesses hide."""

_GAIN = 1e-9
"""Relative gain below which a longer warm-up counts as useless."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """A plan with enough samples in flight, and what it took."""

    plan: TrainPlan
    step_time_s: float
    step_time_before_s: float
    num_simulations: int
    raised: Mapping[int, int]
    """Samples added by stage, stages without any left out."""


def repair_in_flight(
    plan: TrainPlan, *, contention: bool = False, max_simulations: int = 400
) -> Repair:
    """`plan` with samples in flight raised until its simulated step time stops falling.

    First guesses stretch the rule by the round trips of messages; then single stages, and stages
    with all that feed them, are raised by one micro-batch while that helps; then every stage gives
    back what it does not need. No stage exceeds the memory of its devices. Source: GraphPipe
    (arXiv 2406.17145) §6 with the reconstruction and local repair of the sheet's §3.2.
    """
    search = _Search(plan=plan, contention=contention, budget=max_simulations)
    before_s = search.time_s(_held(plan))
    best = min(search.guesses(), key=search.key)
    best = search.lower(search.climb(best))
    raised = {
        stage.index: samples - stage.in_flight
        for stage, samples in zip(plan.stages, best, strict=True)
        if samples != stage.in_flight
    }
    return Repair(
        plan=_with(plan, best),
        step_time_s=search.time_s(best),
        step_time_before_s=before_s,
        num_simulations=search.num_simulations,
        raised=raised,
    )


Held = tuple[int, ...]
"""Samples in flight by stage."""


def _held(plan: TrainPlan) -> Held:
    return tuple(stage.in_flight for stage in plan.stages)


def _with(plan: TrainPlan, held: Held) -> TrainPlan:
    stages = tuple(
        replace(stage, in_flight=samples) for stage, samples in zip(plan.stages, held, strict=True)
    )
    return plan.replace(stages=stages)


@dataclass(kw_only=True)
class _Search:
    plan: TrainPlan
    contention: bool
    budget: int
    num_simulations: int = 0
    times: dict[Held, float] = field(default_factory=dict)

    def time_s(self, held: Held) -> float:
        """Simulated seconds of a step with these samples in flight."""
        if held not in self.times:
            self.num_simulations += 1
            plan = _with(self.plan, held)
            run: Callable[[TrainPlan], float] = step_time_s
            if self.contention:
                run = _simulated_s
            self.times[held] = run(plan)
        return self.times[held]

    def key(self, held: Held) -> tuple[float, int]:
        """Order of preference: time up to noise, then memory."""
        time_s = self.time_s(held)
        return (float(f"{time_s:.9e}"), self.memory(held))

    def memory(self, held: Held) -> int:
        """Activation bytes over all devices."""
        return sum(
            stage.activation_bytes_at(samples) * stage.num_devices
            for stage, samples in zip(self.plan.stages, held, strict=True)
        )

    def fits(self, held: Held) -> bool:
        """Whether every device holds its stages' memory; plans that did not fit may not grow."""
        used = dict.fromkeys(self.plan.used_devices, 0)
        for stage, samples in zip(self.plan.stages, held, strict=True):
            bytes_each = (
                stage.state_bytes + stage.reserved_bytes + stage.activation_bytes_at(samples)
            )
            for device in stage.devices:
                used[device] += bytes_each
        devices = self.plan.cluster.devices
        planned = self.plan.memory_bytes
        return all(
            size <= max(devices[device].type.memory_bytes, planned[device])
            for device, size in used.items()
        )

    def can_run(self, held: Held) -> bool:
        """Whether every stage forwards enough for its successors before it waits for them."""
        return all(
            held[source] >= min(-(-held[index] // size) * size, self.plan.batch_size)
            for index in range(self.plan.num_stages)
            for source in self.plan.predecessors[index]
            if (size := self.plan.stages[source].micro_batch)
        )

    def guesses(self) -> Iterator[Held]:
        """The plan itself, and the rule with messages' round trips as extra samples."""
        yield _held(self.plan)
        merged = merge_replicas(self.plan)
        delays = {} if merged is None else merged.delays_s
        rate_s = max(stage.micro_batch_s / stage.micro_batch for stage in self.plan.stages)
        for stretch in _STRETCHES:
            held = self._stretched(delays, stretch / rate_s if rate_s > 0 else 0.0)
            if self.fits(held):
                yield held

    def _stretched(self, delays: Mapping[EdgeDirection, float], samples_per_s: float) -> Held:
        stages, found = self.plan.stages, list(_held(self.plan))
        for index in reversed(self.plan.topological_order):
            stage = stages[index]
            for after in self.plan.successors[index]:
                trip_s = sum(
                    delays.get(EdgeDirection(sender_stage=a, receiver_stage=b), 0.0)
                    for a, b in ((index, after), (after, index))
                )
                asked = source_in_flight(
                    stage.micro_batch,
                    stage.k,
                    stages[after].micro_batch,
                    stages[after].k,
                    found[after],
                )
                more = math.ceil(trip_s * samples_per_s / stage.micro_batch) * stage.micro_batch
                found[index] = max(found[index], min(asked + more, self.plan.batch_size))
        return tuple(found)

    def climb(self, held: Held) -> Held:
        """Raise while that shortens the step and fits."""
        while self.num_simulations < self.budget:
            better = [h for h in self._raises(held) if self.can_run(h) and self.fits(h)]
            if not better:
                return held
            best = min(better, key=self.key)
            if self.time_s(best) >= self.time_s(held) * (1 - _GAIN):
                return held
            held = best
        return held

    def _raises(self, held: Held) -> Iterator[Held]:
        for stage in self.plan.stages:
            for chosen in ({stage.index}, {stage.index} | self._ancestors(stage.index)):
                yield self._moved(held, chosen, +1)
        yield self._moved(held, range(self.plan.num_stages), +1)

    def lower(self, held: Held) -> Held:
        """Give back every micro-batch that does not lengthen the step, down to the plan's own."""
        limit_s = self.time_s(held) * (1 + _GAIN)
        for index in self.plan.topological_order:
            while held[index] > self.plan.stages[index].in_flight:
                less = self._moved(held, {index}, -1)
                if not self.can_run(less) or self.time_s(less) > limit_s:
                    break
                held = less
        return held

    def _moved(self, held: Held, chosen: Sequence[int] | set[int] | range, sign: int) -> Held:
        return tuple(
            min(samples + sign * stage.micro_batch, self.plan.batch_size)
            if stage.index in chosen
            else samples
            for stage, samples in zip(self.plan.stages, held, strict=True)
        )

    def _ancestors(self, index: int) -> set[int]:
        found: set[int] = set()
        stack = list(self.plan.predecessors[index])
        while stack:
            stage = stack.pop()
            if stage not in found:
                found.add(stage)
                stack.extend(self.plan.predecessors[stage])
        return found


def _simulated_s(plan: TrainPlan) -> float:
    return simulate(plan).step_time_s
