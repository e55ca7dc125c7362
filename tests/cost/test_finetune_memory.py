"""The memory report against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft.base.errors import ConfigError
from weft.cost.finetune_memory import (
    SHEET_BYTES,
    FinetuneSetting,
    ablation,
    finetune_bytes,
)
from weft.cost.shapes import MODEL_SHAPES
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.graph.pruning import Remat

LLAMA_8B, LLAMA_70B = MODEL_SHAPES["llama-3.1-8b"], MODEL_SHAPES["llama-3.1-70b"]
DOWN = AdapterSpec(rank=16, target_modules=("down_proj",))


def test_the_sheets_bytes_a_token_for_lora_on_down_proj() -> None:
    """FlexLLM sheet §2.2: 2(2h + Hd + 2f) a token and layer; the lowest layer keeps act alone."""
    setting = FinetuneSetting(dtype="float16", seq_len=8192)
    job = finetune_bytes(LLAMA_8B, DOWN, setting)
    inner = 2 * (2 * 4096 + 4096 + 2 * 14336)
    assert job.activations == 8192 * (31 * inner + 2 * 14336)
    assert job.kv == 8192 * 32 * 2 * 2 * 1024
    assert job.gradients == 32 * 16 * (14336 + 4096) * 4
    assert job.adapter == job.gradients * 6 // 4  # masters, and what forward rows apply
    assert job.optimizer == 2 * job.gradients
    assert job.accumulators == 8192 * 2 * 1024 * 4


def test_keeping_layer_inputs_alone_is_one_hidden_state_a_layer() -> None:
    setting = FinetuneSetting(dtype="float16", seq_len=100, remat=Remat.LAYER_INPUT)
    job = finetune_bytes(LLAMA_8B, DOWN, setting)
    assert job.activations == 100 * 32 * 4096 * 2
    assert job.kv == 112 * 32 * 2 * 2 * 1024  # seven pages of 16


def test_layers_below_the_lowest_trained_one_keep_nothing() -> None:
    top = replace(DOWN, layers_to_transform=(31,))
    job = finetune_bytes(LLAMA_8B, top, FinetuneSetting(dtype="float16", seq_len=64))
    assert job.activations == 64 * 14336 * 2
    assert job.accumulators == 0  # nothing below attention is trained


def test_samples_in_flight_and_the_backwards_order_count() -> None:
    one = FinetuneSetting(dtype="bfloat16", seq_len=512)
    job, four = (
        finetune_bytes(LLAMA_8B, DOWN, replace(one, num_samples=number)) for number in (1, 4)
    )
    assert four.activations == 4 * job.activations
    assert four.adapter == job.adapter
    major = finetune_bytes(LLAMA_8B, DOWN, replace(one, is_window_major=True))
    assert major.accumulators == 31 * job.accumulators
    assert job.held == job.total - job.workspace


def test_float64_masters_are_float64() -> None:
    single, double = (
        finetune_bytes(LLAMA_8B, DOWN, FinetuneSetting(dtype=dtype, seq_len=16))
        for dtype in ("float32", "float64")
    )
    assert double.adapter == 2 * single.adapter


@pytest.mark.parametrize(
    ("kind", "targets", "column"),
    [
        (AdapterKind.LORA, ("down_proj",), 0),
        (AdapterKind.BOTTLENECK, ("self_attn", "mlp"), 1),
        (AdapterKind.IA3, ("k_proj", "v_proj", "down_proj"), 2),
    ],
)
def test_savings_in_all_lie_within_five_points_of_the_figure(
    kind: AdapterKind, targets: tuple[str, ...], column: int
) -> None:
    spec = AdapterSpec(kind=kind, rank=16, target_modules=targets)
    setting = FinetuneSetting(dtype="float16", seq_len=1024, window=64)
    rows = ablation(LLAMA_70B, spec, setting)
    assert [row.variant for row in rows] == list(SHEET_BYTES)
    bytes_of = [row.activation_bytes for row in rows]
    assert bytes_of == sorted(bytes_of, reverse=True)
    sheet = [SHEET_BYTES[row.variant][column] for row in rows]
    assert abs(rows[-1].saving - (1 - sheet[-1] / sheet[0])) < 0.05
    # No variant saves less than the figure by more than that either.
    for row, figure in zip(rows, sheet, strict=True):
        assert row.saving > 1 - figure / sheet[0] - 0.05


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len is 0"):
        FinetuneSetting(dtype="float32", seq_len=0)
