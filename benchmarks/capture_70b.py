"""Capture of transformers' LlamaForCausalLM, 80 layers, 70 B shape: seconds, memory, exactness.

    python benchmarks/capture_70b.py [--json]

Target: under 60 s and 4 GiB; FLOP and parameters within 1 % of the closed formula. The module lives
on the meta device; nothing is downloaded.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time

HIDDEN, FFN, KV, VOCAB, LAYERS, SEQ = 8192, 28672, 1024, 128256, 80, 2048


def main() -> None:
    """Capture once and print one row a figure."""
    import torch
    import transformers

    from weft.graph.coarsen import coarsen
    from weft.model.zoo.registry import load

    model = load(
        "llama",
        num_layers=LAYERS,
        hidden=HIDDEN,
        ffn_hidden=FFN,
        num_heads=64,
        num_kv_heads=8,
        vocab=VOCAB,
        seq=SEQ,
    )
    started = time.perf_counter()
    graph = model.graph()
    capture_s = time.perf_counter() - started
    blocks = coarsen(graph)
    coarsen_s = time.perf_counter() - started - capture_s
    weights = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * FFN
    flops = LAYERS * (2 * SEQ * weights + 4 * SEQ * SEQ * HIDDEN) + 2 * SEQ * HIDDEN * VOCAB
    parameters = LAYERS * (weights + 2 * HIDDEN) + 2 * VOCAB * HIDDEN + HIDDEN
    # ru_maxrss is in KiB on Linux.
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = [
        {"claim": "capture, seconds", "ours": capture_s, "target": 60.0},
        {"claim": "peak memory, GiB", "ours": peak_gib, "target": 4.0},
        {"claim": "coarsening to blocks, seconds", "ours": coarsen_s},
        {"claim": "operators", "ours": len(graph.ops)},
        {"claim": "blocks", "ours": len(blocks.ops)},
        {"claim": "forward FLOP / formula", "ours": graph.flops_forward / flops},
        {"claim": "backward FLOP / (2 x formula)", "ours": graph.flops_backward / (2 * flops)},
        {"claim": "parameters / formula", "ours": graph.num_parameters / parameters},
    ]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if "--json" in sys.argv[1:]:
        print(json.dumps({"rows": rows, "machine": platform.machine(), "versions": versions}))
        return
    print(f"{platform.machine()}, {versions}")
    for row in rows:
        target = f"  (target {row['target']})" if "target" in row else ""
        print(f"{row['claim']:32} {row['ours']:.5g}{target}")


if __name__ == "__main__":
    main()
