"""Handwritten digits and their captions, for two towers: the model and the data by name.

The images are the 1797 of scikit-learn (8 x 8 grey values); a caption is a sentence around a
number word. `weft train --module digits_towers:model --data digits_towers:data` finds both.
Shapes: B batch, S caption length, E embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from weft.model.zoo.clip import clip
from weft.model.zoo.registry import ZooModel
from weft.train.data import TrainData

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINED_CAPTIONS = (
    "a handwritten {}",
    "a picture of the digit {}",
    "the number {}",
    "a {} written by hand",
    "this digit is a {}",
)
HELD_OUT_CAPTION = "a picture of a handwritten {}"
"""The sentence of the zero-shot test; no image was trained with it."""

_SENTENCES = " ".join((*TRAINED_CAPTIONS, HELD_OUT_CAPTION)).replace("{}", "").split()
_WORDS = ("<pad>", *sorted({*_SENTENCES, *NUMBERS}))
_ID = {word: i for i, word in enumerate(_WORDS)}
_LONGEST = 6
_HELD_OUT_EVERY = 5


def model(hidden: int = 128, image_layers: int = 4, text_layers: int = 4) -> ZooModel:
    """An image Transformer over 2 x 2 patches, a caption Transformer, one contrastive loss."""
    towers = clip(
        image=8,
        patch=2,
        image_hidden=hidden,
        image_layers=image_layers,
        image_heads=4,
        vocab=len(_WORDS),
        seq=_LONGEST,
        text_hidden=hidden,
        text_layers=text_layers,
        text_heads=4,
        embedding=64,
    )
    return ZooModel(
        name="digit-towers",
        module=towers.module,
        example_inputs=towers.example_inputs,
        targets=(torch.zeros(2, dtype=torch.long),),
        loss=same_digit_loss,
        batch_size=64,
    )


def same_digit_loss(similarity_BB: Tensor, digit_B: Tensor) -> Tensor:
    """CLIP's loss within the micro-batch; every caption of an image's digit is right for it."""
    right_BB = (digit_B[:, None] == digit_B[None, :]).to(similarity_BB.dtype)
    wanted_BB = right_BB / right_BB.sum(1, keepdim=True)
    images = -(wanted_BB * functional.log_softmax(similarity_BB, 1)).sum(1).mean()
    texts = -(wanted_BB * functional.log_softmax(similarity_BB.t(), 1)).sum(1).mean()
    return (images + texts) / 2


def encode(caption: str) -> list[int]:
    """Word ids, padded on the left: the caption tower reads the last position."""
    ids = [_ID[word] for word in caption.split()]
    return [_ID["<pad>"]] * (_LONGEST - len(ids)) + ids


def data(seed: int = 0) -> TrainData:
    """Four fifths of the images with a caption each, and the others for validation."""
    image, digit = _digits()
    held = np.arange(len(digit)) % _HELD_OUT_EVERY == 0
    return TrainData(
        **_columns(image[~held], digit[~held], seed),
        validation=TrainData(**_columns(image[held], digit[held], seed + 1)),
    )


def held_out() -> tuple[Tensor, Tensor]:
    """Images (B, 3, 8, 8) that training never saw, and their digits (B,)."""
    image, digit = _digits()
    held = np.arange(len(digit)) % _HELD_OUT_EVERY == 0
    return torch.from_numpy(image[held]), torch.from_numpy(digit[held])


def class_captions() -> Tensor:
    """Ids (10, S) of the held-out sentence about every number."""
    return torch.tensor([encode(HELD_OUT_CAPTION.format(number)) for number in NUMBERS])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    grey = (found.images / 16.0).astype(np.float32)[:, None]
    return np.repeat(grey, 3, axis=1), found.target.astype(np.int64)


def _columns(image: np.ndarray, digit: np.ndarray, seed: int) -> dict[str, tuple[np.ndarray, ...]]:
    drawn = np.random.default_rng(seed).integers(len(TRAINED_CAPTIONS), size=len(digit))
    ids = [
        encode(TRAINED_CAPTIONS[sentence].format(NUMBERS[number]))
        for sentence, number in zip(drawn, digit, strict=True)
    ]
    return {"inputs": (image, np.array(ids, np.int64)), "targets": (digit,)}
