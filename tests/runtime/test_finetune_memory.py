"""Bytes that the memory report names against the storages that the executor holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.finetune_harness import FinetuneHand, Span, random_sample, start_of
from runtime.harness import make_context, random_model
from weft.cost.finetune_memory import FinetuneBytes, FinetuneSetting, finetune_bytes
from weft.cost.shapes import shape_from_config
from weft.engine.finetune import OptimizerSpec
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.graph.pruning import Remat
from weft.runtime.device_context import DeviceContext

NUM_TOKENS = 96
LORA = AdapterSpec(rank=8)
DOWN = AdapterSpec(rank=4, target_modules=("down_proj",))
UP_ABOVE = AdapterSpec(rank=4, target_modules=("up_proj", "q_proj"), layers_to_transform=(1, 2))
IA3 = AdapterSpec(
    kind=AdapterKind.IA3,
    target_modules=("k_proj", "v_proj", "down_proj"),
    feedforward_modules=("down_proj",),
)
BOTTLENECK = AdapterSpec(
    kind=AdapterKind.BOTTLENECK, rank=8, target_modules=("self_attn", "mlp"), activation="relu"
)
SPECS = {
    "lora": LORA,
    "lora-down": DOWN,
    "lora-up-above": UP_ABOVE,
    "ia3": IA3,
    "bottleneck": BOTTLENECK,
}
FAMILIES = ("llama2-mha", "llama3-gqa", "mistral-window", "qwen2", "qwen3")


def storages(root: object) -> dict[int, int]:
    """Bytes of each storage that an object leads to, by address."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    left = [root]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        else:
            left += parts(item)
    return {address: size for address, size in found.items() if size}


def parts(item: object) -> Iterator[object]:
    """What an object of ours or a plain container holds."""
    if isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, list | tuple | set | frozenset):
        yield from item
    elif is_dataclass(item) and not isinstance(item, type):
        yield from (getattr(item, f.name) for f in fields(item))
    elif type(item).__module__.startswith("weft."):
        names = [*getattr(item, "__dict__", {}), *getattr(type(item), "__slots__", ())]
        yield from (getattr(item, name) for name in names if hasattr(item, name))


@dataclass
class Measured:
    """Storages held for one job."""

    hand: FinetuneHand
    frozen: dict[int, int]
    """Those of the model."""

    def held(self) -> int:
        jobs = self.hand.executor._jobs  # pyright: ignore[reportPrivateUsage]
        found = storages((jobs._jobs, jobs._samples))  # pyright: ignore[reportPrivateUsage]
        total = sum(size for address, size in found.items() if address not in self.frozen)
        # What the executor itself says.
        assert jobs.size_bytes == pytest.approx(total, rel=0.01)
        return total


def measure(
    name: str, spec: AdapterSpec, remat: Remat, dtype: torch.dtype, optimizer: OptimizerSpec
) -> tuple[int, int, int, FinetuneBytes, DeviceContext]:
    """Bytes held of a job alone, behind a forward pass, and within a backward; and the report."""
    model = random_model(name)
    context = make_context(model, dtype=dtype, num_sequences=60)
    hand = FinetuneHand(context)
    measured = Measured(hand, storages(context))
    sample = random_sample(np.random.default_rng(1), 0, NUM_TOKENS)
    hand.start(spec, samples=[], remat=remat, optimizer=optimizer)
    job = measured.held()
    hand.run(sample_starts=(start_of(sample),))
    for begin in range(0, NUM_TOKENS, 48):
        hand.run(forward=[Span(sample=sample, begin=begin, end=begin + 48)])
    forward = measured.held()
    # Of the highest layer, whose attention is passed, one token: all that is kept is still there.
    last = NUM_TOKENS - 1
    top = context.config.num_layers - 1
    hand.run(backward=[Span(sample=sample, begin=last, end=NUM_TOKENS, layers=(top, top + 1))])
    backward = measured.held()
    report = finetune_bytes(
        shape_from_config(model.config.to_dict(), name),
        spec,
        FinetuneSetting(
            dtype=str(dtype).removeprefix("torch."),
            seq_len=NUM_TOKENS,
            window=48,
            remat=remat,
            qk_norm=context.config.qk_norm,
            optimizer_values=2,
        ),
    )
    return job, forward - job, backward - forward, report, context


CASES = [
    (family, spec, remat, dtype)
    for number, (family, dtype) in enumerate(
        (family, dtype)
        for family in FAMILIES
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    )
    for spec in SPECS
    for remat in [list(Remat)[(number + list(SPECS).index(spec)) % 3]]
]


@pytest.mark.parametrize(
    ("family", "spec", "remat", "dtype"),
    CASES,
    ids=["-".join(map(str, case)).replace("torch.", "") for case in CASES],
)
def test_the_report_names_what_is_allocated(
    family: str, spec: str, remat: Remat, dtype: torch.dtype
) -> None:
    job, forward, backward, report, context = measure(
        family, SPECS[spec], remat, dtype, OptimizerSpec(lr=1e-3)
    )
    assert report.adapter + report.gradients + report.optimizer == pytest.approx(job, rel=0.05)
    assert report.activations + report.hidden_gradients == pytest.approx(forward, rel=0.05)
    assert report.accumulators == pytest.approx(backward, rel=0.05)
    cached = sum(layer.keys[0].nbytes + layer.values[0].nbytes for layer in context.kv)
    tokens = context.layout.groups[0].page_tokens
    assert report.kv == pytest.approx(cached * -(-NUM_TOKENS // tokens), rel=0.05)
