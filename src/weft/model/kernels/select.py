"""The one place where a set of kernels is chosen."""

from __future__ import annotations

import torch

from weft.model.kernels.cpu_kernels import CpuKernels
from weft.model.kernels.interface import AttentionShape, Kernels
from weft.model.kernels.torch_kernels import TorchKernels


def choose_kernels(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Kernels:
    """The fastest kernels for a device and dtype; plain torch where there are no others."""
    if device.type == "cpu" and dtype is not torch.float64:
        return CpuKernels(shape)
    return TorchKernels(shape)
