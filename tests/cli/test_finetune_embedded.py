"""`weft finetune` and `weft export` as they are, on the model that ships with Weft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from weft.cli import export, finetune
from weft.engine.sampling import SamplingParams
from weft.model.embedded import embedded_model_path
from weft.serve.llm import LLM
from weft.serve.lora_request import LoRARequest

PROMPT = "def f3(x):\n    return"


def test_an_adapter_is_trained_served_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, data, adapter = embedded_model_path(), tmp_path / "t.jsonl", tmp_path / "adapter"
    rows = [{"prompt": f"def f{i}(x):", "completion": f"\n    return x + {i}\n"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", str(base)]
    more = ["--epochs", "2", "--rank", "4", "--learning-rate", "1e-2", "--dtype", "float32"]
    out = ["--data", str(data), "--out", str(adapter)]
    assert finetune.main([*model, *out, *more]) == 0
    losses = json.loads((adapter / finetune.SUMMARY).read_text())["loss"]
    assert losses[-1] < losses[0]
    merged = tmp_path / "merged"
    assert export.main([*model, "--merge", "--adapter", str(adapter), "--out", str(merged)]) == 0
    params = SamplingParams(max_tokens=8, temperature=0)
    with LLM(base, dtype="float32") as llm:
        request = LoRARequest("adapter", 1, adapter)
        answers = llm.generate([PROMPT] * 2, params, lora_request=[request, None], use_tqdm=False)
        found = [output.outputs[0].token_ids for output in answers]
        prompt = llm.get_tokenizer().encode(PROMPT)
    assert found[0] != found[1]
    reference: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    wanted = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert list(found[0]) == wanted[0, len(prompt) :].tolist()
