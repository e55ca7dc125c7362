"""What a cluster is made of: device types with their efficiency, and links."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from weft.base.errors import ConfigError


def _positive(value: float, what: str) -> None:
    if not value > 0:
        raise ConfigError(f"{what} is {value}; it must be greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Fraction of a device's peak that a kernel reaches, rising with its size.

    `fraction(flops) = max_fraction * flops / (flops + half_flops)`: half of the best is reached by
    a kernel of `half_flops`. Source of the form: a fixed pipeline-fill time plus work at the best
    rate, the `t0 + flops / (eff * peak)` of the GraphPipe sheet §5.5.
    """

    max_fraction: float = 1.0
    half_flops: float = 0.0
    bandwidth_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_fraction", "bandwidth_fraction"):
            value: float = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(f"efficiency.{name} is {value}; it must be in (0, 1]")
        if not self.half_flops >= 0:
            raise ConfigError(f"efficiency.half_flops is {self.half_flops}; it must be >= 0")

    def fraction(self, flops: float) -> float:
        """Fraction of peak FLOP/s that one kernel of `flops` reaches; 0 for no work."""
        if flops <= 0:
            return 0.0
        return self.max_fraction * flops / (flops + self.half_flops)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceType:
    """One kind of accelerator; `peak_flops` is FLOP/s by dtype name, dense."""

    name: str
    memory_bytes: int
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth_bytes_per_s: float
    efficiency: Efficiency = Efficiency()
    launch_s: float = 0.0

    def __post_init__(self) -> None:
        _positive(self.memory_bytes, f"device type {self.name!r}: memory_bytes")
        _positive(self.memory_bandwidth_bytes_per_s, f"device type {self.name!r}: bandwidth")
        if not self.peak_flops:
            raise ConfigError(f"device type {self.name!r} gives no peak_flops; name at least one")
        for dtype, peak in self.peak_flops.items():
            _positive(peak, f"device type {self.name!r}: peak_flops[{dtype}]")

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s in `dtype`; raises ConfigError when this device type gives none."""
        try:
            return self.peak_flops[dtype]
        except KeyError:
            raise ConfigError(
                f"device type {self.name!r} gives no peak for dtype {dtype!r}; "
                f"it gives {', '.join(self.peak_flops)}"
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction of a connection: a message of n bytes takes latency_s + n / bandwidth."""

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        _positive(self.bandwidth_bytes_per_s, "link: bandwidth_bytes_per_s")
        if not self.latency_s >= 0:
            raise ConfigError(f"link: latency_s is {self.latency_s}; it must be at least 0")

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds for one message of `num_bytes` on an idle link."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


SAME_DEVICE = Link(bandwidth_bytes_per_s=math.inf)
"""The link from a device to itself: free."""
