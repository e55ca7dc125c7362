"""What training keeps in memory for each parameter, and what it computes twice."""

from __future__ import annotations

from dataclasses import dataclass

from weft.base.errors import ConfigError
from weft.graph.graph import DTYPE_BYTES, Graph, Parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpec:
    """How a model is trained, as far as memory and time depend on it.

    `state_bytes_per_param` counts everything kept per trainable parameter: the weight, its
    gradient, and the optimizer's state. A frozen parameter costs its weight in `dtype` alone.
    `recompute` asks that stages keep only their inputs and run forward again before backward.
    """

    name: str = ""
    dtype: str = "float32"
    state_bytes_per_param: float = 8.0
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"training dtype {self.dtype!r} is unknown; known: {[*DTYPE_BYTES]}")
        if not self.state_bytes_per_param >= self.weight_bytes_per_param:
            raise ConfigError(
                f"state_bytes_per_param is {self.state_bytes_per_param}; it includes the weight, "
                f"so it must be at least {self.weight_bytes_per_param} for {self.dtype}"
            )

    @property
    def weight_bytes_per_param(self) -> int:
        """Bytes of one weight in the training dtype."""
        return DTYPE_BYTES[self.dtype]

    def state_bytes(self, parameter: Parameter) -> int:
        """Bytes that `parameter` occupies on each device that holds it."""
        per = self.state_bytes_per_param if parameter.trainable else self.weight_bytes_per_param
        return round(parameter.num_elements * per)

    def gradient_bytes(self, parameter: Parameter) -> int:
        """Bytes that a data-parallel group reduces for `parameter` once per step."""
        return parameter.num_elements * self.weight_bytes_per_param if parameter.trainable else 0

    def total_state_bytes(self, graph: Graph) -> int:
        """Bytes of the whole model's state, shared parameters once."""
        return sum(self.state_bytes(parameter) for parameter in graph.parameters)


SGD_FP32 = TrainingSpec(name="sgd-fp32", dtype="float32", state_bytes_per_param=8.0)
"""The paper's setting: fp32 weight and gradient, plain SGD (GraphPipe sheet §2.5)."""

ADAM_FP32 = TrainingSpec(name="adam-fp32", dtype="float32", state_bytes_per_param=16.0)
"""fp32 weight, gradient, and Adam's two moments."""

ADAM_BF16 = TrainingSpec(name="adam-bf16", dtype="bfloat16", state_bytes_per_param=16.0)
"""bf16 weight and gradient (2 + 2), fp32 master weight and two moments (4 + 4 + 4)."""

TRAINING_SPECS: dict[str, TrainingSpec] = {
    spec.name: spec for spec in (SGD_FP32, ADAM_FP32, ADAM_BF16)
}
"""The presets by name, as the command line takes them."""
