"""The class of stage graphs that the graphpipe planner searches, as data.

The class, recursively: a part of the series-parallel tree is (i) one stage; (ii) cut at any child
of an n-ary series node; (iii) an n-ary parallel node split into any two groups of children, where
an operator just before it (its fork) and one just after it (its join) go to either group. Stages of
one group never contain both fork and join, since the other group lies between them.

Structurally equal parts (same costs, same wiring, same outside neighbours) are one object here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from weft.graph.series_parallel import Composition, SeriesParallel
from weft.plan.cost_table import CostTable

MAX_FREE_CHILDREN = 10
"""Distinct children of a parallel node up to which every grouping is tried."""

MAX_GROUPS = 1 << MAX_FREE_CHILDREN
"""Groups of children up to which every grouping is tried, equal children counted once."""


@dataclass(frozen=True, slots=True)
class ParallelPart:
    """A parallel node in its place in a chain: the shared object, and the operators it stands for.

    `ops` are in the order of `parallel.ops`.
    """

    parallel: Parallel
    ops: tuple[int, ...]


@dataclass(slots=True)
class Chain:
    """Elements in series: operators and parallel nodes, any cut between two of them allowed.

    `stage[i, j]` is the candidate stage of elements i..j-1, or -1. With `has_fork` element 0 is the
    fork of an enclosing parallel node, with `has_join` the last is its join.
    """

    ops: tuple[int, ...]
    has_fork: bool
    has_join: bool
    is_op: tuple[bool, ...]
    stage: NDArray[np.int64]
    parallels: dict[int, ParallelPart] = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        """Operators and parallel nodes in series."""
        return len(self.is_op)


@dataclass(frozen=True, slots=True)
class Branches:
    """Structurally equal children of a parallel node.

    Each instance lists its operators in the order of `chain.ops`, fork and join included.
    """

    chain: Chain
    instances: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Parallel:
    """A parallel node with its neighbours, and every group of its children.

    A group is a tuple of how many children of each kind it holds. `splits[g]` are the pairs of
    groups that make up group g, in both orders. Stage numbers are -1 where there is no such stage.
    """

    ops: tuple[int, ...]
    fork: tuple[int, ...]
    join: tuple[int, ...]
    branches: tuple[Branches, ...]
    groups: tuple[tuple[int, ...], ...]
    splits: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    fork_stage: int
    join_stage: int
    stage: NDArray[np.int64]
    stage_with_fork: NDArray[np.int64]
    stage_with_join: NDArray[np.int64]
    contiguous: bool


@dataclass(frozen=True, slots=True)
class StageSpace:
    """Every candidate stage, and the chain that composes them."""

    root: Chain
    masks: tuple[int, ...]
    member: NDArray[np.bool_]
    """Operators of each candidate stage, shape (stages, operators)."""
    depth: int
    """Leaves on the longest path of the tree's order: no stage graph is deeper."""
    num_contiguous: int
    """Parallel nodes too wide for every grouping to be tried."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of the tree with its operators as positions in the graph."""

    composition: Composition
    ops: tuple[int, ...]
    children: tuple[_Node, ...]
    shape: int


def build_stage_space(
    table: CostTable,
    tree: SeriesParallel,
    *,
    members: Mapping[str, tuple[int, ...]] | None = None,
    allowed: Callable[[int], bool] | None = None,
    labels: Sequence[Hashable] | None = None,
) -> StageSpace:
    """The candidate stages of a graph's series-parallel tree.

    `members` gives the operators behind a leaf of the tree, by position, where it stands for
    several that no stage may separate. `allowed` says whether a set of operators (bit i is operator
    i) may be a stage; `labels` keeps operators apart that constraints treat differently though they
    cost the same.
    """
    builder = _Builder(table, members, allowed, labels)
    root = builder.node(tree)
    elements = root.children if root.composition is Composition.SERIES else (root,)
    chain = builder.chain(elements, has_fork=False, has_join=False)
    return StageSpace(
        root=chain,
        masks=tuple(builder.masks),
        member=membership(builder.masks, table.num_ops),
        depth=_depth(root),
        num_contiguous=builder.num_contiguous,
    )


