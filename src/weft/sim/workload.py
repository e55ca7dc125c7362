"""What arrives at a serving engine and when: request lengths over time, as columns.

A workload is data, so the same one drives the simulator and a replay on the real engine. The
readers of trace files are in `trace_readers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from weft.base.errors import ConfigError
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_UNIQUE_STREAM = 1
_BLOCK_STREAM = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRange:
    """Fewest and most tokens, both allowed."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(
                f"length range is {self.low}..{self.high}; it must start at 1 or more and not "
                "end before it starts"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """Requests in order of arrival: when each comes, how much it brings and how much it wants.

    All columns have one entry a request. Prompts with equal block ids begin with equal tokens, so
    that a prefix cache finds what it would have found in the traced system.

    Raises:
        ConfigError: columns of unequal length, arrivals out of order, or lengths below 1.
    """

    name: str
    arrival_s: Float64
    """Seconds since the workload began; never decreases."""
    num_prompt_tokens: Int64
    num_output_tokens: Int64
    block_ids: tuple[tuple[int, ...], ...] | None = None
    """For each request, the ids of the blocks that its prompt is made of; None where unknown."""
    block_tokens: int = 512
    num_skipped: int = 0
    """Rows of the source that asked for no token and were left out (failed requests)."""
    seed: int = 0
    """Of the token ids."""

    def __post_init__(self) -> None:
        size = len(self.arrival_s)
        if len(self.num_prompt_tokens) != size or len(self.num_output_tokens) != size:
            raise ConfigError(
                f"workload {self.name!r} has columns of {size}, {len(self.num_prompt_tokens)} and "
                f"{len(self.num_output_tokens)} requests; they must be equally long"
            )
        if self.block_ids is not None and len(self.block_ids) != size:
            raise ConfigError(
                f"workload {self.name!r} has {len(self.block_ids)} rows of block ids for {size} "
                "requests"
            )
        if self.block_tokens < 1:
            raise ConfigError(f"block_tokens is {self.block_tokens}; it must be at least 1")
        if size and (np.diff(self.arrival_s) < 0).any():
            raise ConfigError(f"workload {self.name!r}: arrivals must not decrease")
        for name in ("num_prompt_tokens", "num_output_tokens"):
            column: Int64 = getattr(self, name)
            if size and column.min() < 1:
                raise ConfigError(
                    f"workload {self.name!r}: {name} of request {int(column.argmin())} is "
                    f"{column.min()}; it must be at least 1"
                )

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_per_s(self) -> float:
        """Mean requests per second between the first and the last arrival; 0 below two requests."""
        if len(self) < 2:
            return 0.0
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else float("inf")

    def first(self, num_requests: int) -> Workload:
        """The first `num_requests` requests, or all where there are fewer."""
        if num_requests < 1:
            raise ConfigError(f"num_requests is {num_requests}; it must be at least 1")
        return replace(
            self,
            arrival_s=self.arrival_s[:num_requests],
            num_prompt_tokens=self.num_prompt_tokens[:num_requests],
            num_output_tokens=self.num_output_tokens[:num_requests],
            block_ids=self.block_ids[:num_requests] if self.block_ids is not None else None,
        )

    def with_rate_scaled(self, factor: float) -> Workload:
        """The same requests `factor` times as often; they begin at 0."""
        if not (factor > 0 and np.isfinite(factor)):
            raise ConfigError(f"rate scale is {factor}; it must be greater than 0")
        if not len(self):
            return self
        return replace(self, arrival_s=(self.arrival_s - self.arrival_s[0]) / factor)

    def with_rate(self, rate_per_s: float) -> Workload:
        """The same requests at `rate_per_s` on average, their bursts kept."""
        if not (rate_per_s > 0 and np.isfinite(rate_per_s)):
            raise ConfigError(f"rate is {rate_per_s} requests/s; it must be greater than 0")
        current = self.rate_per_s
        if current == 0 or not np.isfinite(current):
            raise ConfigError(
                f"workload {self.name!r} has no mean rate to scale (requests: {len(self)}, all at "
                "one instant); draw arrivals with `with_arrivals` first"
            )
        return self.with_rate_scaled(rate_per_s / current)

    def with_arrivals(
        self, rate_per_s: float, *, burstiness: float = 1.0, seed: int = 0
    ) -> Workload:
        """The same requests at drawn instants: gaps are gamma with this mean rate.

        `burstiness` is the gamma shape: 1 is a Poisson process, less is burstier (the variance of
        a gap is 1 / burstiness times that of Poisson's), more is steadier.
        """
        arrival_s = draw_arrivals(len(self), rate_per_s, burstiness=burstiness, seed=seed)
        return replace(self, arrival_s=arrival_s)

    def with_lengths_scaled(
        self,
        *,
        prompt_factor: float = 1.0,
        output_factor: float = 1.0,
        prompt_range: LengthRange | None = None,
        output_range: LengthRange | None = None,
    ) -> Workload:
        """Lengths times a factor, rounded, then clipped; blocks scale with the prompts."""
        for name, factor in (("prompt", prompt_factor), ("output", output_factor)):
            if not (factor > 0 and np.isfinite(factor)):
                raise ConfigError(f"{name} length factor is {factor}; it must be greater than 0")
        return replace(
            self,
            num_prompt_tokens=_scaled(self.num_prompt_tokens, prompt_factor, prompt_range),
            num_output_tokens=_scaled(self.num_output_tokens, output_factor, output_range),
            block_tokens=max(1, round(self.block_tokens * prompt_factor)),
        )

    def with_mean_prompt(
        self,
        num_tokens: float,
        *,
        prompt_range: LengthRange | None = None,
        output_range: LengthRange | None = None,
    ) -> Workload:
        """Both lengths times `num_tokens` / mean prompt, then clipped, for a small model."""
        factor = num_tokens / float(self.num_prompt_tokens.mean())
        return self.with_lengths_scaled(
            prompt_factor=factor,
            output_factor=factor,
            prompt_range=prompt_range,
            output_range=output_range,
        )

    def prompt_token_ids(self, index: int, vocab_size: int) -> tuple[int, ...]:
        """Token ids of one prompt: a pure function of (seed, index) or of its block ids.

        Blocks cover the prompt from its start; what they leave is the request's own.
        """
        length = int(self.num_prompt_tokens[index])
        parts: list[int] = []
        if self.block_ids is not None:
            for block in self.block_ids[index]:
                if len(parts) >= length:
                    break
                parts += _draw(self.seed, _BLOCK_STREAM, block, self.block_tokens, vocab_size)
        if len(parts) < length:
            parts += _draw(self.seed, _UNIQUE_STREAM, index, length - len(parts), vocab_size)
        return tuple(parts[:length])

    def request(
        self, index: int, vocab_size: int, sampling: SamplingParams | None = None
    ) -> Request:
        """The engine's request for one row; it produces exactly the traced number of tokens.

        `sampling` gives all but the length: its `max_tokens` is replaced and EOS is ignored.
        """
        sampling = replace(
            sampling or SamplingParams(temperature=0.0),
            max_tokens=int(self.num_output_tokens[index]),
            ignore_eos=True,
        )
        return Request(
            id=str(index),
            prompt_token_ids=self.prompt_token_ids(index, vocab_size),
            sampling=sampling,
            arrival_s=float(self.arrival_s[index]),
        )


