"""One memory budget: the cache is a reserve in it; adapters and jobs share the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from serve.tiny_model import write_tiny_model
from weft.base.errors import ConfigError, OutOfMemoryError
from weft.engine.batch import AdapterRef
from weft.engine.finetune import FinetuneJobSpec, JobChanged, JobStatus, TrainingSample
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterSpec
from weft.serve.engine_config import EngineConfig
from weft.serve.engine_core import EngineCore
from weft.serve.llm import LLM
from weft.serve.messages import JobAction
from weft.serve.model_builder import adapter_bytes

CACHE_BYTES = 2**22
ROWS = ["some text"] * 4
BIG = AdapterSpec(rank=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory, as training makes it."""
    out = tmp_path_factory.mktemp("adapter")
    with LLM(model, kv_cache_memory_bytes=CACHE_BYTES, num_threads=1) as llm:
        llm.finetune(ROWS, lora=BIG, num_epochs=1, output_dir=out).wait()
    return out / "final"


@pytest.fixture
def engine(model: Path) -> Iterator[Callable[[int], EngineCore]]:
    """Engines with so many bytes beside the cache."""
    opened: list[EngineCore] = []

    def start(left_bytes: int) -> EngineCore:
        core = EngineCore(
            EngineConfig(
                model=str(model),
                dtype="float32",
                num_threads=1,
                kv_cache_memory_bytes=CACHE_BYTES,
                memory_budget_bytes=CACHE_BYTES + left_bytes,
                finetune=FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY),
            )
        )
        opened.append(core)
        return core

    yield start
    for core in opened:
        core.close()


def size_of(adapter: Path) -> int:
    (path,) = adapter.glob("*.safetensors")
    return sum(tensor.nbytes for tensor in load_file(path).values())


def job(name: str, spec: AdapterSpec = BIG, num_tokens: int = 20) -> FinetuneJobSpec:
    sample = TrainingSample(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        label_weights=np.ones(num_tokens, np.float32),
    )
    return FinetuneJobSpec(id=name, adapter=spec, samples=(sample,) * 4)


def missing_bytes(error: pytest.ExceptionInfo[OutOfMemoryError]) -> int:
    found = re.search(r"raise the memory budget by (\d+) bytes", str(error.value))
    assert found is not None
    return int(found.group(1))


def ref(number: int) -> AdapterRef:
    return AdapterRef(id=f"a{number}", version=1)


def generate(core: EngineCore, name: str, adapter: AdapterRef | None) -> list[int]:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    core.add(Request(id=name, prompt_token_ids=(1, 2, 3), sampling=sampling, adapter=adapter))
    tokens: list[int] = []
    while core.has_work and len(tokens) < 4:
        tokens += [token for update in core.step() for token in update.new_token_ids]
    return tokens


def end_of(core: EngineCore, name: str) -> JobStatus:
    ends = [
        event.status
        for event in core.take_finetune_events()
        if isinstance(event, JobChanged) and event.job_id == name
    ]
    return ends[-1]


def drain(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def test_adapters_are_counted(engine: Callable[[int], EngineCore], adapter: Path) -> None:
    one = size_of(adapter)
    core = engine(2 * one + one // 2)
    for number in range(2):
        core.load_adapter(ref(number), str(adapter))
    with pytest.raises(OutOfMemoryError, match=f"'a2' needs {one} bytes") as refused:
        core.load_adapter(ref(2), str(adapter))
    assert missing_bytes(refused) == one - one // 2
    assert not core.has_adapter(ref(2))
    # Requests go on, and what is given back can be had.
    assert len(generate(core, "r", ref(1))) == 4
    core.unload_adapter(ref(0))
    core.load_adapter(ref(2), str(adapter))
    assert len(generate(core, "s", ref(2))) == 4


def test_the_number_of_a_refusal_would_do(
    engine: Callable[[int], EngineCore], adapter: Path
) -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        engine(0).add_job(job("j"))
    need = missing_bytes(refused)
    with pytest.raises(OutOfMemoryError) as refused:
        engine(need - 1).add_job(job("j"))
    assert missing_bytes(refused) == 1
    # Served adapters are inference's: a job has what they leave.
    core = engine(need)
    core.load_adapter(ref(0), str(adapter))
    with pytest.raises(OutOfMemoryError, match="of served adapters") as refused:
        core.add_job(job("j"))
    assert missing_bytes(refused) == size_of(adapter)
    core = engine(need + size_of(adapter))
    core.load_adapter(ref(0), str(adapter))
    core.add_job(job("j"))
    drain(core)
    assert end_of(core, "j") is JobStatus.SUCCEEDED


def test_what_jobs_were_promised_is_not_given_away(
    engine: Callable[[int], EngineCore], adapter: Path
) -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        engine(0).add_job(job("j"))
    need = missing_bytes(refused)
    core = engine(need + size_of(adapter))
    core.load_adapter(ref(0), str(adapter))
    core.add_job(job("j"))
    for is_started in (False, True):
        with pytest.raises(OutOfMemoryError, match=f"finetuning jobs {need}"):
            core.load_adapter(ref(1), str(adapter))
        if not is_started:
            core.step()  # It starts with its first iteration.
            core.control_job("j", JobAction.PAUSE)
        assert len(generate(core, f"r{is_started}", ref(0))) == 4
    core.control_job("j", JobAction.CANCEL)
    core.step()
    core.load_adapter(ref(1), str(adapter))


def test_finished_adapters_are_counted(engine: Callable[[int], EngineCore], adapter: Path) -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        engine(0).add_job(job("j"))
    need = missing_bytes(refused)
    core = engine(need)
    core.add_job(job("a"))
    drain(core)
    assert end_of(core, "a") is JobStatus.SUCCEEDED
    # It serves its adapter now, and so it lacks that for the next.
    assert len(generate(core, "r", AdapterRef(id="a", version=1))) == 4
    with pytest.raises(OutOfMemoryError) as refused:
        core.add_job(job("b"))
    assert missing_bytes(refused) == size_of(adapter)
    core.unload_adapter(AdapterRef(id="a", version=1))
    core.add_job(job("b"))


def test_a_budget_below_the_cache_is_refused(model: Path) -> None:
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        kv_cache_memory_bytes=CACHE_BYTES,
        memory_budget_bytes=CACHE_BYTES - 1,
    )
    with pytest.raises(ConfigError, match="less than the KV cache within it"):
        EngineCore(config)


def test_elsewhere_a_share_bounds_what_is_resident() -> None:
    class Store:
        resident_bytes = 1 << 62
        size_bytes = 123

    store = Store()
    assert adapter_bytes(store, torch.device("cpu"), 1000)() == 123  # type: ignore[arg-type]
    assert store.resident_bytes == 1 << 62
    assert adapter_bytes(store, torch.device("cuda"), 1000)() == 250  # type: ignore[arg-type]
    assert store.resident_bytes == 250
