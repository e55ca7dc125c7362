"""Measured costs: a profile file of blocks, and the cost model that reads it."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.base.errors import ConfigError
from weft.cluster.device import DeviceType
from weft.cost.communication import Communication
from weft.cost.model import CostModel, OpCost, Parallel
from weft.cost.training import TrainingSpec
from weft.graph.graph import Op

PROFILE_FORMAT = "weft-block-profile-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTimes:
    """Median seconds of one block at each measured batch size, ascending."""

    op_id: str
    batch_sizes: tuple[int, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    reserved_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"profile of block {self.op_id!r}"
        if not self.batch_sizes or list(self.batch_sizes) != sorted({*self.batch_sizes}):
            raise ConfigError(
                f"{where}: batch sizes {self.batch_sizes} must rise from at least one"
            )
        if self.batch_sizes[0] < 1:
            raise ConfigError(f"{where}: batch size {self.batch_sizes[0]} must be at least 1")
        for name in ("forward_s", "backward_s", "reserved_bytes"):
            values: Sequence[float] = getattr(self, name)
            if len(values) != len(self.batch_sizes) and not (
                name == "reserved_bytes" and not values
            ):
                raise ConfigError(
                    f"{where}: {name} has {len(values)} values for {len(self.batch_sizes)} sizes"
                )
            for value in values:
                if not (math.isfinite(value) and value >= 0):
                    raise ConfigError(f"{where}: {name} holds {value}; it must be finite and >= 0")

    def cost(self, local_samples: float) -> OpCost:
        """Seconds at any batch size: affine between measured sizes and beyond the largest.

        Below the smallest the time of the smallest is taken: kernels do not get faster than that.
        """
        return OpCost(
            forward_s=_interpolate(self.batch_sizes, self.forward_s, local_samples),
            backward_s=_interpolate(self.batch_sizes, self.backward_s, local_samples),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockProfile:
    """What `weft profile` measured on one device: times by block signature.

    `device` is the device type that the figures hold for; `environment` says how they were made.
    """

    model: str
    device: str
    dtype: str
    blocks: Mapping[str, BlockTimes]
    graph_digest: str = ""
    update_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds per parameter of one update, by optimizer: "sgd" and "adam"."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, seconds in self.update_s.items():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ConfigError(
                    f"profile of {self.model!r}: an update by {name!r} takes {seconds} s a "
                    "parameter; it must be finite and >= 0"
                )

    def to_json(self) -> str:
        """The profile as JSON text."""
        return json.dumps({"format": PROFILE_FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> BlockProfile:
        """Read what `to_json` wrote; ConfigError for anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != PROFILE_FORMAT:
                raise ValueError(f"its format is not {PROFILE_FORMAT!r}")
            blocks = {
                signature: BlockTimes(**{k: _as_tuple(v) for k, v in times.items()})
                for signature, times in data.pop("blocks").items()
            }
            return cls(blocks=blocks, **data)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"this is not a block profile ({type(error).__name__}: {error}); "
                "make one with `weft profile MODEL --out profile.json`"
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> BlockProfile:
        """Read a profile file."""
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"cannot read profile {str(path)!r}: {error.strerror}") from None
        return cls.from_json(text)


@dataclass(frozen=True, kw_only=True)
class ProfiledCost(Communication):
    """Prices blocks by measurement; links and all-reduces as every cost model does.

    A block that the profile lacks goes to `fallback`, or is refused where there is none. With
    tp > 1 measured times are divided by tp.
    """

    profile: BlockProfile
    fallback: CostModel | None = None

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
    ) -> OpCost:
        """Seconds of one invocation, from the measured table of the block's signature."""
        if self.profile.device != device_type.name:
            raise ConfigError(
                f"the profile was measured on {self.profile.device!r}, but the plan is for "
                f"{device_type.name!r}; run `weft profile` there, or plan for a cluster of "
                f"{self.profile.device!r}"
            )
        times = self.profile.blocks.get(op.signature)
        if times is None:
            if self.fallback is not None:
                return self.fallback.op_cost(op, local_samples, parallel, device_type)
            raise ConfigError(
                f"the profile of {self.profile.model!r} has no block {op.id!r} (signature "
                f"{op.signature!r}); profile this model with the same number of blocks"
            )
        cost = times.cost(local_samples)
        return OpCost(
            forward_s=cost.forward_s / parallel.tp, backward_s=cost.backward_s / parallel.tp
        )

    def step_s(self, num_params: int, training: TrainingSpec, device_type: DeviceType) -> float:
        """By the measured seconds per parameter, 0 where an older profile has none.

        With 12 bytes of state or more beside the weight (a gradient and two moments in fp32) the
        update is Adam's, else plain SGD's.
        """
        del device_type
        state_bytes = training.state_bytes_per_param - training.weight_bytes_per_param
        return num_params * self.profile.update_s.get("adam" if state_bytes >= 12 else "sgd", 0.0)

    def reserved_bytes(self, op: Op, local_samples: int) -> int:
        """Measured scratch memory, 0 where none was recorded."""
        times = self.profile.blocks.get(op.signature)
        if times is None or not times.reserved_bytes:
            return 0
        return math.ceil(_interpolate(times.batch_sizes, times.reserved_bytes, local_samples))


def _interpolate(sizes: Sequence[int], values: Sequence[float], size: float) -> float:
    if size <= sizes[0] or len(sizes) == 1:
        # One measured size: beyond it, in proportion.
        return values[0] * max(1.0, size / sizes[0]) if len(sizes) == 1 else values[0]
    right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    a, b = sizes[right - 1], sizes[right]
    slope = (values[right] - values[right - 1]) / (b - a)
    # Noise must not make larger batches look free.
    return max(values[right - 1] + slope * (size - a), 0.0 if size <= b else values[right])


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
