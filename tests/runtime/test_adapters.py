"""Adapters in the engine: rows of many adapters and of none, in chunks and decodes, beside PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from model.adapters.mixed import run_mixed
from model.adapters.random_adapters import random_adapter
from model.adapters.wide import wide_transformers
from runtime.harness import HandMade, Row, make_context, random_model, start
from weft.base.clock import WallClock
from weft.base.errors import ConfigError, IntegrityError
from weft.engine.batch import AdapterRef
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.loop import EngineLoop
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterKind, AdapterSpec
from weft.model.adapters.files import read_adapter, write_adapter
from weft.model.kernels.cpu_lora import _places
from weft.model.linear import DenseLinear
from weft.runtime.adapter_store import AdapterStore
from weft.runtime.device_context import DeviceContext
from weft.runtime.torch_executor import TorchExecutor

LORAS = (
    AdapterSpec(rank=2),
    AdapterSpec(rank=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    AdapterSpec(rank=5, alpha=3.0, use_rslora=True, target_modules=("gate_proj", "down_proj")),
    AdapterSpec(rank=16, target_modules=r".*layers\.1\..*(up|o)_proj"),
)
IA3 = AdapterSpec(kind=AdapterKind.IA3, target_modules=("k_proj", "v_proj", "down_proj"))
SPECS = (*LORAS, IA3)
FAMILIES = ("llama3-gqa", "mistral-window", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with wide_transformers():
        yield


def write_adapters(
    directory: Path, context: DeviceContext, specs: tuple[AdapterSpec, ...] = SPECS
) -> list[Path]:
    paths = [directory / f"adapter{index}" for index in range(len(specs))]
    for index, (path, spec) in enumerate(zip(paths, specs, strict=True)):
        write_adapter(path, spec, random_adapter(spec, context.config, seed=index))
    return paths


def ref(index: int, version: int = 1) -> AdapterRef:
    return AdapterRef(id=f"a{index}", version=version)


def peft_model(name: str, paths: list[Path]) -> Any:
    """One transformers model that holds all adapters, by the numbers of their paths."""
    model = PeftModel.from_pretrained(random_model(name), str(paths[0]), adapter_name="0")
    for index, path in enumerate(paths[1:], start=1):
        model.load_adapter(str(path), adapter_name=str(index))
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_one_batch_equal_peft_with_adapter_names(name: str, tmp_path: Path) -> None:
    context = make_context(random_model(name), num_sequences=24)
    paths = write_adapters(tmp_path, context, LORAS)
    adapters = [read_adapter(path, context.config, dtype=torch.float64) for path in paths]
    prompt = [5, 9, 2, 44]
    order = [1, None, 0, 3, 2]
    model = peft_model(name, paths)
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor([prompt] * len(order)),
            adapter_names=["__base__" if index is None else str(index) for index in order],
            use_cache=False,
        ).logits
    chosen = [None if index is None else adapters[index] for index in order]
    found = run_mixed(context, chosen, prompts=[prompt] * len(order))
    torch.testing.assert_close(torch.stack(found), wanted, rtol=0, atol=1e-10)


def requests_for(num: int, vocab_size: int, num_adapters: int) -> list[Request]:
    """Prompts of 3 to 60 tokens, some behind a shared beginning; every adapter, and none."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, vocab_size, 34).tolist()
    requests: list[Request] = []
    for number in range(num):
        own = rng.integers(0, vocab_size, int(rng.integers(3, 26))).tolist()
        index = number % (num_adapters + 1)
        requests.append(
            Request(
                id=str(number),
                prompt_token_ids=tuple((shared if number % 2 else []) + own),
                sampling=SamplingParams(temperature=0.0, max_tokens=6, logprobs=1),
                adapter=None if index == num_adapters else ref(index),
            )
        )
    return requests


