"""What an engine is built from, and what it says of itself once it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from weft.base.errors import ConfigError
from weft.engine.config import check_whole
from weft.engine.finetune_limits import FinetuneConfig

RUNTIME_BUILDER = "weft.serve.model_builder:build"
"""Builds the executor that runs a model directory on this machine's devices."""

_LOWEST = {
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "kv_cache_memory_bytes": 1,
    "num_threads": 1,
    "memory_budget_bytes": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one engine; None and "auto" are resolved once, when it is built.

    Raises:
        ConfigError: a setting is of the wrong type, or below its least useful value.
    """

    model: str
    """A model directory, or a hub id where a hub is reachable."""
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    seed: int = 0
    num_threads: int | None = None
    enable_prefix_caching: bool = True
    trace_path: str | None = None
    """Where the Perfetto trace of every iteration is written when the engine closes."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """How finetuning shares the iterations."""
    memory_budget_bytes: int | None = None
    """Of everything but the weights: the KV cache is a reserve in it, adapters and jobs get the
    rest."""
    record_windows: str | None = None
    """Directory for the window log of every finetuning job."""
    replay_windows: str | None = None
    """A window log: the engine's one job goes through the windows that it names."""
    step_times: str = "off"
    """Where predictions of iterations start: "auto" measures the executor once and keeps what it
    found, "off" learns while it serves, a path is a file of `weft profile`."""
    builder: str = RUNTIME_BUILDER
    """`module:function` from an `EngineConfig` to a `BuiltExecutor`, imported in the engine."""

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "device", "step_times", "builder"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{name} is {value!r}; it must be a non-empty string")
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, lowest)
        check_whole("seed", self.seed)
        if self.record_windows is not None and self.replay_windows is not None:
            raise ConfigError("record_windows and replay_windows are both given; give one")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """A ready engine's resolved settings."""

    model_path: str
    """The model's directory on this machine, tokenizer included."""
    sampling_defaults: dict[str, int | float]
    """`SamplingParams` fields that the model's authors advise."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    """Width of the logits; token ids in prompts must be below it."""
    dtype: str
    device: str
    num_pages: int
    page_bytes: int
    slo_tpot_s: float = 0.05
    """Time per output token that requests are promised."""
    slo_ttft_s: float = 1.0
    """Time to first token that they are promised."""
    slo_ttft_by_prompt: tuple[tuple[int, float], ...] = ()
    """(tokens, seconds): prompts of some lengths that are promised more, in between along lines."""

    def slo_ttft_of(self, num_prompt_tokens: int) -> float:
        """Time to first token that a prompt of so many tokens is promised."""
        points = self.slo_ttft_by_prompt
        if not points:
            return self.slo_ttft_s
        for (low, low_s), (high, high_s) in pairwise(points):
            if num_prompt_tokens <= high:
                share = (num_prompt_tokens - low) / (high - low)
                return max(self.slo_ttft_s, low_s + share * (high_s - low_s))
        return max(self.slo_ttft_s, points[-1][1])

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the whole arena."""
        return self.num_pages * self.page_bytes
