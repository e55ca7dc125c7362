"""What callers say of a job is what the engine is told."""

import numpy as np

from weft.engine.finetune import OptimizerSpec, TrainingSample
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat
from weft.serve.finetune_bodies import JobBody, WeftBody, resolve_settings
from weft.serve.offline_finetune import FinetuneSettings

SAMPLES = (
    TrainingSample(
        token_ids=np.arange(4, dtype=np.int32), label_weights=np.ones(4, dtype=np.float32)
    ),
)


def test_rematerialization_reaches_the_engine() -> None:
    for given, wanted in ((None, Remat.PRUNED), ("layer-input", Remat.LAYER_INPUT)):
        body = JobBody(model="m", training_file="f", weft=WeftBody(remat=given))
        settings = resolve_settings(body, num_samples=1, max_model_len=16)
        assert settings.weft()["remat"] == wanted
        assert settings.spec("job", samples=SAMPLES).remat is wanted


def test_rematerialization_in_ones_own_process() -> None:
    settings = FinetuneSettings(
        lora=AdapterSpec(rank=4), optimizer=OptimizerSpec(), remat=Remat.NONE
    )
    assert settings.spec("job", SAMPLES, ()).remat is Remat.NONE
