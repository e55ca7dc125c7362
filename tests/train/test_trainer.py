"""Runs over loopback: resumes, other plans, broken checkpoints, NaN, the run directory."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR

from train.small import chain_plan, data, model
from weft.base.errors import ConfigError, ModelLoadError
from weft.cluster.presets import load_cluster
from weft.cost.roofline import RooflineCost
from weft.engine.finetune import ScheduleName
from weft.graph.coarsen import coarsen
from weft.model.zoo.registry import ZooModel
from weft.plan.api import plan as make_plan
from weft.plan.train_plan import PlanError, TrainPlan
from weft.runtime.loopback import LoopbackWorld
from weft.runtime.param_init import SafetensorsWeights
from weft.runtime.stage_executor import NonFiniteLossError
from weft.train.checkpoint import CheckpointStore, model_tensors
from weft.train.config import OptimizerName, TrainConfig
from weft.train.data import TrainData
from weft.train.export import export_directory
from weft.train.run_dir import read_metrics
from weft.train.trainer import Trainer, _check_weights, _idle_scheduler


def trainer(run_dir: Path, num_steps: int = 6, *, stages: int = 3, **options: Any) -> Trainer:
    capture_of = model(double=True)
    capture = capture_of.trace()
    dp = options.pop("dp", 1)
    schedule = options.pop("plan_schedule", "1f1b")
    samples = options.pop("data", None) or data()
    config = TrainConfig(num_steps=num_steps, run_dir=run_dir, **{"lr": 1e-2, **options})
    return Trainer(
        plan=chain_plan(capture, stages, dp=dp, schedule=schedule),
        model=capture_of,
        data=samples,
        config=config,
        capture=capture,
    )


def weights(found: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone()
        for rank in found.executor.ranks
        for name, p in rank.parameters.items()
    }


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_leaves_plan_configuration_metrics_and_a_checkpoint(tmp_path: Path) -> None:
    found = trainer(tmp_path / "run", validate_every=2)
    report = found.run()
    assert (report.num_steps, report.first_step, report.was_stopped) == (6, 0, False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] == report.loss
    assert report.validation_loss == rows[-1]["validation_loss"]
    assert (tmp_path / "run" / "plan.json").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 1e-2
    assert "torch" in json.loads((tmp_path / "run" / "versions.json").read_text())
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000006"
    files = sorted(file.suffix for file in checkpoint.iterdir())
    assert set(files) == {".json", ".safetensors"}  # nothing that unpickles
    held = model_tensors(checkpoint)
    for name, value in weights(found).items():
        assert torch.equal(held[name], value), name


def test_a_row_of_metrics_is_about_its_own_step(tmp_path: Path) -> None:
    """The learning rate that the step used, and a validation loss only where one was computed."""
    trainer(
        tmp_path, validate_every=3, schedule=ScheduleName.LINEAR, num_warmup_steps=2, num_steps=7
    ).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    shares = [0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * share for share in shares])
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 7]


def test_validation_leaves_a_run_without_flushes_as_it_is(tmp_path: Path) -> None:
    """Messages of the next step are under way when a validation begins; they must not meet."""
    quiet = trainer(tmp_path / "quiet", plan_schedule="2bw", num_steps=7)
    quiet.run()
    validated = trainer(tmp_path / "validated", plan_schedule="2bw", num_steps=7, validate_every=2)
    validated.run()
    rows = read_metrics(tmp_path / "validated" / "metrics.jsonl")
    assert sum("validation_loss" in row for row in rows) == 4
    assert losses(tmp_path / "validated") == losses(tmp_path / "quiet")
    for name, value in weights(quiet).items():
        assert torch.equal(weights(validated)[name], value), name


def test_half_a_line_of_metrics_does_not_swallow_the_next(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=2).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    trainer(tmp_path, num_steps=4).run()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("schedule", ["1f1b", "2bw"])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(tmp_path: Path, schedule: str) -> None:
    options: dict[str, Any] = {"plan_schedule": schedule, "schedule": "cosine"}
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    # The first life ends after three of the six steps.
    first = trainer(tmp_path / "parts", checkpoint_every=3, **options)
    stopped = 0
    for result in first.executor.steps(3):
        for scheduler in first.schedulers:
            scheduler.step()
        stopped = result.step + 1
    first.run_dir.create()
    first.save(stopped, blocking=True)
    second = trainer(tmp_path / "parts", **options)
    assert second.first_step == 3
    second.run()
    wanted = weights(whole)
    for name, value in weights(second).items():
        assert torch.equal(value, wanted[name]), name
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[3:]


def test_another_plan_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts", num_steps=3, stages=3)
    first.run()
    for stages, dp in ((2, 2), (1, 1)):
        run_dir = tmp_path / f"parts-{stages}"
        (tmp_path / "parts").rename(run_dir)
        other = trainer(run_dir, stages=stages, dp=dp)
        assert other.first_step == 3
        other.run()
        assert losses(run_dir)[3:] == pytest.approx(losses(tmp_path / "whole")[3:], abs=1e-9)
        shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
        run_dir.rename(tmp_path / "parts")
        # The earlier checkpoint is still there for the next plan.
        assert (tmp_path / "parts" / "checkpoints" / "step-00000003").is_dir()


def test_half_written_checkpoints_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, num_steps=4, checkpoint_every=2).run()
    newest = tmp_path / "checkpoints" / "step-00000004"
    (file,) = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "checkpoints" / "step-00000005.part").mkdir()
    resumed = trainer(tmp_path, num_steps=6)
    assert resumed.first_step == 2
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "step-00000004 is skipped" in said
    assert "step-00000005.part was never finished" in said
    assert not (tmp_path / "checkpoints" / "step-00000005.part").exists()


def test_a_checkpoint_without_one_of_its_files_is_skipped(tmp_path: Path) -> None:
    """What lies on another machine's disk, say: the tensors that are there look whole."""
    trainer(tmp_path, num_steps=4, checkpoint_every=2).run()
    newest = tmp_path / "checkpoints" / "step-00000004"
    state = json.loads((newest / "train.json").read_text())
    assert "model-00001-of-00001.safetensors" in state["files"]
    state["files"]["shard-00002-model-00001-of-00001.safetensors"] = 1000
    (newest / "train.json").write_text(json.dumps(state))
    assert trainer(tmp_path, num_steps=4).first_step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["stages"][0].update(frozen=True), "stage 0 is frozen, but parameter 'left"),
        (lambda d: d["edges"][0].update(backward_bytes_per_sample=0), "carries no gradients back"),
    ],
)
def test_a_plan_that_would_lose_gradients_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    zoo = model()
    capture = zoo.trace()
    plain = chain_plan(capture, 2).to_dict()
    change(plain)
    with pytest.raises(PlanError, match=message):
        Trainer(
            plan=TrainPlan.from_dict(plain),
            model=zoo,
            data=data(),
            config=TrainConfig(num_steps=1, run_dir=tmp_path),
            capture=capture,
        )


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=5, checkpoint_every=1, keep_checkpoints=2).run()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]