def membership(masks: Sequence[int], num_ops: int) -> NDArray[np.bool_]:
    """Sets of operators given as bit masks, as rows of booleans."""
    width = -(-num_ops // 8)
    packed = np.frombuffer(b"".join(m.to_bytes(width, "little") for m in masks), dtype=np.uint8)
    rows = np.unpackbits(packed.reshape(len(masks), width), axis=1, bitorder="little")
    return rows[:, :num_ops].astype(np.bool_)


def _depth(node: _Node) -> int:
    """Leaves on the longest path through a node, in the order that the tree gives."""
    if not node.children:
        return 1
    depths = [_depth(child) for child in node.children]
    return sum(depths) if node.composition is Composition.SERIES else max(depths)


class _Builder:
    def __init__(
        self,
        table: CostTable,
        members: Mapping[str, tuple[int, ...]] | None,
        allowed: Callable[[int], bool] | None,
        labels: Sequence[Hashable] | None,
    ) -> None:
        self.masks: list[int] = []
        self.num_contiguous = 0
        self._table = table
        self._members = members or {op.id: (i,) for i, op in enumerate(table.graph.ops)}
        self._allowed = allowed or (lambda mask: True)
        self._stage_of_mask: dict[int, int] = {}
        self._chains: dict[Hashable, Chain] = {}
        self._parallels: dict[Hashable, Parallel] = {}
        self._shapes: dict[Hashable, int] = {}
        times = table.op_times(1)
        self._work = times.forward_s + times.backward_s
        self._wiring = _Wiring(table, labels)

    def node(self, tree: SeriesParallel) -> _Node:
        """The tree in positions; shapes of equal trees get equal numbers."""
        children = tuple(self.node(child) for child in tree.children)
        if tree.composition is Composition.OP:
            ops = self._members[tree.op]
        else:
            ops = tuple(itertools.chain.from_iterable(child.ops for child in children))
        key = (tree.composition, len(ops), tuple(child.shape for child in children))
        shape = self._shapes.setdefault(key, len(self._shapes))
        return _Node(composition=tree.composition, ops=ops, children=children, shape=shape)

    def _stage(self, mask: int) -> int:
        if mask not in self._stage_of_mask:
            if not self._allowed(mask):
                self._stage_of_mask[mask] = -1
            else:
                self._stage_of_mask[mask] = len(self.masks)
                self.masks.append(mask)
        return self._stage_of_mask[mask]

    def chain(self, elements: Sequence[_Node], *, has_fork: bool, has_join: bool) -> Chain:
        """The chain of these elements, fork and join of the enclosing node included."""
        ops = tuple(itertools.chain.from_iterable(element.ops for element in elements))
        shapes = tuple(element.shape for element in elements)
        key = (shapes, has_fork, has_join, self._wiring.key(ops, fixed_outside=False))
        if key in self._chains:
            return self._chains[key]
        size = len(elements)
        stage = np.full((size, size + 1), -1, dtype=np.int64)
        for i in range(size):
            mask = 0
            for j in range(i, size):
                mask |= _mask(elements[j].ops)
                # The other group of the split lies between fork and join: no stage holds both.
                if not (has_fork and has_join and i == 0 and j == size - 1):
                    stage[i, j + 1] = self._stage(mask)
        chain = Chain(
            ops=ops,
            has_fork=has_fork,
            has_join=has_join,
            is_op=tuple(element.composition is Composition.OP for element in elements),
            stage=stage,
        )
        self._chains[key] = chain
        for i, element in enumerate(elements):
            if element.composition is Composition.PARALLEL:
                fork = elements[i - 1] if i > 0 and chain.is_op[i - 1] else None
                join = elements[i + 1] if i + 1 < size and chain.is_op[i + 1] else None
                chain.parallels[i] = self._parallel(element, fork, join)
        return chain

    def _parallel(self, node: _Node, fork: _Node | None, join: _Node | None) -> ParallelPart:
        before = (fork,) if fork else ()
        after = (join,) if join else ()
        ops = tuple(itertools.chain.from_iterable(n.ops for n in (*before, node, *after)))
        key = (
            node.shape,
            fork is not None,
            join is not None,
            self._wiring.key(ops, fixed_outside=False),
        )
        if key not in self._parallels:
            self._parallels[key] = self._new_parallel(node, before, after, ops)
        return ParallelPart(parallel=self._parallels[key], ops=ops)

    def _new_parallel(
        self,
        node: _Node,
        before: tuple[_Node, ...],
        after: tuple[_Node, ...],
        ops: tuple[int, ...],
    ) -> Parallel:
        branches, groups, contiguous = self._branches(node, before, after)
        index = {group: i for i, group in enumerate(groups)}
        fork = before[0].ops if before else ()
        join = after[0].ops if after else ()
        fork_mask, join_mask = _mask(fork), _mask(join)
        bodies = [
            [_mask(instance) & ~fork_mask & ~join_mask for instance in kind.instances]
            for kind in branches
        ]
        masks = [
            sum(sum(body[:count]) for body, count in zip(bodies, group, strict=True))
            for group in groups
        ]
        if contiguous:
            self.num_contiguous += 1
        return Parallel(
            ops=ops,
            fork=fork,
            join=join,
            branches=branches,
            groups=groups,
            splits=[_splits(group, index) for group in groups],
            fork_stage=self._stage(fork_mask) if before else -1,
            join_stage=self._stage(join_mask) if after else -1,
            stage=np.array([self._stage(mask) for mask in masks]),
            stage_with_fork=np.array(
                [self._stage(mask | fork_mask) if before else -1 for mask in masks]
            ),
            stage_with_join=np.array(
                [self._stage(mask | join_mask) if after else -1 for mask in masks]
            ),
            contiguous=contiguous,
        )

    def _branches(
        self, node: _Node, before: tuple[_Node, ...], after: tuple[_Node, ...]
    ) -> tuple[tuple[Branches, ...], tuple[tuple[int, ...], ...], bool]:
        """Kinds of children, all groups of them (small ones first), and whether contiguous."""
        work = sorted(
            node.children,
            key=lambda child: (-float(self._work[list(child.ops)].sum()), child.ops[0]),
        )
        kinds: dict[Hashable, list[tuple[int, ...]]] = {}
        chains: dict[Hashable, Chain] = {}
        for child in work:
            inner = child.children if child.composition is Composition.SERIES else (child,)
            elements = (*before, *inner, *after)
            ops = tuple(itertools.chain.from_iterable(element.ops for element in elements))
            # Siblings are interchangeable only if they also share the same outside neighbours.
            # What the join reads of the others differs by which child is left out: nothing else.
            others = frozenset(node.ops).difference(child.ops)
            key = (child.shape, self._wiring.key(ops, fixed_outside=True, ignored=others))
            kinds.setdefault(key, []).append(ops)
            if key not in chains:
                chains[key] = self.chain(elements, has_fork=bool(before), has_join=bool(after))
        counts = [len(instances) for instances in kinds.values()]
        free = len(work) <= MAX_FREE_CHILDREN or math.prod(c + 1 for c in counts) <= MAX_GROUPS
        if free:
            branches = tuple(Branches(chains[key], tuple(ops)) for key, ops in kinds.items())
            every = itertools.product(*(range(count + 1) for count in counts))
            groups = sorted((group for group in every if any(group)), key=lambda g: (sum(g), g))
            return branches, tuple(groups), False
        branches = tuple(
            Branches(chains[key], (ops,)) for key, rows in kinds.items() for ops in rows
        )
        num = len(branches)
        ranges = [(i, i + length) for length in range(1, num + 1) for i in range(num - length + 1)]
        groups = [tuple(int(i <= at < j) for at in range(num)) for i, j in ranges]
        return branches, tuple(groups), True


def _splits(
    group: tuple[int, ...], index: dict[tuple[int, ...], int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of known groups that add up to `group`."""
    first: list[int] = []
    second: list[int] = []
    for part in (
        itertools.product(*(range(count + 1) for count in group))
        if _free(group, index)
        else _prefixes(group)
    ):
        rest = tuple(a - b for a, b in zip(group, part, strict=True))
        if part in index and rest in index:
            first.append(index[part])
            second.append(index[rest])
    return np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)


def _free(group: tuple[int, ...], index: dict[tuple[int, ...], int]) -> bool:
    # Contiguous ranges of n branches number n(n+1)/2, all groups of them at least 2^n - 1.
    return math.prod(count + 1 for count in group) - 1 <= len(index)


def _prefixes(group: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Both ends of a contiguous group, cut everywhere."""
    for cut in range(1, len(group)):
        yield tuple(count if i < cut else 0 for i, count in enumerate(group))
        yield tuple(count if i >= cut else 0 for i, count in enumerate(group))


def _mask(ops: Iterable[int]) -> int:
    mask = 0
    for op in ops:
        mask |= 1 << op
    return mask


class _Wiring:
    """Keys that are equal for lists of operators with equal costs and equal connections."""

    def __init__(self, table: CostTable, labels: Sequence[Hashable] | None) -> None:
        graph = table.graph
        self._incoming: list[list[tuple[int, int, bool, int]]] = [[] for _ in graph.ops]
        self._outgoing: list[list[tuple[int, int, bool]]] = [[] for _ in graph.ops]
        for edge in graph.edges:
            i, j = graph.op_index[edge.source], graph.op_index[edge.target]
            row = (i, edge.bytes_per_sample, edge.needs_grad, edge.saved_bytes)
            self._incoming[j].append(row)
            self._outgoing[i].append((j, edge.bytes_per_sample, edge.needs_grad))
        users: dict[str, int] = {}
        for op in graph.ops:
            for parameter_id in set(op.param_ids):
                users[parameter_id] = users.get(parameter_id, 0) + 1
        self._own: list[Hashable] = []
        self._cap: list[int] = []
        for i, op in enumerate(graph.ops):
            cap = max(op.output_bytes, *(row[1] for row in self._outgoing[i]), 0)
            params = tuple(
                parameter_id
                if users[parameter_id] > 1
                else (
                    table.training.state_bytes(graph.parameter_by_id[parameter_id]),
                    table.training.gradient_bytes(graph.parameter_by_id[parameter_id]),
                )
                for parameter_id in dict.fromkeys(op.param_ids)
            )
            label = labels[i] if labels is not None else None
            name = op.signature or f"id:{op.id}"
            self._own.append((name, op.saved_bytes, cap, params, label))
            self._cap.append(cap)

    def key(
        self, ops: Sequence[int], *, fixed_outside: bool, ignored: Collection[int] = ()
    ) -> Hashable:
        """The key of a list of operators; connections with `ignored` ones do not count.

        Neighbours outside the list count by who they are with `fixed_outside`, else only by which
        of the operators read the same one.
        """
        position = {op: i for i, op in enumerate(ops)}
        outside: dict[int, int] = {}
        rows: list[Hashable] = []
        for op in ops:
            sources: list[Hashable] = []
            for source, num_bytes, needs_grad, saved in self._incoming[op]:
                if source in ignored:
                    continue
                where: Hashable = position.get(source)
                if where is None and fixed_outside:
                    where = ("outside", source)
                elif where is None:
                    number = outside.setdefault(source, len(outside))
                    where = ("outside", number, self._cap[source])
                sources.append((where, num_bytes, needs_grad, saved))
            out = [
                (n, g) for t, n, g in self._outgoing[op] if t not in position and t not in ignored
            ]
            forward = sum(n for n, _ in out)
            backward = sum(n for n, g in out if g)
            rows.append((self._own[op], tuple(sources), forward, backward))
        return tuple(rows)
