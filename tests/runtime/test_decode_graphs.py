"""Padded decode iterations give what unpadded ones give; the graphs themselves need CUDA."""

from __future__ import annotations

import pytest
import torch

from model.tiny_models import write_checkpoint
from weft.model.config import ModelConfig
from weft.model.decoder import attention_shape
from weft.model.forward_step import ForwardStep, GroupStep
from weft.model.kernels.torch_kernels import TorchKernels
from weft.model.loading import load_weights
from weft.runtime.decode_graphs import DecodeGraphs, eager_capture, graph_sizes
from weft.runtime.device_context import DeviceContext, create_context
from weft.runtime.kv_layout import kv_layout


@pytest.fixture(params=["llama3-gqa", "qwen2-mixed-windows"])
def context(request, tmp_path) -> DeviceContext:
    write_checkpoint(request.param, tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    kernels = TorchKernels(attention_shape(config))
    weights = load_weights(
        tmp_path, config, kernels.make_linear, dtype=torch.float64, device=torch.device("cpu")
    )
    layout = kv_layout(config, torch.float64)
    return create_context(config, weights, kernels, layout, num_pages=40, max_model_len=64)


def decode_step(context: DeviceContext, lengths: list[int]) -> ForwardStep:
    """One token for each of some sequences whose caches hold random numbers."""
    torch.manual_seed(3)
    positions = torch.tensor(lengths) - 1
    groups, first_page = [], 1
    for group in context.layout.groups:
        width = -(-max(lengths) // group.page_tokens)
        tables = torch.arange(first_page, first_page + len(lengths) * width, dtype=torch.int32)
        first_page += len(lengths) * width
        tables = tables.view(len(lengths), width)
        page = tables.gather(1, (positions // group.page_tokens)[:, None])[:, 0].long()
        groups.append(
            GroupStep(
                page_tables=tables,
                write_slots=page * group.page_tokens + positions % group.page_tokens,
                page_tokens=group.page_tokens,
                window=group.window,
            )
        )
    return ForwardStep(
        token_ids=torch.randint(0, context.config.vocab_size, (len(lengths),)),
        positions=positions,
        prefix_lens=torch.tensor(lengths, dtype=torch.int32),
        num_decodes=len(lengths),
        max_decode_context=max(lengths),
        chunks=(),
        groups=tuple(groups),
    )


def plain_logits(context: DeviceContext, step: ForwardStep) -> torch.Tensor:
    decoder = context.decoder
    return decoder.logits(decoder.forward(decoder.embed(step.token_ids), step, context.kv))


def test_padded_rows_change_nothing(context):
    for layer in context.kv:
        layer.keys.normal_()
        layer.values.normal_()
    pristine = context.arena.clone()
    graphs = DecodeGraphs(context, (1, 2, 4, 8), eager_capture)
    for lengths in ([5], [40, 3, 17], [9, 1, 2, 33, 21], [64]):
        step = decode_step(context, lengths)
        assert graphs.covers(step)
        context.arena.copy_(pristine)
        expected = plain_logits(context, step).clone()
        cache = context.arena.clone()
        context.arena.copy_(pristine)
        torch.testing.assert_close(graphs.run(step), expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (arena[1:].view(torch.float64) for arena in (context.arena, cache))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # Page 0 takes padding.


def test_too_many_rows_and_prompts_are_not_covered(context):
    graphs = DecodeGraphs(context, (1, 2), eager_capture)
    assert not graphs.covers(decode_step(context, [1, 2, 3]))


def test_sizes_end_at_the_most_rows():
    assert graph_sizes(1) == (1,)
    assert graph_sizes(6) == (1, 2, 4, 6)
    assert graph_sizes(16) == (1, 2, 4, 8, 16)
    assert graph_sizes(384)[-3:] == (256, 320, 384)
    assert list(graph_sizes(300)) == sorted(set(graph_sizes(300)))
