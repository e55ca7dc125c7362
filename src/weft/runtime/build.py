"""From a model directory and a few settings to an executor; every "auto" is resolved here, once."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.base.errors import ConfigError, ModelLoadError, OutOfMemoryError, UnsupportedError
from weft.engine.config import check_whole
from weft.model.config import ModelConfig
from weft.model.decoder import attention_shape
from weft.model.generation import GenerationDefaults
from weft.model.kernels.select import choose_kernels
from weft.model.loading import load_weights
from weft.model.tokenizer import Tokenizer
from weft.runtime.device_context import DeviceContext, create_context
from weft.runtime.kv_layout import PAGE_TOKENS, KvLayout, kv_layout
from weft.runtime.memory import format_bytes, free_memory_bytes, most_memory_bytes
from weft.runtime.torch_executor import TorchExecutor

_log = logging.getLogger(__name__)

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
"""vLLM's."""
_LOWEST = {
    "max_model_len": 2,  # one token to read and one to write
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "kv_cache_memory_bytes": 1,
    "num_threads": 1,
}
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
_FREE_SHARE = {"cpu": 0.4, "cuda": 0.88}
_CACHE_CAP_BYTES = {"cpu": 4 << 30, "cuda": 1 << 62}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorConfig:
    """What to load and how much of the machine to use; None and "auto" are resolved when built.

    Raises:
        ConfigError: a number is out of its range, or dtype or device is unknown.
        UnsupportedError: tensor_parallel_size > 1.
    """

    model: str
    """A model directory, or a hub id where a hub is reachable."""
    dtype: str = "auto"
    """float64, float32 (or float), bfloat16, float16 (or half), a torch dtype, or auto: the
    checkpoint's where the device is quick."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    num_threads: int | None = None
    """CPU threads; None leaves torch's choice, which OMP_NUM_THREADS sets."""
    tensor_parallel_size: int = 1
    max_finetune_samples: int = 0
    """Samples of finetuning jobs that may be in flight at once; 0 leaves jobs out."""

    def __post_init__(self) -> None:
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, lowest)
        if self.tensor_parallel_size != 1:
            raise UnsupportedError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, which is not supported; "
                "supported is 1"
            )
        name = str(self.dtype).removeprefix("torch.")
        object.__setattr__(self, "dtype", _DTYPE_ALIASES.get(name, name))
        if self.dtype != "auto" and self.dtype not in _DTYPES:
            raise ConfigError(f"dtype is {name!r}; it must be auto or one of {', '.join(_DTYPES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    """An `ExecutorConfig` with nothing left open."""

    model_path: Path
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int
    """Bytes of the arena."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltModel:
    """A loaded model, ready to run batches."""

    executor: TorchExecutor
    context: DeviceContext
    config: ModelConfig
    tokenizer: Tokenizer
    generation: GenerationDefaults
    resolved: ResolvedConfig


def build_executor(config: ExecutorConfig) -> BuiltModel:
    """Load a model and reserve its cache.

    Raises:
        ModelLoadError: the directory is missing, half-written or inconsistent.
        UnsupportedError: the model is of a kind that Weft does not run.
        ConfigError: max_model_len is beyond the model's context, or the device is not there.
        OutOfMemoryError: the cache cannot hold one sequence, or the memory not the cache; the
            message says how many bytes do.
    """
    path = resolve_model(config.model)
    model_config = ModelConfig.from_directory(path)
    _check_length(config, model_config)
    generation = GenerationDefaults.from_directory(path, model_config)
    tokenizer = Tokenizer.from_directory(path)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    kernels = choose_kernels(attention_shape(model_config), dtype, device)
    weights = load_weights(path, model_config, kernels.make_linear, dtype=dtype, device=device)
    layout = kv_layout(model_config, dtype)
    resolved = resolve_sizes(config, path, model_config, layout, device)
    context = create_context(
        model_config,
        weights,
        kernels,
        layout,
        num_pages=resolved.kv_cache_memory_bytes // layout.page_bytes,
        max_model_len=resolved.max_model_len,
        device=device,
    )
    return BuiltModel(
        executor=TorchExecutor(
            context,
            max_num_seqs=resolved.max_num_seqs,
            max_finetune_samples=config.max_finetune_samples,
        ),
        context=context,
        config=model_config,
        tokenizer=tokenizer,
        generation=generation,
        resolved=resolved,
    )


def resolve_model(model: str) -> Path:
    """A directory as it is; anything else that looks like a hub id is fetched, or found offline.

    Raises:
        ModelLoadError: neither a directory nor a hub id that can be had.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelLoadError(
            f"{model or repr(model)} is neither a model directory nor a hub id (owner/name)"
        )
    # Imported here: it is slow, and most models are directories.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelLoadError(
            f"{model} is no directory here, and the hub does not give it{offline}: {error}"
        ) from error


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Raises:
        ConfigError: the device is unknown or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def resolve_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """`auto` takes the checkpoint's, but float32 on a CPU that has no fast path for it."""
    if name != "auto":
        return _DTYPES[name]
    dtype = _DTYPES[checkpoint]
    if device.type == "cpu" and dtype is torch.float16:
        return torch.float32
    if device.type == "cpu" and dtype is torch.bfloat16 and not _has_fast_bfloat16():
        return torch.float32
    return dtype


def _has_fast_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _check_length(config: ExecutorConfig, model_config: ModelConfig) -> None:
    limit = model_config.max_context
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the model's context is {limit} tokens"
        )


