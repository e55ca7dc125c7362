"""Recorded functions: a replay gives what running would give, on any number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from weft.model.forward_step import ForwardStep, GroupStep, KvLayer, RopeRows, kv_layers
from weft.model.kernels.cpu_kernels import CpuKernels
from weft.model.kernels.cpu_record import record
from weft.model.kernels.cpu_team import KernelsUnavailableError, native_kernels
from weft.model.kernels.interface import AttentionShape
from weft.model.linear import make_linear

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-6)
HIDDEN, FFN, MAX_ROWS, PAGE_TOKENS = 64, 96, 9, 16

pytestmark = pytest.mark.skipif(
    native_kernels() is None, reason="this processor or platform has no native CPU kernels"
)


class Block:
    """A decoder layer with an embedding and RoPE tables, on fixed buffers of MAX_ROWS rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=draw) / shape[-1] ** 0.5).to(dtype)

        self.kernels = CpuKernels(SHAPE)
        self.embedding = make_linear(random(50, HIDDEN))
        self.qkv = make_linear(random(SHAPE.query_size + 2 * SHAPE.kv_size, HIDDEN))
        self.output = make_linear(random(HIDDEN, SHAPE.query_size))
        self.gate_up = make_linear(random(2 * FFN, HIDDEN))
        self.down = make_linear(random(HIDDEN, FFN))
        self.norm = random(HIDDEN)
        angles = torch.randn(40, SHAPE.head_dim // 2, generator=draw)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        tables = torch.arange(1, 1 + 3 * MAX_ROWS, dtype=torch.int32).view(MAX_ROWS, 3)
        self.group = GroupStep(
            page_tables=tables,
            write_slots=torch.zeros(MAX_ROWS, dtype=torch.int64),
            page_tokens=PAGE_TOKENS,
            window=None,
        )
        self.step = ForwardStep(
            token_ids=torch.zeros(MAX_ROWS, dtype=torch.int64),
            positions=torch.zeros(MAX_ROWS, dtype=torch.int64),
            prefix_lens=torch.ones(MAX_ROWS, dtype=torch.int32),
            num_decodes=MAX_ROWS,
            max_decode_context=40,
            chunks=(),
            groups=(self.group,),
        )
        arena = random(1 + 3 * MAX_ROWS, 1, 2, SHAPE.num_kv_heads, PAGE_TOKENS, SHAPE.head_dim)
        self.kv: KvLayer = kv_layers(arena)[0]

    def fill(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.step.token_ids.copy_(torch.randint(50, (MAX_ROWS,), generator=draw))
        positions = torch.randint(40, (MAX_ROWS,), generator=draw)
        self.step.positions.copy_(positions)
        self.step.prefix_lens.copy_(positions + 1)
        pages = self.group.page_tables[torch.arange(MAX_ROWS), positions // PAGE_TOKENS]
        self.group.write_slots.copy_(pages.long() * PAGE_TOKENS + positions % PAGE_TOKENS)

    def forward(self, step: ForwardStep) -> torch.Tensor:
        group = step.groups[0]
        hidden = self.embedding.rows(step.token_ids)
        rope = RopeRows(cos=self.cos[step.positions], sin=self.sin[step.positions])
        normed = self.kernels.rms_norm(hidden, self.norm, 1e-6)
        qkv = self.qkv.forward(normed)
        mixed = self.kernels.attention(qkv, None, rope, self.kv, step, group)
        hidden = self.output.forward_add(mixed, hidden)
        normed = self.kernels.rms_norm(hidden, self.norm, 1e-6)
        hidden = self.down.forward_add(self.gate_up.forward_silu_mul(normed), hidden)
        return self.embedding.forward(hidden)

    def first_rows(self, count: int) -> ForwardStep:
        step, group = self.step, self.group
        return dataclasses.replace(
            step,
            token_ids=step.token_ids[:count],
            positions=step.positions[:count],
            prefix_lens=step.prefix_lens[:count],
            num_decodes=count,
            groups=(
                dataclasses.replace(
                    group,
                    page_tables=group.page_tables[:count],
                    write_slots=group.write_slots[:count],
                ),
            ),
        )


# Above seven rows torch multiplies bfloat16 on processors with AMX, which cannot be recorded.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_replay_equals_the_run_to_the_last_bit(dtype: torch.dtype) -> None:
    block = Block(dtype)
    replay = record(lambda: block.forward(block.step))
    for seed, count in ((1, MAX_ROWS), (2, 1), (3, 4), (4, 4), (5, MAX_ROWS)):
        block.fill(seed)
        with torch.inference_mode():
            expected = block.forward(block.first_rows(count))
        cache = block.kv.keys.clone()
        out = replay.run(count)
        assert out.shape == expected.shape
        assert torch.equal(out, expected)
        assert torch.equal(block.kv.keys, cache)


def test_recording_itself_changes_nothing() -> None:
    block = Block(torch.float32)
    block.fill(1)
    before = block.kv.keys.clone()
    replay = record(lambda: block.forward(block.step))
    assert torch.equal(block.kv.keys, before)
    assert replay.num_calls == 12


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: torch.softmax(x, -1),
        lambda x: x[torch.tensor([0]), torch.tensor([1])],
        lambda x: make_linear(torch.eye(4, dtype=torch.float64)).forward(x.double()),
    ],
)
def test_torch_operators_are_refused(forward: object) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(KernelsUnavailableError, match="cannot be recorded"):
        record(lambda: forward(x))  # type: ignore[operator]


def test_after_a_refused_recording_calls_run_again() -> None:
    layer, x = make_linear(torch.eye(16)), torch.ones(1, 16)
    with pytest.raises(KernelsUnavailableError):
        record(lambda: layer.forward(x) + 1)
    assert torch.equal(layer.forward(x), x)
