"""Train a small Llama on the Python standard library with two ranks, and export it for serving.

Usage: python examples/train_stdlib_gpt.py --out my-gpt [--steps N]

The result is a Hugging Face directory: `weft serve my-gpt` loads it, and so does transformers.
The defaults take a few minutes on two cores and give a poor model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from local_ranks import ADAMW, local_devices, newest_checkpoint, show, weft
from stdlib_gpt import llama_config, model, prepare

from weft.plan.api import plan as make_plan
from weft.plan.constraints import FixedStage
from weft.plan.train_plan import TrainPlan
from weft.train.export import export_directory
from weft.train.run_dir import read_metrics

NUM_RANKS = 2
_TEMPLATE = "{%- for message in messages %}{{ message['content'] }}\n{% endfor %}"
_SETTINGS = (
    '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", '
    '"eos_token": "<|eos|>", "pad_token": "<|pad|>"}\n'
)


def main() -> None:
    """Prepare, plan, train, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--max-files", type=int, default=None, help="use only the first files")
    parser.add_argument("--run-dir", type=Path, default=None, help="keep the run here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        train_and_export(arguments, arguments.run_dir or Path(scratch) / "run", Path(scratch))


def train_and_export(arguments: argparse.Namespace, run_dir: Path, scratch: Path) -> None:
    """All of it; `scratch` holds the tokens."""
    sizes = {name: getattr(arguments, name) for name in ("vocab", "hidden", "layers", "length")}
    tokens = scratch / "tokens"
    count = prepare(
        tokens, vocab=sizes["vocab"], length=sizes["length"], max_files=arguments.max_files
    )
    print(f"{count} tokens")
    plan = two_stages(arguments.batch, sizes)
    show(plan)
    planned = scratch / "plan.json"
    planned.write_text(plan.to_json())
    options = [part for name, value in sizes.items() for part in ("--option", f"{name}={value}")]
    weft(
        *("train", str(planned), "--module", "stdlib_gpt:model", *options),
        *("--data", "stdlib_gpt:data", "--data-option", f"path={tokens}"),
        *("--steps", str(arguments.steps), "--run-dir", str(run_dir)),
        *("--lr", "3e-3", "--schedule", "cosine", "--warmup", str(arguments.steps // 10)),
        *("--clip-norm", "1.0", "--weight-decay", "0.01"),
    )
    loss = read_metrics(run_dir / "metrics.jsonl")[-1]["validation_loss"]
    print(f"held-out loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}")
    config = llama_config(**sizes)
    export_directory(
        newest_checkpoint(run_dir),
        arguments.out,
        config={**config.to_dict(), "use_cache": True, "dtype": "float32"},
        files=(tokens / "tokenizer.json",),
    )
    (arguments.out / "tokenizer_config.json").write_text(_SETTINGS)
    (arguments.out / "chat_template.jinja").write_text(_TEMPLATE)
    print(f"weft serve {arguments.out}")


def two_stages(batch_size: int, sizes: dict[str, int]) -> TrainPlan:
    """A chain of two stages, half of the layers in each; the tied embeddings live on both ends."""
    with torch.device("meta"):
        graph = model(**sizes).graph()
    ids = [op.id for op in graph.ops]
    second = f"model.layers.{sizes['layers'] // 2}."
    border = next(i for i, op_id in enumerate(ids) if op_id.startswith(second))
    return make_plan(
        graph,
        local_devices(NUM_RANKS),
        batch_size=batch_size,
        method="spp",
        training=ADAMW,
        micro_batches=(max(1, batch_size // 4),),
        constraints=[FixedStage(ops=tuple(ids[:border]), num_devices=1)],
    )


if __name__ == "__main__":
    main()
