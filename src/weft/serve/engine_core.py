"""The engine as its owners see it: requests in, updates out. In-process; no sockets, no text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

from weft.base.clock import Clock, WallClock
from weft.base.errors import (
    ConfigError,
    InvalidRequestError,
    OutOfMemoryError,
    UnsupportedError,
)
from weft.base.trace import TraceWriter
from weft.cost.step_time import StepTimeModel
from weft.engine.batch import AdapterRef
from weft.engine.config import PolicyConfig
from weft.engine.coserve import CoServing
from weft.engine.executor import AdapterHost, BatchExecutor, CheckpointHost
from weft.engine.finetune import FinetuneEvent, FinetuneJobSpec
from weft.engine.finetune_limits import FinetuneMemory, LatencySlo
from weft.engine.job import FIRST_VERSION
from weft.engine.loop import EngineLoop
from weft.engine.pacing import prefill_shape
from weft.engine.request import EngineStats, Request, SequenceUpdate
from weft.engine.window_log import WindowRecorder, WindowReplay
from weft.engine.window_policies import RecordingPolicy, ReplayingPolicy
from weft.serve.engine_config import EngineConfig, EngineInfo
from weft.serve.iteration_trace import TracedExecutor
from weft.serve.messages import FinetuneGauges, JobAction
from weft.serve.step_times import RefitFile

_REFIT_INTERVAL_S = 60.0
"""A killed engine has learnt for nothing since, at most."""


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
    finetune_memory: FinetuneMemory | None = None
    """What jobs may take; None leaves it unbounded."""
    step_time: StepTimeModel | None = None
    """Where predictions of its iterations start; None learns while serving."""
    refits: RefitFile | None = None
    """What earlier sittings learnt about them, and where this one's goes."""


