"""A graph as nested series and parallel compositions, which is what a planner can cut.

The order of the operators is decomposed, not the edge list: an edge that another path implies
(a residual or skip connection) drops out of the order, whatever bytes it carries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from weft.graph.graph import Graph


class Composition(StrEnum):
    """How the children of a node are ordered."""

    OP = "op"
    """A single operator; no children."""
    SERIES = "series"
    """Every operator of a child precedes every operator of the next."""
    PARALLEL = "parallel"
    """Operators of different children are independent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesParallel:
    """A node of the decomposition: an operator, or children composed in series or in parallel.

    Children never have their parent's composition. `layered` marks a series that stands for an
    irreducible block: between its children there is more order than the graph asks for.
    """

    composition: Composition
    op: str = ""
    children: tuple[SeriesParallel, ...] = ()
    layered: bool = False

    def ops(self) -> Iterator[str]:
        """The operators below this node, in order."""
        stack: list[SeriesParallel] = [self]
        while stack:
            node = stack.pop()
            if node.composition is Composition.OP:
                yield node.op
            stack.extend(reversed(node.children))

    def nodes(self) -> Iterator[SeriesParallel]:
        """This node and all below it, parents first."""
        stack: list[SeriesParallel] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))

    def __str__(self) -> str:
        if self.composition is Composition.OP:
            return self.op
        separator = " " if self.composition is Composition.SERIES else " | "
        return "(" + separator.join(map(str, self.children)) + ")"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decomposition:
    """The tree of a graph, and what had to be added to its order to get one.

    `redundant_edges` are implied by other paths; `layered_ops` lie in blocks that are not
    series-parallel and were cut into layers.
    """

    root: SeriesParallel
    redundant_edges: tuple[tuple[str, str], ...]
    layered_ops: tuple[str, ...]

    @property
    def is_series_parallel(self) -> bool:
        """Whether the tree has exactly the graph's order."""
        return not self.layered_ops


def decompose(graph: Graph) -> Decomposition:
    """Decompose the order of a graph's operators into series and parallel compositions.

    Operators become edges of a two-terminal network whose vertices are the places where outputs
    meet inputs (a complete bipartite meeting is one vertex); all inputs start at one super-source,
    all outputs end at one super-sink. Series and parallel reductions then shrink the network in
    time linear in its size (Valdes, Tarjan, Lawler, "The recognition of series parallel digraphs",
    1982). Where they get stuck, the smallest single-entry single-exit block is cut into layers by
    longest path, its reducible parts kept whole, and the reductions go on (GraphPipe sheet §2.7).
    """
    reduced, redundant = _transitive_reduction(graph)
    network = _Network.of(graph, reduced)
    layered: list[str] = []
    network.reduce()
    while not network.is_one_edge:
        layered.extend(network.layer_smallest_blocks())
        network.reduce()
    position = graph.op_index
    return Decomposition(
        root=_flatten(network.result(), position),
        redundant_edges=redundant,
        layered_ops=tuple(sorted(layered, key=position.__getitem__)),
    )


def linear_order(tree: SeriesParallel) -> tuple[str, ...]:
    """A topological order that finishes one branch before the next.

    This is the order in which a sequential planner sees a branching model (GraphPipe sheet §6.2).
    """
    return tuple(tree.ops())


def _transitive_reduction(
    graph: Graph,
) -> tuple[list[list[int]], tuple[tuple[str, str], ...]]:
    """Successor lists without implied edges, and the implied edges."""
    index = graph.op_index
    num_ops = len(graph.ops)
    reach = [0] * num_ops
    reduced: list[list[int]] = [[] for _ in range(num_ops)]
    redundant: list[tuple[str, str]] = []
    for v in range(num_ops - 1, -1, -1):
        op = graph.ops[v].id
        covered = 0
        for w in sorted(index[target] for target in graph.successors[op]):
            if covered >> w & 1:
                redundant.append((op, graph.ops[w].id))
            else:
                reduced[v].append(w)
                covered |= reach[w] | 1 << w
        reach[v] = covered
    return reduced, tuple(reversed(redundant))


@dataclass(slots=True)
class _Part:
    """A tree under construction: binary, so that a reduction takes constant time."""

    composition: Composition
    op: str = ""
    children: tuple[_Part, ...] = ()
    layered: bool = False


_SOURCE, _SINK = 0, 1


