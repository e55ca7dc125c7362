"""What a user may demand of a plan: kept together, cut, pinned, or written by hand."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weft.cluster.cluster import Cluster
from weft.graph.graph import Edge, Graph
from weft.plan.train_plan import PlanError, TrainPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepTogether:
    """These operators run in one stage."""

    ops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForbidCut:
    """No stage border between these two operators."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ForceCut:
    """A stage border between these two operators."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """The stages of these operators run on these devices, or on devices of this node."""

    ops: tuple[str, ...]
    devices: tuple[int, ...] = ()
    node: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedStage:
    """These operators, and no others, form a stage, on this many devices (0: the planner says).

    With `devices` the stage runs exactly there.
    """

    ops: tuple[str, ...]
    num_devices: int = 0
    devices: tuple[int, ...] = ()


Constraint = KeepTogether | ForbidCut | ForceCut | Pin | FixedStage


def freeze(plan: TrainPlan, stages: Iterable[int] | None = None) -> tuple[FixedStage, ...]:
    """Constraints that keep stages of a plan (all by default) as they are, devices included."""
    chosen = range(plan.num_stages) if stages is None else stages
    return tuple(FixedStage(ops=plan.stages[i].ops, devices=plan.stages[i].devices) for i in chosen)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Constraints in terms of operator positions, as a search asks about them.

    Sets of operators are bit masks. No stage may separate the operators of one of `groups`, which
    are disjoint and convex; `whole` sets are groups that are a stage by themselves, on `sizes[set]`
    devices where given; `apart` pairs are never in one stage; `pinned` maps sets to devices.
    """

    groups: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    apart: tuple[tuple[int, int], ...] = ()
    pinned: Mapping[int, frozenset[int]] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.groups or self.apart or self.pinned)

    def allows(self, mask: int) -> bool:
        """Whether these operators may be one stage."""
        if any(group & mask not in (0, group) for group in self.groups):
            return False
        if any(group & mask and group != mask for group in self.whole):
            return False
        if any(mask >> a & 1 and mask >> b & 1 for a, b in self.apart):
            return False
        devices = self.devices_for(mask)
        return devices is None or bool(devices)

    def devices_for(self, mask: int) -> frozenset[int] | None:
        """The devices that a stage of these operators may use; None for any."""
        sets = [devices for ops, devices in self.pinned.items() if ops & mask]
        return frozenset.intersection(*sets) if sets else None

    def allows_size(self, mask: int, num_devices: int) -> bool:
        """Whether a stage of these operators may take that many devices."""
        if mask in self.sizes and num_devices != self.sizes[mask]:
            return False
        devices = self.devices_for(mask)
        return devices is None or num_devices <= len(devices)

    def labels(self, num_ops: int) -> list[Hashable] | None:
        """What keeps operators apart that cost the same but are constrained differently."""
        if not self:
            return None
        pairs = [1 << a | 1 << b for a, b in self.apart]
        sets = (*self.groups, *self.pinned, *pairs)
        return [tuple(i for i, ops in enumerate(sets) if ops >> op & 1) for op in range(num_ops)]

    def members(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        """Operators, by position, behind each leaf of the order of `contract`."""
        leader = _leaders(self.groups, len(graph.ops))
        found: dict[str, tuple[int, ...]] = {}
        for op, first in enumerate(leader):
            name = graph.ops[first].id
            found[name] = (*found.get(name, ()), op)
        return found

    def contract(self, graph: Graph) -> Graph:
        """The order of a graph with every group as one operator, named for its first."""
        if not self.groups:
            return graph
        leader = _leaders(self.groups, len(graph.ops))
        pairs = {
            (leader[graph.op_index[e.source]], leader[graph.op_index[e.target]])
            for e in graph.edges
        }
        return Graph.ordered(
            graph.name,
            [graph.ops[op] for op, first in enumerate(leader) if op == first],
            [
                Edge(source=graph.ops[a].id, target=graph.ops[b].id, bytes_per_sample=0)
                for a, b in sorted(pairs)
                if a != b
            ],
            graph.parameters,
        )


def _leaders(groups: Sequence[int], num_ops: int) -> list[int]:
    leader = list(range(num_ops))
    for group in groups:
        first = (group & -group).bit_length() - 1
        for op in range(num_ops):
            if group >> op & 1:
                leader[op] = first
    return leader


NO_RULES = Rules()
"""No constraints."""


def resolve(constraints: Sequence[Constraint], graph: Graph, cluster: Cluster) -> Rules:
    """The rules that constraints stand for; PlanError names what is unknown or contradictory."""
    together: list[int] = []
    apart: list[tuple[int, int]] = []
    whole: list[int] = []
    pinned: dict[int, frozenset[int]] = {}
    sizes: dict[int, int] = {}

    def pin(mask: int, devices: frozenset[int], op: str) -> None:
        pinned[mask] = pinned.get(mask, devices) & devices
        if not pinned[mask]:
            raise PlanError(f"operator {op!r} is pinned to places that do not meet")

    for constraint in constraints:
        match constraint:
            case KeepTogether(ops=ops):
                together.append(_mask(graph, ops, constraint))
            case ForbidCut(source=source, target=target):
                together.append(_mask(graph, (source, target), constraint))
            case ForceCut(source=source, target=target):
                _mask(graph, (source, target), constraint)
                apart.append((graph.op_index[source], graph.op_index[target]))
            case Pin():
                devices = _pin_devices(constraint, cluster)
                for op in constraint.ops:
                    pin(_mask(graph, (op,), constraint), devices, op)
            case FixedStage():
                mask = _mask(graph, constraint.ops, constraint)
                whole.append(mask)
                if constraint.devices:
                    _known_devices(constraint.devices, cluster, constraint)
                    pin(mask, frozenset(constraint.devices), constraint.ops[0])
                if constraint.devices or constraint.num_devices:
                    sizes[mask] = len(constraint.devices) or constraint.num_devices
    order = _Order.of(graph)
    for mask in whole:
        between = order.closure(mask) & ~mask
        if between:
            raise PlanError(
                f"a fixed stage of {mask.bit_count()} operators is not convex: "
                f"{graph.ops[_first(between)].id!r} lies between them; add it or split the stage"
            )
    groups = order.merge([*whole, *together])
    for mask in whole:
        for group in groups:
            if group & mask and group != mask:
                op = graph.ops[_first(group & ~mask or mask)].id
                raise PlanError(
                    f"a fixed stage must also hold operator {op!r}, by another constraint or "
                    "because they depend on each other both ways; change one of them"
                )
    for a, b in apart:
        if any(group >> a & 1 and group >> b & 1 for group in groups):
            raise PlanError(
                f"operators {graph.ops[a].id!r} and {graph.ops[b].id!r} are both forced apart and "
                "kept together; drop one of the constraints"
            )
    return Rules(
        groups=tuple(g for g in groups if g.bit_count() > 1 or g in whole),
        whole=tuple(whole),
        apart=tuple(apart),
        pinned=pinned,
        sizes=sizes,
    )


def _first(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


@dataclass(frozen=True, slots=True)
class _Order:
    """Strict ancestors and descendants of every operator, as bit masks."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, graph: Graph) -> _Order:
        n = len(graph.ops)
        before, after = [0] * n, [0] * n
        for i, op in enumerate(graph.ops):
            for name in graph.predecessors[op.id]:
                j = graph.op_index[name]
                before[i] |= before[j] | 1 << j
        for i in range(n - 1, -1, -1):
            for name in graph.successors[graph.ops[i].id]:
                j = graph.op_index[name]
                after[i] |= after[j] | 1 << j
        return cls(before, after)

    def _reach(self, mask: int) -> tuple[int, int]:
        up, down = 0, 0
        for op in range(mask.bit_length()):
            if mask >> op & 1:
                up |= self.before[op]
                down |= self.after[op]
        return up, down

    def closure(self, mask: int) -> int:
        """The set with everything on paths between its operators."""
        up, down = self._reach(mask)
        return mask | (up & down)

    def merge(self, masks: Sequence[int]) -> list[int]:
        """Disjoint convex groups holding these sets, none between the operators of another."""
        groups = [self.closure(mask) for mask in masks if mask]
        changed = True
        while changed:
            changed = False
            for i in range(len(groups)):
                for j in range(i + 1, len(groups)):
                    first, second = groups[i], groups[j]
                    up, down = self._reach(first)
                    if first & second or (second & up and second & down):
                        groups[i] = self.closure(first | second)
                        del groups[j]
                        changed = True
                        break
                if changed:
                    break
        return groups


def _mask(graph: Graph, ops: Collection[str], constraint: Constraint) -> int:
    mask = 0
    for op in ops:
        if op not in graph.op_index:
            raise PlanError(
                f"{type(constraint).__name__} names operator {op!r}, which graph {graph.name!r} "
                "does not have; `weft plan --list-ops` prints them"
            )
        mask |= 1 << graph.op_index[op]
    return mask


def _known_devices(devices: Collection[int], cluster: Cluster, constraint: Constraint) -> None:
    for device in devices:
        if not 0 <= device < cluster.num_devices:
            raise PlanError(
                f"{type(constraint).__name__} names device {device}; cluster {cluster.name!r} has "
                f"devices 0 to {cluster.num_devices - 1}"
            )


def _pin_devices(pin: Pin, cluster: Cluster) -> frozenset[int]:
    if bool(pin.devices) == bool(pin.node):
        raise PlanError("Pin takes either devices or a node; give exactly one of them")
    if pin.devices:
        _known_devices(pin.devices, cluster, pin)
        return frozenset(pin.devices)
    found = frozenset(device.index for device in cluster.devices if device.node == pin.node)
    if not found:
        names = ", ".join(node.name for node in cluster.nodes)
        raise PlanError(f"Pin names node {pin.node!r}; cluster {cluster.name!r} has {names}")
    return found
