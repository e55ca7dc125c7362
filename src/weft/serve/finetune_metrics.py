"""Prometheus metrics of finetuning: speed, loss, head-room, and foresight against fact."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weft.serve.engine_client import EngineClient
from weft.serve.finetune_service import FinetuneService

_LABELS = ("model_name",)


class FinetuneCollector(Collector):
    """Reads the engine's latest snapshot and the running jobs' latest steps when scraped."""

    def __init__(
        self, client: EngineClient, model_name: str, service: FinetuneService | None
    ) -> None:
        self._client = client
        self._service = service
        self._labels = (model_name,)

    def collect(self) -> Iterable[Metric]:
        """One family a number."""
        gauges = self._client.finetune_gauges
        for name, text, value in (
            ("finetune_tokens", "Finetuning tokens sent forward.", "num_forward_tokens"),
            ("finetune_steps", "Optimizer steps done.", "num_steps"),
        ):
            counter = CounterMetricFamily(f"weft:{name}", text, labels=_LABELS)
            counter.add_metric(self._labels, 0 if gauges is None else getattr(gauges, value))
            yield counter
        for name, text, value in (
            ("iteration_predicted_seconds", "The latest iteration, as foreseen.", "predicted_s"),
            ("iteration_actual_seconds", "The latest iteration, as it went.", "actual_s"),
            (
                "iteration_head_room_seconds",
                "What the objectives left beside inference in the latest iteration.",
                "head_room_s",
            ),
        ):
            gauge = GaugeMetricFamily(f"weft:{name}", text, labels=_LABELS)
            gauge.add_metric(self._labels, 0.0 if gauges is None else getattr(gauges, value))
            yield gauge
        yield from self._jobs()

    def _jobs(self) -> Iterable[Metric]:
        latest = {} if self._service is None else self._service.latest_steps
        loss = GaugeMetricFamily(
            "weft:finetune_loss", "Training loss of a job's latest step.", labels=(*_LABELS, "job")
        )
        speed = GaugeMetricFamily(
            "weft:finetune_tokens_per_second",
            "Tokens of a job's latest step over its duration.",
            labels=(*_LABELS, "job"),
        )
        for job_id, metrics in latest.items():
            loss.add_metric((*self._labels, job_id), metrics.loss)
            rate = metrics.num_tokens / metrics.elapsed_s if metrics.elapsed_s > 0 else 0.0
            speed.add_metric((*self._labels, job_id), rate)
        yield loss
        yield speed