class _Network:
    """A two-terminal network; each edge holds the part of the tree that it stands for, or None.

    An edge without a part only orders. Parallel edges merge as they are added.
    """

    def __init__(self) -> None:
        self.heads: dict[int, dict[int, _Part | None]] = {_SOURCE: {}, _SINK: {}}
        self.tails: dict[int, set[int]] = {_SOURCE: set(), _SINK: set()}
        self._changed: set[int] = set()

    @classmethod
    def of(cls, graph: Graph, successors: Sequence[Sequence[int]]) -> _Network:
        """The network of an order given by successor lists without implied edges."""
        network = cls()
        start, end = network._place_meetings(successors)
        for v, op in enumerate(graph.ops):
            network.add(start[v], end[v], _Part(Composition.OP, op=op.id))
        return network

    def _place_meetings(self, successors: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Vertices where each operator starts and ends."""
        num_ops = len(successors)
        predecessors: list[list[int]] = [[] for _ in range(num_ops)]
        for v, row in enumerate(successors):
            for w in row:
                predecessors[w].append(v)
        start, end = [_SOURCE] * num_ops, [_SINK] * num_ops
        # Outputs that feed the same set meet in one vertex, and so do inputs fed by the same set.
        outputs: dict[tuple[int, ...], int] = {}
        inputs: dict[tuple[int, ...], int] = {}
        read_by = _classes(successors)
        fed_by = _classes(predecessors)
        for v in range(num_ops):
            if successors[v]:
                end[v] = self._vertex_for(outputs, tuple(successors[v]))
        meetings: dict[int, int] = {}
        for w in range(num_ops):
            sources = predecessors[w]
            if not sources:
                continue
            if fed_by[w] not in meetings:
                targets = successors[sources[0]]
                complete = all(read_by[v] == read_by[sources[0]] for v in sources) and all(
                    fed_by[x] == fed_by[w] for x in targets
                )
                if complete:
                    meetings[fed_by[w]] = end[sources[0]]
                else:
                    meetings[fed_by[w]] = meeting = self._vertex_for(inputs, tuple(sources))
                    for v in sources:
                        self.add(end[v], meeting, None)
            start[w] = meetings[fed_by[w]]
        return start, end

    def _vertex_for(self, known: dict[tuple[int, ...], int], key: tuple[int, ...]) -> int:
        if key not in known:
            known[key] = vertex = len(self.heads)
            self.heads[vertex] = {}
            self.tails[vertex] = set()
        return known[key]

    def add(self, tail: int, head: int, part: _Part | None) -> None:
        """Add an edge; one that is parallel to another joins it."""
        if head in self.heads[tail]:
            other = self.heads[tail][head]
            if part is None or other is None:
                part = part or other
            else:
                part = _Part(Composition.PARALLEL, children=(other, part))
        self.heads[tail][head] = part
        self.tails[head].add(tail)
        self._changed.update((tail, head))

    def remove(self, tail: int, head: int) -> _Part | None:
        """Remove an edge and return what it held."""
        self.tails[head].discard(tail)
        self._changed.update((tail, head))
        return self.heads[tail].pop(head)

    def reduce(self) -> None:
        """Apply series and parallel reductions until none applies."""
        while self._changed:
            vertex = self._changed.pop()
            if vertex in (_SOURCE, _SINK) or vertex not in self.heads:
                continue
            if len(self.tails[vertex]) != 1 or len(self.heads[vertex]) != 1:
                continue
            (tail,) = self.tails[vertex]
            (head,) = self.heads[vertex]
            first, second = self.remove(tail, vertex), self.remove(vertex, head)
            del self.heads[vertex], self.tails[vertex]
            if first is None or second is None:
                self.add(tail, head, first or second)
            else:
                self.add(tail, head, _Part(Composition.SERIES, children=(first, second)))

    @property
    def is_one_edge(self) -> bool:
        """Whether only the edge from source to sink is left."""
        return len(self.heads) == 2

    def result(self) -> _Part:
        """The tree, once the network is one edge."""
        part = self.heads[_SOURCE][_SINK]
        if part is None:
            raise ValueError("a network without operators has no tree")
        return part

    def layer_smallest_blocks(self) -> list[str]:
        """Replace blocks that no reduction fits by layers; return their operators.

        The smallest first, then others that have no vertex in common with these.
        """
        order = self._topological_order()
        rank = {vertex: i for i, vertex in enumerate(order)}
        dominator = _immediate_dominators(order, self.tails)
        post_dominator = _immediate_dominators(order[::-1], self.heads)
        found: list[tuple[int, int, int, int, set[int]]] = []
        for entry in order:
            exit_ = post_dominator.get(entry)
            if exit_ is not None and len(self.heads[entry]) > 1:
                found += self._blocks(entry, exit_, self.heads, self.tails, dominator, rank)
        for exit_ in order:
            entry = dominator.get(exit_)
            if entry is not None and len(self.tails[exit_]) > 1:
                found += self._blocks(exit_, entry, self.tails, self.heads, post_dominator, rank)
        blocks = sorted(found, key=lambda block: block[:4])
        taken: set[int] = set()
        layered: list[str] = []
        for _, entry_rank, exit_rank, _, inside in blocks:
            entry, exit_ = order[entry_rank], order[exit_rank]
            if taken.isdisjoint(inside) and not taken & {entry, exit_}:
                taken |= inside
                layered += self._layer(entry, exit_, sorted(inside, key=rank.__getitem__))
        return layered

    def _blocks(
        self,
        start: int,
        stop: int,
        ahead: Mapping[int, Iterable[int]],
        behind: Mapping[int, Iterable[int]],
        owner: Mapping[int, int],
        rank: Mapping[int, int],
    ) -> Iterator[tuple[int, int, int, int, set[int]]]:
        """Sets of vertices that only edges from `start` and to `stop` join to others.

        Every way `ahead` from `start` must lead to `stop`; `owner` is the immediate dominator in
        that direction. Sorted, smaller sets come first.
        """
        first, last = sorted((rank[start], rank[stop]))
        direction = rank[stop] - rank[start]
        seen: set[int] = set()
        for head in ahead[start]:
            found, is_closed = set[int](), head not in seen
            queue = deque([head])
            while queue and is_closed:
                vertex = queue.popleft()
                if vertex in found or vertex in (start, stop):
                    continue
                # What `start` does not dominate has another way in: far from all need be seen.
                from_start = (rank[owner[vertex]] - rank[start]) * direction >= 0
                is_closed = vertex not in seen and from_start
                found.add(vertex)
                queue.extend((*ahead[vertex], *behind[vertex]))
            seen |= found
            if is_closed and found:
                yield len(found), first, last, min(rank[v] for v in found), found

    def _layer(self, entry: int, exit_: int, inside: Sequence[int]) -> list[str]:
        level = {entry: 0}
        layers: dict[int, list[_Part]] = {}
        own = set(inside)
        first = [head for head in self.heads[entry] if head in own]
        edges = [(entry, head) for head in first]
        edges += [(vertex, head) for vertex in inside for head in self.heads[vertex]]
        # `inside` is topologically sorted, so a tail's level is final when its edges come up.
        for tail, head in edges:
            part = self.remove(tail, head)
            here = level[tail]
            if part is not None:
                layers.setdefault(here, []).append(part)
                here += 1
            level[head] = max(level.get(head, 0), here)
        for vertex in inside:
            del self.heads[vertex], self.tails[vertex]
        rows = [layers[i] for i in sorted(layers)]
        children = tuple(
            row[0] if len(row) == 1 else _Part(Composition.PARALLEL, children=tuple(row))
            for row in rows
        )
        block = _Part(Composition.SERIES, children=children, layered=True)
        self.add(entry, exit_, block)
        return _part_ops(block)

    def _topological_order(self) -> list[int]:
        waiting = {vertex: len(tails) for vertex, tails in self.tails.items()}
        ready, order = [_SOURCE], list[int]()
        while ready:
            vertex = ready.pop()
            order.append(vertex)
            for head in self.heads[vertex]:
                waiting[head] -= 1
                if waiting[head] == 0:
                    ready.append(head)
        return order


def _classes(rows: Sequence[Sequence[int]]) -> list[int]:
    """Numbers that are equal for equal rows."""
    known: dict[tuple[int, ...], int] = {}
    return [known.setdefault(tuple(row), len(known)) for row in rows]


def _immediate_dominators(
    order: Sequence[int], sources: Mapping[int, Iterable[int]]
) -> dict[int, int]:
    """Immediate dominator of each vertex but the first of a topological order."""
    dominator: dict[int, int] = {}
    depth = {order[0]: 0}
    for vertex in order[1:]:
        common: int | None = None
        for source in sources[vertex]:
            other = source
            while common is not None and common != other:
                if depth[common] >= depth[other]:
                    common = dominator[common]
                else:
                    other = dominator[other]
            common = other
        if common is not None:
            dominator[vertex] = common
            depth[vertex] = depth[common] + 1
    return dominator


def _part_ops(part: _Part) -> list[str]:
    found: list[str] = []
    stack = [part]
    while stack:
        here = stack.pop()
        if here.composition is Composition.OP:
            found.append(here.op)
        stack.extend(here.children)
    return found


def _flatten(part: _Part, position: Mapping[str, int]) -> SeriesParallel:
    """The n-ary tree of a binary one; parallel children ordered by their first operator."""
    # Post-order with an explicit stack: a chain of thousands of operators nests as deep.
    done: dict[int, tuple[SeriesParallel, int]] = {}
    stack: list[tuple[_Part, bool]] = [(part, False)]
    while stack:
        here, expanded = stack.pop()
        if here.composition is Composition.OP:
            done[id(here)] = (
                SeriesParallel(composition=Composition.OP, op=here.op),
                position[here.op],
            )
        elif not expanded:
            stack.append((here, True))
            stack.extend((child, False) for child in _members(here))
        else:
            rows = [done[id(child)] for child in _members(here)]
            if here.composition is Composition.PARALLEL:
                rows.sort(key=lambda row: row[1])
            children: list[SeriesParallel] = []
            for child, _ in rows:
                # Layers of one part inside a layered series may be series themselves.
                same = child.composition is here.composition
                children.extend(child.children if same else (child,))
            node = SeriesParallel(
                composition=here.composition,
                children=tuple(children),
                layered=here.layered
                or any(c.layered and c.composition is here.composition for c, _ in rows),
            )
            done[id(here)] = (node, min(first for _, first in rows))
    return done[id(part)][0]


def _members(part: _Part) -> list[_Part]:
    """The children of a node with nested nodes of its own composition opened."""
    found: list[_Part] = []
    stack = list(reversed(part.children))
    while stack:
        child = stack.pop()
        if child.composition is part.composition and not child.layered:
            stack.extend(reversed(child.children))
        else:
            found.append(child)
    return found
