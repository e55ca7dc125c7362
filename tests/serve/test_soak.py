"""Random requests with random hang-ups: no error, no leaked page, memory flat."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from serve.conftest import Server
from serve.fake_engine import greedy_text

CONCURRENCY = 16
WARM_UP_SHARE = 0.2
MAX_GROWTH_BYTES = 8 * 2**20
"""Of API process and engine together, from warm-up to the end of the long run."""


def _body(rng: random.Random) -> dict[str, Any]:
    shared = "a prefix that many requests share, of several pages. " * rng.randint(0, 2)
    body: dict[str, Any] = {
        "prompt": shared + "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60))),
        "max_tokens": rng.randint(1, 60),
        "temperature": rng.choice([0, 1]),
        "n": rng.choice([1, 1, 1, 3]),
        "stream": rng.random() < 0.6,
    }
    if rng.random() < 0.3:
        body["stop"] = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 2)))]
    if rng.random() < 0.2:
        body["logprobs"] = rng.randint(0, 5)
    if rng.random() < 0.1:
        body |= {"echo": True, "prompt_logprobs": 1}
    if rng.random() < 0.1:
        body["prompt"] = [body["prompt"], "another"]
    return body


async def _one(http: httpx.AsyncClient, rng: random.Random, counts: dict[str, int]) -> None:
    body = _body(rng)
    hangs_up = rng.random() < 0.3
    if body["stream"]:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            left = rng.randint(0, 10) if hangs_up else 10**9
            async for line in answer.aiter_lines():
                assert '"error"' not in line
                left -= 1
                if left < 0:
                    counts["hung up"] += 1
                    return
        counts["streamed"] += 1
        return
    try:
        timeout = httpx.Timeout(30, read=rng.uniform(0.001, 0.05) if hangs_up else 30)
        answer = await http.post("/v1/completions", json=body, timeout=timeout)
    except httpx.ReadTimeout:
        counts["hung up"] += 1
        return
    assert answer.status_code == 200, answer.text
    counts["whole"] += 1
    if body["temperature"] == 0 and isinstance(body["prompt"], str) and "stop" not in body:
        expected = greedy_text(body["prompt"], body["max_tokens"])
        for choice in answer.json()["choices"]:
            assert choice["text"].removeprefix(body["prompt"]) == expected
        counts["checked"] += 1


async def _soak(server: Server, num_requests: int, seed: int) -> dict[str, int]:
    counts = dict.fromkeys(("hung up", "streamed", "whole", "checked"), 0)
    numbers = iter(range(num_requests))

    async def worker(http: httpx.AsyncClient) -> None:
        for number in numbers:
            await _one(http, random.Random(seed * 10**6 + number), counts)

    limits = httpx.Limits(max_connections=2 * CONCURRENCY)
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as http:
        await asyncio.gather(*(worker(http) for _ in range(CONCURRENCY)))
        for _ in range(200):  # Hang-ups are noticed a moment later.
            text = (await http.get("/metrics")).text
            if 'num_requests_running{model_name="fake/model"} 0.0' in text:
                break
            await asyncio.sleep(0.05)
    assert 'num_requests_running{model_name="fake/model"} 0.0' in text
    assert 'num_requests_waiting{model_name="fake/model"} 0.0' in text
    assert 'kv_cache_usage_perc{model_name="fake/model"} 0.0' in text
    return counts


def _memory_bytes(server: Server) -> int:
    return sum(psutil.Process(p).memory_info().rss for p in (server.process.pid, server.engine_pid))


def _run(server: Server, num_requests: int) -> int:
    """Soak in two parts; returns by how many bytes the second made the processes grow."""
    warm_up = int(num_requests * WARM_UP_SHARE)
    first = asyncio.run(_soak(server, warm_up, seed=1))
    before_bytes = _memory_bytes(server)
    second = asyncio.run(_soak(server, num_requests - warm_up, seed=2))
    counts = {name: first[name] + second[name] for name in first}
    assert counts["hung up"] + counts["streamed"] + counts["whole"] == num_requests
    for name, count in counts.items():
        assert count > num_requests / 50, (name, counts)
    assert server.process.poll() is None
    grown_bytes = _memory_bytes(server) - before_bytes
    server.terminate()
    assert server.process.wait(20) == 0, "a leaked page or request would keep it from draining"
    return grown_bytes


@pytest.mark.parametrize("builder", ["build", "build_tight"])
def test_a_short_soak(start_server: Callable[..., Server], builder: str) -> None:
    _run(start_server(builder=builder), 250)


@pytest.mark.soak
def test_a_long_soak(start_server: Callable[..., Server]) -> None:
    grown_bytes = _run(start_server(builder="build_tight"), 10_000)
    assert grown_bytes < MAX_GROWTH_BYTES
