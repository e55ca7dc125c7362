"""Train a small Python-completing Llama from this machine's own standard library.

The embedded model was made this way. The defaults take about an hour on two cores with bf16 matrix
units; `--steps 200` gives a poor model in minutes. The result is a directory that Weft serves:

    python examples/train_embedded.py --out my-model
    weft serve my-model
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token streams of the standard library; the held-out files are a fiftieth of all."""

    train: Tensor
    held_out: Tensor


def library_files() -> tuple[list[Path], list[Path]]:
    """The standard library's sources without its tests: (train, held out by hash of the path)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Path] = []
    held_out: list[Path] = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if EXCLUDED.isdisjoint(inside.parts):
            digest = int(hashlib.sha1(inside.as_posix().encode()).hexdigest()[:8], 16)
            (held_out if digest % 50 == 0 else train).append(path)
    return train, held_out


def read(path: Path) -> str:
    """A source file as text; the few that are not UTF-8 are read with replacement characters."""
    return path.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    """A lossless byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((read(path) for path in files), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, files: list[Path]) -> Tensor:
    """All files as one stream of ids, each between BOS and EOS."""
    ids: list[int] = []
    for path in files:
        ids += [0, *tokenizer.encode(read(path)).ids, 1]
    return torch.tensor(ids, dtype=torch.long)


def windows(stream: Tensor, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Random windows of `length + 1` tokens, [batch, length + 1], for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        begins = torch.randint(0, len(stream) - length - 1, (batch,), generator=generator)
        yield torch.stack([stream[begin : begin + length + 1] for begin in begins.tolist()])


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token's successor; bf16 products, fp32 loss."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, length: int) -> float:
    """Mean loss over the held-out stream, cut in windows."""
    count = (len(stream) - 1) // length
    rows = torch.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)])
    losses = [loss_of(model, batch).item() * len(batch) for batch in rows.split(16)]
    return sum(losses) / count


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    held = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Warm-up, constant, then a linear fall over the last third of the steps."""
    optimizers = make_optimizers(model)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    batches = windows(corpus.train, arguments.length, arguments.batch, arguments.seed)
    begin = time.monotonic()
    for step in range(arguments.steps):
        left = (arguments.steps - step) / max(1, arguments.steps // 3)
        scale = min(1.0, (step + 1) / 20, left)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * scale
        loss = loss_of(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % arguments.report_every == 0 or step == arguments.steps - 1:
            took = time.monotonic() - begin
            print(f"step {step:5d}  loss {loss.item():.3f}  {took:6.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, context: int) -> None:
    """Write a Hugging Face directory in bfloat16, with a tokenizer and a plain chat template."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = (
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", '
        f'"eos_token": "<|eos|>", "pad_token": "<|pad|>", "model_max_length": {context}}}\n'
    )
    (out / "tokenizer_config.json").write_text(settings)
    template = "{%- for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (out / "chat_template.jinja").write_text(template)


def main() -> None:
    """Parse, train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--max-files", type=int, default=None, help="use only the first files")
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    train_files, held_out_files = library_files()
    train_files = train_files[: arguments.max_files]
    tokenizer = train_tokenizer(train_files, arguments.vocab)
    corpus = Corpus(
        train=encode(tokenizer, train_files), held_out=encode(tokenizer, held_out_files)
    )
    print(f"{len(train_files)} files, {len(corpus.train)} tokens")
    context = 2 * arguments.length
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=max(1, arguments.hidden // 64),
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    train(model, corpus, arguments)
    model.eval()
    if arguments.steps:
        loss = held_out_loss(model, corpus.held_out, arguments.length)
        print(f"held-out loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}")
    save(model, tokenizer, arguments.out, context)
    print(f"weft serve {arguments.out}")


if __name__ == "__main__":
    main()
