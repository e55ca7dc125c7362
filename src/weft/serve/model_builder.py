"""Builds the executor of a model directory; the only module of the room that loads torch."""

from __future__ import annotations

from weft.runtime.build import ExecutorConfig, build_executor
from weft.serve.engine_config import EngineConfig
from weft.serve.engine_core import BuiltExecutor


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
        )
    )
    resolved = built.resolved
    return BuiltExecutor(
        executor=built.executor,
        model_path=str(resolved.model_path),
        max_model_len=resolved.max_model_len,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        eos_token_ids=built.generation.eos_token_ids,
        dtype=str(resolved.dtype).removeprefix("torch."),
        device=str(resolved.device),
        sampling_defaults=dict(built.generation.sampling),
    )
