"""Fewest devices on which a stage graph of the class meets a bound on the time per sample.

For a fixed bound and micro-batch size the dynamic programme runs backwards from the loss. Its state
is (part of the tree, micro-batches in flight downstream of it); its value is, for every number of
micro-batches in flight at the part's source, the fewest devices, which is the Pareto set of the two
(GraphPipe, arXiv 2406.17145 §5, Alg. 1, with the value of the state exchanged for that set).

Arrays are indexed [downstream, source] with in-flight counts in micro-batches; "source" is a bound
that the part's source stages stay within, except in the `exact` arrays of parts that begin with a
fork: there the fork's stage is checked against memory at exactly that count, so that whoever else
follows the fork needs only to stay below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.plan.cost_table import Candidates, Variant
from weft.plan.stage_space import Branches, Chain, Parallel, StageSpace

NONE = 1 << 20
"""More devices than any cluster has: no solution."""

Devices = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ChosenStage:
    """One stage of a solution: its operators, how it runs, and its time per sample."""

    ops: tuple[int, ...]
    variant: Variant
    time_per_sample_s: float


@dataclass(frozen=True, slots=True)
class Solution:
    """Stages that meet the bound, the devices they take, and the time per sample they achieve."""

    stages: tuple[ChosenStage, ...]
    num_devices: int
    bottleneck_s: float


@dataclass(frozen=True, slots=True)
class _ChainTable:
    """Per start element: fewest devices, monotone in the source bound; and exact at element 0."""

    best: Devices
    exact: Devices


@dataclass(frozen=True, slots=True)
class _ParallelTable:
    """Per group of children: fewest devices, by which of fork and join the group holds."""

    plain: Devices
    join: Devices
    fork: Devices
    both: Devices


class BottleneckSolver:
    """Solves one micro-batch size for any bound on the time per sample.

    `max_depth` bounds the stages on a path (never more than the devices can serve).
    """

    def __init__(self, space: StageSpace, candidates: Candidates, max_depth: int) -> None:
        self.space = space
        self.candidates = candidates
        self.max_depth = max_depth
        self.num_states = 0
        self.bound_s = np.inf
        self._sizes = candidates.num_devices.astype(np.int32)
        self._order = np.argsort(self._sizes, kind="stable")
        self._limits = np.minimum(candidates.max_in_flight, max_depth)
        # Most stages hold as many micro-batches as there can be, however they run.
        is_unlimited = (self._limits == max_depth).all(axis=1)
        self._unlimited = np.flatnonzero(is_unlimited)
        # Variants first, for a fast minimum over them. An infinite price means that the stage may
        # not run so, whatever the bound: no number is at most a bound that is compared with NaN.
        seconds = candidates.time_per_sample_s[self._unlimited].T
        self._seconds = np.ascontiguousarray(np.where(np.isfinite(seconds), seconds, np.nan))
        self._limited = np.flatnonzero(~is_unlimited)
        # Downstream counts below which nothing may come: source must exceed downstream by one.
        source = np.arange(max_depth + 1)
        self._after = np.where(source[None, :] > source[:max_depth, None], 0, NONE).astype(np.int32)
        self._chains: dict[tuple[int, int], _ChainTable] = {}
        self._parallels: dict[int, _ParallelTable] = {}
        self._devices: Devices = np.empty((0, 0), dtype=np.int32)

    def fewest_devices(self, bound_s: float) -> Devices:
        """Fewest devices for stages of at most `bound_s` per sample, by source in-flight count."""
        self.bound_s = bound_s
        self._chains.clear()
        self._parallels.clear()
        self._devices = self._stage_devices(bound_s)
        root = self.space.root
        return self._chain(root, root.num_elements, is_root=True).best[0, 0]

    def solve(self, bound_s: float, num_devices: int) -> Solution | None:
        """The stages of least depth for `bound_s` on at most `num_devices` devices, if any."""
        devices = self.fewest_devices(bound_s)
        enough = np.flatnonzero(devices <= num_devices)
        if not len(enough):
            return None
        return self._solution(int(enough[0]))

    def _solution(self, depth: int) -> Solution:
        root = self.space.root
        names = {op: op for op in root.ops}
        reader = _Reader(self)
        stages = tuple(reader.chain(root, root.num_elements, 0, 0, depth, False, names))
        return Solution(
            stages=stages,
            num_devices=sum(stage.variant.dp for stage in stages),
            bottleneck_s=max(stage.time_per_sample_s for stage in stages),
        )

    def _stage_devices(self, bound_s: float) -> Devices:
        """Fewest devices of each candidate stage at each in-flight count; last row: no stage."""
        seconds = self.candidates.time_per_sample_s
        devices = np.full((len(seconds) + 1, self.max_depth + 1), NONE, dtype=np.int32)
        sizes = np.where(self._seconds <= bound_s, self._sizes[:, None], np.int32(NONE))
        least = sizes.min(axis=0, initial=NONE)[:, None]
        if not len(self._limited):
            devices[:-1] = least
        else:
            devices[self._unlimited] = least
        counts = np.arange(self.max_depth + 1)
        for column in self._order[::-1]:
            prices = seconds[self._limited, column]
            rows = self._limited[np.isfinite(prices) & (prices <= bound_s)]
            if not len(rows):
                continue
            fits = counts[None, :] <= self._limits[rows, column][:, None]
            devices[rows] = np.where(fits, self._sizes[column], devices[rows])
        devices[:, 0] = NONE
        return devices

    def _chain(self, chain: Chain, end: int, *, is_root: bool = False) -> _ChainTable:
        key = (id(chain), end)
        if key not in self._chains:
            self._chains[key] = self._solve_chain(chain, end, 1 if is_root else self.max_depth)
        return self._chains[key]

    def _solve_chain(self, chain: Chain, end: int, num_downstream: int) -> _ChainTable:
        width = self.max_depth + 1
        best = np.full((end + 1, num_downstream, width), NONE, dtype=np.int32)
        exact = np.full((num_downstream, width), NONE, dtype=np.int32)
        counts = np.arange(width)
        best[end] = np.where(counts[None, :] >= counts[:num_downstream, None], 0, NONE)
        for i in range(end - 1, -1, -1):
            here = np.full((num_downstream, width), NONE, dtype=np.int32)
            # The source of the rest stays one below the stage that precedes it.
            stages = self._devices[chain.stage[i, i + 1 : end + 1]][:, None, 1:]
            np.min(stages + best[i + 1 :, :, :-1], axis=0, out=here[:, 1:])
            for first, j in _parallel_segments(chain, i, end):
                segment = self._segment(chain, i, first, j)
                np.minimum(here, _compose(segment, best[j]), out=here)
            np.minimum(here, NONE, out=here)
            self.num_states += here.size
            if i == 0:
                exact = here
            np.minimum.accumulate(here, axis=-1, out=best[i])
        return _ChainTable(best=best, exact=exact)

    def _segment(self, chain: Chain, start: int, at: int, end: int) -> Devices:
        """Devices of a whole parallel node at `at`, with its fork and join where they belong."""
        part = chain.parallels[at].parallel
        table = self.parallel(part)
        row = len(part.groups) - 1
        if start < at:
            return table.both[row] if end > at + 1 else table.fork[row]
        return table.join[row] if end > at + 1 else table.plain[row]

    def parallel(self, part: Parallel) -> _ParallelTable:
        """Tables of every group of a parallel node's children."""
        key = id(part)
        if key not in self._parallels:
            shape = (len(part.groups), self.max_depth, self.max_depth + 1)
            table = _ParallelTable(
                *(np.full(shape, NONE, dtype=np.int32) for _ in range(4)),
            )
            self._parallels[key] = table
            for group, counts in enumerate(part.groups):
                if sum(counts) == 1:
                    self._one_branch(table, group, part.branches[counts.index(1)])
                else:
                    self._many_branches(table, group, part)
            self.num_states += 4 * table.plain.size
        return self._parallels[key]

    def _one_branch(self, table: _ParallelTable, group: int, branches: Branches) -> None:
        chain = branches.chain
        size = chain.num_elements
        start, end = int(chain.has_fork), size - int(chain.has_join)
        without_join = self._chain(chain, end)
        table.plain[group] = without_join.best[start]
        if chain.has_fork:
            table.fork[group] = without_join.exact
        if chain.has_join:
            with_join = self._chain(chain, size)
            table.join[group] = with_join.best[start]
            if chain.has_fork:
                table.both[group] = with_join.exact

    def _many_branches(self, table: _ParallelTable, group: int, part: Parallel) -> None:
        a, b = part.splits[group]
        plain, join, fork = table.plain, table.join, table.fork
        _improve(plain[group], self.one_stage(int(part.stage[group])))
        _improve(plain[group], *_sums(plain[a], plain[b]))
        np.minimum.accumulate(plain[group], axis=-1, out=plain[group])
        before_join = _later(plain)
        if part.join:
            join_alone = self.join_alone(part)
            _improve(join[group], self.one_stage(int(part.stage_with_join[group])))
            _improve(join[group], before_join[group] + join_alone)
            _improve(join[group], *_sums(join[a], before_join[b]))
            np.minimum.accumulate(join[group], axis=-1, out=join[group])
        if part.fork:
            fork_alone = self._devices[part.fork_stage]
            _improve(fork[group], self.one_stage(int(part.stage_with_fork[group])))
            _improve(fork[group], fork_alone + _below(plain[group]))
            _improve(fork[group], *_sums(fork[a], _below(plain[b])))
            if part.join:
                both, join_alone = table.both, self.join_alone(part)
                _improve(both[group], fork_alone + _below(join[group]))
                _improve(both[group], _later(fork[group]) + join_alone)
                _improve(both[group], *_sums(both[a], _below(before_join[b])))
                _improve(both[group], *_sums(_later(fork[a]), _below(join[b])))

    def one_stage(self, stage: int) -> Devices:
        """Devices of one stage as a part: any source count above the one downstream."""
        return self._devices[stage][None, :] + self._after

    def join_alone(self, part: Parallel) -> Devices:
        """Devices of a join in its own stage, by downstream count, as a column."""
        return self._devices[part.join_stage][1:, None]

    def variant_of(self, stage: int, num_devices: int, count: int) -> tuple[Variant, float]:
        """The fastest way to run a stage on this many devices within bound and memory."""
        seconds = self.candidates.time_per_sample_s[stage]
        fits = (self.candidates.num_devices == num_devices) & (self._limits[stage] >= count)
        column = int(np.argmin(np.where(fits & (seconds <= self.bound_s), seconds, np.inf)))
        return self.candidates.variants[column], float(seconds[column])

    def devices_of(self, stage: int, count: int) -> int:
        """Fewest devices of a candidate stage with `count` micro-batches in flight."""
        return int(self._devices[stage, count])

    def chain_table(self, chain: Chain, end: int) -> _ChainTable:
        """The table of a chain that `fewest_devices` filled."""
        return self._chain(chain, end)

    def segment_table(self, chain: Chain, start: int, at: int, end: int) -> Devices:
        """The table of a whole parallel node that `fewest_devices` filled."""
        return self._segment(chain, start, at, end)


