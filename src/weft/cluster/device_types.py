"""Built-in device types; every constant with its source.

Peaks are dense vendor figures (no structured sparsity) from the data sheets of the NVIDIA V100
(SXM2), T4, A10G (AWS g5 page: fp32 31.2 TFLOP/s; tensor 70 with fp32 accumulation), A100 (SXM4),
A800 (A100 with slower NVLink), H100 (SXM5) and H200; `float32` is plain fp32, which is what torch
runs by default, `tfloat32` is what it runs when asked. Memory is the sold size in GiB (H200: 141e9
bytes). Summit's V100 is the 16 GB part (GraphPipe sheet §5.1).

Efficiency. `max_fraction` and `half_flops`:

- fp32 without tensor cores (v100-16, t4): the cuBLAS column of openai-gemm's published table, on a
  card of about 11 TFLOP/s, shows 9.9 TFLOP/s for M = 7000, N = K = 2048 (0.90 of peak), 6.9 for
  128 x 1760 x 1760 and 4.1 for 64 x 1760 x 1760: half of the best at about 0.35 GFLOP, which is a
  fill time of 35 us at the best rate. Other cards: the same fill time at their best rate.
- tensor cores (others): 0.80 of peak for large products and a fill time of 6 us at that rate.
  Assumed, not measured: below the 0.85 to 0.95 that single large products show, above the 0.52 that
  Megatron-LM trains at end to end (arXiv 2104.04473, Table 1, which includes everything else).

`bandwidth_fraction`: 0.83 on V100 (750 of 900 GB/s) and 0.69 on T4 (220 of 320 GB/s) by the
microbenchmarks of Jia et al. (arXiv 1804.06826, 1903.07486); 0.88 assumed for the others.
`launch_s`: 5 us, the usual time of one CUDA launch from eager torch.

These were written down before any comparison of planners was run and are not tuned to one.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.cluster.device import DeviceType, Efficiency

GIB = 2**30
_LAUNCH_S = 5e-6
_CUDA_CORE_FILL_S = 35e-6
_TENSOR_CORE_FILL_S = 6e-6


def _cuda_core(peak: float, bandwidth_fraction: float) -> Efficiency:
    return Efficiency(
        max_fraction=0.90,
        half_flops=0.90 * peak * _CUDA_CORE_FILL_S,
        bandwidth_fraction=bandwidth_fraction,
    )


def _tensor_core(peak: float) -> Efficiency:
    return Efficiency(
        max_fraction=0.80, half_flops=0.80 * peak * _TENSOR_CORE_FILL_S, bandwidth_fraction=0.88
    )


def _device(
    name: str,
    memory_bytes: int,
    peak_flops: Mapping[str, float],
    bandwidth_bytes_per_s: float,
    efficiency: Efficiency,
) -> DeviceType:
    return DeviceType(
        name=name,
        memory_bytes=memory_bytes,
        peak_flops=peak_flops,
        memory_bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        efficiency=efficiency,
        launch_s=_LAUNCH_S,
    )


def _tensor_peaks(half: float, tf32: float, plain: float) -> dict[str, float]:
    return {"float32": plain, "tfloat32": tf32, "float16": half, "bfloat16": half}


_A100 = _tensor_peaks(312e12, 156e12, 19.5e12)
_HOPPER = _tensor_peaks(989e12, 494e12, 67e12)

DEVICE_TYPES: dict[str, DeviceType] = {
    device.name: device
    for device in (
        _device(
            "v100-16",
            16 * GIB,
            {"float32": 15.7e12, "float16": 125e12},
            900e9,
            _cuda_core(15.7e12, 0.83),
        ),
        _device(
            "t4", 16 * GIB, {"float32": 8.1e12, "float16": 65e12}, 320e9, _cuda_core(8.1e12, 0.69)
        ),
        _device("a10g", 24 * GIB, _tensor_peaks(70e12, 35e12, 31.2e12), 600e9, _tensor_core(70e12)),
        _device("a100-40", 40 * GIB, _A100, 1555e9, _tensor_core(312e12)),
        _device("a100-80", 80 * GIB, _A100, 2039e9, _tensor_core(312e12)),
        _device("a800", 80 * GIB, _A100, 2039e9, _tensor_core(312e12)),
        _device("h100", 80 * GIB, _HOPPER, 3350e9, _tensor_core(989e12)),
        _device("h200", 141_000_000_000, _HOPPER, 4800e9, _tensor_core(989e12)),
    )
}
"""Device type by name."""


def cpu_device_type(num_cores: int, memory_bytes: int) -> DeviceType:
    """A CPU of `num_cores` as one device, for planning on the machine at hand.

    157 GFLOP/s a core in fp32 and 833 in bf16, 10.5 GB/s a core, no launch: measured with torch on
    two AVX-512 + AMX cores (products of 4096^3, copies of 512 MiB). A profile of the machine
    (`weft profile`) is better.
    """
    return DeviceType(
        name="cpu",
        memory_bytes=memory_bytes,
        peak_flops={"float32": 157e9 * num_cores, "bfloat16": 833e9 * num_cores},
        memory_bandwidth_bytes_per_s=10.5e9 * num_cores,
        launch_s=2e-6,
    )
