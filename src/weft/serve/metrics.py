"""Prometheus metrics with vLLM's names (its prefix exchanged), meanings and buckets."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weft.engine.request import EngineStats, SequenceUpdate
from weft.serve.engine_client import EngineClient, LiveRequest
from weft.serve.finetune_metrics import FinetuneCollector
from weft.serve.finetune_service import FinetuneService

_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""vLLM's, and three below 10 ms, where small models live."""
_LATENCY_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LABELS = ("model_name",)


def _token_buckets(max_model_len: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to the model's context."""
    values = (mantissa * 10**exponent for exponent in range(9) for mantissa in (1, 2, 5))
    return [value for value in values if value <= max_model_len]


class _Timing:
    """When things happened to one request."""

    __slots__ = (
        "arrival_s",
        "first_token_s",
        "last_token_s",
        "num_tokens",
        "scheduled_s",
        "ttft_slo_s",
    )

    def __init__(self, arrival_s: float, *, ttft_slo_s: float) -> None:
        self.arrival_s = arrival_s
        self.ttft_slo_s = ttft_slo_s
        self.scheduled_s = 0.0
        self.first_token_s = 0.0
        self.last_token_s: dict[int, float] = {}
        self.num_tokens: dict[int, int] = {}


class ServingMetrics:
    """Observes every request's life; gauges and counters of the engine are read when scraped."""

    def __init__(
        self,
        client: EngineClient,
        *,
        model_name: str,
        finetuning: FinetuneService | None = None,
    ) -> None:
        self._client = client
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(client, model_name))
        self._registry.register(FinetuneCollector(client, model_name, finetuning))
        self._timings: dict[str, _Timing] = {}
        tokens = _token_buckets(client.info.max_model_len)
        histogram = self._histogram
        self._ttft = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS_S
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds",
            "Time between two tokens of one choice.",
            _INTER_TOKEN_BUCKETS_S,
        )
        self._per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between tokens, one sample a choice.",
            _INTER_TOKEN_BUCKETS_S,
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_BUCKETS_S
        )
        self._queue = histogram(
            "request_queue_time_seconds", "Arrival to first iteration.", _LATENCY_BUCKETS_S
        )
        self._inference = histogram(
            "request_inference_time_seconds",
            "First iteration to last token.",
            _LATENCY_BUCKETS_S,
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "First iteration to first token.",
            _LATENCY_BUCKETS_S,
        )
        self._decode = histogram(
            "request_decode_time_seconds", "First token to last token.", _LATENCY_BUCKETS_S
        )
        self._prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", tokens
        )
        self._generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a choice.", tokens
        )
        self._success = Counter(
            "weft:request_success",
            "Choices that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._slo = Counter(
            "weft:slo_outcomes",
            "Choices that kept a latency objective, or did not.",
            (*_LABELS, "objective", "attained"),
            registry=self._registry,
        )
        self._rejections = Counter(
            "weft:admission_rejections",
            "Requests that a full queue turned away.",
            _LABELS,
            registry=self._registry,
        ).labels(model_name)

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self._registry)

    def rejected(self) -> None:
        """A request met a full queue."""
        self._rejections.inc()

    def started(self, live: LiveRequest) -> None:
        """A request goes to the engine."""
        num_prompt = len(live.request.prompt_token_ids)
        self._timings[live.request.id] = _Timing(
            live.request.arrival_s or time.monotonic(),
            ttft_slo_s=self._client.info.slo_ttft_of(num_prompt),
        )
        self._prompt_tokens.observe(num_prompt)

    def updated(self, live: LiveRequest, update: SequenceUpdate, now_s: float) -> None:
        """The engine sent news of a request."""
        timing = self._timings.get(update.request_id)
        if timing is None:
            return
        if update.first_scheduled_s and not timing.scheduled_s:
            timing.scheduled_s = update.first_scheduled_s
            self._queue.observe(max(0.0, timing.scheduled_s - timing.arrival_s))
        if update.new_token_ids:
            self._count_tokens(timing, update.choice, len(update.new_token_ids), now_s)
        if update.finish_reason is not None:
            self._choice_ended(timing, update.choice, update.finish_reason)

    def ended(self, live: LiveRequest, now_s: float) -> None:
        """Nothing more will come of a request."""
        timing = self._timings.pop(live.request.id, None)
        if timing is None:
            return
        for choice in live.unfinished:
            self._choice_ended(timing, choice, "abort")
        self._e2e.observe(now_s - timing.arrival_s)
        if timing.scheduled_s and timing.first_token_s:
            self._inference.observe(now_s - timing.scheduled_s)
            self._prefill.observe(max(0.0, timing.first_token_s - timing.scheduled_s))
            self._decode.observe(now_s - timing.first_token_s)

    def stopped(self, live: LiveRequest, choice: int) -> None:
        """A stop string ended a choice, which the engine does not report."""
        timing = self._timings.get(live.request.id)
        if timing is not None:
            self._choice_ended(timing, choice, "stop")

    def _count_tokens(self, timing: _Timing, choice: int, count: int, now_s: float) -> None:
        previous_s = timing.last_token_s.get(choice)
        if not timing.first_token_s:
            timing.first_token_s = now_s
            self._ttft.observe(now_s - timing.arrival_s)
            self._judge("ttft", now_s - timing.arrival_s, timing.ttft_slo_s)
        if previous_s is not None:
            self._inter_token.observe(now_s - previous_s)
        timing.last_token_s[choice] = now_s
        timing.num_tokens[choice] = timing.num_tokens.get(choice, 0) + count

    def _choice_ended(self, timing: _Timing, choice: int, reason: str) -> None:
        self._success.labels(self._model_name, str(reason)).inc()
        num_tokens = timing.num_tokens.get(choice, 0)
        self._generation_tokens.observe(num_tokens)
        if num_tokens > 1:
            span_s = timing.last_token_s[choice] - timing.first_token_s
            self._per_output_token.observe(max(0.0, span_s) / (num_tokens - 1))
            tpot_s = max(0.0, span_s) / (num_tokens - 1)
            self._judge("tpot", tpot_s, self._client.info.slo_tpot_s)

    def _judge(self, objective: str, value_s: float, promised_s: float) -> None:
        attained = "true" if value_s <= promised_s else "false"
        self._slo.labels(self._model_name, objective, attained).inc()

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(
            f"weft:{name}", text, _LABELS, buckets=tuple(buckets), registry=self._registry
        ).labels(self._model_name)


class _EngineCollector(Collector):
    """Reads the engine's latest snapshot; costs nothing between scrapes."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._labels = (model_name,)

    def collect(self) -> Iterable[Metric]:
        """One family a number."""
        stats = self._client.stats or _NO_STATS
        yield self._gauge("num_requests_running", "Choices in iterations.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Choices in the queue.", stats.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of KV pages that running choices hold; 1 is all.",
            stats.kv_cache_usage,
        )
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found.", stats.prefix_cache_hits),
            ("num_preemptions", "Choices that lost their pages.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens of admitted requests.", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.num_generated_tokens),
        ):
            family = CounterMetricFamily(f"weft:{name}", text, labels=_LABELS)
            family.add_metric(self._labels, value)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"weft:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family


_NO_STATS = EngineStats(
    num_running=0,
    num_waiting=0,
    kv_cache_usage=0.0,
    prefix_cache_queries=0,
    prefix_cache_hits=0,
    num_preemptions=0,
    num_finished=0,
    num_prompt_tokens=0,
    num_generated_tokens=0,
    num_chunked_prefills=0,
)
