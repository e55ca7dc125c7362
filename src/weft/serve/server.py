"""The server as a process: socket, engine, HTTP, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn

from weft.base.errors import ConfigError
from weft.engine.config import check_whole
from weft.model.tokenizer import Tokenizer
from weft.serve.adapter_api import serve_modules
from weft.serve.api import Api, ApiConfig
from weft.serve.engine_client import EngineClient
from weft.serve.engine_config import EngineConfig
from weft.serve.finetune_service import FinetuneService, FinetuneServiceConfig
from weft.serve.http_errors import DrainingError
from weft.serve.served_models import ServedModels
from weft.serve.store import Store

DEATH_GRACE_S = 2.0
"""After the engine's death requests hear 503 for so long, then the server exits with 1."""
STOP_GRACE_S = 1.0
"""After the second signal connections stay open for at most so long."""
EXIT_ENGINE_DEAD = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger("weft.server")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Where files, jobs and adapters are kept.

    Raises:
        ConfigError: `checkpoint_every` is given and below 1.
    """

    directory: Path | None = None
    """None: a temporary one, gone with the server."""
    database_url: str | None = None
    """None: SQLite in the directory."""
    checkpoint_every: int | None = None
    """Optimizer steps of a job between its checkpoints; None: 1, or more where writing one would
    cost over 2 % of the time."""

    def __post_init__(self) -> None:
        if self.checkpoint_every is not None:
            check_whole("checkpoint_every", self.checkpoint_every, 1)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All that a server is started from."""

    engine: EngineConfig
    api: ApiConfig
    host: str = "127.0.0.1"
    port: int = 8000
    """0 lets the system choose."""
    access_log: bool = False
    store: StoreConfig = field(default_factory=StoreConfig)


def run_server(
    config: ServerConfig, *, on_ready: Callable[[str, EngineClient], None] | None = None
) -> int:
    """Serve until told to stop; returns the exit code.

    Blocks while the model loads. `on_ready` hears the server's URL once requests are taken.

    Raises:
        ConfigError: the address cannot be used; raised before the model loads.
        WeftError: what the engine raised while it was built.
    """
    listener = _bind(config.host, config.port)
    with contextlib.ExitStack() as stack:
        try:
            # Before the model loads, where it can: what is wrong with it is said at once.
            store = None if config.store.directory is None else _open_store(config.store)
            with _terminate_raises():
                client = EngineClient.start(config.engine)
        except BaseException:
            listener.close()
            raise
        stack.callback(client.close)
        if store is None:  # The engine sees to it that this directory goes with the server.
            store = _open_store(replace(config.store, directory=client.directory / "data"))
        stack.callback(store.close)
        tokenizer = Tokenizer.from_directory(client.info.model_path)
        server = _Server(config, client, tokenizer, listener, store)
        return asyncio.run(server.run(on_ready))


def _open_store(config: StoreConfig) -> Store:
    assert config.directory is not None
    return Store(config.directory, config.database_url)


class _Server:
    """Owns uvicorn and decides when it ends."""

    def __init__(
        self,
        config: ServerConfig,
        client: EngineClient,
        tokenizer: Tokenizer,
        listener: socket.socket,
        store: Store,
    ) -> None:
        self._client = client
        self._listener = listener
        models = self._models = ServedModels(config.api.model_names, client)
        self._modules = config.api.adapters.modules
        self._finetuning = FinetuneService(
            store,
            client,
            tokenizer,
            FinetuneServiceConfig(
                base_names=config.api.model_names,
                max_model_len=client.info.max_model_len,
                checkpoint_every=config.store.checkpoint_every,
            ),
            models,
        )
        self._api = Api(config.api, client, tokenizer, models=models, finetuning=self._finetuning)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._api.app(),
                log_level="info" if config.access_log else "warning",
                access_log=config.access_log,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._exit_code = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, on_ready: Callable[[str, EngineClient], None] | None) -> int:
        self._client.on_death = lambda: self._spawn(self._end_after_death())
        self._client.attach()
        await serve_modules(self._models, self._modules)
        await self._finetuning.start()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        self._spawn(self._announce(on_ready))
        gc.collect()
        gc.freeze()  # Modules and schemas never die; later collections skip them.
        await self._uvicorn.serve(sockets=[self._listener])
        await self._finetuning.close()
        return self._exit_code

    def _on_signal(self, number: int) -> None:
        if self._api.is_draining:
            logger.warning("told to stop again: ending %d requests", self._client.num_live)
            self._exit_code = 128 + number
            self._client.kill(DrainingError("the server was told to stop at once"))
            self._uvicorn.should_exit = True
            # Streams get their error event; a client that does not read keeps nobody waiting.
            asyncio.get_running_loop().call_later(STOP_GRACE_S, self._force_exit)
            return
        self._api.is_draining = True
        logger.warning("shutting down: finishing %d requests", self._client.num_live)
        self._spawn(self._drain())

    def _force_exit(self) -> None:
        self._uvicorn.force_exit = True

    async def _drain(self) -> None:
        while self._client.num_live:
            await asyncio.sleep(0.02)
        self._uvicorn.should_exit = True

    async def _end_after_death(self) -> None:
        self._exit_code = EXIT_ENGINE_DEAD
        await asyncio.sleep(DEATH_GRACE_S)
        self._uvicorn.force_exit = self._uvicorn.should_exit = True

    async def _announce(self, on_ready: Callable[[str, EngineClient], None] | None) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.005)
        if on_ready is not None:
            on_ready(_url(self._listener), self._client)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the first signal must not close the door yet."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must be between 0 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"host {host!r} cannot be resolved: {error}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)  # Clients are refused, not kept waiting, until requests are taken.
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host} port {port} cannot be used: {error.strerror}; stop what uses it, or choose "
            "another with --port"
        ) from error
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _terminate_raises() -> Generator[None, None, None]:
    """While the model loads, SIGTERM ends the process as Ctrl-C does, and the engine with it.

    Its exit code is that of a process which SIGTERM has ended.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
