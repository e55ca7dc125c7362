"""Settings of finetuning beside inference: which policy, what latency, how much memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from weft.base.errors import ConfigError
from weft.engine.config import check_whole
from weft.engine.finetune import FinetuneJobSpec


class FinetunePolicy(StrEnum):
    """Who gets what of an iteration."""

    COSERVE = "coserve"
    """Inference first; finetuning in what the latency objectives leave."""
    BUDGET = "budget"
    """A fixed number of tokens an iteration, and of backward layers (FlexLLM as shipped)."""
    TEMPORAL = "temporal"
    """Some inference iterations, then a whole sample, forward and backward, alone."""
    INFERENCE_ONLY = "inference-only"
    """Jobs wait."""
    FINETUNE_ONLY = "finetune-only"
    """Requests wait while a job can advance; windows are fixed, so that runs repeat bit for bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySlo:
    """What a request is promised."""

    tpot_s: float = 0.05
    """(t_last - t_first) / (tokens - 1)."""
    ttft_s: float = 1.0
    """From arrival to the first token."""
    ttft_prefills: float = 10.0
    """A long prompt is promised no less than this times its own unloaded prefill."""

    def __post_init__(self) -> None:
        for name in ("tpot_s", "ttft_s"):
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be a positive number of seconds")
        if not self.ttft_prefills >= 0:
            raise ConfigError(f"ttft_prefills is {self.ttft_prefills}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How a policy treats jobs.

    Raises:
        ConfigError: a number is out of its range.
    """

    policy: FinetunePolicy = FinetunePolicy.COSERVE
    slo: LatencySlo | None = None
    """None takes the objectives that follow from the executor's step times, where they are known,
    and else the defaults."""
    slo_tpot_s: float | None = None
    """Asked for by name: replaces that of `slo`, or the one that follows from step times."""
    slo_ttft_s: float | None = None
    """Likewise, and for prompts of any length."""
    max_iteration_s: float = 0.1
    """Of an iteration with finetuning: what an arrival waits for it at most, as predicted."""
    min_share: float = 0.0
    """Share of the executor's time that jobs get even where the objectives leave none."""
    paces_prompts: bool = True
    """Split prompts so that they do not hold up running requests beyond their objective; not for
    `budget`, which has its own bound."""
    granule_tokens: int = 16
    """Windows are multiples of this, but for the last of a sample."""
    max_window_tokens: int = 2048
    """Most tokens of one row, forward or backward."""
    max_samples: int | None = None
    """Samples in flight at once; None means as many as executor and memory hold."""
    budget_tokens: int = 256
    """`budget`: tokens of an iteration, inference included."""
    budget_layers: int = 1
    """`budget`: layers that the backward of a whole sample passes in an iteration."""
    temporal_iterations: int | None = 64
    """`temporal`: inference iterations between samples; None adapts them to the load."""
    forward_window: int = 512
    """`finetune-only`: tokens of a forward window."""
    backward_window: int = 512
    """`finetune-only`: tokens of a backward window, which passes all layers at once."""

    def __post_init__(self) -> None:
        for name in (
            "granule_tokens",
            "max_window_tokens",
            "budget_tokens",
            "budget_layers",
            "forward_window",
            "backward_window",
        ):
            check_whole(name, getattr(self, name), 1)
        for name in ("slo_tpot_s", "slo_ttft_s"):
            value: float | None = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be a positive number of seconds")
        for name in ("max_samples", "temporal_iterations"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if not (math.isfinite(self.max_iteration_s) and self.max_iteration_s > 0):
            raise ConfigError(
                f"max_iteration_s is {self.max_iteration_s}; it must be a positive number"
            )
        if not 0 <= self.min_share < 1:
            raise ConfigError(f"min_share is {self.min_share}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneMemory:
    """Bytes that jobs may take beside weights and pages, and what each would take."""

    budget_bytes: int
    """Of jobs and served adapters together."""
    job_bytes: Callable[[FinetuneJobSpec], int]
    """Of a job: weights, gradients, optimizer state."""
    sample_bytes: Callable[[FinetuneJobSpec, int], int]
    """Of one sample of so many tokens while it is between forward and backward."""
    adapter_bytes: Callable[[], int] = lambda: 0
    """What served adapters hold of the budget at this instant; inference needs them."""

    @property
    def left_bytes(self) -> int:
        """What jobs may take at this instant."""
        return self.budget_bytes - self.adapter_bytes()
