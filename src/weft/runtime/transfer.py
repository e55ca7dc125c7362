"""Moving small arrays to a device and results back without waiting for the device."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Scalar = TypeVar("Scalar", bound=np.generic)


def upload(array: npt.NDArray[Scalar], device: torch.device) -> Tensor:
    """The array on a device: the same memory on the CPU, a copy in stream order on CUDA."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # Through pinned memory: a copy from pageable memory would wait for all work enqueued before.
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Device tensors on their way to the host, in the order of the work enqueued before."""

    __slots__ = ("_event", "_tensors")

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Enqueue the copies; the tensors may be overwritten by work enqueued later."""
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._tensors = {name: _start_copy(tensor) for name, tensor in tensors.items()}
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> dict[str, np.ndarray]:
        """The arrays; waits for these copies only, not for work enqueued since."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}


def _start_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
