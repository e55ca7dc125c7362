"""The engine on one GPU against the card's own limits and transformers' continuous batching.

    PYTHONPATH=src python benchmarks/serve_cuda.py --json results.json

Weights are random (nothing is downloaded); the default shape is Llama-3.1-8B in bfloat16. Rows:
decode at batch 1, 64 and 256 against the bytes that a step must read over the measured copy
bandwidth; prefill of 2,048 tokens against its FLOP over the measured GEMM rate; decode and prefill
against transformers on the same card. `--device cpu --shape tiny` only checks that the script runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Row, compare, describe_machine, print_rows, write_json

from weft.base.clock import WallClock
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.loop import EngineLoop
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.model.config import ModelConfig
from weft.model.decoder import attention_shape
from weft.model.kernels.select import choose_kernels
from weft.model.weights import RandomSource, build_weights
from weft.runtime.device_context import create_context
from weft.runtime.kv_layout import kv_layout
from weft.runtime.torch_executor import TorchExecutor

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "rope_theta": 10000.0,
    },
}
PROMPT = 256
NEW = 128
PREFILL = 2048


def hf_config(shape: str) -> dict[str, Any]:
    """A transformers configuration of one shape, as a dictionary."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **SHAPES[shape],
    }


class Ours:
    """The production policy, loop and executor over random weights."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device, seqs: int) -> None:
        self.config = ModelConfig.from_dict(hf_config(shape))
        kernels = choose_kernels(attention_shape(self.config), dtype, device)
        source = RandomSource(seed=0, dtype=dtype, device=device)
        self.weights = build_weights(self.config, source, kernels.make_linear)
        layout = kv_layout(self.config, dtype)
        pages = 1 + max(seqs * layout.pages_for_sequence(PROMPT + NEW + 16, 8192), 600)
        context = create_context(
            self.config,
            self.weights,
            kernels,
            layout,
            num_pages=pages,
            max_model_len=4096,
            device=device,
        )
        self.executor = TorchExecutor(context, max_num_seqs=seqs)
        self._count = 0

    def run(self, num: int, prompt: int, new: int) -> list[float]:
        """Seconds of every iteration of `num` fresh requests, the prompts' own first."""
        settings = PolicyConfig(max_model_len=4096, max_num_batched_tokens=8192)
        policy = ContinuousBatching(settings, self.executor.info, WallClock())
        random = np.random.default_rng(self._count)
        for _ in range(num):
            tokens = random.integers(0, self.config.vocab_size, prompt).tolist()
            sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            name = str(self._count)
            policy.add(Request(id=name, prompt_token_ids=tuple(tokens), sampling=sampling))
            self._count += 1
        loop, walls = EngineLoop(policy, self.executor), []
        while loop.has_work:
            begin = time.perf_counter()
            loop.step()
            walls.append(time.perf_counter() - begin)
        return walls


class Peer:
    """transformers' continuous batching on the same shape."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoConfig, LlamaForCausalLM

        raw = hf_config(shape)
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(dtype).eval()
        self.vocab_size = config.vocab_size
        self._seed = 0

    def run(self, num: int, prompt: int, new: int) -> float:
        """Seconds for `num` fresh requests, prompts included."""
        from transformers import GenerationConfig

        self._seed += 1
        random = np.random.default_rng(10_000 + self._seed)
        inputs = random.integers(0, self.vocab_size, (num, prompt)).tolist()
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1)
        begin = time.perf_counter()
        self.model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
        return time.perf_counter() - begin


def best_s(work: Callable[[], object], device: torch.device, runs: int = 10) -> float:
    """Least seconds of a piece of work, the device idle before and after."""
    walls: list[float] = []
    for _ in range(runs + 2):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        walls.append(time.perf_counter() - begin)
    return min(walls[2:])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes/s of a large copy, read and written bytes both counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_s(lambda: target.copy_(source), device)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / best_s(lambda: left @ right, device)


def decode_bytes(ours: Ours, batch: int, context: int, itemsize: int) -> float:
    """Bytes a decode step must read: all weights but the embedding, and the rows' caches."""
    config = ours.config
    weights = ours.weights.size_bytes - ours.weights.embedding.size_bytes
    cache = 2 * config.kv_size * config.num_layers * context * itemsize
    return weights + batch * cache


def prefill_flop(config: ModelConfig, tokens: int) -> float:
    """FLOP of a prompt: linears, causal attention, and one row of logits."""
    head = config.vocab_size * config.hidden_size
    linears = config.num_parameters - 2 * head
    attention = 2 * config.query_size * tokens * tokens * config.num_layers
    return 2.0 * linears * tokens + attention + 2.0 * head


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Measure everything, ours and peer in turns."""
    device, dtype = torch.device(args.device), torch.bfloat16
    if device.type == "cpu":
        dtype = torch.float32
    ours = Ours(args.shape, dtype, device, max(args.batches))
    peer = None if args.no_peer else Peer(args.shape, dtype, device)
    small = device.type == "cpu"
    bandwidth = copy_bandwidth(device, 2**26 if small else 2**32)
    rate = gemm_rate(device, dtype, 512 if small else 8192)
    rows: list[Row] = []
    ours.run(1, 64, 8)  # Kernels compile on first use.
    for batch in args.batches:
        steps, walls, peers = [], [], []
        for _ in range(args.rounds):
            run = ours.run(batch, PROMPT, NEW)
            steps.append(statistics.median(run[-NEW // 2 :]))
            walls.append(sum(run))
            if peer is not None:
                peers.append(peer.run(batch, PROMPT, NEW))
        bound = decode_bytes(ours, batch, PROMPT + 3 * NEW // 4, dtype.itemsize) / bandwidth
        bounds = [bound] * len(steps)
        target = 0.8 if batch == 1 else None
        claim = f"decode step, batch {batch}, share of the copy bandwidth"
        rows.append(compare(claim, "s", steps, bounds, lower_is_better=True, target=target))
        if peers:
            claim = f"{batch} x ({PROMPT} in, {NEW} out) against transformers continuous batching"
            rows.append(compare(claim, "s", walls, peers, lower_is_better=True))
    prefills = [min(ours.run(1, PREFILL, 1)) for _ in range(args.rounds)]
    least = prefill_flop(ours.config, PREFILL) / rate
    claim = f"prefill of {PREFILL} tokens, share of the GEMM rate"
    limits = [least] * len(prefills)
    rows.append(compare(claim, "s", prefills, limits, lower_is_better=True, target=0.6))
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with torch.inference_mode():
        rows = rows_of(args)
    machine = describe_machine()
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    print_rows(rows, title=f"{args.shape} on {machine.get('gpu', machine['processor'])}")
    if args.json:
        write_json(args.json, rows, machine)


if __name__ == "__main__":
    main()
