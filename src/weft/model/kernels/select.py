"""The one place where a set of kernels is chosen."""

from __future__ import annotations

import torch

from weft.model.kernels.cpu_kernels import CpuKernels
from weft.model.kernels.interface import AttentionShape, Kernels
from weft.model.kernels.torch_kernels import TorchKernels


def choose_kernels(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Kernels:
    """The fastest kernels for a device and dtype; plain torch where there are no others."""
    if dtype is torch.float64:
        return TorchKernels(shape)
    if device.type == "cpu":
        return CpuKernels(shape)
    if device.type == "cuda":
        # Imported here: Triton comes with CUDA builds of torch only.
        from weft.model.kernels.triton_kernels import TritonKernels

        num_programs = torch.cuda.get_device_properties(device).multi_processor_count
        return TritonKernels(shape, dtype=dtype, num_programs=num_programs)
    return TorchKernels(shape)
