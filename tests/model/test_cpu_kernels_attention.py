"""The native attention, RoPE and norm kernels against their torch twins in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from weft.model.forward_step import ChunkRow, ForwardStep, GroupStep, RopeRows, kv_layers
from weft.model.kernels.cpu_kernels import CpuKernels
from weft.model.kernels.cpu_team import native_kernels
from weft.model.kernels.interface import AttentionShape, HeadNorms
from weft.model.kernels.torch_kernels import TorchKernels

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NUM_PAGES, NUM_LAYERS, LAYER, PAGES_PER_ROW = 40, 2, 1, 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """Heads, pages and rows of one iteration."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    window: int | None = None
    has_norms: bool = False
    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    """(first_prefix, tokens) of each."""

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=1e-5,
        )


DECODES = (1, 16, 17, 45)
CHUNKS = ((1, 37), (20, 9))
CASES = [
    Case(num_heads=8, num_kv_heads=4, head_dim=32, page_tokens=16, contexts=DECODES),
    Case(num_heads=4, num_kv_heads=4, head_dim=64, page_tokens=16, chunks=CHUNKS),
    Case(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        page_tokens=16,
        window=20,
        has_norms=True,
        contexts=DECODES,
        chunks=CHUNKS,
    ),
    Case(
        num_heads=6,
        num_kv_heads=1,
        head_dim=16,
        page_tokens=32,
        has_norms=True,
        contexts=DECODES,
        chunks=CHUNKS,
    ),
    Case(
        num_heads=32,
        num_kv_heads=1,
        head_dim=128,
        page_tokens=16,
        window=7,
        contexts=DECODES,
        chunks=CHUNKS,
    ),
    # Sizes that the native code does not cover: the twin must step in.
    Case(num_heads=2, num_kv_heads=2, head_dim=24, page_tokens=16, contexts=DECODES),
    Case(num_heads=2, num_kv_heads=2, head_dim=32, page_tokens=4, contexts=(1, 4, 7)),
]