def test_a_checkpoint_of_another_model_is_refused_with_its_names(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=1).run()
    other = model(width=10, double=True)
    capture = other.trace()
    with pytest.raises(ModelLoadError, match=r"another model: parameter .* has shape"):
        Trainer(
            plan=chain_plan(capture, 2),
            model=other,
            data=data(),
            config=TrainConfig(num_steps=2, run_dir=tmp_path),
            capture=capture,
        )


def test_a_loss_that_is_not_finite_stops_with_step_and_rank(tmp_path: Path) -> None:
    found = trainer(tmp_path, data=data(poison=3), shuffles=False)
    before = weights(found)
    with pytest.raises(NonFiniteLossError, match="step 0 is not finite on rank 2"):
        found.run()
    for name, value in weights(found).items():
        assert torch.equal(value, before[name])


def test_sigterm_writes_a_checkpoint_and_leaves(tmp_path: Path) -> None:
    found = trainer(tmp_path, num_steps=1000)

    def terminate(result: Any, num_steps: int, row: dict[str, Any]) -> None:
        if result.step == 2:
            signal.raise_signal(signal.SIGTERM)

    found.on_step = terminate
    report = found.run()
    assert report.was_stopped
    assert report.num_steps == 3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_plan_of_blocks_trains_their_operators(tmp_path: Path) -> None:
    zoo = model(double=False)
    capture = zoo.trace()
    blocks = coarsen(capture.graph, 150)
    planned = make_plan(blocks, load_cluster("summit-2"), batch_size=8, cost=RooflineCost())
    found = Trainer(
        plan=planned,
        model=zoo,
        data=data(),
        config=TrainConfig(num_steps=1, run_dir=tmp_path),
        capture=capture,
    )
    assert found.run().num_steps == 1


