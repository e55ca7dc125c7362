"""What a job that fails on the real executor says: the line of the file that is to blame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from serve.tiny_model import write_tiny_model
from weft.engine.finetune_limits import FinetuneConfig, FinetunePolicy
from weft.engine.job_plan import sample_order
from weft.serve.llm import LLM
from weft.serve.offline_finetune import JobFailedError

POISON = "z"
NUM_GOOD = 6


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has no number for one letter."""
    directory = write_tiny_model(tmp_path_factory.mktemp("poisoned"))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][ord(POISON)] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


# A whole step in one iteration, where its gradient is spoilt as well; and loss alone, at first.
@pytest.mark.parametrize("window", [64, 4])
def test_a_loss_that_is_no_number_names_the_line(
    window: int, poisoned_model: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"good {i}"} for i in range(NUM_GOOD)] + [{"text": f"ba{POISON}d"}]
    # Blank lines count, as in an editor.
    data = tmp_path / "train.jsonl"
    data.write_text("\n\n".join(json.dumps(row) for row in rows))
    line = 2 * NUM_GOOD + 1
    order = sample_order(len(rows), seed=3, epoch=0, shuffles=True)
    step = order.index(NUM_GOOD) // 2
    assert order.index(NUM_GOOD) not in (0, NUM_GOOD)
    config = FinetuneConfig(
        policy=FinetunePolicy.FINETUNE_ONLY,
        forward_window=window,
        backward_window=window,
        max_window_tokens=window,
        granule_tokens=min(window, 16),
    )
    with LLM(poisoned_model, dtype="float32", num_threads=1, finetune_config=config) as llm:
        job = llm.finetune(data, batch_size=2, seed=3)
        with pytest.raises(JobFailedError) as failed:
            job.wait()
    message = f"loss of a sample in step {step + 1} is nan (line {line} of the training file)"
    assert message in str(failed.value)


def test_a_validation_loss_that_is_no_number_names_its_line(poisoned_model: Path) -> None:
    config = FinetuneConfig(policy=FinetunePolicy.FINETUNE_ONLY)
    with LLM(poisoned_model, dtype="float32", num_threads=1, finetune_config=config) as llm:
        job = llm.finetune(["good"], validation=["fine", "well", POISON], num_epochs=1)
        with pytest.raises(JobFailedError, match=r"is nan \(line 3 of the validation file\)"):
            job.wait()
