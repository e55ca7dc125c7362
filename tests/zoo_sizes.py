"""Options that make each zoo model small enough to run in a test."""

from __future__ import annotations

from typing import Any

_TOWER = {"hidden": 32, "num_heads": 4}

SMALL: dict[str, dict[str, Any]] = {
    "mmt": {**_TOWER, "num_branches": 2, "num_layers": 2, "ffn_hidden": 64, "seq": 8},
    "case-study": {**_TOWER, "num_layers": 2, "ffn_hidden": 64, "seq": 8},
    "dlrm": {
        "num_dense": 2,
        "num_sparse": 2,
        "width": 32,
        "num_entries": 50,
        "embedding_width": 8,
        "bag_size": 4,
    },
    "candle-uno": {"num_branches": 3, "width": 32},
    "clip": {
        "image": 64,
        "image_hidden": 32,
        "image_layers": 2,
        "image_heads": 4,
        "vocab": 100,
        "seq": 12,
        "text_hidden": 32,
        "text_layers": 2,
        "text_heads": 4,
        "embedding": 16,
    },
    "unet": {"channels": 8, "num_levels": 2, "image": 16},
    "gpt": {**_TOWER, "num_layers": 2, "vocab": 100, "seq": 16},
    "llama": {
        **_TOWER,
        "num_layers": 2,
        "ffn_hidden": 64,
        "num_kv_heads": 2,
        "vocab": 100,
        "seq": 16,
    },
    "llava": {
        "vision_layers": 3,
        "vision_hidden": 32,
        "vision_ffn": 64,
        "vision_heads": 4,
        "image": 28,
        "text_layers": 2,
        "text_hidden": 32,
        "text_ffn": 64,
        "text_heads": 4,
        "vocab": 100,
        "text_seq": 8,
    },
}
