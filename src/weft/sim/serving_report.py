"""What a replay of a workload measured: per request, per iteration, and in summary.

Real and simulated replays fill the same report by the same definitions: TTFT is from arrival to the
first token, TPOT is (t_last - t_first) / (num_generated - 1), inter-token latency is each gap.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weft.base.trace import TraceWriter
from weft.cost.step_time import IterationShape
from weft.engine.coserve import FinetuneStats
from weft.engine.finetune import FinetuneEvent, StepMetrics

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Percentiles:
    """Median and tails of a sample; None where there is none."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Float64) -> Percentiles:
        """Linear interpolation between order statistics; NaNs are left out."""
        finite = values[~np.isnan(values)]
        if not len(finite):
            return cls(p50=None, p90=None, p99=None)
        p50, p90, p99 = np.quantile(finite, (0.5, 0.9, 0.99)).tolist()
        return cls(p50=p50, p90=p90, p99=p99)

    def to_dict(self) -> dict[str, float | None]:
        """Key to value, for JSON."""
        return {"p50": self.p50, "p90": self.p90, "p99": self.p99}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestColumns:
    """One entry a request, in order of arrival; times in seconds since the replay began, or NaN."""

    arrival_s: Float64
    first_scheduled_s: Float64
    first_token_s: Float64
    last_token_s: Float64
    num_prompt_tokens: Int64
    num_cached_tokens: Int64
    num_generated_tokens: Int64
    is_rejected: npt.NDArray[np.bool_]
    """Refused at the door: it does not fit the model's context, or the queue was full."""

    @property
    def ttft_s(self) -> Float64:
        """Seconds from arrival to the first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Float64:
        """Mean seconds per token after the first; NaN for requests of one token."""
        gaps = np.where(self.num_generated_tokens > 1, self.num_generated_tokens - 1, 1)
        tpot_s = (self.last_token_s - self.first_token_s) / gaps
        return np.where(self.num_generated_tokens > 1, tpot_s, np.nan)

    def to_csv(self) -> str:
        """A header and one line a request, TTFT and TPOT included; empty where unknown."""
        names = (
            "arrival_s",
            "first_scheduled_s",
            "first_token_s",
            "last_token_s",
            "ttft_s",
            "tpot_s",
            "num_prompt_tokens",
            "num_cached_tokens",
            "num_generated_tokens",
            "is_rejected",
        )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        columns = [getattr(self, name).tolist() for name in names]
        for row in zip(*columns, strict=True):
            writer.writerow(["" if value != value else value for value in row])
        return text.getvalue()


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationRecord:
    """One batch: when the device had it, what it carried, and the engine's state beside it."""

    start_s: float
    end_s: float
    shape: IterationShape
    kv_share: float
    """Share of the pages held when it was submitted."""
    num_running: int
    num_waiting: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServingReport:
    """The outcome of one replay; `summary` is what `weft simulate --serve --json` prints."""

    simulated: bool
    requests: RequestColumns
    iterations: tuple[IterationRecord, ...]
    inter_token_s: Float64
    num_finished: int
    num_preempted: int
    num_truncated: int
    """Requests that the model's context ended before their traced length."""
    num_skipped: int
    """Rows of the trace that were left out when it was read."""
    prefix_cache_hit_share: float
    """Share of admitted prompt tokens that the prefix cache held."""
    finetune_events: tuple[FinetuneEvent, ...] = ()
    """Of the jobs that ran beside, in order."""
    finetune_stats: FinetuneStats | None = None
    """What the policy counted at the end; None where it does not finetune."""

    @property
    def num_finetune_tokens(self) -> int:
        """Finetuning tokens that went forward."""
        return sum(iteration.shape.num_ft_tokens for iteration in self.iterations)

    @property
    def num_finetune_token_layers(self) -> int:
        """Finetuning tokens times layers that went backward."""
        return sum(iteration.shape.num_ft_token_layers for iteration in self.iterations)

    @property
    def finetune_tokens_per_s(self) -> float:
        """Finetuning tokens forward per second of the duration (FlexLLM's metric)."""
        return self.num_finetune_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last token; 0 where nothing finished."""
        last = self.requests.last_token_s
        if not len(last) or np.isnan(last).all():
            return 0.0
        return float(np.nanmax(last) - self.requests.arrival_s[0])

    @property
    def throughput_tokens_per_s(self) -> float:
        """Generated tokens per second of the duration."""
        duration_s = self.duration_s
        return int(self.requests.num_generated_tokens.sum()) / duration_s if duration_s else 0.0

    @property
    def kv_peak_share(self) -> float:
        """The largest share of the pages that running sequences held."""
        return max((iteration.kv_share for iteration in self.iterations), default=0.0)

    @property
    def busy_share(self) -> float:
        """Share of the duration in which the executor had a batch."""
        busy_s = sum(iteration.end_s - iteration.start_s for iteration in self.iterations)
        return busy_s / self.duration_s if self.duration_s else 0.0

    def attainment(self, *, ttft_s: float | Float64, tpot_s: float) -> float:
        """Share of all requests, rejected ones included, that kept both limits.

        `ttft_s` may be one limit a request.
        A request of one token has no TPOT and keeps that limit.
        """
        if not len(self.requests.arrival_s):
            return 1.0
        tpot = self.requests.tpot_s
        kept = (self.requests.ttft_s <= ttft_s) & (np.isnan(tpot) | (tpot <= tpot_s))
        return float(kept.mean())

    def summary(self) -> dict[str, Any]:
        """Plain numbers under fixed keys, for JSON."""
        return {
            "simulated": self.simulated,
            "ttft_s": Percentiles.of(self.requests.ttft_s).to_dict(),
            "tpot_s": Percentiles.of(self.requests.tpot_s).to_dict(),
            "itl_s": Percentiles.of(self.inter_token_s).to_dict(),
            "throughput_tokens_per_s": self.throughput_tokens_per_s,
            "kv_peak_share": self.kv_peak_share,
            "num_finished": self.num_finished,
            "num_preempted": self.num_preempted,
            "num_requests": len(self.requests.arrival_s),
            "num_rejected": int(self.requests.is_rejected.sum()),
            "num_truncated": self.num_truncated,
            "num_skipped": self.num_skipped,
            "num_prompt_tokens": int(self.requests.num_prompt_tokens.sum()),
            "num_generated_tokens": int(self.requests.num_generated_tokens.sum()),
            "num_iterations": len(self.iterations),
            "duration_s": self.duration_s,
            "busy_share": self.busy_share,
            "prefix_cache_hit_share": self.prefix_cache_hit_share,
        } | self._finetune_summary()

    def _finetune_summary(self) -> dict[str, Any]:
        if not any(iteration.shape.has_finetuning for iteration in self.iterations):
            return {}
        steps = [event for event in self.finetune_events if isinstance(event, StepMetrics)]
        return {
            "finetune_tokens_per_s": self.finetune_tokens_per_s,
            "num_finetune_tokens": self.num_finetune_tokens,
            "num_finetune_token_layers": self.num_finetune_token_layers,
            "num_finetune_steps": len(steps),
        }

    def trace(self) -> TraceWriter:
        """The replay for ui.perfetto.dev: iterations, gauges, and every request on a lane."""
        writer = TraceWriter()
        for number, iteration in enumerate(self.iterations):
            _trace_iteration(writer, number, iteration)
        _trace_requests(writer, self.requests)
        return writer


def _trace_iteration(writer: TraceWriter, number: int, iteration: IterationRecord) -> None:
    shape = iteration.shape
    writer.slice(
        "engine",
        "iterations",
        _carried(shape),
        start_s=iteration.start_s,
        duration_s=iteration.end_s - iteration.start_s,
        category="iteration",
        args={
            "batch": number,
            "decode_rows": shape.num_decode_rows,
            "prefill_rows": shape.num_prefill_rows,
            "prefill_tokens": shape.num_prefill_tokens,
            "sampled_rows": shape.num_sampled_rows,
            "finetune_tokens": shape.num_ft_tokens,
            "finetune_token_layers": shape.num_ft_token_layers,
            "optimizer_steps": shape.num_ft_steps,
        },
    )
    start_s = iteration.start_s
    writer.counter("engine", "KV pages held", time_s=start_s, values={"share": iteration.kv_share})
    writer.counter(
        "engine",
        "requests",
        time_s=start_s,
        values={
            "running": float(iteration.num_running),
            "waiting": float(iteration.num_waiting),
        },
    )


def _carried(shape: IterationShape) -> str:
    text = f"{shape.num_decode_rows} decode + {shape.num_prefill_tokens} prefill"
    if shape.num_ft_tokens:
        text += f" + {shape.num_ft_tokens} forward"
    if shape.num_ft_token_layers:
        text += f" + {shape.num_ft_token_layers} backward"
    return text


def _trace_requests(writer: TraceWriter, requests: RequestColumns) -> None:
    """Each request takes the lowest lane that is free from its arrival on."""
    lane_free_s: list[float] = []
    spans = zip(
        requests.arrival_s.tolist(),
        requests.first_scheduled_s.tolist(),
        requests.first_token_s.tolist(),
        requests.last_token_s.tolist(),
        strict=True,
    )
    for number, (arrival_s, scheduled_s, first_s, last_s) in enumerate(spans):
        if last_s != last_s:
            continue  # Rejected: it never ran.
        lane = next((i for i, free_s in enumerate(lane_free_s) if free_s <= arrival_s), None)
        if lane is None:
            lane = len(lane_free_s)
            lane_free_s.append(0.0)
        lane_free_s[lane] = last_s
        for name, start_s, end_s in (
            ("queued", arrival_s, scheduled_s),
            ("prefill", scheduled_s, first_s),
            ("decode", first_s, last_s),
        ):
            writer.slice(
                "requests",
                f"lane {lane:03d}",
                f"{name} {number}",
                start_s=start_s,
                duration_s=end_s - start_s,
                category=name,
            )
