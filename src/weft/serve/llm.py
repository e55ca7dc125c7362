"""`LLM`: the engine in your own process, in vLLM's shape."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar

from weft.base.clock import WallClock
from weft.base.errors import ConfigError, UnsupportedError
from weft.engine.batch import AdapterRef
from weft.engine.finetune import LossNormalization, OptimizerSpec
from weft.engine.finetune_limits import FinetuneConfig
from weft.engine.request import EngineStats, Request, SequenceUpdate
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat
from weft.model.tokenizer import Tokenizer
from weft.serve.engine_config import RUNTIME_BUILDER, EngineConfig
from weft.serve.engine_core import EngineCore
from weft.serve.finetune_data import OverlongSamples
from weft.serve.interrupts import held_interrupts
from weft.serve.lora_request import LoRARequest, LoraRequests
from weft.serve.messages import JobAction
from weft.serve.offline_finetune import (
    FinetuneData,
    FinetuneJob,
    FinetuneSettings,
    load_samples,
    new_job_name,
)
from weft.serve.output_processor import RequestProcessor
from weft.serve.outputs import RequestOutput
from weft.serve.prompts import (
    conversation_list,
    naming,
    per_prompt,
    prompt_list,
    prompt_parts,
    sampling_list,
)


class TokensPrompt(TypedDict):
    """A prompt as token ids, taken as they are."""

    prompt_token_ids: Sequence[int]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Prompt = str | TokensPrompt | TextPrompt | Mapping[str, Any]
Message = Mapping[str, Any]
LoraChoice = LoRARequest | AdapterRef | Sequence[LoRARequest | AdapterRef | None] | None
"""An adapter for all prompts, or one a prompt; a finished job's `adapter` is an `AdapterRef`."""


