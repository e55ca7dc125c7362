"""How long one iteration of a serving engine takes: what it carries, and a roofline that prices it.

The fitted twin, which prices by measured points, is in `fitted_step_time`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol

from weft.base.errors import ConfigError, OutOfMemoryError
from weft.cluster.device import DeviceType, Link
from weft.cost.shapes import ModelShape, dtype_bytes

_LINEARS_PER_LAYER = 4
"""qkv, o, gate-up, down: the kernels that share a layer's arithmetic."""
_BACKWARD_FLOPS_PER_PAIR = 10
"""Scores again, then the gradients of values, probabilities, queries and keys: 2 FLOP each."""
_BACKWARD_LAUNCHES_PER_LAYER = 24
_LAUNCHES_PER_LAYER = 8
"""Those, two norms with their residuals, rotary embedding with the cache write, attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationShape:
    """What an iteration carries, in the numbers that decide how long it takes.

    Context is counted in tokens seen, the token itself included, averaged over the layers: a layer
    with a window sees no further back than its window.
    """

    num_decode_rows: int = 0
    num_prefill_rows: int = 0
    num_prefill_tokens: int = 0
    num_sampled_rows: int = 0
    """Rows that pass the output projection and the sampler."""
    decode_context_tokens: float = 0.0
    """Sum over decode rows of the context: keys and values read."""
    prefill_context_tokens: float = 0.0
    """Sum over prefill rows of the context of their last token: keys and values read."""
    prefill_pairs: float = 0.0
    """Sum over prefill tokens of the context: query-key pairs, the arithmetic of attention."""
    num_ft_rows: int = 0
    """Finetuning rows that go forward."""
    num_ft_tokens: int = 0
    """Finetuning tokens that go forward, in the same linears as all others."""
    ft_context_tokens: float = 0.0
    """As `prefill_context_tokens`, for them."""
    ft_pairs: float = 0.0
    """As `prefill_pairs`, for them."""
    num_ft_loss_tokens: int = 0
    """Those whose loss and its gradient are computed: output projection, there and back."""
    num_ft_layer_rows: int = 0
    """Layers that backward rows pass, one count a row and layer: weights read again."""
    num_ft_token_layers: int = 0
    """Tokens times layers of backward rows."""
    ft_pair_layers: float = 0.0
    """Query-key pairs of backward rows, summed over their layers."""
    num_ft_steps: int = 0
    """Optimizer steps."""

    @property
    def num_tokens(self) -> int:
        """Tokens that pass the layers' linears forward."""
        return self.num_decode_rows + self.num_prefill_tokens + self.num_ft_tokens

    @property
    def has_finetuning(self) -> bool:
        """Whether anything of a job is in it."""
        return bool(self.num_ft_tokens or self.num_ft_layer_rows or self.num_ft_steps)

    @property
    def is_empty(self) -> bool:
        """Whether it carries nothing."""
        return not (self.num_tokens or self.num_ft_layer_rows or self.num_ft_steps)

    def without_finetuning(self) -> IterationShape:
        """What is left of it for inference."""
        return replace(self, **_NO_FINETUNING)


_NO_FINETUNING = {
    field.name: field.default
    for field in fields(IterationShape)
    if field.name.removeprefix("num_").startswith("ft_")
}