def _parallel_segments(chain: Chain, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Parallel nodes that a split may open at `start`: (position, end of the segment)."""
    for at in (start, start + 1):
        if at not in chain.parallels or at >= end:
            continue
        if at > start and not chain.is_op[start]:
            continue
        yield at, at + 1
        if at + 1 < end and chain.is_op[at + 1]:
            yield at, at + 2


def _compose(segment: Devices, rest: Devices) -> Devices:
    """Devices of a segment before the rest of a chain, over the counts where they meet.

    `segment` is [meeting, source], `rest` [downstream, meeting], the result [downstream, source].
    """
    meeting = len(segment)
    return (rest[:, :meeting, None] + segment[None, :, :]).min(axis=1)


def _sums(first: Devices, second: Devices) -> tuple[Devices, ...]:
    """The least sum over pairs of rows, as zero or one array."""
    return ((first + second).min(axis=0),) if len(first) else ()


def _improve(target: Devices, *others: Devices) -> None:
    for other in others:
        np.minimum(target, other, out=target)


def _later(devices: Devices) -> Devices:
    """The same parts with one more micro-batch in flight downstream: a join's stage follows."""
    moved = np.full_like(devices, NONE)
    moved[..., :-1, :] = devices[..., 1:, :]
    return moved


def _below(devices: Devices) -> Devices:
    """The same parts with their source one below the count: a fork's stage precedes."""
    moved = np.full_like(devices, NONE)
    moved[..., 1:] = devices[..., :-1]
    return moved


class _Reader:
    """Reads the stages of a solution back from the tables of a solver."""

    def __init__(self, solver: BottleneckSolver) -> None:
        self._solver = solver

    def chain(
        self,
        chain: Chain,
        end: int,
        start: int,
        downstream: int,
        source: int,
        exact: bool,
        names: Mapping[int, int],
    ) -> Iterator[ChosenStage]:
        """Stages of elements start..end-1 within the source count."""
        solver = self._solver
        table = solver.chain_table(chain, end)
        while start < end:
            best = table.best
            if exact:
                value = int(table.exact[downstream, source])
            else:
                value = int(best[start, downstream, source])
                source = int(np.argmax(best[start, downstream] == value))
            exact = False
            step = self._stage_step(chain, best, end, start, downstream, source, value)
            if step is not None:
                stage = int(chain.stage[start, step])
                yield self._chosen(stage, solver.devices_of(stage, source), source, names)
                start, source = step, source - 1
                continue
            at, stop, meeting = self._parallel_step(
                chain, best, end, start, downstream, source, value
            )
            part = chain.parallels[at]
            inner = dict(zip(part.parallel.ops, (names[op] for op in part.ops), strict=True))
            held = [
                [tuple(inner[op] for op in instance) for instance in kind.instances]
                for kind in part.parallel.branches
            ]
            group = len(part.parallel.groups) - 1
            fork, join = start < at, stop > at + 1
            inside = _ParallelReader(self, solver, part.parallel, inner)
            yield from inside.group(group, held, fork, join, meeting, source)
            start, source = stop, meeting

    def _stage_step(
        self,
        chain: Chain,
        best: Devices,
        end: int,
        start: int,
        downstream: int,
        source: int,
        value: int,
    ) -> int | None:
        if source == 0:
            return None
        for j in range(end, start, -1):
            devices = self._solver.devices_of(int(chain.stage[start, j]), source)
            if devices + int(best[j, downstream, source - 1]) == value:
                return j
        return None

    def _parallel_step(
        self,
        chain: Chain,
        best: Devices,
        end: int,
        start: int,
        downstream: int,
        source: int,
        value: int,
    ) -> tuple[int, int, int]:
        for at, stop in _parallel_segments(chain, start, end):
            segment = self._solver.segment_table(chain, start, at, stop)
            total = segment[:, source] + best[stop, downstream, : len(segment)]
            meeting = np.flatnonzero(total == value)
            if len(meeting):
                return at, stop, int(meeting[0])
        raise AssertionError("the tables of the search contradict each other")

    def _chosen(
        self, stage: int, devices: int, count: int, names: Mapping[int, int]
    ) -> ChosenStage:
        member = self._solver.space.member[stage]
        return self.stage_of(
            stage, devices, count, tuple(names[op] for op in np.flatnonzero(member).tolist())
        )

    def stage_of(self, stage: int, devices: int, count: int, ops: tuple[int, ...]) -> ChosenStage:
        """The chosen stage with these operators."""
        variant, seconds = self._solver.variant_of(stage, devices, count)
        return ChosenStage(ops=tuple(sorted(ops)), variant=variant, time_per_sample_s=seconds)


_Held = list[list[tuple[int, ...]]]
"""Instances of each kind of child, under the names of the part being read."""


class _ParallelReader:
    """Reads the stages of one parallel node back; `names` maps its operators to real ones."""

    def __init__(
        self, reader: _Reader, solver: BottleneckSolver, part: Parallel, names: Mapping[int, int]
    ) -> None:
        self._reader = reader
        self._solver = solver
        self._part = part
        self._table = solver.parallel(part)
        self._fork = {names[op] for op in part.fork}
        self._join = {names[op] for op in part.join}

    def group(
        self, group: int, held: _Held, fork: bool, join: bool, downstream: int, source: int
    ) -> Iterator[ChosenStage]:
        """Stages of a group of children, with fork and join as asked, within the counts."""
        table = self._array(fork, join)
        value = int(table[group, downstream, source])
        if not fork:
            source = int(np.argmax(table[group, downstream] == value))
        counts = self._part.groups[group]
        if sum(counts) == 1:
            kind = counts.index(1)
            chain = self._part.branches[kind].chain
            start = 0 if fork else int(chain.has_fork)
            end = chain.num_elements - (0 if join else int(chain.has_join))
            names = dict(zip(chain.ops, held[kind][0], strict=True))
            yield from self._reader.chain(chain, end, start, downstream, source, fork, names)
            return
        whole = self._one_stage(group, fork, join)
        if whole >= 0 and self._solver.one_stage(whole)[downstream, source] == value:
            ops = {op for kind in held for instance in kind for op in instance}
            ops = ops - self._fork - self._join
            ops |= (self._fork if fork else set()) | (self._join if join else set())
            yield self._reader.stage_of(whole, value, source, tuple(ops))
            return
        if fork and self._fork_alone(group, join, downstream, source) == value:
            yield self._alone(self._part.fork_stage, source, self._fork)
            yield from self.group(group, held, False, join, downstream, source - 1)
            return
        if join and self._join_alone(group, fork, downstream, source) == value:
            yield from self.group(group, held, fork, False, downstream + 1, source)
            yield self._alone(self._part.join_stage, downstream + 1, self._join)
            return
        yield from self._split(group, held, fork, join, downstream, source, value)

    def _split(
        self,
        group: int,
        held: _Held,
        fork: bool,
        join: bool,
        downstream: int,
        source: int,
        value: int,
    ) -> Iterator[ChosenStage]:
        # Who owns the join: the first group (its sibling then ends one stage earlier), or, where
        # the first owns the fork, possibly the second.
        for join_first in (True, False) if fork and join else (True,):
            first_join, second_join = join and join_first, join and not join_first
            first_down = downstream + int(second_join)
            second_down = downstream + int(first_join)
            second_source = source - int(fork)
            for a, b in zip(*(row.tolist() for row in self._part.splits[group]), strict=True):
                first = self._at(fork, first_join, a, first_down, source)
                second = self._at(False, second_join, b, second_down, second_source)
                if first + second != value:
                    continue
                counts = self._part.groups[a]
                mine = [kind[:count] for kind, count in zip(held, counts, strict=True)]
                rest = [kind[count:] for kind, count in zip(held, counts, strict=True)]
                yield from self.group(a, mine, fork, first_join, first_down, source)
                yield from self.group(b, rest, False, second_join, second_down, second_source)
                return
        raise AssertionError("the tables of the search contradict each other")

    def _array(self, fork: bool, join: bool) -> Devices:
        table = self._table
        if fork:
            return table.both if join else table.fork
        return table.join if join else table.plain

    def _at(self, fork: bool, join: bool, group: int, downstream: int, source: int) -> int:
        if downstream >= self._solver.max_depth or source < 0:
            return NONE
        return int(self._array(fork, join)[group, downstream, source])

    def _one_stage(self, group: int, fork: bool, join: bool) -> int:
        if fork and join:
            return -1
        part = self._part
        rows = part.stage_with_fork if fork else part.stage_with_join if join else part.stage
        return int(rows[group])

    def _fork_alone(self, group: int, join: bool, downstream: int, source: int) -> int:
        own = self._solver.devices_of(self._part.fork_stage, source)
        return own + self._at(False, join, group, downstream, source - 1)

    def _join_alone(self, group: int, fork: bool, downstream: int, source: int) -> int:
        own = self._solver.devices_of(self._part.join_stage, downstream + 1)
        return own + self._at(fork, False, group, downstream + 1, source)

    def _alone(self, stage: int, count: int, ops: set[int]) -> ChosenStage:
        devices = self._solver.devices_of(stage, count)
        return self._reader.stage_of(stage, devices, count, tuple(ops))
