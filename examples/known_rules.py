"""Data whose best possible loss is known: clicks for DLRM, drug responses for CANDLE-Uno.

The rule that makes the targets is linear in what each branch sees, plus noise; a model that learns
all of it is left with the noise. Shapes: B samples, W features, N ids in a bag.
"""

from __future__ import annotations

import numpy as np

from weft.train.data import TrainData

RESPONSE_NOISE = 0.3


def clicks(
    num_samples: int = 20480,
    num_dense: int = 2,
    num_sparse: int = 2,
    width: int = 32,
    num_entries: int = 50,
    bag_size: int = 4,
    seed: int = 0,
) -> TrainData:
    """DLRM's inputs, and clicks drawn with probability sigmoid(rule)."""
    inputs, logit_B, draw = _clicks(
        num_samples, num_dense, num_sparse, width, num_entries, bag_size, seed
    )
    clicked_B = (draw.random(num_samples) < _sigmoid(logit_B)).astype(np.float32)
    return _split(inputs, clicked_B)


def least_click_loss(**options: int) -> float:
    """The cross-entropy of the validation clicks under the rule's own probabilities."""
    options = {"num_samples": 20480, "num_dense": 2, "num_sparse": 2, "width": 32} | options
    options = {"num_entries": 50, "bag_size": 4, "seed": 0} | options
    _, logit_B, draw = _clicks(**options)
    clicked_B = draw.random(options["num_samples"]) < _sigmoid(logit_B)
    signed_B = np.where(clicked_B, logit_B, -logit_B)[-_num_held(options["num_samples"]) :]
    return float(np.log1p(np.exp(-signed_B)).mean())


def responses(
    num_samples: int = 20480, num_branches: int = 3, width: int = 32, seed: int = 0
) -> TrainData:
    """CANDLE-Uno's inputs, and a response with noise of standard deviation RESPONSE_NOISE."""
    draw = np.random.default_rng(seed)
    features = [
        draw.standard_normal((num_samples, width)).astype(np.float32) for _ in range(num_branches)
    ]
    rule = [draw.standard_normal(width) / np.sqrt(width) for _ in features]
    response_B = sum(x_BW @ w for x_BW, w in zip(features, rule, strict=True))
    response_B = response_B + RESPONSE_NOISE * draw.standard_normal(num_samples)
    return _split(tuple(features), np.asarray(response_B, np.float32))


def _clicks(
    num_samples: int,
    num_dense: int,
    num_sparse: int,
    width: int,
    num_entries: int,
    bag_size: int,
    seed: int,
) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.random.Generator]:
    draw = np.random.default_rng(seed)
    dense = [
        draw.standard_normal((num_samples, width)).astype(np.float32) for _ in range(num_dense)
    ]
    sparse = [draw.integers(num_entries, size=(num_samples, bag_size)) for _ in range(num_sparse)]
    logit_B = np.zeros(num_samples)
    for x_BW in dense:
        logit_B += x_BW @ (2 * draw.standard_normal(width) / np.sqrt(width))
    for ids_BN in sparse:
        logit_B += draw.standard_normal(num_entries)[ids_BN].sum(1)
    return (*dense, *sparse), logit_B, draw


def _split(inputs: tuple[np.ndarray, ...], target_B: np.ndarray) -> TrainData:
    held = _num_held(len(target_B))
    return TrainData(
        inputs=tuple(column[:-held] for column in inputs),
        targets=(target_B[:-held],),
        validation=TrainData(
            inputs=tuple(column[-held:] for column in inputs), targets=(target_B[-held:],)
        ),
    )


def _num_held(num_samples: int) -> int:
    return num_samples // 5


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
