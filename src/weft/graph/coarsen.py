"""Coarsening: operators become at most `max_blocks` blocks, where no good plan would cut anyway.

Three steps, each of which contracts equal structures equally, so that equal branches stay equal.
(1) *Negligible* operators (less than a twentieth of an even block's share of the work) join a
neighbour in series: of the same module first, then the one to which the most bytes go, so that the
cheap cut stays possible; a light loss joins what precedes it. (2) *Modules*: with a rising
threshold of work, every module whose operators form one convex piece and whose work is below the
threshold becomes one block; the lowest threshold that leaves at most `max_blocks` wins. (3)
*Chains*: if modules do not suffice, the cheapest neighbours in series are joined, all equal pairs
at once, and then the cheapest neighbours of any kind.

A contraction is allowed only when the result has no cycle. Edges between blocks keep the bytes of
every distinct tensor, skip connections included. Work is FLOP plus bytes at a fixed arithmetic
intensity, so that memory-bound operators count.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from weft.base.errors import ConfigError
from weft.graph.graph import Edge, Graph, Op, merge_kernels

# FLOP that a device does in the time of moving one byte: 15.7e12 / 900e9 on the fp32 V100 of the
# paper, rounded; only the relative work of blocks depends on it.
_FLOPS_PER_BYTE = 16.0
_NEGLIGIBLE_SHARE = 0.05


def coarsen(graph: Graph, max_blocks: int = 150) -> Graph:
    """A graph of at most `max_blocks` blocks that computes, moves and keeps what `graph` does.

    Each block is an Op whose `members` are the operators inside it; its id is the first member's
    module path (or id). Sums of FLOP, traffic, saved bytes and parameters are preserved. Raises
    ConfigError for max_blocks below 1.
    """
    if max_blocks < 1:
        raise ConfigError(f"max_blocks is {max_blocks}; it must be at least 1")
    contraction = _Contraction(graph)
    contraction.join_losses(1 / max_blocks)
    contraction.absorb_negligible(_NEGLIGIBLE_SHARE / max_blocks)
    if contraction.num_groups > max_blocks:
        # Afresh: a block that already spans two modules would drag one into the other.
        contraction = _by_modules(graph, _Contraction(graph), max_blocks)
    contraction.join_losses(1 / max_blocks)
    contraction.absorb_negligible(_NEGLIGIBLE_SHARE / max_blocks)
    contraction.join_chains(max_blocks)
    contraction.join_any(max_blocks)
    return contraction.to_graph()


def _by_modules(graph: Graph, start: _Contraction, max_blocks: int) -> _Contraction:
    """`start` with every module below a threshold of work contracted; see the head of this file."""
    pieces = _module_pieces(graph)
    if not pieces:
        return start
    work = {op.id: op_work(op) for op in graph.ops}
    weights = [sum(work[i] for i in piece) for piece in pieces]
    # Equal modules differ by rounding of sums only.
    thresholds = sorted({float(f"{w:.6g}") for w in weights})

    def contracted(threshold: float) -> _Contraction:
        result = start.copy()
        # Inner modules first: they are convex more often than what holds them.
        for piece, weight in sorted(zip(pieces, weights, strict=True), key=lambda p: len(p[0])):
            if float(f"{weight:.6g}") <= threshold:
                result.merge_if_acyclic(piece)
        result.absorb_negligible(_NEGLIGIBLE_SHARE / max_blocks)
        return result

    low, high = 0, len(thresholds) - 1
    best = contracted(thresholds[high])
    if best.num_groups > max_blocks:
        return best
    while low < high:
        middle = (low + high) // 2
        candidate = contracted(thresholds[middle])
        if candidate.num_groups <= max_blocks:
            best, high = candidate, middle
        else:
            low = middle + 1
    return best


def op_work(op: Op) -> float:
    """One number for how long an operator takes per sample, forward and backward."""
    return sum(
        kernel.count
        * max(
            kernel.flops_forward + kernel.flops_backward,
            (kernel.bytes_accessed + kernel.bytes_accessed_backward) * _FLOPS_PER_BYTE,
        )
        for kernel in op.parts
    )


def _module_pieces(graph: Graph) -> list[tuple[str, ...]]:
    """For every module path, the operators at or below it that are weakly connected."""
    by_path: dict[str, list[str]] = defaultdict(list)
    for op in graph.ops:
        parts = op.module_path.split(".") if op.module_path else []
        for depth in range(1, len(parts) + 1):
            by_path[".".join(parts[:depth])].append(op.id)
    pieces: list[tuple[str, ...]] = []
    for members in by_path.values():
        pieces.extend(_connected(graph, members))
    return [piece for piece in dict.fromkeys(pieces) if len(piece) > 1]


def _connected(graph: Graph, members: Sequence[str]) -> Iterable[tuple[str, ...]]:
    inside = set(members)
    seen: set[str] = set()
    for first in members:
        if first in seen:
            continue
        found, stack = {first}, [first]
        while stack:
            here = stack.pop()
            for near in (*graph.successors[here], *graph.predecessors[here]):
                if near in inside and near not in found:
                    found.add(near)
                    stack.append(near)
        seen |= found
        yield tuple(m for m in members if m in found)


class _Contraction:
    """Groups of operators with the acyclic graph between them; groups are named by small ints."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.members: dict[int, tuple[str, ...]] = {i: (op.id,) for i, op in enumerate(graph.ops)}
        self.group_of: dict[str, int] = {op.id: i for i, op in enumerate(graph.ops)}
        self.succ: dict[int, dict[int, int]] = {i: {} for i in self.members}
        self.pred: dict[int, dict[int, int]] = {i: {} for i in self.members}
        for edge in graph.edges:
            a, b = self.group_of[edge.source], self.group_of[edge.target]
            self.succ[a][b] = self.pred[b][a] = edge.bytes_per_sample
        self.work: dict[int, float] = {i: op_work(op) for i, op in enumerate(graph.ops)}
        self.signatures = [op.signature or f"{op.kind}{op_work(op)!r}" for op in graph.ops]
        self.shape: dict[int, str] = dict(enumerate(self.signatures))

    @property
    def num_groups(self) -> int:
        """Blocks as of now."""
        return len(self.members)

    def copy(self) -> _Contraction:
        """An independent copy."""
        other = object.__new__(_Contraction)
        other.graph, other.signatures = self.graph, self.signatures
        other.members, other.group_of = dict(self.members), dict(self.group_of)
        other.succ = {k: dict(v) for k, v in self.succ.items()}
        other.pred = {k: dict(v) for k, v in self.pred.items()}
        other.work, other.shape = dict(self.work), dict(self.shape)
        return other

    def merge(self, groups: set[int]) -> int:
        """Make one group of several; the caller knows that no cycle arises."""
        keep = min(groups)
        order = self.graph.op_index
        members = sorted((m for g in groups for m in self.members[g]), key=order.__getitem__)
        succ = self._outside(groups, self.succ)
        pred = self._outside(groups, self.pred)
        work = sum(self.work[g] for g in groups)
        for gone in groups - {keep}:
            del self.members[gone], self.succ[gone], self.pred[gone]
            del self.work[gone], self.shape[gone]
        for near, back in ((succ, self.pred), (pred, self.succ)):
            for n, num_bytes in near.items():
                for g in groups:
                    back[n].pop(g, None)
                back[n][keep] = num_bytes
        self.members[keep], self.succ[keep], self.pred[keep] = tuple(members), succ, pred
        self.work[keep] = work
        self.shape[keep] = _hash(self.signatures[order[m]] for m in members)
        for m in members:
            self.group_of[m] = keep
        return keep

    @staticmethod
    def _outside(groups: set[int], near: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
        """Neighbours of the union, with the bytes on all edges to each."""
        found: dict[int, int] = {}
        for group in groups:
            for n, num_bytes in near[group].items():
                if n not in groups:
                    found[n] = found.get(n, 0) + num_bytes
        return found

    def merge_if_acyclic(self, op_ids: Iterable[str]) -> bool:
        """Merge the groups of these operators unless a path leaves them and comes back."""
        groups = {self.group_of[op] for op in op_ids}
        if len(groups) < 2 or self._leaves_and_returns(groups):
            return False
        self.merge(groups)
        return True

    def _leaves_and_returns(self, groups: set[int]) -> bool:
        stack = [s for g in groups for s in self.succ[g] if s not in groups]
        seen = set(stack)
        while stack:
            for s in self.succ[stack.pop()]:
                if s in groups:
                    return True
                if s not in seen:
                    seen.add(s)
                    stack.append(s)
        return False

    def absorb_negligible(self, share: float) -> None:
        """Join groups of almost no work to a neighbour that they are in series with."""
        limit = sum(self.work.values()) * share
        changed = True
        while changed:
            changed = False
            for group in sorted(self.members):
                if group not in self.members or self.work[group] > limit:
                    continue
                near = self._series_neighbours(group)
                if near:
                    self.merge({group, self._closest(group, near)})
                    changed = True

    def join_losses(self, share: float) -> None:
        """Join a light loss to what it is in series with: no plan gains by cutting before it.

        A join of branches and its loss must be one block, or a plan that gives the join to one
        branch would still need a device for the loss.
        """
        limit = sum(self.work.values()) * share
        for loss in [op.id for op in self.graph.ops if op.is_loss]:
            group = self.group_of[loss]
            before = self._nearest(group, self.pred)
            if (
                before is not None
                and self.work[group] <= limit
                and self._nearest(before, self.succ) == group
            ):
                self.merge({group, before})

    def _closest(self, group: int, near: Sequence[int]) -> int:
        """Of the same module; then by bytes; then the lightest, for evenness; then the producer."""
        path = self._path(group)

        def distance(n: int) -> tuple[int, int, float, bool]:
            before = n in self.pred[group]
            num_bytes = self.pred[group][n] if before else self.succ[group][n]
            shared = len(_common_path([path, self._path(n)]))
            return (-shared, -num_bytes, self.work[n], not before)

        return min(near, key=distance)

    def _path(self, group: int) -> str:
        return _common_path([self.graph.op_by_id[m].module_path for m in self.members[group]])

    def _series_neighbours(self, group: int) -> list[int]:
        """Neighbours that every path through `group` also passes, skips aside."""
        found: list[int] = []
        before = self._nearest(group, self.pred)
        after = self._nearest(group, self.succ)
        if before is not None and self._nearest(before, self.succ) == group:
            found.append(before)
        if after is not None and self._nearest(after, self.pred) == group:
            found.append(after)
        return found

    def _nearest(self, group: int, ahead: Mapping[int, Mapping[int, int]]) -> int | None:
        """The one direct neighbour that is not implied by a longer path, if there is just one."""
        near = ahead[group]
        if len(near) <= 1:
            return next(iter(near), None)
        # A neighbour is redundant for order when another neighbour leads to it.
        reached: set[int] = set()
        stack = list(near)
        budget = 64 * len(near)
        while stack and budget:
            budget -= 1
            for n in ahead[stack.pop()]:
                if n not in reached:
                    reached.add(n)
                    stack.append(n)
        remaining = near.keys() - reached
        return next(iter(remaining)) if len(remaining) == 1 else None

    def join_chains(self, max_blocks: int) -> None:
        """Join the cheapest pairs in series, all pairs of equal shape at once."""
        while self.num_groups > max_blocks:
            pairs: dict[tuple[float, str, str], list[tuple[int, int]]] = defaultdict(list)
            for group in self.members:
                after = self._nearest(group, self.succ)
                if after is not None and self._nearest(after, self.pred) == group:
                    joint = float(f"{self.work[group] + self.work[after]:.6g}")
                    key = (joint, self.shape[group], self.shape[after])
                    pairs[key].append((group, after))
            if not pairs:
                return
            used: set[int] = set()
            for a, b in pairs[min(pairs)]:
                if a not in used and b not in used:
                    used |= {a, b}
                    self.merge({a, b})

    def join_any(self, max_blocks: int) -> None:
        """Join the cheapest adjacent pair that leaves no cycle, until few enough remain."""
        while self.num_groups > max_blocks:
            edges = sorted(
                (self.work[a] + self.work[b], a, b) for a in self.members for b in self.succ[a]
            )
            for _, a, b in edges:
                if not self._leaves_and_returns({a, b}):
                    self.merge({a, b})
                    break
            else:
                # No edge at all, or only between unconnected parts: join the two lightest.
                a, b = sorted(self.members, key=lambda g: (self.work[g], g))[:2]
                self.merge({a, b})

    def to_graph(self) -> Graph:
        """The graph of blocks."""
        names = self._names()
        ops = [self._block(group, names[group]) for group in sorted(self.members)]
        return Graph.ordered(
            self.graph.name, ops, self._edges(names), self.graph.parameters, self.graph.dtype
        )

    def _names(self) -> dict[int, str]:
        paths = {
            group: _common_path([self.graph.op_by_id[m].module_path for m in members])
            for group, members in self.members.items()
        }
        count = Counter(paths.values())
        ids = self.graph.op_by_id
        names: dict[int, str] = {}
        for group, members in self.members.items():
            path = paths[group]
            # Where the path is taken, or empty, the first member's id is unique.
            free = bool(path) and count[path] == 1 and path not in ids
            names[group] = path if free and len(members) != 1 else members[0]
        return names

    def _block(self, group: int, name: str) -> Op:
        members = [self.graph.op_by_id[m] for m in self.members[group]]
        if len(members) == 1:
            op = members[0]
            return op
        tasks = {op.task for op in members}
        return Op(
            id=name,
            kind="block",
            module_path=_common_path([op.module_path for op in members]),
            flops_forward=sum(op.flops_forward for op in members),
            flops_backward=sum(op.flops_backward for op in members),
            bytes_accessed=sum(op.bytes_accessed for op in members),
            bytes_accessed_backward=sum(op.bytes_accessed_backward for op in members),
            fixed_flops=sum(op.fixed_flops for op in members),
            fixed_bytes=sum(op.fixed_bytes for op in members),
            fixed_bytes_backward=sum(op.fixed_bytes_backward for op in members),
            param_ids=tuple(dict.fromkeys(p for op in members for p in op.param_ids)),
            saved_bytes=sum(op.saved_bytes for op in members),
            output_bytes=self._output_bytes(members),
            task=tasks.pop() if len(tasks) == 1 else "",
            is_loss=any(op.is_loss for op in members),
            signature=self.shape[group],
            members=tuple(op.id for op in members),
            kernels=merge_kernels(kernel for op in members for kernel in op.parts),
        )

    def _output_bytes(self, members: Sequence[Op]) -> int:
        inside = {op.id for op in members}
        return sum(
            op.output_bytes
            for op in members
            if op.is_loss or any(s not in inside for s in self.graph.successors[op.id])
        )

    def _edges(self, names: Mapping[int, str]) -> list[Edge]:
        crossing: dict[tuple[int, int], list[Edge]] = defaultdict(list)
        for edge in self.graph.edges:
            a, b = self.group_of[edge.source], self.group_of[edge.target]
            if a != b:
                crossing[a, b].append(edge)
        return [
            Edge(
                source=names[a],
                target=names[b],
                bytes_per_sample=self.graph.distinct_bytes(edges),
                needs_grad=any(e.needs_grad for e in edges),
                saved_bytes=min(
                    sum(e.saved_bytes for e in edges), self.graph.distinct_bytes(edges)
                ),
            )
            for (a, b), edges in crossing.items()
        ]


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("+".join(parts).encode()).hexdigest()[:16]


def _common_path(paths: Sequence[str]) -> str:
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        while common != parts[: len(common)]:
            common.pop()
    return ".".join(common)