class LLM:
    """A model and its engine, in this process. A context manager; `close` gives everything back.

    `dtype` is auto, a name (float32, bfloat16, float16, float64; float and half for short) or one
    of torch's own; a `seed` of None is 0. `record_windows` names a directory for the windows that
    each finetuning job goes through; `replay_windows` is such a log, and trains in its windows.

    Raises:
        ModelLoadError: the model directory is missing, half-written or inconsistent.
        UnsupportedError: the model, or a setting, is of a kind that Weft does not run.
        OutOfMemoryError: the KV cache cannot hold one sequence; the message says what would do.
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        dtype: object = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        seed: int | None = 0,
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
        tensor_parallel_size: int = 1,
        trace: str | PathLike[str] | None = None,
        finetune_config: FinetuneConfig | None = None,
        memory_budget_bytes: int | None = None,
        record_windows: str | PathLike[str] | None = None,
        replay_windows: str | PathLike[str] | None = None,
        builder: str = RUNTIME_BUILDER,
    ) -> None:
        if tensor_parallel_size != 1:
            raise UnsupportedError(
                f"tensor_parallel_size is {tensor_parallel_size}, which is not supported; "
                "supported is 1"
            )
        self._core = EngineCore(
            EngineConfig(
                model=str(model) if isinstance(model, PathLike) else model,
                dtype=str(dtype).removeprefix("torch."),
                device=device,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                seed=0 if seed is None else seed,
                enable_prefix_caching=enable_prefix_caching,
                num_threads=num_threads,
                trace_path=None if trace is None else str(trace),
                finetune=finetune_config or FinetuneConfig(),
                memory_budget_bytes=memory_budget_bytes,
                record_windows=None if record_windows is None else str(record_windows),
                replay_windows=None if replay_windows is None else str(replay_windows),
                builder=builder,
            )
        )
        self.info = self._core.info
        """The engine's resolved settings."""
        self._tokenizer = Tokenizer.from_directory(self.info.model_path)
        self._lora = LoraRequests(self._core)
        self._clock = WallClock()
        self._numbers = count()
        self._is_closed = False
        self._jobs: dict[str, FinetuneJob] = {}
        """Those that have not ended."""

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoraChoice = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; returns one output a prompt, in their order.

        A prompt is text, `{"prompt": text}` or `{"prompt_token_ids": ids}`; a list holds several.
        One `sampling_params` serves all prompts, a list gives each its own, None takes
        `get_default_sampling_params()`. `lora_request` names an adapter, likewise for all or one a
        prompt. The progress bar shows on terminals only.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; nothing has run.
            AdapterLoadError: `lora_request` names an adapter that is broken or of another base.
        """
        self._check_open()
        texts: list[str | None] = []
        token_ids: list[Sequence[int]] = []
        for number, prompt in enumerate(prompt_list(prompts)):
            with naming(f"prompt {number}"):
                parts = prompt_parts(prompt)
                texts.append(parts.text)
                if parts.token_ids is None:
                    token_ids.append(self._tokenizer.encode(parts.text or ""))
                else:
                    token_ids.append(parts.token_ids)
        return self._run(
            "prompt", texts, token_ids, sampling_params, priority, lora_request, use_tqdm=use_tqdm
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoraChoice = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several; returns one output a conversation.

        A message's content is text, a list of parts of type `text` (joined by newlines, as the
        server does), or None.

        Raises:
            InvalidRequestError: a conversation does not fit the chat template or the context.
            AdapterLoadError: `lora_request` names an adapter that is broken or of another base.
        """
        self._check_open()
        token_ids: list[Sequence[int]] = []
        for number, conversation in enumerate(conversation_list(messages)):
            with naming(f"conversation {number}"):
                ids = self._tokenizer.encode_chat(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template=chat_template,
                    chat_template_kwargs=chat_template_kwargs,
                )
            token_ids.append(ids)
        texts: list[str | None] = [None] * len(token_ids)
        return self._run(
            "conversation", texts, token_ids, sampling_params, None, lora_request, use_tqdm=use_tqdm
        )

    def finetune(
        self,
        data: FinetuneData,
        *,
        adapter: str | None = None,
        lora: AdapterSpec | Mapping[str, Any] | None = None,
        validation: FinetuneData | None = None,
        optimizer: OptimizerSpec | Mapping[str, Any] | None = None,
        num_epochs: int = 3,
        batch_size: int = 1,
        loss_normalization: str = "token",
        seed: int = 0,
        max_sample_tokens: int | None = None,
        overlong_samples: str = "refuse",
        checkpoint_every: int | None = None,
        output_dir: str | PathLike[str] | None = None,
        resume_from: str | PathLike[str] | None = None,
        initial_adapter: str | PathLike[str] | None = None,
        remat: str = "pruned",
    ) -> FinetuneJob:
        """Start training an adapter beside everything else; returns at once.

        `data` is a JSONL file or an iterable of its lines as objects. `adapter` names the result.
        `lora` holds `AdapterSpec`'s fields (rank, alpha, dropout, target_modules, ...), `optimizer`
        those of `OptimizerSpec` (name, lr, schedule, ...). `remat` says what a sample keeps for its
        backward pass: `none`, `pruned` or, least, `layer-input`. Iterations run within `generate`,
        `chat` and the job's `wait` only; once it has succeeded, its `adapter` serves as
        `lora_request`.

        Raises:
            InvalidRequestError: a line of the data is refused; the message names it.
            ConfigError: a setting is out of its range, or the name is taken.
            OutOfMemoryError: the job does not fit; the message says what would do.
        """
        self._check_open()
        limit = self.info.max_model_len
        settings = FinetuneSettings(
            lora=_made(AdapterSpec, lora, "lora"),
            optimizer=_made(OptimizerSpec, optimizer, "optimizer"),
            num_epochs=num_epochs,
            batch_size=batch_size,
            loss_normalization=_named(LossNormalization, loss_normalization, "loss_normalization"),
            seed=seed,
            max_sample_tokens=max_sample_tokens,
            overlong_samples=_named(OverlongSamples, overlong_samples, "overlong_samples"),
            checkpoint_every=checkpoint_every,
            output_dir=None if output_dir is None else str(output_dir),
            resume_from=None if resume_from is None else str(resume_from),
            initial_adapter=None if initial_adapter is None else str(initial_adapter),
            remat=_named(Remat, remat, "remat"),
        )
        samples, checked = (
            ()
            if given is None
            else load_samples(
                given,
                self._tokenizer,
                max_tokens=min(max_sample_tokens or limit, limit),
                overlong=settings.overlong_samples,
            )
            for given in (data, validation)
        )
        spec = settings.spec(adapter or new_job_name(), samples, checked)
        job = FinetuneJob(spec, drive=self._drive_job, owner=self)
        self._core.add_job(spec)
        self._jobs[spec.id] = job
        self._hear_jobs()
        return job

    def cancel_job(self, job: FinetuneJob) -> None:
        """End a job without a result; does nothing to one that has ended."""
        self._control(job, JobAction.CANCEL)

    def pause_job(self, job: FinetuneJob) -> None:
        """Let a job stand still."""
        self._control(job, JobAction.PAUSE)

    def resume_job(self, job: FinetuneJob) -> None:
        """Let a paused job go on."""
        self._control(job, JobAction.RESUME)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json advises, but for lengths (max_new_tokens)."""
        defaults: dict[str, Any] = dict(self.info.sampling_defaults)
        return SamplingParams(**defaults)

    @property
    def engine_stats(self) -> EngineStats:
        """Gauges and counters of this instant; ConfigError once it is closed."""
        self._check_open()
        return self._core.stats()

    def check_integrity(self) -> None:
        """Verify every invariant of pages and sequences.

        Raises:
            IntegrityError: one is broken.
        """
        self._core.check_integrity()

    def close(self) -> None:
        """Give back memory and threads; idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._core.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- pieces ----

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this LLM is closed; make a new one")

    def _run(
        self,
        kind: str,
        texts: Sequence[str | None],
        token_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        priority: Sequence[int] | None,
        lora_request: LoraChoice,
        *,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        number = len(token_ids)
        adapters = self._lora.resolve(lora_request, number)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = sampling_list(sampling_params, number)
        priorities = [0] * number
        if priority is not None:
            priorities = per_prompt("priority", priority, number, "a list of whole numbers")
        requests = [
            Request(
                id=f"llm-{next(self._numbers)}",
                prompt_token_ids=tuple(ids),
                sampling=sampling,
                priority=urgency,
                adapter=adapter,
                arrival_s=self._clock.now_s(),
            )
            for ids, sampling, urgency, adapter in zip(
                token_ids, params, priorities, adapters, strict=True
            )
        ]
        for index, request in enumerate(requests):
            with naming(f"{kind} {index}"):
                self._core.validate(request)
        processors = {
            request.id: RequestProcessor(request, self._tokenizer, prompt=text)
            for request, text in zip(requests, texts, strict=True)
        }
        with _progress(len(requests), shown=use_tqdm) as advance:
            self._drive(processors, advance)
        return [processor.output() for processor in processors.values()]

    def _drive(self, processors: dict[str, RequestProcessor], advance: Callable[[], None]) -> None:
        with held_interrupts() as raise_if_interrupted:
            try:
                for processor in processors.values():
                    self._core.add(processor.request)
                while not all(processor.is_finished for processor in processors.values()):
                    for update in self._core.step():
                        self._take(processors[update.request_id], update, advance)
                    self._hear_jobs()
                    raise_if_interrupted()
            finally:
                # After an interrupt or an error the engine must be as it was before.
                for request_id, processor in processors.items():
                    if not processor.is_finished:
                        self._core.cancel(request_id)
                self._drain()

    def _drain(self) -> None:
        """Run off what cancelled requests have left in flight; jobs wait for the next call."""
        while self._core.has_work and not (self._jobs and self._has_no_requests()):
            self._core.step()
            self._hear_jobs()

    def _has_no_requests(self) -> bool:
        stats = self._core.stats()
        return not (stats.num_running or stats.num_waiting)

    def _drive_job(self, job: FinetuneJob) -> None:
        """One iteration for a job's `wait`."""
        self._check_open()
        if not self._core.has_work:
            raise ConfigError(f"job {job.id} is {job.status}; resume it before waiting for it")
        with held_interrupts():
            self._core.step()
            self._hear_jobs()

    def _control(self, job: FinetuneJob, action: JobAction) -> None:
        self._check_open()
        if job.id in self._jobs:
            self._core.control_job(job.id, action)
            self._hear_jobs()

    def _hear_jobs(self) -> None:
        for event in self._core.take_finetune_events():
            job = self._jobs.get(event.job_id)
            if job is not None:
                job.hear(event)
                if job.status.is_final:
                    del self._jobs[job.id]

    def _take(
        self, processor: RequestProcessor, update: SequenceUpdate, advance: Callable[[], None]
    ) -> None:
        if processor.is_finished:
            return
        processor.push(update)
        for choice in processor.choices_to_finish:
            self._core.finish(update.request_id, choice)
        processor.choices_to_finish.clear()
        if processor.is_finished:
            advance()


def _made(kind: type[T], given: T | Mapping[str, Any] | None, name: str) -> T:
    """A specification, from one or from its fields."""
    if isinstance(given, kind):
        return given
    try:
        return kind(**dict(given or {}))  # pyright: ignore[reportCallIssue, reportArgumentType]
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from None


def _named(kind: type[E], value: str, name: str) -> E:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ConfigError(f"{name} is {value!r}; it must be one of {known}") from None


@contextlib.contextmanager
def _progress(total: int, *, shown: bool) -> Generator[Callable[[], None]]:
    """Yields what to call when a request ends; draws only on a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda: None
        return
    # Imported here: not every process that imports the room has a terminal.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("generating", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