def resolve_sizes(
    config: ExecutorConfig,
    path: Path,
    model_config: ModelConfig,
    layout: KvLayout,
    device: torch.device,
) -> ResolvedConfig:
    """Settle lengths and the size of the cache, once the weights are in place.

    A context too long for the memory at hand is cut, with a warning, where neither its length nor
    the memory was set.

    Raises:
        OutOfMemoryError: the cache cannot hold one sequence, or the memory not the cache.
    """
    max_model_len = config.max_model_len or model_config.max_context
    max_num_seqs = config.max_num_seqs or _MAX_NUM_SEQS[device.type]
    max_num_batched_tokens = config.max_num_batched_tokens or max(
        _MAX_NUM_BATCHED_TOKENS[device.type], max_num_seqs
    )
    num_samples = config.max_finetune_samples

    def pages_of(length: int) -> tuple[int, int]:
        """Of a request, and of a job's sample, which keeps what lies behind its windows too."""
        one = layout.pages_for_sequence(length, max_num_batched_tokens)
        return one, layout.pages_for_sequence(length, length) if num_samples else 0

    one, whole = pages_of(max_model_len)
    if config.kv_cache_memory_bytes is not None:
        num_pages = config.kv_cache_memory_bytes // layout.page_bytes
        most = most_memory_bytes(device)
        if config.kv_cache_memory_bytes > most:
            raise OutOfMemoryError(
                f"kv_cache_memory_bytes is {config.kv_cache_memory_bytes} "
                f"({format_bytes(config.kv_cache_memory_bytes)}); {device} has {most} bytes "
                f"({format_bytes(most)}) at most: lower it"
            )
    else:
        free = int(_FREE_SHARE[device.type] * free_memory_bytes(device))
        # More than all slots can fill would only be a larger prefix cache.
        full_bytes = (1 + max_num_seqs * one + num_samples * whole) * layout.page_bytes
        num_pages = min(free, _CACHE_CAP_BYTES[device.type], full_bytes) // layout.page_bytes
        # A sample must find room beside the longest request, or no job could ever start.
        if config.max_model_len is None and num_pages < 1 + one + whole:
            max_model_len = _longest(
                lambda n: sum(pages_of(n)), num_pages, max_model_len, layout.page_bytes
            )
            one, _ = pages_of(max_model_len)
    if num_pages < 1 + one:
        _refuse_small_cache(config, max_model_len, num_pages, 1 + one, layout)
    return ResolvedConfig(
        model_path=path,
        dtype=layout.dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=num_pages * layout.page_bytes,
    )


def _longest(pages_of: Callable[[int], int], num_pages: int, context: int, page_bytes: int) -> int:
    """The longest sequence, in whole pages, that fits beside the null page; at least one page."""
    lengths = range(PAGE_TOKENS, context, PAGE_TOKENS)
    fitting = bisect_right(lengths, num_pages - 1, key=pages_of)
    longest = lengths[max(0, fitting - 1)]
    _log.warning(
        "max_model_len is %d instead of the model's %d: the KV cache has %s; set max_model_len or "
        "kv_cache_memory_bytes to choose",
        longest,
        context,
        format_bytes(num_pages * page_bytes),
    )
    return longest


def _refuse_small_cache(
    config: ExecutorConfig, max_model_len: int, num_pages: int, needed: int, layout: KvLayout
) -> None:
    needed_bytes = needed * layout.page_bytes
    if config.kv_cache_memory_bytes is None:
        have = f"there is room for {format_bytes(num_pages * layout.page_bytes)} of KV cache"
    else:
        have = f"kv_cache_memory_bytes is {config.kv_cache_memory_bytes}"
    raise OutOfMemoryError(
        f"{have}, too small for one sequence of max_model_len {max_model_len}: "
        f"{needed_bytes} bytes ({format_bytes(needed_bytes)}) would do, or a smaller max_model_len"
    )
