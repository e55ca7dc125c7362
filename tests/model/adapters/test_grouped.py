"""The grouped kernels against adapters applied group by group in plain torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.adapters.mixed import PROMPTS
from model.adapters.random_adapters import random_adapter
from runtime.harness import HandMade, Row, make_context, random_model
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.model.adapters.table import AdapterTable
from weft.model.adapters.weights import pack
from weft.model.forward_step import BypassGroup, BypassStep, ForwardStep
from weft.model.kernels.cpu_lora import CpuGrouped
from weft.model.kernels.cpu_team import native_kernels
from weft.runtime.device_context import DeviceContext
from weft.runtime.step_builder import build_step

SPECS = (
    AdapterSpec(rank=1),
    AdapterSpec(rank=13, target_modules=("q_proj", "v_proj", "o_proj")),
    AdapterSpec(rank=6, target_modules=("gate_proj", "down_proj")),
    AdapterSpec(kind=AdapterKind.IA3, target_modules=("k_proj", "v_proj", "down_proj")),
    AdapterSpec(kind=AdapterKind.IA3, target_modules=("o_proj", "up_proj"), feedforward_modules=()),
    AdapterSpec(kind=AdapterKind.BOTTLENECK, rank=7, activation="relu"),
    AdapterSpec(kind=AdapterKind.BOTTLENECK, rank=3, activation="gelu", target_modules=("mlp",)),
)


def step_of(context: DeviceContext) -> tuple[ForwardStep, list[int]]:
    made = HandMade(context, max_num_seqs=8)
    rows = [Row(slot=i, tokens=[3 + i]) for i in range(3)]
    rows += [Row(slot=3 + i, tokens=prompt) for i, prompt in enumerate(PROMPTS)]
    batch = made.batch(rows)
    return build_step(batch, context, torch.zeros(8, dtype=torch.int32)), batch.row_starts.tolist()


def forward(context: DeviceContext, step: ForwardStep) -> Tensor:
    return context.decoder.forward(context.decoder.embed(step.token_ids), step, context.kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_native_rows_equal_groups_and_leave_others_alone(
    dtype: torch.dtype, num_threads: int
) -> None:
    native = native_kernels()
    if native is None:
        pytest.skip("this processor has no native kernels")
    context = make_context(random_model("llama3-gqa"), dtype=dtype, num_sequences=16)
    adapters = [
        pack(random_adapter(spec, context.config, seed=seed, dtype=dtype), "cpu")
        for seed, spec in enumerate(SPECS)
    ]
    table = AdapterTable(context.config.num_layers, CpuGrouped(native, dtype))
    numbers = [table.add(adapter) for adapter in adapters]
    assert None not in numbers
    step, starts = step_of(context)
    groups = tuple(
        BypassGroup(rows=slice(starts[row], starts[row + 1]), adapter=adapter)
        for row, adapter in enumerate(adapters)
    )
    slots = np.full(starts[-1], -1, np.int64)
    for row, number in enumerate(numbers):
        assert number is not None
        slots[starts[row] : starts[row + 1]] = number
    rows = table.rows(slots, torch.from_numpy(slots))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            plain = forward(context, step)
            wanted = forward(context, replace(step, bypass=BypassStep(groups=groups)))
            found = forward(context, replace(step, bypass=BypassStep(groups=(), rows=rows)))
    finally:
        torch.set_num_threads(before)
    bare = starts[len(adapters)]
    assert torch.equal(found[bare:], plain[bare:])
    for row in range(len(adapters)):
        span = slice(starts[row], starts[row + 1])
        assert (wanted[span] - plain[span]).abs().max() > 0.05
    tolerance = 1e-4 if dtype is torch.float32 else 0.02 * plain.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_a_table_grows_and_reuses_slots() -> None:
    native = native_kernels()
    if native is None:
        pytest.skip("this processor has no native kernels")
    context = make_context(random_model("llama3-gqa"), dtype=torch.float32)
    adapter = pack(random_adapter(SPECS[0], context.config, seed=0, dtype=torch.float32), "cpu")
    table = AdapterTable(context.config.num_layers, CpuGrouped(native, torch.float32))
    slots = [table.add(adapter) for _ in range(40)]
    assert sorted(slots) == list(range(40))  # type: ignore[type-var]
    table.remove(7)
    assert not table.words[:, 7].any()
    assert table.add(adapter) == 7


def test_what_the_kernels_do_not_take_stays_with_groups() -> None:
    native = native_kernels()
    if native is None:
        pytest.skip("this processor has no native kernels")
    context = make_context(random_model("llama3-gqa"), dtype=torch.float32)
    kernels = CpuGrouped(native, torch.float32)
    config = context.config
    odd = AdapterSpec(
        kind=AdapterKind.IA3, target_modules=("q_proj",), feedforward_modules=("q_proj",)
    )
    assert not kernels.takes(random_adapter(odd, config, seed=0, dtype=torch.float32))
    wide = random_adapter(SPECS[0], config, seed=0, dtype=torch.float64)
    assert not kernels.takes(pack(wide, "cpu"))
    narrow = random_adapter(SPECS[0], replace(config, intermediate_size=44), seed=0)
    assert not CpuGrouped(native, torch.float32).takes(pack(narrow, "cpu"))