def test_a_plan_of_another_module_is_refused(tmp_path: Path) -> None:
    capture = model().trace()
    plan = chain_plan(capture, 2)
    other = model(width=12)
    with pytest.raises(PlanError, match=r"is for graph .*first stage that differs is 0 .*left.0"):
        Trainer(
            plan=plan,
            model=other,
            data=data(),
            config=TrainConfig(num_steps=1, run_dir=tmp_path),
        )


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        trainer(blocked)


def test_a_resume_under_another_seed_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=1).run()
    with pytest.raises(ModelLoadError, match="seed 0, this run has 1"):
        trainer(tmp_path, num_steps=2, seed=1)


def test_settings_changed_for_the_rest_of_a_run_are_obeyed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lower learning rate after a loss that was not finite, say."""
    options: dict[str, Any] = {"schedule": ScheduleName.LINEAR, "num_steps": 4}
    trainer(tmp_path, **options).run()
    other = trainer(tmp_path, schedule=ScheduleName.LINEAR, num_steps=8, lr=2e-3, weight_decay=0.25)
    for rank in other.executor.ranks:
        assert rank.optimizer is not None
        (group,) = rank.optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-3), 0.25)
    said = [record.getMessage() for record in caplog.records]
    assert "resuming with weight_decay 0.25; the run began with 0.0" in said
    other.run()
    rates = [row["lr"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates[4:] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_groups_of_parameters_resume_by_name_under_another_plan(tmp_path: Path) -> None:
    """Ranks have groups of their own; a frozen stage's rank has none, and no scheduler."""

    def biases_apart(held: Any) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for n, p in held.items() if ("bias" in n) == is_bias], "lr": lr}
            for is_bias, lr in ((True, 1e-3), (False, 1e-2))
        ]
        return torch.optim.SGD([group for group in groups if group["params"]])

    def made(stages: int, num_steps: int) -> Trainer:
        zoo = model(double=True)
        zoo.module.left.requires_grad_(False)
        capture = zoo.trace()
        return Trainer(
            plan=chain_plan(capture, stages),
            model=zoo,
            data=data(),
            config=TrainConfig(num_steps=num_steps, run_dir=tmp_path),
            optimizer=biases_apart,
            scheduler=lambda optimizer: ExponentialLR(optimizer, 0.5),
            capture=capture,
        )

    first = made(4, 2)
    assert first.executor.ranks[0].optimizer is None
    first.run()
    for stages in (4, 1):
        for rank in made(stages, 3).executor.ranks:
            named = {id(p): name for name, p in rank.trainable.items()}
            for group in [] if rank.optimizer is None else rank.optimizer.param_groups:
                names = [named[id(p)] for p in group["params"]]
                is_bias = "bias" in names[0]
                assert all(("bias" in name) == is_bias for name in names)
                assert group["lr"] == (1e-3 if is_bias else 1e-2) / 4
    made(4, 3).run()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["lr"] in (1e-3 / 4, 1e-2 / 4)


