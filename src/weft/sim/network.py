"""Which links and network cards a message queues at."""

from __future__ import annotations

import numpy as np

from weft.cluster.cluster import Cluster
from weft.plan.messages import MessageTable
from weft.sim.kernel import NO_HOP, Routes


def routes(cluster: Cluster, table: MessageTable, *, contention: bool = True) -> Routes:
    """FIFO resources of every message, by the devices that it joins.

    Inside a node each ordered pair of devices has a link of its own. Between nodes a message leaves
    through the sender's network card and enters through the receiver's, one direction each; a node
    shares one card among its devices where `cluster.nic_shared`, else each device has its own. A
    message occupies a resource for bytes / bandwidth; the latency delays it without occupying.
    Without `contention` messages queue nowhere.
    """
    num_devices = cluster.num_devices
    pair = table.sender.astype(np.int64) * num_devices + table.receiver
    pairs, of_message = np.unique(pair, return_inverse=True)
    hops: dict[tuple[str, str, int], int] = {}
    columns: list[tuple[int, int, float, float]] = []
    for value in pairs.tolist():
        sender, receiver = divmod(value, num_devices)
        link = cluster.link(sender, receiver)
        first, second = NO_HOP, NO_HOP
        if contention:
            ends = _resources(cluster, sender, receiver)
            first = hops.setdefault(ends[0], len(hops))
            second = hops.setdefault(ends[1], len(hops)) if len(ends) > 1 else NO_HOP
        columns.append((first, second, link.bandwidth_bytes_per_s, link.latency_s))
    of_pair = np.array(columns, dtype=np.float64).reshape(-1, 4)[of_message]
    occupancy_s = table.num_bytes / of_pair[:, 2]
    return Routes(
        first_hop=of_pair[:, 0].astype(np.int64),
        second_hop=of_pair[:, 1].astype(np.int64),
        occupancy_s=occupancy_s,
        delay_s=of_pair[:, 3] + occupancy_s,
        num_resources=len(hops),
    )


def _resources(cluster: Cluster, sender: int, receiver: int) -> list[tuple[str, str, int]]:
    a, b = cluster.devices[sender].node, cluster.devices[receiver].node
    if a == b:
        return [("link", str(sender), receiver)]
    if cluster.nic_shared:
        return [("out", a, -1), ("in", b, -1)]
    return [("out", a, sender), ("in", b, receiver)]
