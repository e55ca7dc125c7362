"""The one place where a set of kernels is chosen."""

from __future__ import annotations

import torch

from weft.model.adapters.table import GroupedKernels
from weft.model.kernels.cpu_kernels import CpuKernels
from weft.model.kernels.cpu_linear import storage_of
from weft.model.kernels.cpu_lora import CpuGrouped
from weft.model.kernels.cpu_team import native_kernels
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


def choose_grouped(dtype: torch.dtype, device: torch.device) -> GroupedKernels | None:
    """What applies the adapters of many rows at once; None where each adapter goes by itself."""
    if device.type == "cpu":
        native = native_kernels()
        return CpuGrouped(native, dtype) if native and storage_of(dtype) is not None else None
    if device.type == "cuda" and dtype is not torch.float64:
        # Imported here: Triton comes with CUDA builds of torch only.
        from weft.model.kernels.triton_lora import TritonGrouped

        return TritonGrouped(dtype, device)
    return None
