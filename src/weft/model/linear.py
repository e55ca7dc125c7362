"""The weight of a linear layer behind one protocol; nothing else touches its storage.

Shape legend: T rows (tokens), K in_features, N out_features.

A layer holds a `LinearWeight` and calls `forward` and `grad_input`. How the numbers lie in memory
(dense, packed in panels, later 4-bit or a shard) is the implementation's own business, so a packed
weight need not keep a dense copy beside it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.base.errors import ConfigError
from weft.model.kernels import cpu_linear


@runtime_checkable
class LinearWeight(Protocol):
    """A frozen linear map `y = x Wᵀ + b` from K to N features."""

    @property
    def in_features(self) -> int:
        """K, the width of `x`."""
        ...

    @property
    def out_features(self) -> int:
        """N, the width of `y`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weight, of `x` and of `y`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The bias [N], or None."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes held for weight and bias, every packed copy included."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N], bias added."""
        ...

    def forward_add(self, x: Tensor, addend: Tensor) -> Tensor:
        """`forward(x) + addend`: how a block ends on the residual stream [..., N]."""
        ...

    def forward_silu_mul(self, x: Tensor) -> Tensor:
        """For stacked gate and up weights [2F, K]: silu(gate(x)) · up(x), [..., F]."""
        ...

    def silu_mul(self, outputs: Tensor) -> Tensor:
        """The end of `forward_silu_mul` for outputs [M, 2F] of `forward`, perhaps changed: [M, F].

        A row that was not changed gets the bits that `forward_silu_mul` would give.
        """
        ...

    def grad_input(self, dy: Tensor) -> Tensor:
        """Map the gradient dy [..., N] of `y` to that of `x`: dx = dy W, [..., K]."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Gather rows W[ids]: ids [...] integer to [..., K]; how a tied embedding is looked up."""
        ...

    def dense(self) -> Tensor:
        """The weight as a plain [N, K] tensor; a copy where it is stored in another form."""
        ...


def check_linear_shapes(weight: Tensor, bias: Tensor | None) -> None:
    """Raise `ConfigError` unless weight is [N, K] and bias, if any, is [N] of the same dtype."""
    if weight.dim() != 2:
        raise ConfigError(f"a linear weight must be [N, K]; got shape {tuple(weight.shape)}")
    if bias is None:
        return
    if bias.shape != (weight.shape[0],) or bias.dtype != weight.dtype:
        raise ConfigError(
            f"bias must be [{weight.shape[0]}] of {weight.dtype} for a weight of shape "
            f"{tuple(weight.shape)}; got {tuple(bias.shape)} of {bias.dtype}"
        )


def tensor_bytes(tensor: Tensor | None) -> int:
    """Bytes of the elements of a tensor; 0 for None."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


class DenseLinear:
    """The plain torch form of `LinearWeight`: any device, any floating dtype; the reference."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        check_linear_shapes(weight, bias)
        self._weight = weight
        self._bias = bias

    @property
    def in_features(self) -> int:
        return self._weight.shape[1]

    @property
    def out_features(self) -> int:
        return self._weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self._weight) + tensor_bytes(self._bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def forward_add(self, x: Tensor, addend: Tensor) -> Tensor:
        return self.forward(x) + addend

    def forward_silu_mul(self, x: Tensor) -> Tensor:
        return DenseLinear.silu_mul(self, self.forward(x))

    def silu_mul(self, outputs: Tensor) -> Tensor:
        gate, up = outputs.chunk(2, dim=-1)
        return F.silu(gate) * up

    def grad_input(self, dy: Tensor) -> Tensor:
        return dy @ self._weight

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._weight)

    def dense(self) -> Tensor:
        return self._weight


class CpuLinear(DenseLinear):
    """`DenseLinear` whose products take the native CPU kernels where these are the faster path.

    The storage is the same [N, K] tensor: no packed copy. On the native path a row's result does
    not depend, in any bit, on the other rows.
    """

    __slots__ = ()

    def forward(self, x: Tensor) -> Tensor:
        return cpu_linear.linear(x, self._weight, self._bias)

    def forward_add(self, x: Tensor, addend: Tensor) -> Tensor:
        """`forward(x) + addend`, in one pass where no bias is in the way."""
        if self._bias is not None:
            return self.forward(x) + addend
        return cpu_linear.linear_add(x, self._weight, addend)

    def forward_silu_mul(self, x: Tensor) -> Tensor:
        """For stacked gate and up weights [2F, K]: silu(gate(x)) · up(x), [..., F]."""
        if self._bias is not None:
            return super().forward_silu_mul(x)
        return cpu_linear.linear_silu_mul(x, self._weight)

    def silu_mul(self, outputs: Tensor) -> Tensor:
        if self._bias is not None:
            return super().silu_mul(outputs)
        return cpu_linear.silu_mul(outputs, self._weight)

    def grad_input(self, dy: Tensor) -> Tensor:
        """Map dy [..., N] to dx = dy W, [..., K], summed in float32."""
        return cpu_linear.grad_input(dy, self._weight)


def make_linear(weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> LinearWeight:
    """Build the fastest `LinearWeight` for this weight's device and dtype.

    The weight is adopted: it may be kept as it is or repacked, so the caller should drop its own
    reference. `pack=False` always gives `DenseLinear`.
    """
    is_native = weight.device.type == "cpu" and cpu_linear.storage_of(weight.dtype) is not None
    if pack and is_native and weight.is_contiguous():
        return CpuLinear(weight, bias)
    return DenseLinear(weight, bias)
