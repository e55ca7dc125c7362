"""Prices of messages, shared by every cost model: affine links and ring all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

from weft.cluster.cluster import Cluster
from weft.cluster.device import DeviceType, Link
from weft.cost.training import TrainingSpec
from weft.graph.graph import Op


class Communication:
    """Mixin: affine messages, ring all-reduce; updates cost nothing, and nothing is reserved."""

    __slots__ = ()

    def transfer_s(self, num_bytes: float, link: Link) -> float:
        """Seconds of one message on an idle link: latency + bytes / bandwidth."""
        return link.transfer_s(num_bytes)

    def all_reduce_s(self, num_bytes: float, devices: Sequence[int], cluster: Cluster) -> float:
        """Seconds of a ring all-reduce: 2(n-1) steps of 1/n of the bytes over the slowest link.

        The ring visits the devices in index order, so that it enters and leaves each node once and
        a shared network card carries one message per direction. Source: ring all-reduce as counted
        in Megatron-LM (arXiv 2104.04473) §3.3, cost proportional to (n-1)/n.
        """
        n = len(devices)
        if n < 2 or num_bytes <= 0:
            return 0.0
        ring = sorted(devices)
        links = [cluster.link(a, b) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
        step_s = max(self.transfer_s(num_bytes / n, link) for link in links)
        return 2 * (n - 1) * step_s

    def step_s(self, num_params: int, training: TrainingSpec, device_type: DeviceType) -> float:
        """0: what an optimizer takes is known where it was measured alone."""
        return 0.0

    def reserved_bytes(self, op: Op, local_samples: int) -> int:
        """0: torch's kernels keep nothing beyond what capture counts as saved."""
        return 0
