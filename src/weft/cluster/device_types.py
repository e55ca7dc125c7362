"""Built-in device types; every constant with its source.

Peaks are dense vendor figures: no structured sparsity. Memory is what the vendor sells, in GiB.
`launch_s` and the efficiency constants are in the table `EFFICIENCY_SOURCES`.
"""

from __future__ import annotations

from weft.cluster.device import DeviceType, Efficiency

GIB = 2**30

DEVICE_TYPES: dict[str, DeviceType] = {
    # NVIDIA V100 datasheet (SXM2): 15.7 TFLOP/s fp32, 125 TFLOP/s tensor, 900 GB/s. Summit has
    # the 16 GB part (GraphPipe sheet §5.1).
    "v100-16": DeviceType(
        name="v100-16",
        memory_bytes=16 * GIB,
        peak_flops={"float32": 15.7e12, "float16": 125e12},
        memory_bandwidth_bytes_per_s=900e9,
        efficiency=Efficiency(max_fraction=0.93, half_flops=1.0e8, bandwidth_fraction=0.83),
        launch_s=5e-6,
    ),
}
"""Device type by name."""
