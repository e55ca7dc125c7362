"""Write a Llama checkpoint (safetensors) as GGUF: `convert_gguf.py MODEL_DIR OUT.gguf f32|bf16`.

Runs in llama.cpp's interpreter (needs numpy and gguf). The vocabulary is a placeholder, since the
benchmark feeds token ids. Rows of q and k are permuted, because ggml rotates neighbouring pairs
where Hugging Face rotates halves; norms stay float32, as llama.cpp's own converter keeps them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as float32, by the format's own header; float32 and bfloat16 are known."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            raw = file.read(end - begin)
            if entry["dtype"] == "F32":
                values = np.frombuffer(raw, np.float32)
            elif entry["dtype"] == "BF16":
                values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                raise ValueError(f"{name} is {entry['dtype']}; only F32 and BF16 are converted")
            yield name, values.reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """The tensor's name in llama.cpp's `llama` architecture."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[module]}.weight"


def interleave_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (head, half, pair) -> (head, pair, half)."""
    split = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_header(writer: gguf.GGUFWriter, config: dict[str, Any], num_heads_kv: int) -> None:
    """Hyperparameters and a vocabulary of placeholders."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(num_heads_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>".encode() for index in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * config["vocab_size"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def convert(model: Path, out: Path, dtype: str) -> None:
    """One GGUF file in float32 or bfloat16."""
    config = json.loads((model / "config.json").read_text())
    num_heads = config["num_attention_heads"]
    num_heads_kv = config.get("num_key_value_heads") or num_heads
    file_types = {"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_file_type(file_types[dtype])
    write_header(writer, config, num_heads_kv)
    for path in sorted(model.glob("*.safetensors")):
        for name, weight in read_safetensors(path):
            if name.endswith("q_proj.weight"):
                weight = interleave_halves(weight, num_heads)
            elif name.endswith("k_proj.weight"):
                weight = interleave_halves(weight, num_heads_kv)
            if dtype == "bf16" and weight.ndim == 2:
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(
                    gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind
                )
            else:
                writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
