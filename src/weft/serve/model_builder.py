"""Builds the executor of a model directory; the only module of the room that loads torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch

from weft.base.errors import ConfigError
from weft.cost.finetune_memory import FinetuneSetting, finetune_bytes
from weft.cost.fitted_step_time import VERSION, StepTimeProfile
from weft.cost.shapes import ModelShape, load_shape
from weft.engine.finetune import BackwardOrder, FinetuneJobSpec, OptimizerName
from weft.engine.finetune_limits import FinetuneMemory, FinetunePolicy
from weft.runtime.adapter_store import AdapterStore
from weft.runtime.build import BuiltModel, ExecutorConfig, build_executor
from weft.runtime.memory import free_memory_bytes
from weft.runtime.serve_profiler import processor_name, quick_profile, warm_up_finetuning
from weft.serve.engine_config import EngineConfig
from weft.serve.engine_core import BuiltExecutor
from weft.serve.step_times import AUTO, RefitFile, find_step_times

MAX_FINETUNE_SAMPLES = 8
"""In flight at once, over all jobs; short samples of one step share iterations."""
_MAX_KNOWN = 4096
_RESIDENT_SHARE = 0.25
"""Of what the cache leaves of the budget, for adapters on a device with memory of its own."""
_FREE_SHARE = 0.5
"""Of the memory that is free once the cache stands: what jobs get where nothing is said."""


def build(config: EngineConfig) -> BuiltExecutor:
    """Load the model and reserve its cache; raises as `runtime.build.build_executor`."""
    built = build_executor(
        ExecutorConfig(
            model=config.model,
            dtype=config.dtype,
            device=config.device,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            num_threads=config.num_threads,
            max_finetune_samples=MAX_FINETUNE_SAMPLES,
        )
    )
    resolved = built.resolved
    cache_bytes = resolved.kv_cache_memory_bytes
    if config.memory_budget_bytes is None:
        budget_bytes = int(_FREE_SHARE * free_memory_bytes(resolved.device))
    else:
        budget_bytes = config.memory_budget_bytes - cache_bytes
        if budget_bytes < 0:
            built.executor.close()
            raise ConfigError(
                f"memory_budget is {config.memory_budget_bytes} bytes, less than the KV cache "
                f"within it, {cache_bytes} bytes: raise it, or lower kv_cache_memory_bytes"
            )
    step_times = _step_times(config, built)
    return BuiltExecutor(
        executor=built.executor,
        model_path=str(resolved.model_path),
        max_model_len=resolved.max_model_len,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        eos_token_ids=built.generation.eos_token_ids,
        dtype=str(resolved.dtype).removeprefix("torch."),
        device=str(resolved.device),
        sampling_defaults=dict(built.generation.sampling),
        finetune_memory=finetune_memory(
            load_shape(str(resolved.model_path)),
            dtype=str(resolved.dtype).removeprefix("torch."),
            qk_norm=built.config.qk_norm,
            budget_bytes=budget_bytes,
            adapter_bytes=adapter_bytes(built.executor.adapters, resolved.device, budget_bytes),
        ),
        step_time=step_times.profile,
        refits=step_times.refits,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepTimes:
    profile: StepTimeProfile | None
    refits: RefitFile | None
    """Where the profile is the cache's own: a file that the user named is left as it is."""


def _step_times(config: EngineConfig, built: BuiltModel) -> _StepTimes:
    """A profile of this executor, measured here and now where none is known."""
    resolved, info = built.resolved, built.executor.info
    dtype = str(resolved.dtype).removeprefix("torch.")
    device = f"{processor_name(resolved.device)}, {torch.get_num_threads()} threads"

    context, batch_tokens = resolved.max_model_len, resolved.max_num_batched_tokens
    # An engine that never trains need not know how long that would take.
    finetunes = config.finetune.policy is not FinetunePolicy.INFERENCE_ONLY
    is_warm = not finetunes

    def measure() -> StepTimeProfile:
        nonlocal is_warm
        is_warm = True
        return quick_profile(
            built.executor,
            max_model_len=context,
            max_num_batched_tokens=batch_tokens,
            model=resolved.model_path.name,
            dtype=dtype,
            device=device,
            finetunes=finetunes,
        )

    settings = resolved.model_path / "config.json"
    key = {
        "weft": version("weft"),
        "format": VERSION,
        "config": settings.read_text(encoding="utf-8") if settings.exists() else "",
        "dtype": dtype,
        "device": f"{resolved.device} {device}",
        "max_model_len": context,
        "max_num_batched_tokens": batch_tokens,
        "max_num_seqs": info.max_num_seqs,
        "max_finetune_samples": info.max_finetune_samples,
        "finetunes": finetunes,
    }
    try:
        found = find_step_times(config.step_times, key=key, measure=measure)
        if found is not None and not is_warm:
            warm_up_finetuning(
                built.executor, max_model_len=context, max_num_batched_tokens=batch_tokens
            )
        refits = None
        if found is not None and config.step_times == AUTO:
            refits = RefitFile.beside(found, key=key)
        return _StepTimes(profile=found, refits=refits)
    except BaseException:
        built.executor.close()
        raise


def adapter_bytes(
    store: AdapterStore, device: torch.device, budget_bytes: int
) -> Callable[[], int]:
    """What adapters hold of a budget at an instant.

    On the CPU that is every adapter. Elsewhere a share of the budget is theirs for good: it bounds
    what is resident, and the rest stays in host memory, which is not the device's.
    """
    if device.type == "cpu":
        return lambda: store.size_bytes
    reserve_bytes = int(_RESIDENT_SHARE * budget_bytes)
    store.resident_bytes = reserve_bytes
    return lambda: reserve_bytes


def finetune_memory(
    shape: ModelShape,
    *,
    dtype: str,
    qk_norm: bool,
    budget_bytes: int,
    adapter_bytes: Callable[[], int] = lambda: 0,
) -> FinetuneMemory:
    """What jobs may take, and what each takes; keys and values are pages of the cache."""

    def setting(spec: FinetuneJobSpec, num_tokens: int) -> FinetuneSetting:
        return FinetuneSetting(
            dtype=dtype,
            seq_len=num_tokens,
            remat=spec.remat,
            qk_norm=qk_norm,
            optimizer_values=2 if spec.optimizer.name is OptimizerName.ADAMW else 1,
            is_window_major=spec.backward_order is BackwardOrder.WINDOW_MAJOR,
        )

    def job_bytes(spec: FinetuneJobSpec) -> int:
        found = finetune_bytes(shape, spec.adapter, setting(spec, 1))
        return found.adapter + found.gradients + found.optimizer

    known: dict[tuple[str, int], int] = {}

    def sample_bytes(spec: FinetuneJobSpec, num_tokens: int) -> int:
        key = (spec.id, num_tokens)
        if key not in known:
            if len(known) >= _MAX_KNOWN:
                known.clear()
            found = finetune_bytes(shape, spec.adapter, setting(spec, num_tokens))
            known[key] = (
                found.activations + found.accumulators + found.hidden_gradients + found.workspace
            )
        return known[key]

    return FinetuneMemory(
        budget_bytes=budget_bytes,
        job_bytes=job_bytes,
        sample_bytes=sample_bytes,
        adapter_bytes=adapter_bytes,
    )