def serve(context: DeviceContext, paths: list[Path], requests: list[Request]) -> dict[str, Any]:
    executor = TorchExecutor(context, max_num_seqs=6)
    for index, path in enumerate(paths):
        executor.load_adapter(ref(index), str(path))
    policy = ContinuousBatching(
        PolicyConfig(max_model_len=context.max_model_len, max_num_batched_tokens=24),
        executor.info,
        WallClock(),
    )
    loop = EngineLoop(policy, executor)
    found: dict[str, Any] = {request.id: ([], []) for request in requests}
    coming = list(requests)[::-1]
    while coming or loop.has_work:
        for _ in range(min(2, len(coming))):
            policy.add(coming.pop())
        for update in loop.step():
            found[update.request_id][0].extend(update.new_token_ids)
            found[update.request_id][1].extend(entry.logprob for entry in update.logprobs)
    policy.check_integrity()
    stats = policy.stats()
    assert stats.num_chunked_prefills > 0
    assert stats.prefix_cache_hits > 0
    executor.close()
    return found


def expected(model: Any, request: Request, tokens: list[int]) -> Tensor:
    """Log-probabilities [tokens, V] that PEFT gives at the places of these tokens."""
    sequence = [*request.prompt_token_ids, *tokens]
    ids = torch.tensor([sequence[:-1]])
    with torch.no_grad():
        if request.adapter is None:
            with model.disable_adapter():
                logits = model(input_ids=ids, use_cache=False).logits
        else:
            model.set_adapter(request.adapter.id.removeprefix("a"))
            logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(request.prompt_token_ids) - 1 :].log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_tokens_equal_peft_request_by_request(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    wide_context = make_context(random_model(name))
    paths = write_adapters(tmp_path, wide_context)
    context = make_context(random_model(name), dtype=dtype)
    requests = requests_for(18, context.config.vocab_size, len(paths))
    found = serve(context, paths, requests)
    loras, ia3 = peft_model(name, paths[:-1]), peft_model(name, paths[-1:])
    ia3_ref = ref(len(paths) - 1)
    for request in requests:
        tokens, logprobs = found[request.id]
        is_ia3 = request.adapter == ia3_ref
        asked = replace(request, adapter=ref(0)) if is_ia3 else request
        scores = expected(ia3 if is_ia3 else loras, asked, tokens)
        assert tokens == scores.argmax(-1).tolist()
        chosen = scores.max(-1).values.float()
        torch.testing.assert_close(torch.tensor(logprobs), chosen, rtol=0, atol=1e-4)


def test_each_linear_runs_once_an_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(random_model("qwen2"))
    paths = write_adapters(tmp_path, context)
    made = HandMade(context, max_num_seqs=6)
    for index, path in enumerate(paths):
        made.executor.load_adapter(ref(index), str(path))
    calls: list[int] = []
    plain = DenseLinear.forward

    def forward(self: DenseLinear, x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return plain(self, x)

    monkeypatch.setattr(DenseLinear, "forward", forward)
    rows = [Row(slot=0, tokens=[3], begin=0, is_decode=True), Row(slot=1, tokens=[4, 5, 6])]
    rows += [Row(slot=slot, tokens=[slot] * 20) for slot in range(2, 6)]
    made.executor.submit(
        made.batch(
            rows,
            starts=[start(slot, [1, 2]) for slot in range(6)],
            adapters=np.array([0, 4, 1, 2, 3, -1], np.int32),
            adapter_refs=tuple(ref(index) for index in range(5)),
        )
    )
    made.executor.collect()
    assert calls[:-1] == [84] * (4 * context.config.num_layers)
    assert calls[-1] == 6  # The output layer sees the sampled rows.
    assert made.num_replayed == 0


NATIVE = replace(IA3, target_modules=("k_proj", "down_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_decodes_equal_the_decoder_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    context = make_context(random_model("llama3-gqa"), dtype=dtype, num_sequences=20)
    specs = (*LORAS, NATIVE)
    paths = write_adapters(tmp_path, context, specs)
    logprobs: list[list[Tensor]] = []
    _places.cache_clear()  # A server's first iteration with adapters may be one to record.
    for replays in (True, False):
        made = HandMade(context, max_num_seqs=6, replays_decodes=replays)
        if replays and made.executor._replay is None:
            pytest.skip("nothing is recorded on this processor")
        for index, path in enumerate(paths):
            made.executor.load_adapter(ref(index), str(path))
        found: list[Tensor] = []
        for order in ((0, 1, -1, 4), (1, 3, 2, -1, 0, 4), (-1, 2), (4, 4, -1)):
            rows = [Row(slot=s, tokens=[9 + s], begin=3, is_decode=True) for s in range(len(order))]
            made.executor.submit(
                made.batch(
                    rows,
                    starts=[start(slot, [1, 2, 3, 4]) for slot in range(len(order))],
                    adapters=np.array(order, np.int32),
                    adapter_refs=tuple(ref(index) for index in range(5)),
                )
            )
            top = made.executor.collect().logprobs
            assert top is not None
            found.append(torch.from_numpy(top.top[:, 0]))
        assert made.num_replayed == (4 if replays else 0)
        logprobs.append(found)
    for ours, theirs in zip(*logprobs, strict=True):
        assert torch.equal(ours, theirs)


def batch_of(made: HandMade, refs: tuple[AdapterRef, ...]) -> Any:
    rows = [Row(slot=slot, tokens=[7], is_decode=True) for slot in range(len(refs))]
    return made.batch(rows, adapters=np.arange(len(refs), dtype=np.int32), adapter_refs=refs)


def test_the_device_holds_the_latest_used(tmp_path: Path) -> None:
    context = make_context(random_model("llama3-gqa"), dtype=torch.float32)
    paths = write_adapters(tmp_path, context, (AdapterSpec(rank=4),) * 4)
    made = HandMade(context)
    one = read_adapter(paths[0], context.config, dtype=torch.float32).size_bytes
    store = AdapterStore(context, resident_bytes=2 * one)
    for index, path in enumerate(paths):
        store.load(ref(index), path)
    assert (store.held_bytes, store.size_bytes) == (0, 4 * one)
    for refs, num_evicted, num_held in (
        ((0, 1), 0, 2),
        ((0,), 0, 2),
        ((2,), 1, 2),  # 1 was used before 0
        ((0, 2), 1, 2),
        ((1, 2, 3), 2, 3),  # one batch's adapters are held together, whatever the bound
        ((0,), 4, 2),
    ):
        bypass = store.bypass(batch_of(made, tuple(ref(index) for index in refs)))
        assert bypass is not None
        assert (store.num_evicted, store.held_bytes) == (num_evicted, num_held * one), refs
    store.unload(ref(0))
    assert store.held_bytes == one
    with pytest.raises(IntegrityError, match="a0 version 1, which is not loaded"):
        store.bypass(batch_of(made, (ref(0),)))
    with pytest.raises(ConfigError, match="a1 version 1 is loaded already"):
        store.load(ref(1), paths[1])


def test_a_new_version_shares_nothing_with_the_old(tmp_path: Path) -> None:
    context = make_context(random_model("llama3-gqa"))
    paths = write_adapters(tmp_path, context, LORAS[:2])
    executor = TorchExecutor(context, max_num_seqs=2)
    policy = ContinuousBatching(
        PolicyConfig(max_model_len=128, max_num_batched_tokens=64), executor.info, WallClock()
    )
    loop = EngineLoop(policy, executor)
    prompt = tuple(range(3, 51))
    outputs: list[list[int]] = []
    for version, path in ((1, paths[0]), (2, paths[1]), (3, paths[0])):
        executor.load_adapter(ref(0, version), str(path))
        sampling = SamplingParams(temperature=0.0, max_tokens=8)
        adapter = ref(0, version)
        policy.add(
            Request(id=str(version), prompt_token_ids=prompt, sampling=sampling, adapter=adapter)
        )
        outputs.append([token for update in loop.drain() for token in update.new_token_ids])
    assert policy.stats().prefix_cache_hits == 0
    assert outputs[0] == outputs[2] != outputs[1]
