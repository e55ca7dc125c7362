"""The roofline cost model: the larger of arithmetic and memory time, plus launches."""

from __future__ import annotations

from dataclasses import dataclass

from weft.cluster.device import DeviceType
from weft.cost.communication import Communication
from weft.cost.model import OpCost, Parallel
from weft.graph.graph import Op


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineCost(Communication):
    """Prices an operator by its FLOP and bytes on a device type.

    time = launches + max(flops / (peak * efficiency(flops per kernel)), bytes / bandwidth).
    Efficiency rises with the size of a kernel, so small micro-batches cost more per sample.
    Source: GraphPipe sheet §5.5, with the memory roof added.
    """

    dtype: str = "float32"

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
    ) -> OpCost:
        """Seconds of one invocation for `local_samples` samples; arithmetic is divided by tp."""
        n, tp = local_samples, parallel.tp
        return OpCost(
            forward_s=self._seconds(
                (op.flops_forward * n + op.fixed_flops) / tp,
                (op.bytes_accessed * n + op.fixed_bytes) / tp,
                op.num_kernels,
                device_type,
            ),
            backward_s=self._seconds(
                op.flops_backward * n / tp,
                (op.bytes_accessed_backward * n + op.fixed_bytes_backward) / tp,
                # Backward of a kernel is about two: one for the input, one for the weight.
                op.num_kernels * 2 if op.flops_backward > 0 else 0,
                device_type,
            ),
        )

    def _seconds(
        self, flops: float, num_bytes: float, num_kernels: int, device_type: DeviceType
    ) -> float:
        if flops <= 0 and num_bytes <= 0:
            return 0.0
        efficiency = device_type.efficiency
        bandwidth = device_type.memory_bandwidth_bytes_per_s * efficiency.bandwidth_fraction
        arithmetic_s = 0.0
        if flops > 0:
            kernels = max(num_kernels, 1)
            fraction = efficiency.fraction(flops / kernels)
            arithmetic_s = flops / (device_type.peak(self.dtype) * fraction)
        return max(arithmetic_s, num_bytes / bandwidth) + num_kernels * device_type.launch_s
