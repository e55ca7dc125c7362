"""Which devices each stage gets, once it is known how many."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from weft.cluster.cluster import Cluster
from weft.plan.train_plan import PlanError


def stage_order(
    num_stages: int, edges: Collection[tuple[int, int]], first: Sequence[int]
) -> list[int]:
    """A topological order of stages that follows one branch to its end before the next.

    `first` is each stage's position in the model, which decides between branches. Raises PlanError
    when there is a cycle.
    """
    targets: list[list[int]] = [[] for _ in range(num_stages)]
    waiting = [0] * num_stages
    for source, target in edges:
        targets[source].append(target)
        waiting[target] += 1
    by_position = sorted(range(num_stages), key=lambda stage: -first[stage])
    ready = [stage for stage in by_position if waiting[stage] == 0]
    order: list[int] = []
    while ready:
        stage = ready.pop()
        order.append(stage)
        opened: list[int] = []
        for target in targets[stage]:
            waiting[target] -= 1
            if waiting[target] == 0:
                opened.append(target)
        ready.extend(sorted(opened, key=lambda target: -first[target]))
    if len(order) < num_stages:
        raise PlanError("the stages depend on each other in a cycle; every stage must be convex")
    return order


def place(
    cluster: Cluster,
    num_devices: Sequence[int],
    allowed: Mapping[int, Collection[int]] | None = None,
) -> list[tuple[int, ...]]:
    """Devices for stages in order: neighbours close together, few groups split over nodes.

    `num_devices[s]` is the size of stage s. `allowed` restricts some stages to some devices; these
    choose first. Contiguous placement in stage order is GraphPipe's (sheet §2.3); a group that
    would straddle a node border moves to the first node with room. Raises PlanError when the
    devices do not suffice.
    """
    free = {device.index for device in cluster.devices}
    placed: dict[int, tuple[int, ...]] = {}
    restricted = allowed or {}
    order = sorted(range(len(num_devices)), key=lambda s: (len(restricted.get(s, free)), s))
    if not restricted:
        order = list(range(len(num_devices)))
    for stage in order:
        usable = free & set(restricted[stage]) if stage in restricted else free
        chosen = choose_devices(cluster, sorted(usable), num_devices[stage])
        if chosen is None:
            raise PlanError(
                f"stage {stage} needs {num_devices[stage]} devices, but only {len(usable)} of "
                f"those it may use are free; relax its pin or give it fewer"
            )
        placed[stage] = chosen
        free -= set(chosen)
    return [placed[stage] for stage in range(len(num_devices))]


def choose_devices(cluster: Cluster, free: Sequence[int], count: int) -> tuple[int, ...] | None:
    """So many of the free devices, in one node where possible; None where there are too few."""
    if len(free) < count:
        return None
    by_node: dict[str, list[int]] = {}
    for device in free:
        by_node.setdefault(cluster.devices[device].node, []).append(device)
    for devices in by_node.values():
        if len(devices) >= count:
            return tuple(devices[:count])
    # Too big for one node's rest: whole nodes first, so that few groups are split.
    chosen: list[int] = []
    for devices in sorted(by_node.values(), key=lambda rest: (-len(rest), rest[0])):
        chosen.extend(devices[: count - len(chosen)])
        if len(chosen) == count:
            break
    return tuple(sorted(chosen))