class Iteration:
    """Random tensors of a case, in float64; slots that no token sees hold NaN."""

    def __init__(self, case: Case) -> None:
        draw = torch.Generator().manual_seed(11)
        num_rows = len(case.contexts) + len(case.chunks)
        pages = torch.randperm(NUM_PAGES - 1, generator=draw)[: num_rows * PAGES_PER_ROW] + 1
        self.case = case
        self.tables = torch.zeros(num_rows, PAGES_PER_ROW + 3, dtype=torch.int32)
        self.tables[:, :PAGES_PER_ROW] = pages.view(num_rows, PAGES_PER_ROW)
        rows = list(range(len(case.contexts)))
        prefixes = list(case.contexts)
        chunks = []
        for row, (first, count) in enumerate(case.chunks, start=len(case.contexts)):
            begin = len(rows)
            chunks.append(
                ChunkRow(
                    row=row,
                    begin=begin,
                    end=begin + count,
                    first_prefix=first,
                    context=first + count - 1,
                )
            )
            rows += [row] * count
            prefixes += range(first, first + count)
        self.chunks = tuple(chunks)
        self.prefix_lens = torch.tensor(prefixes, dtype=torch.int32)
        size = case.page_tokens
        last = self.prefix_lens.long() - 1
        self.slots = self.tables[rows, last // size].long() * size + last % size
        is_seen = torch.zeros(NUM_PAGES, size, dtype=torch.bool)
        for row, prefix in zip(rows, prefixes, strict=True):
            seen = torch.arange(prefix)
            is_seen[self.tables[row, seen // size].long(), seen % size] = True
        arena = torch.randn(
            NUM_PAGES, NUM_LAYERS, 2, case.num_kv_heads, size, case.head_dim, generator=draw
        )
        self.arena = arena.masked_fill(~is_seen[:, None, None, None, :, None], float("nan"))
        width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
        self.qkv = torch.randn(len(rows), width, generator=draw)
        self.angles = torch.randn(len(rows), case.head_dim // 2, generator=draw)
        self.norms = torch.rand(2, case.head_dim, generator=draw) + 0.5

    def attend(
        self, kernels: CpuKernels | TorchKernels, dtype: torch.dtype, through: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and arena, both in float64; inputs are rounded to `through` first."""

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(through).to(dtype).clone()

        case, arena = self.case, cast(self.arena)
        group = GroupStep(
            page_tables=self.tables,
            write_slots=self.slots,
            page_tokens=case.page_tokens,
            window=case.window,
        )
        step = ForwardStep(
            token_ids=torch.zeros_like(self.slots),
            positions=self.prefix_lens.long() - 1,
            prefix_lens=self.prefix_lens,
            num_decodes=len(case.contexts),
            max_decode_context=max(case.contexts, default=0),
            chunks=self.chunks,
            groups=(group,),
        )
        norms = HeadNorms(query=cast(self.norms[0]), key=cast(self.norms[1]))
        out = kernels.attention(
            cast(self.qkv),
            norms if case.has_norms else None,
            RopeRows(cos=cast(self.angles.cos()), sin=cast(self.angles.sin())),
            kv_layers(arena)[LAYER],
            step,
            group,
        )
        return out.double(), arena.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.num_heads}-{c.num_kv_heads}-{c.head_dim}"
)
def test_attention_matches_the_twin(case: Case, dtype: torch.dtype) -> None:
    iteration = Iteration(case)
    reference = TorchKernels(case.shape)
    expected, written = iteration.attend(reference, torch.float64, through=dtype)
    out, arena = iteration.attend(CpuKernels(case.shape), dtype, through=dtype)
    assert not out.isnan().any()
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(arena, written, atol=TOLERANCE[dtype], rtol=0, equal_nan=True)


def test_float64_is_the_twin_to_the_last_bit() -> None:
    iteration = Iteration(CASES[2])
    expected, written = iteration.attend(
        TorchKernels(CASES[2].shape), torch.float64, through=torch.float64
    )
    out, arena = iteration.attend(CpuKernels(CASES[2].shape), torch.float64, through=torch.float64)
    assert torch.equal(out, expected)
    assert torch.equal(arena.nan_to_num(), written.nan_to_num())


def test_a_row_does_not_depend_on_its_batch_nor_its_chunking() -> None:
    """The tokens of a chunk, alone as decodes, give the same bits."""
    if native_kernels() is None:
        pytest.skip("this processor or platform cannot run the native CPU kernels")
    shape = CASES[0].shape
    together = Iteration(
        Case(num_heads=8, num_kv_heads=4, head_dim=32, page_tokens=16, chunks=((1, 50),))
    )
    out, arena = together.attend(CpuKernels(shape), torch.float32, through=torch.float32)
    for token in (0, 15, 16, 49):
        group = GroupStep(
            page_tables=together.tables,
            write_slots=together.slots[token : token + 1],
            page_tokens=16,
            window=None,
        )
        step = ForwardStep(
            token_ids=torch.zeros(1, dtype=torch.int64),
            positions=torch.tensor([token]),
            prefix_lens=together.prefix_lens[token : token + 1],
            num_decodes=1,
            max_decode_context=token + 1,
            chunks=(),
            groups=(group,),
        )
        angles = together.angles[token : token + 1]
        alone = CpuKernels(shape).attention(
            together.qkv[token : token + 1].clone(),
            None,
            RopeRows(cos=angles.cos(), sin=angles.sin()),
            kv_layers(arena.float())[LAYER],
            step,
            group,
        )
        assert torch.equal(alone[0].double(), out[token])


@pytest.mark.parametrize("size", [16, 256, 40])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rms_norm_matches_the_twin(dtype: torch.dtype, size: int) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(5, size, generator=draw).to(dtype)
    weight = torch.rand(size, generator=draw).to(dtype)
    shape = CASES[0].shape
    expected = TorchKernels(shape).rms_norm(x, weight, 1e-5)
    out = CpuKernels(shape).rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out.float(), expected.float(), atol=TOLERANCE[dtype], rtol=0)
