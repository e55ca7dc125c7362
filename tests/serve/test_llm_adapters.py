"""`lora_request` over the embedded model, and adapters that leave while they are in use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.adapters.random_adapters import random_adapter
from weft.base.errors import (
    AdapterLoadError,
    ConfigError,
    InvalidRequestError,
    UnsupportedError,
)
from weft.engine.batch import AdapterRef
from weft.engine.request import Request
from weft.engine.sampling import SamplingParams
from weft.graph.adapter_spec import AdapterSpec
from weft.model.adapters.files import write_adapter
from weft.model.config import ModelConfig
from weft.model.embedded import embedded_model_path
from weft.serve.engine_config import EngineConfig
from weft.serve.engine_core import EngineCore
from weft.serve.llm import LLM
from weft.serve.lora_request import LoRARequest

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = ModelConfig.from_directory(embedded_model_path())
    found: list[Path] = []
    for seed in range(2):
        spec = AdapterSpec(rank=4, alpha=32.0)
        path = tmp_path_factory.mktemp("adapter")
        write_adapter(path, spec, random_adapter(spec, config, seed=seed))
        found.append(path)
    return found


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(embedded_model_path(), max_model_len=128, max_num_seqs=4) as opened:
        yield opened


def test_each_prompt_runs_through_its_own_adapter(llm: LLM, paths: list[Path]) -> None:
    one, two = LoRARequest("one", 1, str(paths[0])), LoRARequest("two", 2, paths[1])
    prompt = "Once upon a time"
    mixed = llm.generate([prompt] * 4, GREEDY, lora_request=[one, None, two, one])
    texts = [output.outputs[0].text for output in mixed]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    (bare,) = llm.generate(prompt, GREEDY)
    (alone,) = llm.generate(prompt, GREEDY, lora_request=two)
    assert [bare.outputs[0].text, alone.outputs[0].text] == texts[1:3]


def test_wrong_adapters_are_refused(llm: LLM, paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterLoadError, match="neither adapter_config"):
        llm.generate("a", GREEDY, lora_request=LoRARequest("x", 1, str(tmp_path)))
    llm.generate("a", GREEDY, lora_request=LoRARequest("y", 1, str(paths[0])))
    with pytest.raises(ConfigError, match="another lora_int_id"):
        llm.generate("a", GREEDY, lora_request=LoRARequest("y", 1, str(paths[1])))
    with pytest.raises(InvalidRequestError, match="1 entries for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, lora_request=[None])
    with pytest.raises(UnsupportedError, match="lora_request is a dict"):
        llm.generate("a", GREEDY, lora_request={"x": 1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lora_int_id is 0"):
        LoRARequest("x", 0, "path")


def test_a_version_leaves_with_its_last_request(paths: list[Path]) -> None:
    core = EngineCore(
        EngineConfig(model=str(embedded_model_path()), max_model_len=128, max_num_seqs=2)
    )
    try:
        ref = AdapterRef(id="a", version=1)
        core.load_adapter(ref, str(paths[0]))
        request = Request(
            id="r", prompt_token_ids=tuple(range(5, 25)), sampling=GREEDY, adapter=ref
        )
        core.add(request)
        assert not core.step()[0].finish_reason
        core.unload_adapter(ref)
        host = core._host
        assert host is not None
        assert host.has_adapter(ref)
        with pytest.raises(InvalidRequestError, match="'a' version 1 is not loaded"):
            core.add(Request(id="s", prompt_token_ids=(5,), sampling=GREEDY, adapter=ref))
        updates = []
        while core.has_work:
            updates += core.step()
        assert updates[-1].finish_reason == "length"
        assert not host.has_adapter(ref)
    finally:
        core.close()
