"""`python fake_server.py OPTIONS_JSON`: the whole server over the closed-form model."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve.fake_engine import write_model_directory
from weft.base.errors import WeftError
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.serve.adapter_api import AdapterConfig, LoraModule
from weft.serve.api import ApiConfig
from weft.serve.api_keys import ApiKeys
from weft.serve.engine_client import EngineClient
from weft.serve.engine_config import RUNTIME_BUILDER, EngineConfig
from weft.serve.request_factory import RequestLimits
from weft.serve.server import ServerConfig, StoreConfig, run_server

MODEL_NAME = "fake/model"


def main(options: dict[str, Any]) -> int:
    """Run it; prints one line `URL ENGINE_PID` when it is ready."""
    with tempfile.TemporaryDirectory() as directory:
        # A directory with weights runs on the real executor.
        given = options.get("model_dir")
        model = Path(given) if given else write_model_directory(Path(directory) / "model")
        fake = f"serve.fake_engine:{options.get('builder', 'build')}"
        config = ServerConfig(
            host=options.get("host", "127.0.0.1"),
            port=options.get("port", 0),
            store=StoreConfig(
                directory=Path(options["data_dir"]) if "data_dir" in options else None,
                database_url=options.get("database_url"),
                checkpoint_every=options.get("checkpoint_every", 1),
            ),
            engine=EngineConfig(
                model=str(model),
                builder=RUNTIME_BUILDER if given else fake,
                dtype="float32" if given else "auto",
                kv_cache_memory_bytes=2**22 if given else None,
                num_threads=1,
                max_num_seqs=options.get("max_num_seqs"),
                trace_path=options.get("trace_path"),
                memory_budget_bytes=options.get("memory_budget_bytes"),
                finetune=FinetuneConfig(
                    policy=FinetunePolicy(options.get("policy", "finetune-only"))
                ),
            ),
            api=ApiConfig(
                model_names=(MODEL_NAME, "alias"),
                keys=ApiKeys.load(options.get("api_keys", ()), options.get("key_file")),
                limits=RequestLimits(**options.get("limits", {})),
                max_waiting=options.get("max_waiting", 1024),
                allow_unknown_params=options.get("allow_unknown_params", False),
                adapters=AdapterConfig(
                    modules=tuple(map(LoraModule.parse, options.get("lora_modules", ()))),
                    root=Path(options["adapter_root"]) if "adapter_root" in options else None,
                ),
            ),
        )

        def announce(url: str, client: EngineClient) -> None:
            print(url, client.pid, flush=True)

        return run_server(config, on_ready=announce)


if __name__ == "__main__":
    try:
        sys.exit(main(json.loads(sys.argv[1])))
    except WeftError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
