"""`/metrics` says what happened, under vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.conftest import Server, running_server
from serve.fake_engine import greedy_text
from serve.fake_server import MODEL_NAME


def _samples(server: Server) -> dict[str, float]:
    with server.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == MODEL_NAME
            name = "|".join([sample.name, *(f"{k}={v}" for k, v in sorted(labels.items()))])
            samples[name] = sample.value
    return samples


@pytest.fixture(scope="module")
def measured() -> Iterator[Server]:
    # Slow, so that a stop string reaches the engine before it has run to the end.
    with running_server(builder="build_slow") as server:
        yield server


def test_the_names_that_vllms_boards_ask_for(measured: Server) -> None:
    names = {name.split("|")[0] for name in _samples(measured)}
    for histogram in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        for suffix in ("bucket", "sum", "count"):
            assert f"weft:{histogram}_{suffix}" in names
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"weft:{gauge}" in names
    for counter in (
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
    ):
        assert f"weft:{counter}_total" in names


def test_numbers_follow_what_was_done(measured: Server) -> None:
    before = _samples(measured)
    client = measured.openai()
    prompt = "sixteen tokens and then four more: 37"
    for _ in range(2):
        client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=8, temperature=0)
    text = greedy_text("x", 12)
    client.completions.create(
        model=MODEL_NAME, prompt="x", max_tokens=12, temperature=0, stop=text[3:5]
    )
    after = _samples(measured)

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown("weft:prefix_cache_queries_total") == 2 * len(prompt) + 1
    assert grown("weft:prefix_cache_hits_total") == len(prompt) // 16 * 16
    assert grown("weft:prompt_tokens_total") == 2 * len(prompt) + 1
    assert grown("weft:generation_tokens_total") >= 8 + 8 + 5
    assert grown("weft:time_to_first_token_seconds_count") == 3
    assert grown("weft:e2e_request_latency_seconds_count") == 3
    assert grown("weft:request_queue_time_seconds_count") == 3
    # The engine may run on while the stop string is on its way to it.
    assert 7 + 7 + 4 <= grown("weft:inter_token_latency_seconds_count") <= 7 + 7 + 11
    assert 8 + 8 + 5 <= grown("weft:request_generation_tokens_sum") <= 8 + 8 + 12
    assert grown("weft:request_prompt_tokens_sum") == 2 * len(prompt) + 1
    assert grown("weft:request_success_total|finished_reason=length") == 2
    assert grown("weft:request_success_total|finished_reason=stop") == 1
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for _ in range(100):  # The engine hears of a stop string a moment after the caller.
        if all(_samples(measured)[f"weft:{name}"] == 0 for name in gauges):
            break
        time.sleep(0.02)
    assert all(_samples(measured)[f"weft:{name}"] == 0 for name in gauges)
    assert after["weft:e2e_request_latency_seconds_sum"] > 0


def test_gauges_show_the_running_and_the_waiting(start_server: Callable[..., Server]) -> None:
    server = start_server(builder="build_slow", max_num_seqs=1)
    body = {"prompt": "x", "max_tokens": 60, "stream": True}
    with (
        server.http() as http,
        http.stream("POST", "/v1/completions", json=body) as one,
        http.stream("POST", "/v1/completions", json=body),
    ):
        lines = one.iter_lines()
        for _ in range(6):
            next(lines)
        samples = _samples(server)
        assert samples["weft:num_requests_running"] == 1
        assert samples["weft:num_requests_waiting"] == 1
        assert 0 < samples["weft:kv_cache_usage_perc"] < 1


def test_finetuning_is_measured(start_server: Callable[..., Server]) -> None:
    server = start_server(builder="build_slow", policy="budget")
    client = server.openai()
    rows = "\n".join(f'{{"text": "row {i}"}}' for i in range(50)).encode()
    file = client.files.create(file=("a.jsonl", rows), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL_NAME, training_file=file.id)
    with server.http() as http:
        for _ in range(200):
            values = _values(http.get("/metrics").text)
            if values.get('weft:finetune_steps_total{model_name="fake/model"}', 0) >= 2:
                break
            time.sleep(0.05)
        client.completions.create(model=MODEL_NAME, prompt="x", max_tokens=3)
        client.fine_tuning.jobs.cancel(job.id)
        values |= _values(http.get("/metrics").text)
    label = f'{{job="{job.id}",model_name="fake/model"}}'
    assert 0 < values[f"weft:finetune_loss{label}"] <= 2
    assert values[f"weft:finetune_tokens_per_second{label}"] > 0
    assert values['weft:finetune_tokens_total{model_name="fake/model"}'] >= 12
    assert values['weft:iteration_actual_seconds{model_name="fake/model"}'] > 0
    for objective in ("tpot", "ttft"):
        assert any(
            key.startswith("weft:slo_outcomes_total") and f'objective="{objective}"' in key
            for key in values
        )


def _values(text: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}
