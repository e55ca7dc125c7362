"""The roofline cost model: per kernel, the larger of arithmetic and memory time, plus launches."""

from __future__ import annotations

from dataclasses import dataclass

from weft.cluster.device import DeviceType
from weft.cost.communication import Communication
from weft.cost.model import OpCost, Parallel
from weft.graph.graph import Kernel, Op


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineCost(Communication):
    """Prices an operator by its FLOP and bytes on a device type; a block is the sum of its kernels.

    A product takes max(flops / (peak * efficiency(flops)), bytes / bandwidth), anything else
    bytes / bandwidth, and each kernel one launch. Efficiency rises with the size of a product, so
    small micro-batches cost more per sample. Source: GraphPipe sheet §5.5, with a memory roof.
    """

    dtype: str = "float32"

    def op_cost(
        self, op: Op, local_samples: int, parallel: Parallel, device_type: DeviceType
    ) -> OpCost:
        """Seconds of one invocation for `local_samples` samples; work is divided by tp."""
        forward_s = backward_s = 0.0
        for kernel in op.parts:
            forward_s += kernel.count * self._forward_s(
                kernel, local_samples, parallel.tp, device_type
            )
            backward_s += kernel.count * self._backward_s(
                kernel, local_samples, parallel.tp, device_type
            )
        return OpCost(forward_s=forward_s, backward_s=backward_s)

    def _forward_s(self, kernel: Kernel, samples: int, tp: int, device_type: DeviceType) -> float:
        return self._seconds(
            (kernel.flops_forward * samples + kernel.fixed_flops) / tp,
            (kernel.bytes_accessed * samples + kernel.fixed_bytes) / tp,
            kernel.is_product,
            1,
            device_type,
        )

    def _backward_s(self, kernel: Kernel, samples: int, tp: int, device_type: DeviceType) -> float:
        # Backward of a product is one product for each operand that needs a gradient.
        products = 1
        if kernel.is_product and kernel.flops_forward > 0:
            products = max(1, round(kernel.flops_backward / kernel.flops_forward))
        return self._seconds(
            kernel.flops_backward * samples / tp,
            (kernel.bytes_accessed_backward * samples + kernel.fixed_bytes_backward) / tp,
            kernel.is_product,
            products,
            device_type,
        )

    def _seconds(
        self,
        flops: float,
        num_bytes: float,
        is_product: bool,
        launches: int,
        device_type: DeviceType,
    ) -> float:
        if flops <= 0 and num_bytes <= 0:
            return 0.0
        efficiency = device_type.efficiency
        bandwidth = device_type.memory_bandwidth_bytes_per_s * efficiency.bandwidth_fraction
        arithmetic_s = 0.0
        if is_product and flops > 0:
            fraction = efficiency.fraction(flops / launches)
            arithmetic_s = flops / (device_type.peak(self.dtype) * fraction)
        return max(arithmetic_s, num_bytes / bandwidth) + launches * device_type.launch_s
