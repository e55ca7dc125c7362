"""Models built by transformers from a configuration, and captured as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from weft.model.zoo.layers import token_cross_entropy, token_ids
from weft.model.zoo.registry import ZooModel

_IMAGE_TOKEN = 32000


def logits_loss(output: Any, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy of a transformers model's logits against every token's label."""
    return token_cross_entropy(output.logits, labels_BS)


def llama(
    num_layers: int = 32,
    hidden: int = 4096,
    ffn_hidden: int = 14336,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    vocab: int = 128256,
    seq: int = 2048,
) -> ZooModel:
    """transformers' LlamaForCausalLM; the defaults are Llama-3 8B's."""
    config = LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=ffn_hidden,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab,
        max_position_embeddings=seq,
        use_cache=False,
    )
    return ZooModel(
        name=f"llama-{num_layers}",
        module=LlamaForCausalLM(config),
        example_inputs=(token_ids(2, seq),),
        targets=(token_ids(2, seq),),
        loss=logits_loss,
        batch_size=256,
    )


def llava(
    vision_layers: int = 24,
    vision_hidden: int = 1024,
    vision_ffn: int = 4096,
    vision_heads: int = 16,
    image: int = 336,
    patch: int = 14,
    text_layers: int = 32,
    text_hidden: int = 4096,
    text_ffn: int = 11008,
    text_heads: int = 32,
    vocab: int = 32064,
    text_seq: int = 64,
    frozen_vision: bool = False,
) -> ZooModel:
    """transformers' LLaVA; the defaults are LLaVA-1.5 7B's (CLIP ViT-L/14-336, Vicuna 7B).

    Each sample is one image, whose patches stand first, and `text_seq` text tokens.
    `frozen_vision=True` trains the projector and the language model only.
    """
    num_patches = (image // patch) ** 2
    image_token = min(_IMAGE_TOKEN, vocab - 1)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=vision_ffn,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            hidden_size=text_hidden,
            intermediate_size=text_ffn,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            num_key_value_heads=text_heads,
            vocab_size=vocab,
            use_cache=False,
        ),
        image_token_index=image_token,
        image_seq_length=num_patches,
    )
    module = LlavaForConditionalGeneration(config)
    if frozen_vision:
        module.model.vision_tower.requires_grad_(False)
    ids = torch.cat(
        [torch.full((2, num_patches), image_token), torch.zeros(2, text_seq, dtype=torch.long)], 1
    )
    return ZooModel(
        name="llava",
        module=module,
        example_inputs={"input_ids": ids, "pixel_values": torch.zeros(2, 3, image, image)},
        targets=(token_ids(2, num_patches + text_seq),),
        loss=logits_loss,
        batch_size=128,
    )