def draw_arrivals(
    num_requests: int, rate_per_s: float, *, burstiness: float = 1.0, seed: int = 0
) -> Float64:
    """Instants of `num_requests` arrivals with gamma gaps; the first is at 0.

    Raises:
        ConfigError: a rate or burstiness that is not greater than 0.
    """
    for name, value in (("rate_per_s", rate_per_s), ("burstiness", burstiness)):
        if not (value > 0 and np.isfinite(value)):
            raise ConfigError(f"{name} is {value}; it must be greater than 0")
    gaps = np.random.default_rng(seed).gamma(
        burstiness, 1.0 / (rate_per_s * burstiness), max(num_requests - 1, 0)
    )
    return np.concatenate([np.zeros(min(num_requests, 1)), np.cumsum(gaps)])


def synthetic(
    num_requests: int,
    rate_per_s: float,
    *,
    num_prompt_tokens: int = 256,
    num_output_tokens: int = 128,
    burstiness: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Requests of one length at drawn instants."""
    return Workload(
        name=f"synthetic {rate_per_s:g}/s",
        arrival_s=draw_arrivals(num_requests, rate_per_s, burstiness=burstiness, seed=seed),
        num_prompt_tokens=np.full(num_requests, num_prompt_tokens, np.int64),
        num_output_tokens=np.full(num_requests, num_output_tokens, np.int64),
        seed=seed,
    )


def _scaled(lengths: Int64, factor: float, limits: LengthRange | None) -> Int64:
    scaled = np.maximum(np.rint(lengths * factor), 1).astype(np.int64)
    return np.clip(scaled, limits.low, limits.high) if limits is not None else scaled


def _draw(seed: int, stream: int, index: int, length: int, vocab_size: int) -> list[int]:
    generator = np.random.Generator(np.random.PCG64([seed, stream, index]))
    return generator.integers(0, vocab_size, length, dtype=np.int64).tolist()
