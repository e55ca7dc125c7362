"""`weft serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from weft.base.errors import UnsupportedError
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.model.embedded import EMBEDDED_MODEL_NAME, embedded_model_path
from weft.serve.adapter_api import AdapterConfig, LoraModule
from weft.serve.api import ApiConfig
from weft.serve.api_keys import ApiKeys
from weft.serve.data_dir import hold_data_dir
from weft.serve.engine_client import EngineClient
from weft.serve.engine_config import EngineConfig
from weft.serve.request_factory import RequestLimits
from weft.serve.server import ServerConfig, StoreConfig, run_server

_SERVER = "Server"
_ENGINE = "Engine"
_FINETUNING = "Finetuning"
_LIMITS = "Limits of one request"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _option(text: str, panel: str) -> object:
    return typer.Option(help=text, rich_help_panel=panel)


@app.command(name="serve")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Model directory or hub id; without one, the embedded model"),
    ] = None,
    host: Annotated[str, _option("Address to listen on", _SERVER)] = "127.0.0.1",
    port: Annotated[int, _option("Port to listen on; 0 chooses a free one", _SERVER)] = 8000,
    served_model_name: Annotated[
        list[str] | None, _option("Name in requests; may be given several times", _SERVER)
    ] = None,
    api_key: Annotated[
        list[str] | None, _option("Key that callers must send; may be given several times", _SERVER)
    ] = None,
    api_keys: Annotated[
        Path | None,
        _option("File of keys: lines, or JSON from key to tenant, priority, weight", _SERVER),
    ] = None,
    max_waiting: Annotated[
        int, _option("Answers that may wait; beyond them requests get 429", _SERVER)
    ] = 1024,
    allow_unknown_params: Annotated[
        bool, _option("Warn of unknown parameters instead of refusing them", _SERVER)
    ] = False,
    data_dir: Annotated[
        Path | None,
        _option(
            "Directory for what the server keeps: files, finetuning jobs and adapters, server.json "
            "while it runs, and the trace; without one, nothing outlives the server",
            _SERVER,
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        _option("sqlite:// or postgresql://; default: SQLite in --data-dir", _SERVER),
    ] = None,
    lora_modules: Annotated[
        list[str] | None,
        _option("Adapter to serve: name=path; may be given several times", _SERVER),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        _option("Directory below which requests may load adapters; default: none may", _SERVER),
    ] = None,
    access_log: Annotated[bool, _option("Log every request", _SERVER)] = False,
    dtype: Annotated[str, _option("auto, float32, bfloat16, float16 or float64", _ENGINE)] = "auto",
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N", _ENGINE)] = "auto",
    max_model_len: Annotated[
        int | None, _option("Tokens of prompt and answer together; default: the model's", _ENGINE)
    ] = None,
    max_num_seqs: Annotated[int | None, _option("Answers that run at once", _ENGINE)] = None,
    max_num_batched_tokens: Annotated[
        int | None, _option("Tokens of one iteration", _ENGINE)
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, _option("Memory of the KV cache; default: a share of what is free", _ENGINE)
    ] = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep and share the KV cache of equal prefixes",
            rich_help_panel=_ENGINE,
        ),
    ] = True,
    seed: Annotated[int, _option("Of requests that bring none", _ENGINE)] = 0,
    num_threads: Annotated[int | None, _option("CPU threads of the engine", _ENGINE)] = None,
    tensor_parallel_size: Annotated[
        int, _option("Devices a layer is split over; 1 is supported", _ENGINE)
    ] = 1,
    trace: Annotated[
        Path | None,
        _option(
            "Write a Perfetto trace of every iteration to this file (in --data-dir, if given) "
            "when the server ends",
            _ENGINE,
        ),
    ] = None,
    policy: Annotated[
        FinetunePolicy, _option("How finetuning shares the iterations", _FINETUNING)
    ] = FinetunePolicy.COSERVE,
    slo_tpot_ms: Annotated[
        float | None,
        _option("Time per output token that requests are promised; default: by model", _FINETUNING),
    ] = None,
    slo_ttft_ms: Annotated[
        float | None,
        _option("Time to first token that requests are promised; default: by model", _FINETUNING),
    ] = None,
    step_times: Annotated[
        str,
        _option(
            "Where predictions of iterations start: auto measures this model once, for a few "
            "seconds, and keeps it in the cache directory; off learns while it serves; or a file "
            "that weft profile wrote",
            _FINETUNING,
        ),
    ] = "auto",
    max_iteration_ms: Annotated[
        float,
        _option("Longest iteration with finetuning, so that arrivals wait no longer", _FINETUNING),
    ] = 100.0,
    finetune_min_share: Annotated[
        float, _option("Share of the time that finetuning gets at any load", _FINETUNING)
    ] = 0.0,
    memory_budget: Annotated[
        int | None,
        _option("Bytes beside the weights: KV cache, adapters and finetuning jobs", _FINETUNING),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        _option(
            "Optimizer steps between a job's checkpoints; default: 1, or more where writing one "
            "would cost over 2 % of the time",
            _FINETUNING,
        ),
    ] = None,
    record_windows: Annotated[
        Path | None,
        _option("Directory for the windows of every job, to replay them", _FINETUNING),
    ] = None,
    max_body_bytes: Annotated[int, _option("Size of the body", _LIMITS)] = 16 * 2**20,
    max_file_bytes: Annotated[int, _option("Size of an uploaded file", _LIMITS)] = 128 * 2**20,
    max_prompts: Annotated[int, _option("Prompts of one completions request", _LIMITS)] = 1024,
    max_prompt_tokens: Annotated[
        int | None, _option("Tokens of a prompt; default: what the context holds", _LIMITS)
    ] = None,
    max_choices: Annotated[int, _option("n", _LIMITS)] = 128,
    max_logprobs: Annotated[int, _option("logprobs and prompt_logprobs", _LIMITS)] = 20,
    max_stop: Annotated[int, _option("Stop strings", _LIMITS)] = 16,
) -> None:
    """Serve a model with an OpenAI-compatible API."""
    if tensor_parallel_size != 1:
        raise UnsupportedError(
            f"--tensor-parallel-size is {tensor_parallel_size}, which is not supported; supported "
            "is 1"
        )
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    names = tuple(served_model_name or (model or EMBEDDED_MODEL_NAME,))
    config = ServerConfig(
        host=host,
        port=port,
        access_log=access_log,
        engine=EngineConfig(
            model=model or str(embedded_model_path()),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            num_threads=num_threads,
            trace_path=None if trace is None else str((data_dir or Path()) / trace),
            finetune=FinetuneConfig(
                policy=policy,
                slo_tpot_s=None if slo_tpot_ms is None else slo_tpot_ms / 1e3,
                slo_ttft_s=None if slo_ttft_ms is None else slo_ttft_ms / 1e3,
                max_iteration_s=max_iteration_ms / 1e3,
                min_share=finetune_min_share,
            ),
            memory_budget_bytes=memory_budget,
            step_times=step_times,
            record_windows=None if record_windows is None else str(record_windows),
        ),
        store=StoreConfig(
            directory=data_dir, database_url=database_url, checkpoint_every=checkpoint_every
        ),
        api=ApiConfig(
            model_names=names,
            keys=ApiKeys.load(api_key or (), api_keys),
            limits=RequestLimits(
                max_body_bytes=max_body_bytes,
                max_file_bytes=max_file_bytes,
                max_prompts=max_prompts,
                max_prompt_tokens=max_prompt_tokens,
                max_choices=max_choices,
                max_logprobs=max_logprobs,
                max_stop=max_stop,
            ),
            max_waiting=max_waiting,
            allow_unknown_params=allow_unknown_params,
            adapters=AdapterConfig(
                modules=tuple(LoraModule.parse(text) for text in lora_modules or ()),
                root=adapter_root,
            ),
        ),
    )
    raise typer.Exit(_run(config, data_dir))


def main(argv: list[str]) -> int:
    """Parse and run; returns the exit code."""
    try:
        app(args=argv, prog_name="weft serve")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _run(config: ServerConfig, data_dir: Path | None) -> int:
    name = config.api.model_names[0]
    if data_dir is None:
        return run_server(config, on_ready=lambda url, client: _announce(url, name, client))
    with hold_data_dir(data_dir) as held:

        def on_ready(url: str, client: EngineClient) -> None:
            held.announce(url=url, model=name)
            _announce(url, name, client)

        return run_server(config, on_ready=on_ready)


def _announce(url: str, name: str, client: EngineClient) -> None:
    info = client.info
    print(
        f"weft serves {name} at {url}/v1\n"
        f"  {info.dtype} on {info.device}, context {info.max_model_len} tokens, "
        f"{info.max_num_seqs} answers at once, KV cache {info.kv_cache_bytes / 2**20:.0f} MiB",
        file=sys.stderr,
        flush=True,
    )