def test_a_learning_rate_in_a_tensor_resumes(tmp_path: Path) -> None:
    def made(num_steps: int) -> Trainer:
        zoo = model(double=True)
        return Trainer(
            plan=chain_plan(zoo.trace(), 1),
            model=zoo,
            data=data(),
            config=TrainConfig(num_steps=num_steps, run_dir=tmp_path),
            optimizer=lambda held: AdamW(list(held.values()), lr=torch.tensor(0.5)),
            scheduler=lambda optimizer: ExponentialLR(optimizer, 0.5),
        )

    made(2).run()
    (rank,) = made(4).executor.ranks
    assert rank.optimizer is not None
    assert rank.optimizer.param_groups[0]["lr"] == torch.tensor(0.125)


def test_a_rank_that_trains_nothing_tells_the_learning_rate(tmp_path: Path) -> None:
    config = TrainConfig(num_steps=4, run_dir=tmp_path, schedule=ScheduleName.LINEAR, lr=0.5)
    scheduler = _idle_scheduler(config)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.375]


def test_a_resume_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=1).run()
    with pytest.raises(ModelLoadError, match="written by optimizer AdamW, this run has SGD"):
        trainer(tmp_path, num_steps=2, optimizer=OptimizerName.SGD)


def test_a_resume_with_another_batch_says_what_becomes_of_the_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, num_steps=1).run()
    trainer(tmp_path, num_steps=2, accumulate=2).run()
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "written with 8 samples a step, this run takes 16" in said


def test_training_begins_with_the_values_that_the_module_holds(tmp_path: Path) -> None:
    zoo = model()
    with torch.no_grad():
        for p in zoo.module.parameters():
            p.fill_(0.125)
    found = Trainer(
        plan=chain_plan(zoo.trace(), 2),
        model=zoo,
        data=data(),
        config=TrainConfig(num_steps=1, run_dir=tmp_path),
    )
    assert all((value == 0.125).all() for value in weights(found).values())


