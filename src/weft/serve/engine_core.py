"""The engine as its owners see it: requests in, updates out. In-process; no sockets, no text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from weft.base.clock import Clock, WallClock
from weft.base.errors import ConfigError
from weft.base.trace import TraceWriter
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.executor import BatchExecutor
from weft.engine.loop import EngineLoop
from weft.engine.request import EngineStats, Request, SequenceUpdate
from weft.serve.engine_config import EngineConfig, EngineInfo
from weft.serve.iteration_trace import TracedExecutor


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltExecutor:
    """An executor and what was resolved while it was built."""

    executor: BatchExecutor
    model_path: str
    max_model_len: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    sampling_defaults: dict[str, int | float] = field(default_factory=dict[str, int | float])


class EngineCore:
    """Wires policy, executor and loop; `LLM` and the engine process each own one."""

    def __init__(self, config: EngineConfig, *, clock: Clock | None = None) -> None:
        clock = clock or WallClock()
        if config.trace_path is not None:  # The file itself is written when all is done.
            TraceWriter.check_path(config.trace_path)
        built = _find_builder(config.builder)(config)
        self._executor: BatchExecutor = built.executor
        try:
            info = self._executor.info
            self._policy = ContinuousBatching(
                PolicyConfig(
                    max_model_len=built.max_model_len,
                    max_num_batched_tokens=built.max_num_batched_tokens,
                    eos_token_ids=built.eos_token_ids,
                    enable_prefix_caching=config.enable_prefix_caching,
                    seed=config.seed,
                ),
                info,
                clock,
            )
        except BaseException:
            self._executor.close()
            raise
        if config.trace_path is not None:
            self._executor = TracedExecutor(self._executor, path=config.trace_path, clock=clock)
        self._loop = EngineLoop(self._policy, self._executor)
        self.info = EngineInfo(
            model_path=built.model_path,
            sampling_defaults=built.sampling_defaults,
            max_model_len=built.max_model_len,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=built.max_num_batched_tokens,
            vocab_size=info.vocab_size,
            dtype=built.dtype,
            device=built.device,
            num_pages=info.num_pages,
            page_bytes=info.page_bytes,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` can do anything."""
        return self._loop.has_work

    def validate(self, request: Request) -> None:
        """Check a request without adding it.

        Raises:
            InvalidRequestError: it cannot be served; `param` names why.
        """
        self._policy.validate(request)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it cannot be served, or its id is in use.
        """
        self._policy.add(request)

    def cancel(self, request_id: str) -> bool:
        """End all choices of a request and free their pages; False if it is not here."""
        return self._policy.cancel(request_id)

    def finish(self, request_id: str, choice: int) -> bool:
        """End one choice whose stop string was seen; False if it is not here."""
        return self._policy.finish(request_id, choice)

    def step(self) -> list[SequenceUpdate]:
        """Run one iteration."""
        return self._loop.step()

    def stats(self) -> EngineStats:
        """Gauges and counters of this instant."""
        return self._policy.stats()

    def check_integrity(self) -> None:
        """Verify every invariant of pages and sequences.

        Raises:
            IntegrityError: one is broken.
        """
        self._policy.check_integrity()

    def close(self) -> None:
        """Give back memory and threads; writes the trace, if one was asked for."""
        self._executor.close()


def _find_builder(name: str) -> Callable[[EngineConfig], BuiltExecutor]:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"builder {name!r} cannot be imported: {error}") from error