class EngineCore:
    """Wires policy, executor and loop; `LLM` and the engine process each own one."""

    def __init__(self, config: EngineConfig, *, clock: Clock | None = None) -> None:
        clock = clock or WallClock()
        if config.trace_path is not None:  # The file itself is written when all is done.
            TraceWriter.check_path(config.trace_path)
        make_policy = _policy_of(config)  # Before the model loads.
        built = _find_builder(config.builder)(config)
        self._executor: BatchExecutor = built.executor
        self._host = built.executor if isinstance(built.executor, AdapterHost) else None
        self._writer = built.executor if isinstance(built.executor, CheckpointHost) else None
        self._memory = built.finetune_memory
        self._retired: set[AdapterRef] = set()
        """Versions to be unloaded once the last request that names them has ended."""
        try:
            info = self._executor.info
            self._policy = make_policy(
                PolicyConfig(
                    max_model_len=built.max_model_len,
                    max_num_batched_tokens=built.max_num_batched_tokens,
                    eos_token_ids=built.eos_token_ids,
                    enable_prefix_caching=config.enable_prefix_caching,
                    seed=config.seed,
                ),
                info,
                clock,
                finetune=config.finetune,
                step_time=built.step_time,
                memory=built.finetune_memory,
            )
        except BaseException:
            self._executor.close()
            raise
        self._clock = clock
        self._refits = built.refits
        self._keep_refit_at_s = clock.now_s() + _REFIT_INTERVAL_S
        if self._refits is not None and (refit := self._refits.read()) is not None:
            self._policy.step_time.begin_with(refit)
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
            slo_tpot_s=self._policy.slo.tpot_s,
            slo_ttft_s=self._policy.slo.ttft_s,
            slo_ttft_by_prompt=_ttft_by_prompt(
                self._policy.slo, built.step_time, built.max_model_len
            ),
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
        self._check_adapter(request)
        self._policy.validate(request)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it cannot be served, or its id is in use.
        """
        self._check_adapter(request)
        self._policy.add(request)

    def cancel(self, request_id: str) -> bool:
        """End all choices of a request and free their pages; False if it is not here."""
        return self._policy.cancel(request_id)

    def finish(self, request_id: str, choice: int) -> bool:
        """End one choice whose stop string was seen; False if it is not here."""
        return self._policy.finish(request_id, choice)

    def add_job(self, spec: FinetuneJobSpec) -> None:
        """Queue a finetuning job; its news come from `take_finetune_events`.

        Raises:
            ConfigError: its settings do not fit the model, or its name is an adapter's.
            OutOfMemoryError: it does not fit the memory; the message says what would do.
            UnsupportedError: this engine does not finetune.
        """
        # Else it would learn that at its end only.
        if self.has_adapter(AdapterRef(id=spec.id, version=FIRST_VERSION)):
            raise ConfigError(f"an adapter is served as {spec.id!r}; name the job otherwise")
        self._policy.add_job(spec)

    def control_job(self, job_id: str, action: JobAction) -> None:
        """Cancel, pause or resume a job.

        Raises:
            ConfigError: there is no such job.
            UnsupportedError: this engine does not finetune.
        """
        match action:
            case JobAction.CANCEL:
                if self._writer is not None:
                    # Once it has ended its files are cleared away: none must come after that.
                    self._writer.settle_job(job_id)
                is_here = self._policy.cancel_job(job_id)
            case JobAction.PAUSE:
                is_here = self._policy.pause_job(job_id)
            case JobAction.RESUME:
                is_here = self._policy.resume_job(job_id)
        if not is_here:
            raise ConfigError(f"job {job_id!r} is not here; it has ended")

    def take_finetune_events(self) -> list[FinetuneEvent]:
        """News of all jobs since the last call, in order."""
        return self._policy.take_finetune_events()

    def load_adapter(self, ref: AdapterRef, path: str) -> None:
        """Read an adapter directory and serve it as a version.

        Raises:
            OutOfMemoryError: it does not fit beside jobs and other adapters; the message says what
                would do.
            WeftError: it is malformed or of another base, or this engine has no adapters.
        """
        before = 0 if self._memory is None else self._memory.adapter_bytes()
        self._adapters().load_adapter(ref, path)
        if self._memory is None:
            return
        held, promised = self._memory.adapter_bytes(), self._policy.promised_job_bytes
        missing = held + promised - self._memory.budget_bytes
        if missing > 0 and held > before:
            self._adapters().unload_adapter(ref)
            raise OutOfMemoryError(
                f"adapter {ref.id!r} needs {held - before} bytes; beside it other adapters hold "
                f"{before} and finetuning jobs {promised} of {self._memory.budget_bytes}: raise "
                f"the memory budget by {missing} bytes, or unload another adapter"
            )

    def unload_adapter(self, ref: AdapterRef) -> None:
        """Take no more requests for a version, and drop it once none uses it."""
        if not self._adapters().has_adapter(ref):
            return
        self._retired.add(ref)
        self._drop_retired()

    def has_adapter(self, ref: AdapterRef) -> bool:
        """Whether requests may name a version."""
        return self._host is not None and ref not in self._retired and self._host.has_adapter(ref)

    def step(self) -> list[SequenceUpdate]:
        """Run one iteration."""
        updates = self._loop.step()
        if self._retired:
            self._drop_retired()
        if self._refits is not None and self._clock.now_s() >= self._keep_refit_at_s:
            self._keep_refit_at_s = self._clock.now_s() + _REFIT_INTERVAL_S
            self._keep_refit()
        return updates

    def stats(self) -> EngineStats:
        """Gauges and counters of this instant."""
        return self._policy.stats()

    def finetune_gauges(self) -> FinetuneGauges:
        """Finetuning's counters, and how the latest iteration went against what was foreseen."""
        stats = self._policy.finetune_stats()
        latest = stats.latest
        return FinetuneGauges(
            num_forward_tokens=stats.num_forward_tokens,
            num_steps=stats.num_steps,
            predicted_s=0.0 if latest is None else latest.predicted_s,
            actual_s=0.0 if latest is None else latest.actual_s,
            head_room_s=0.0 if latest is None else latest.head_room_s,
        )

    def check_integrity(self) -> None:
        """Verify every invariant of pages and sequences.

        Raises:
            IntegrityError: one is broken.
        """
        self._policy.check_integrity()

    def _adapters(self) -> AdapterHost:
        if self._host is None:
            raise UnsupportedError("this engine does not serve adapters")
        return self._host

    def _check_adapter(self, request: Request) -> None:
        ref = request.adapter
        if ref is not None and not self.has_adapter(ref):
            raise InvalidRequestError(
                f"adapter {ref.id!r} version {ref.version} is not loaded", "model"
            )

    def _drop_retired(self) -> None:
        for ref in [ref for ref in self._retired if not self._policy.uses_adapter(ref)]:
            self._retired.discard(ref)
            self._adapters().unload_adapter(ref)

    def close(self) -> None:
        """Give back memory and threads; writes the trace, if one was asked for."""
        self._keep_refit()
        self._executor.close()

    def _keep_refit(self) -> None:
        """Keep what this sitting has learnt of iteration times for the next one."""
        refit = self._policy.step_time.refit
        if self._refits is not None and refit is not None:
            self._refits.write(refit)


def _policy_of(config: EngineConfig) -> Callable[..., CoServing]:
    """The policy, and who records or replays windows; a log that cannot be read is refused here."""
    if config.record_windows is not None:
        return partial(RecordingPolicy, recorder=WindowRecorder(config.record_windows))
    if config.replay_windows is not None:
        return partial(ReplayingPolicy, replay=WindowReplay(config.replay_windows))
    return CoServing


def _ttft_by_prompt(
    slo: LatencySlo, model: StepTimeModel | None, max_model_len: int
) -> tuple[tuple[int, float], ...]:
    """Ten unloaded prefills, at lengths that double."""
    if model is None or slo.ttft_prefills == 0:
        return ()
    lengths = [0, *(2**i for i in range(4, 31) if 2**i < max_model_len), max_model_len]
    points: list[tuple[int, float]] = []
    for length in lengths:
        shape = prefill_shape(length)
        seconds = model.device_s(shape) + model.host_s(shape)
        points.append((length, slo.ttft_prefills * seconds))
    return tuple(points)


def _find_builder(name: str) -> Callable[[EngineConfig], BuiltExecutor]:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"builder {name!r} cannot be imported: {error}") from error
