"""The engine process and its client, without HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve.fake_engine import greedy_text
from weft.base.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
)
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.serve.engine_client import EngineClient, Mailbox
from weft.serve.engine_config import EngineConfig

pytestmark = pytest.mark.usefixtures("engine_environment")


def _config(model_dir: Path, builder: str = "build") -> EngineConfig:
    return EngineConfig(model=str(model_dir), builder=f"serve.fake_engine:{builder}")


@pytest.fixture
def engine(model_dir: Path, engine_environment: None) -> Iterator[EngineClient]:
    client = EngineClient.start(_config(model_dir))
    yield client
    client.close()
    assert not psutil.pid_exists(client.pid)


def _request(name: str, prompt: bytes = b"hello", **sampling: object) -> Request:
    settings = {"temperature": 0, "max_tokens": 10, **sampling}
    return Request(
        id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**settings),  # type: ignore[arg-type]
    )


async def _tokens(mailbox: Mailbox) -> dict[str, bytes]:
    tokens: dict[str, bytes] = {}
    while True:
        is_done = not mailbox.live
        for update in await mailbox.next():
            before = tokens.get(update.request_id, b"")
            tokens[update.request_id] = before + bytes(update.new_token_ids)
        if is_done or not mailbox.live:
            return tokens


@pytest.mark.parametrize("only_when_finished", [True, False])
def test_updates_of_several_requests_come_to_one_mailbox(
    engine: EngineClient, only_when_finished: bool
) -> None:
    async def run() -> dict[str, bytes]:
        engine.attach()
        requests = [_request(name, name.encode()) for name in ("one", "two", "three")]
        mailbox = engine.submit(requests, only_when_finished=only_when_finished)
        assert engine.num_live == engine.num_live_choices == 3
        tokens = await _tokens(mailbox)
        assert engine.num_live == 0
        await engine.check_integrity()
        return tokens

    tokens = asyncio.run(run())
    assert tokens == {n: greedy_text(n, 10).encode() for n in ("one", "two", "three")}


def test_what_the_engine_refuses_reaches_the_caller(engine: EngineClient) -> None:
    async def run() -> None:
        engine.attach()
        mailbox = engine.submit([_request("bad", b""), _request("good")])
        with pytest.raises(InvalidRequestError, match="empty") as caught:
            await mailbox.next()
        assert caught.value.param == "prompt"
        assert engine.num_live == 0
        assert (await engine.check_integrity()).num_running == 0

    asyncio.run(run())


def test_cancelling_frees_pages_at_once(model_dir: Path) -> None:
    client = EngineClient.start(_config(model_dir, "build_slow"))

    async def run() -> None:
        client.attach()
        mailbox = client.submit([_request("long", max_tokens=200)])
        await mailbox.next()
        assert client.stats is not None
        assert client.stats.num_running == 1
        client.cancel(mailbox)
        client.cancel(mailbox)
        stats = await client.check_integrity()
        assert (stats.num_running, stats.kv_cache_usage) == (0, 0)
        assert stats.num_generated_tokens < 200

    try:
        asyncio.run(run())
    finally:
        client.close()


def test_one_choice_can_be_ended(engine: EngineClient) -> None:
    async def run() -> None:
        engine.attach()
        mailbox = engine.submit([_request("r", n=2, max_tokens=200)])
        await mailbox.next()
        engine.finish("r", 1)
        engine.finish("r", 1)
        assert engine.num_live_choices == 1
        counts = {0: 0, 1: 0}
        while mailbox.live:
            for update in await mailbox.next():
                counts[update.choice] += len(update.new_token_ids)
        assert counts[1] < counts[0]
        await engine.check_integrity()

    asyncio.run(run())


def test_a_death_fails_all_that_wait_and_all_that_come(model_dir: Path) -> None:
    client = EngineClient.start(_config(model_dir, "build_slow"))
    died: list[bool] = []

    async def run() -> None:
        client.attach()
        client.on_death = lambda: died.append(True)
        mailboxes = [client.submit([_request(str(i), max_tokens=200)]) for i in range(2)]
        await mailboxes[0].next()
        os.kill(client.pid, signal.SIGKILL)
        for mailbox in mailboxes:
            with pytest.raises(EngineDeadError, match="signal 9"):
                await _tokens(mailbox)
        with pytest.raises(EngineDeadError):
            client.submit([_request("late")])
        with pytest.raises(EngineDeadError):
            await client.check_integrity()

    try:
        asyncio.run(run())
    finally:
        client.close()
    assert died == [True]


def test_start_raises_what_the_engine_raised(model_dir: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is missing"):
        EngineClient.start(_config(model_dir, "build_failing"))
    with pytest.raises(ConfigError, match="no_such_function"):
        EngineClient.start(_config(model_dir, "no_such_function"))


def test_a_death_while_starting_is_told(model_dir: Path) -> None:
    config = EngineConfig(model=str(model_dir), builder="os:_exit")
    with pytest.raises(EngineDeadError, match="could not start: TypeError"):
        EngineClient.start(config)
    with pytest.raises(EngineDeadError, match="exit code 9 before it was ready"):
        EngineClient.start(
            EngineConfig(model=str(model_dir), builder="serve.fake_engine:build_dying")
        )


def test_an_idle_engine_sleeps(engine: EngineClient) -> None:
    process = psutil.Process(engine.pid)
    before_s = sum(process.cpu_times()[:2])

    async def run() -> None:
        engine.attach()
        await asyncio.sleep(0.5)

    asyncio.run(run())
    assert sum(process.cpu_times()[:2]) - before_s <= 0.05