class StepTimeModel(Protocol):
    """Prices an iteration; deterministic and free of side effects."""

    def device_s(self, shape: IterationShape) -> float:
        """Seconds that the executor is busy with the iteration."""
        ...

    def host_s(self, shape: IterationShape) -> float:
        """Seconds that the policy and its loop spend on the iteration outside the executor."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineStepTime:
    """Prices an iteration by a model's shape and a device's peaks.

    Linears, output projection, attention of decodes and attention of prefills are four roofs, each
    the larger of its arithmetic and its memory time; they follow each other. Launches hide behind
    them where they are shorter, and vanish for iterations of decodes alone, which are replayed as
    one graph. With `num_devices` > 1 the arithmetic and the bytes are divided and every layer adds
    two ring all-reduces over `link` (Megatron-LM, arXiv 1909.08053 §3).

    Raises:
        ConfigError: the device type gives no peak for `dtype`, or several devices have no link.
    """

    shape: ModelShape
    device_type: DeviceType
    dtype: str = "bfloat16"
    num_devices: int = 1
    link: Link | None = None
    host_overhead_s: float = 0.0
    """Policy and loop, per iteration."""

    def __post_init__(self) -> None:
        self.device_type.peak(self.dtype)
        dtype_bytes(self.dtype)
        if self.num_devices < 1:
            raise ConfigError(f"num_devices is {self.num_devices}; it must be at least 1")
        if self.num_devices > 1 and self.link is None:
            raise ConfigError(
                f"num_devices is {self.num_devices} and no link is given; name the link over "
                "which the devices reduce"
            )
        if not self.host_overhead_s >= 0:
            raise ConfigError(f"host_overhead_s is {self.host_overhead_s}; it must be >= 0")

    def device_s(self, shape: IterationShape) -> float:
        """Seconds of the iteration; 0 for an empty one.

        Backward is priced as one pass of the frozen linears for the gradient of their inputs, and
        attention as its scores again and four products; adapters, the optimizer and what the chosen
        rematerialization recomputes beyond cheap operators are left out.
        """
        if shape.is_empty:
            return 0.0
        model, element = self.shape, dtype_bytes(self.dtype)
        linear, head = model.num_linear_params, model.num_head_params
        kv_bytes = model.kv_bytes_per_token(self.dtype)
        pair_flops = 4 * model.num_layers * model.num_heads * model.head_dim
        work_s = 0.0
        if shape.num_tokens:
            kernels = model.num_layers * _LINEARS_PER_LAYER
            work_s += self._roof(2 * linear * shape.num_tokens, linear * element, kernels)
        if shape.num_sampled_rows:
            work_s += self._roof(2 * head * shape.num_sampled_rows, head * element, 1)
        for pairs, context in (
            (shape.decode_context_tokens, shape.decode_context_tokens),
            (shape.prefill_pairs, shape.prefill_context_tokens),
            (shape.ft_pairs, shape.ft_context_tokens),
        ):
            work_s += self._roof(pair_flops * pairs, kv_bytes * context, model.num_layers)
        if shape.num_ft_loss_tokens:
            # Logits, then the gradient of the hidden states.
            work_s += 2 * self._roof(2 * head * shape.num_ft_loss_tokens, head * element, 1)
        if shape.num_ft_layer_rows:
            work_s += self._backward_s(shape)
        if shape.num_prefill_tokens or shape.num_ft_tokens:
            launches = model.num_layers * _LAUNCHES_PER_LAYER
            work_s = max(work_s, launches * self.device_type.launch_s)
        return work_s + self._all_reduces_s(shape.num_tokens)

    def _backward_s(self, shape: IterationShape) -> float:
        model, element = self.shape, dtype_bytes(self.dtype)
        layer_params = model.num_linear_params / model.num_layers
        num_layers = shape.num_ft_layer_rows
        linears_s = self._roof(
            2 * layer_params * shape.num_ft_token_layers,
            layer_params * element * num_layers,
            num_layers * _LINEARS_PER_LAYER,
        )
        kv_bytes = model.kv_bytes_per_token(self.dtype) / model.num_layers
        attention_s = self._roof(
            _BACKWARD_FLOPS_PER_PAIR * model.num_heads * model.head_dim * shape.ft_pair_layers,
            kv_bytes * shape.num_ft_token_layers,
            num_layers,
        )
        launches_s = num_layers * _BACKWARD_LAUNCHES_PER_LAYER * self.device_type.launch_s
        return max(linears_s + attention_s, launches_s)

    def host_s(self, shape: IterationShape) -> float:
        """The constant given."""
        return self.host_overhead_s

    def _roof(self, flops: float, num_bytes: float, num_kernels: int) -> float:
        if flops <= 0:
            return 0.0
        device, efficiency = self.device_type, self.device_type.efficiency
        flops, num_bytes = flops / self.num_devices, num_bytes / self.num_devices
        fraction = efficiency.fraction(flops / num_kernels)
        bandwidth = device.memory_bandwidth_bytes_per_s * efficiency.bandwidth_fraction
        return max(flops / (device.peak(self.dtype) * fraction), num_bytes / bandwidth)

    def _all_reduces_s(self, num_tokens: int) -> float:
        if self.link is None or self.num_devices == 1:
            return 0.0
        n = self.num_devices
        num_bytes = num_tokens * self.shape.hidden_size * dtype_bytes(self.dtype)
        return 2 * self.shape.num_layers * 2 * (n - 1) * self.link.transfer_s(num_bytes / n)


def kv_capacity_bytes(
    shape: ModelShape,
    device_type: DeviceType,
    *,
    dtype: str,
    num_devices: int = 1,
    memory_fraction: float = 0.9,
) -> int:
    """Bytes left for keys and values on `num_devices` devices that share the model's weights.

    Raises:
        OutOfMemoryError: the weights alone do not fit; the message says how many devices would do.
    """
    if not 0 < memory_fraction <= 1:
        raise ConfigError(f"memory_fraction is {memory_fraction}; it must be in (0, 1]")
    usable = device_type.memory_bytes * memory_fraction
    weights = shape.weight_bytes(dtype)
    left = int(usable * num_devices) - weights
    if left <= 0:
        raise OutOfMemoryError(
            f"the {dtype} weights of {shape.name} take {weights / 2**30:.1f} GiB and "
            f"{num_devices} x {device_type.name} offer {usable * num_devices / 2**30:.1f} GiB; "
            f"{int(weights // usable) + 1} devices would hold them"
        )
    return left
