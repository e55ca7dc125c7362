"""Who can be measured: each engine's worker, interpreter, settings and converted checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_models import BenchModel, convert_for

MAX_REQUEST_LEN = 768
"""Prompt and answer of the longest request of any workload, with some room."""
MEAN_REQUEST_LEN = 512
"""Likewise of the mean one."""
OURS = "weft"
MACHINE = "machine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One engine as the benchmark knows it."""

    name: str
    module: str
    interpreter_variable: str = ""
    """Environment variable that names its Python; empty: the Python that runs the benchmark."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    no_dtype_reason: str = ""
    converter: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)


ENGINES: tuple[Engine, ...] = (
    Engine(name=OURS, module="weft_worker"),
    # An empty search path hides every compiler: what a machine without one gets.
    Engine(
        name="weft-nocompiler",
        module="weft_worker",
        environment={"PATH": "", "CC": "", "CXX": ""},
    ),
    Engine(
        name="transformers",
        module="transformers_worker",
        interpreter_variable="WEFT_PEER_TRANSFORMERS",
    ),
    Engine(
        name="transformers-cb",
        module="transformers_worker",
        interpreter_variable="WEFT_PEER_TRANSFORMERS",
        spec={"mode": "continuous"},
    ),
    Engine(name="vllm", module="vllm_worker", interpreter_variable="WEFT_PEER_VLLM"),
    Engine(
        name="llama.cpp",
        module="llamacpp_worker",
        interpreter_variable="WEFT_PEER_LLAMACPP",
        converter="convert_gguf.py",
    ),
    Engine(
        name="onnxruntime-genai",
        module="ortgenai_worker",
        interpreter_variable="WEFT_PEER_ORTGENAI",
        dtypes=("float32",),
        no_dtype_reason="its CPU execution provider has no bfloat16 kernels for this model",
        converter="convert_onnx.py",
    ),
)
MACHINE_ENGINE = Engine(name=MACHINE, module="machine_worker")


def find_interpreter(engine: Engine, given: Mapping[str, str]) -> str:
    """The Python that runs `engine`: from `--peer`, else its variable, else our own.

    Raises:
        LookupError: none is named, or the one named does not exist.
    """
    variable = engine.interpreter_variable
    named = given.get(engine.name) or (os.environ.get(variable) if variable else sys.executable)
    if not named and variable == "WEFT_PEER_TRANSFORMERS":
        named = sys.executable
    if not named:
        raise LookupError(f"no interpreter: set {variable} or pass --peer {engine.name}=PYTHON")
    found = shutil.which(named)
    if found is None:
        raise LookupError(f"interpreter {named} does not exist or is not executable")
    return found


def worker_environment(engine: Engine, interpreter: str, num_threads: int) -> dict[str, str]:
    """Threads, and no reaching for the network."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine.name == "vllm":
        environment |= _vllm_environment(interpreter, num_threads)
    else:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            environment[name] = str(num_threads)
    return environment | dict(engine.environment)


def _vllm_environment(interpreter: str, num_threads: int) -> dict[str, str]:
    """What made vLLM fastest here: every core, its own thread binding, Intel's OpenMP preloaded.

    It counts its threads by the binding and warns of OMP_NUM_THREADS; it depends on intel-openmp
    and asks for it in LD_PRELOAD (about a quarter more tokens/s at batch 1 and 8 on two cores).
    """
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    # Not resolved: a virtual environment's interpreter is a link out of it.
    openmp = Path(interpreter).parents[1] / "lib" / "libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    return environment


def engine_spec(
    engine: Engine,
    model: BenchModel,
    dtype: str,
    *,
    interpreter: str,
    num_threads: int,
    max_num_seqs: int,
    cache: Path,
) -> dict[str, Any]:
    """What the worker's `load` receives; converts the checkpoint where the engine needs that."""
    max_model_len = min(4096, model.config["max_position_embeddings"])
    # Every paged engine gets the same cache, enough for any batch here, so that nobody preempts
    # and all of them fit in memory together.
    num_cache_tokens = max(max_num_seqs * MEAN_REQUEST_LEN, max_model_len + MEAN_REQUEST_LEN)
    spec: dict[str, Any] = {
        "model": str(model.path),
        "dtype": dtype,
        "num_threads": num_threads,
        "max_num_seqs": max_num_seqs,
        "max_request_len": MAX_REQUEST_LEN,
        "max_model_len": max_model_len,
        "num_cache_tokens": num_cache_tokens,
        "kv_cache_memory_bytes": num_cache_tokens * model.kv_bytes_per_token(dtype),
        **engine.spec,
    }
    log = cache / "logs" / f"{engine.converter}.log"
    if engine.converter == "convert_gguf.py":
        kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        out = cache / "gguf" / f"{model.name}-{kind}.gguf"
        artifact = convert_for(engine.converter, interpreter, model, out, [kind], log)
        spec["artifact"] = str(artifact)
    elif engine.converter == "convert_onnx.py":
        kind = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        out = cache / "onnx" / f"{model.name}-{kind}-{num_threads}threads"
        arguments = [kind, str(num_threads)]
        artifact = convert_for(engine.converter, interpreter, model, out, arguments, log)
        spec["artifact"] = str(artifact)
    return spec
