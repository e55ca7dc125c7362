"""The Triton kernels against their torch twins: on CUDA where there is one, else interpreted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from weft.base.errors import UnsupportedError
from weft.graph.adapter_spec import AdapterKind, BypassTarget, Module
from weft.model.adapters.table import AdapterTable, Field, Linear
from weft.model.adapters.weights import AdapterWeights, FrozenBypass, collect_layers, pack
from weft.model.forward_step import ChunkRow, ForwardStep, GroupStep, KvLayer, RopeRows
from weft.model.kernels import triton_ops
from weft.model.kernels.interface import AttentionShape, HeadNorms
from weft.model.kernels.torch_kernels import TorchKernels
from weft.model.kernels.triton_kernels import TritonKernels, TritonLinear
from weft.model.kernels.triton_lora import TritonGrouped
from weft.model.linear import DenseLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_TOKENS = 8
# The interpreter has no bfloat16 arithmetic.
HALF_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype is torch.float32 else 3e-2


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


class Case:
    """An arena with other sequences' NaNs in it, and an iteration of decodes and chunks."""

    def __init__(
        self,
        *,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        window: int | None,
        decodes: list[int],
        chunks: list[tuple[int, int]],
        has_norms: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.shape = AttentionShape(
            num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, norm_eps=1e-5
        )
        contexts = decodes + [end for _, end in chunks]
        pages_each = -(-max(contexts) // PAGE_TOKENS)
        num_pages = 1 + len(contexts) * pages_each + 3
        self.cache = random(num_pages, 2, 2, heads[1], PAGE_TOKENS, head_dim, dtype=dtype)
        order = torch.randperm(num_pages - 1) + 1
        tables = order[: len(contexts) * pages_each].view(len(contexts), pages_each)
        self.cache[order[len(contexts) * pages_each :]] = float("nan")
        self.cache[0] = float("nan")

        positions, slots, rows = [], [], []
        for row, (begin, end) in enumerate([(n - 1, n) for n in decodes] + chunks):
            for position in range(begin, end):
                positions.append(position)
                page = int(tables[row, position // PAGE_TOKENS])
                slots.append(page * PAGE_TOKENS + position % PAGE_TOKENS)
            if row >= len(decodes):
                rows.append(
                    ChunkRow(
                        row=row,
                        begin=len(positions) - (end - begin),
                        end=len(positions),
                        first_prefix=begin + 1,
                        context=end,
                    )
                )
            if window is not None:
                tables[row, : max(0, begin + 1 - window) // PAGE_TOKENS] = 0
            # What lies behind a sequence's last token may be anything, NaNs too.
            used = end % PAGE_TOKENS
            if used:
                self.cache[int(tables[row, end // PAGE_TOKENS]), :, :, :, used:] = float("nan")
        self.num_tokens = len(positions)
        self.window = window
        self.tables = tables.to(torch.int32).to(DEVICE)
        self.slots = torch.tensor(slots).to(DEVICE)
        position = torch.tensor(positions).to(DEVICE)
        self.step = ForwardStep(
            token_ids=torch.zeros_like(position),
            positions=position,
            prefix_lens=(position + 1).to(torch.int32),
            num_decodes=len(decodes),
            max_decode_context=max(decodes, default=0),
            chunks=tuple(rows),
            groups=(),
        )
        width = (heads[0] + 2 * heads[1]) * head_dim
        self.qkv = random(self.num_tokens, width, dtype=dtype)
        angles = random(self.num_tokens, head_dim // 2)
        self.rope = RopeRows(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))
        self.norms = None
        if has_norms:
            self.norms = HeadNorms(
                query=random(head_dim, dtype=dtype), key=random(head_dim, dtype=dtype)
            )

    def attend(self, kernels) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.cache.clone()
        kv = KvLayer(keys=cache[:, 1, 0], values=cache[:, 1, 1])
        group = GroupStep(
            page_tables=self.tables,
            write_slots=self.slots,
            page_tokens=PAGE_TOKENS,
            window=self.window,
        )
        return kernels.attention(self.qkv, self.norms, self.rope, kv, self.step, group), cache


@pytest.mark.parametrize("dtype", [torch.float32, HALF_DTYPE], ids=["fp32", "half"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "has_norms"),
    [
        ((4, 2), 16, None, False),
        ((6, 1), 24, None, True),
        ((2, 2), 32, 11, False),
        ((8, 2), 8, 5, True),
    ],
)
def test_attention_equals_the_torch_twin(heads, head_dim, window, has_norms, dtype):
    case = Case(
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        window=window,
        decodes=[1, 8, 67],
        chunks=[(0, 3), (58, 72)],
        has_norms=has_norms,
    )
    twin, twin_cache = case.attend(TorchKernels(case.shape))
    for num_programs in (1, 9):
        kernels = TritonKernels(case.shape, dtype=dtype, num_programs=num_programs)
        ours, cache = case.attend(kernels)
        torch.testing.assert_close(ours, twin, atol=tolerance(dtype), rtol=tolerance(dtype))
        torch.testing.assert_close(
            cache, twin_cache, atol=tolerance(dtype), rtol=tolerance(dtype), equal_nan=True
        )


def test_more_splits_than_tokens_change_nothing():
    case = Case(
        heads=(4, 4), head_dim=16, dtype=torch.float32, window=None, decodes=[1, 2], chunks=[]
    )
    twin, _ = case.attend(TorchKernels(case.shape))
    kernels = TritonKernels(case.shape, dtype=torch.float32, num_programs=10_000)
    assert kernels._num_splits(2) == 32
    ours, _ = case.attend(kernels)
    torch.testing.assert_close(ours, twin, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("width", [24, 64, 200])
def test_norm_and_activation_equal_the_torch_twins(width):
    torch.manual_seed(1)
    shape = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=8, norm_eps=1e-5)
    twin = TorchKernels(shape)
    x, weight = random(5, width), random(width)
    ours = triton_ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, twin.rms_norm(x, weight, 1e-5))
    weights, addend = random(2 * width, width) / width**0.5, random(5, 2 * width)
    dense, fused = DenseLinear(weights), TritonLinear(weights)
    torch.testing.assert_close(fused.forward_silu_mul(x), dense.forward_silu_mul(x))
    torch.testing.assert_close(fused.forward_add(x, addend), dense.forward_add(x, addend))


def test_float64_is_refused_by_name():
    shape = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=8, norm_eps=1e-5)
    with pytest.raises(UnsupportedError, match=r"float64.*TorchKernels"):
        TritonKernels(shape, dtype=torch.float64, num_programs=1)


@pytest.mark.parametrize("dtype", [torch.float32, HALF_DTYPE])
def test_adapters_of_many_rows_equal_each_by_itself(dtype: torch.dtype) -> None:
    """Two linears of one input with LoRA and (IA)³, then a bottleneck, rows without any between."""
    torch.manual_seed(0)
    hidden, widths = 40, (48, 24)
    config = SimpleNamespace(num_layers=1)
    linears = (
        Linear(module=Module.Q_PROJ, name="", begin=0, width=widths[0]),
        Linear(module=Module.K_PROJ, name="", begin=widths[0], width=widths[1]),
    )
    sub_layer = Linear(module=Module.MLP, name="", begin=0, width=hidden)

    def bypass(part: Linear, rank: int, scale: float, **shapes: tuple[int, ...]) -> FrozenBypass:
        target = BypassTarget(
            layer=0,
            module=part.module,
            in_features=hidden,
            out_features=part.width,
            rank=rank,
            scale=scale,
        )
        weights = {name: random(*shape, dtype=dtype) * 0.3 for name, shape in shapes.items()}
        return FrozenBypass(target=target, weights=weights, activation="silu")

    def adapter(kind: AdapterKind, *bypasses: FrozenBypass) -> AdapterWeights:
        layers = collect_layers(bypasses, config.num_layers)
        return pack(AdapterWeights(kind=kind, layers=layers), DEVICE)

    def lora(*ranks: int) -> AdapterWeights:
        pairs = zip(linears, ranks, strict=False)
        return adapter(
            AdapterKind.LORA,
            *(bypass(p, r, 0.5, A=(r, hidden), B=(p.width, r)) for p, r in pairs),
        )

    deep = {"down": (21, hidden), "down_bias": (21,), "up": (hidden, 21), "up_bias": (hidden,)}
    adapters = [
        lora(3, 17),
        lora(8),
        adapter(AdapterKind.IA3, bypass(linears[1], 0, 1.0, l=(widths[1],))),
        adapter(AdapterKind.BOTTLENECK, bypass(sub_layer, 21, 1.0, **deep)),
    ]
    kernels = TritonGrouped(dtype, torch.device(DEVICE))
    table = AdapterTable(config.num_layers, kernels)
    slots = [table.add(one) for one in adapters]
    assert None not in slots
    order = np.array([0, -1, 1, 2, 3, 0, -1, 2], np.int64)
    rows = table.rows(order, torch.from_numpy(order).to(DEVICE))
    x, outputs = random(8, hidden, dtype=dtype), random(8, sum(widths), dtype=dtype)
    found, deep_found = outputs.clone(), x.clone()
    kernels.add_low_rank(x, found, linears, rows, 0)
    kernels.scale(found, linears, rows, 0, Field.SCALE_OUTPUT)
    kernels.add_low_rank(deep_found, deep_found, (sub_layer,), rows, 0)
    wanted, deep_wanted = outputs.float(), x.float()
    for row, slot in enumerate(order.tolist()):
        for one in adapters[slot] if slot >= 0 else ():
            w = {name: weight.float() for name, weight in one.weights.items()}
            part = next(p for p in (*linears, sub_layer) if p.module == one.target.module)
            view = wanted[row, part.begin : part.begin + part.width]
            if "A" in w:
                view += 0.5 * w["B"] @ (w["A"] @ x[row].float())
            elif "l" in w:
                view *= w["l"]
            else:
                inner = torch.nn.functional.silu(w["down"] @ x[row].float() + w["down_bias"])
                deep_wanted[row] += w["up"] @ inner + w["up_bias"]
    bare, flat = torch.from_numpy(order < 0), torch.from_numpy(order != 3)
    assert torch.equal(found[bare], outputs[bare])
    assert torch.equal(deep_found[flat], x[flat])
    limit = tolerance(dtype)
    torch.testing.assert_close(found.float(), wanted, rtol=limit, atol=limit)
    torch.testing.assert_close(deep_found.float(), deep_wanted, rtol=limit, atol=limit)