def test_ranks_with_different_first_values_are_refused() -> None:
    class Two(LoopbackWorld):
        def all_gather_bytes(self, parts: Any) -> list[bytes]:
            return [parts[0], parts[0].replace(b"1.0", b"2.0")]

    shared = {"head.bias": torch.nn.Parameter(torch.tensor([0.5, 0.5]))}
    with pytest.raises(ConfigError, match=r"rank 1 begins with other values .*'head.bias'"):
        _check_weights(Two(2), [SimpleNamespace(parameters=shared)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, "momentum is 0.9, which optimizer adamw has no use for"),
        ({"optimizer": "sgd", "momentum": 1.5}, r"momentum is 1.5; it must be in \[0, 1\)"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be positive"),
        ({"device": "tpu"}, "device is 'tpu'; it must be cpu or cuda"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of sgd, adam, adamw"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(num_steps=1, run_dir=tmp_path, **options)


def test_validation_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validate_every is 2, but the data holds no validation"):
        trainer(tmp_path, data=replace(data(), validation=None), validate_every=2)


def test_names_of_settings_may_be_text(tmp_path: Path) -> None:
    config = TrainConfig(num_steps=1, run_dir=tmp_path, optimizer="sgd")  # type: ignore[arg-type]
    assert config.optimizer is OptimizerName.SGD


class Scaled(nn.Module):
    """A scale without axes, statistics in a buffer, a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.unused = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        y = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return self.layer(y) * self.scale


def scaled(run_dir: Path, num_steps: int, mean: float = 0.0, **options: Any) -> Trainer:
    torch.manual_seed(0)
    module = Scaled()
    module.norm.running_mean.fill_(mean)  # type: ignore[union-attr]
    zoo = ZooModel(
        name="scaled",
        module=module,
        example_inputs=(torch.zeros(2, 4, dtype=torch.float64),),
        targets=(torch.zeros(2, 3, dtype=torch.float64),),
        loss=functional.mse_loss,
    )
    held = data()
    return Trainer(
        plan=chain_plan(zoo.trace(), 2),
        model=zoo,
        data=TrainData(inputs=(held.leaves[0],), targets=held.targets),
        config=TrainConfig(num_steps=num_steps, run_dir=run_dir),
        **options,
    )


def test_a_parameter_without_axes_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = scaled(tmp_path / "whole", 6)
    whole.run()
    scaled(tmp_path / "parts", 3).run()
    resumed = scaled(tmp_path / "parts", 6)
    assert resumed.first_step == 3
    resumed.run()
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_an_exported_directory_holds_all_that_belongs_to_the_model(tmp_path: Path) -> None:
    trained = scaled(tmp_path / "run", 2, mean=3.0)
    trained.run()
    out = tmp_path / "out"
    export_directory(tmp_path / "run" / "checkpoints" / "step-00000002", out, config={})
    other = Scaled()
    other.load_state_dict(load_file(out / "model.safetensors"))  # strict: nothing is missing
    assert torch.equal(other.norm.running_mean, torch.full((4,), 3.0, dtype=torch.float64))  # type: ignore[arg-type]
    # And back: the buffers come along.
    again = scaled(tmp_path / "again", 1, weights=SafetensorsWeights(out))
    for rank in again.executor.ranks:
        for name, value in rank.buffers.items():
            assert torch.equal(value, dict(other.named_buffers())[name]), name
        for name, value in rank.parameters.items():
            assert torch.equal(value, weights(trained)[name]), name
    assert any(rank.buffers for rank in again.executor.ranks)


def test_a_torn_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=8, checkpoint_every=2, keep_checkpoints=0).run()
    for step in (6, 8):
        (file,) = (tmp_path / "checkpoints" / f"step-0000000{step}").glob("*.safetensors")
        file.write_bytes(b"torn")
    resumed = trainer(tmp_path, num_steps=8, checkpoint_every=1, keep_checkpoints=1)
    assert resumed.first_step == 4
    (result,) = resumed.executor.steps(1, first_step=4)
    resumed.save(result.step + 1, blocking=True)
    newest = CheckpointStore(tmp_path / "checkpoints").latest()
    assert newest is not None
    assert newest.name == "step-00000005"


def test_an_asynchronous_save_holds_the_state_of_its_step(tmp_path: Path) -> None:
    """Training goes on while files are written: they must not see later weights."""
    found = trainer(tmp_path, num_steps=4)
    store = CheckpointStore(tmp_path / "checkpoints")
    for result in found.executor.steps(2):
        if result.step == 0:
            found.save(1)
            wanted = weights(found)
    found.checkpoints.wait()
    path = store.latest()
    assert path is not None
    assert path.name == "step-00000001"
    for name, value in model_tensors(path).items():
        assert torch.equal(value, wanted[name]), name


def test_optimizer_state_is_in_safetensors_by_parameter_name(tmp_path: Path) -> None:
    trainer(tmp_path, num_steps=1).run()
    (file,) = (tmp_path / "checkpoints" / "step-00000001").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
    assert "model.head.weight" in names
    assert "optimizer.head.weight.exp_avg_sq" in names
    state = json.loads((file.parent / "train.json").read_text())
    assert state["optimizer"]["head.weight"] == {"step": 1.0}


def test_stages_say_what_they_are_built_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="weft.runtime"):
        own = trainer(tmp_path / "own")
        graph = trainer(tmp_path / "graph", own_modules=False)
    said = [record.getMessage() for record in caplog.records if "stage 0: " in record.getMessage()]
    assert "the user's own modules" in said[0]
    assert said[1] == "stage 0: cut from the exported graph"
    assert own.executor.cut.stages[0].own
    assert not graph.executor.cut.stages[0].own
