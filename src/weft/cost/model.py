"""How long an operator, a transfer and an all-reduce take: the protocol that planners price by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from weft.base.errors import ConfigError
from weft.cluster.cluster import Cluster
from weft.cluster.device import DeviceType, Link
from weft.cost.training import TrainingSpec
from weft.graph.graph import Op


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """How the devices of one stage share its work: data-parallel and tensor-parallel degree."""

    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, degree in (("dp", self.dp), ("tp", self.tp)):
            if degree < 1:
                raise ConfigError(f"parallel degree {axis} is {degree}; it must be at least 1")

    @property
    def num_devices(self) -> int:
        """Devices that the degrees multiply to."""
        return self.dp * self.tp


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCost:
    """Seconds for one invocation of an operator on each device of its stage."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        """Forward and backward together."""
        return self.forward_s + self.backward_s


class CostModel(Protocol):
    """Prices of everything a plan does; deterministic, and free of side effects."""

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
    ) -> OpCost:
        """Seconds of `op` for `local_samples` samples on one device.

        `local_samples` is what one data-parallel replica gets (micro-batch size / dp). With
        tp > 1 the arithmetic is divided by tp; collectives are priced by the caller.
        """
        ...

    def transfer_s(self, num_bytes: float, link: Link) -> float:
        """Seconds of one point-to-point message on an idle link (affine)."""
        ...

    def all_reduce_s(self, num_bytes: float, devices: Sequence[int], cluster: Cluster) -> float:
        """Seconds of a ring all-reduce of `num_bytes` over these device indices."""
        ...

    def step_s(self, num_params: int, training: TrainingSpec, device_type: DeviceType) -> float:
        """Seconds of the optimizer's update of so many parameters on one device."""
        ...

    def reserved_bytes(self, op: Op, local_samples: int) -> int:
        """Scratch memory that `op` holds between forward and backward beyond its saved tensors."""
        ...
