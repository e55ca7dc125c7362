"""What a job does beside its gradients: steps, masks, checkpoints, publication, failures."""

from __future__ import annotations

import errno
import resource
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.finetune_harness import (
    RATE,
    FinetuneHand,
    Sample,
    Span,
    gradients,
    random_sample,
    random_weights,
    reference_step,
    relative_error,
    start_of,
    write_weights,
)
from runtime.harness import Row, make_context, random_model, start
from weft.base.errors import IntegrityError
from weft.engine.batch import AdapterRef
from weft.engine.finetune import (
    OptimizerName,
    OptimizerSpec,
    OptimizerStep,
    PublishAdapter,
    SaveCheckpoint,
)
from weft.graph.adapter_spec import AdapterSpec
from weft.graph.pruning import Remat
from weft.model.finetune.saved import SavedTensors
from weft.runtime import finetune_checkpoint

SPEC = AdapterSpec(rank=4, dropout=0.2)
NAME = "llama3-gqa"


def hand_of(dtype: torch.dtype = torch.float64) -> FinetuneHand:
    return FinetuneHand(make_context(random_model(NAME), dtype=dtype, num_sequences=16))


def samples_of(step: int, num: int = 2) -> list[Sample]:
    rng = np.random.default_rng(step)
    return [
        random_sample(rng, step * num + index, 20 + 3 * index, step=step, index=index)
        for index in range(num)
    ]


def train_step(hand: FinetuneHand, step: int, lr: float, window: int = 8) -> None:
    samples = samples_of(step)
    hand.run(sample_starts=tuple(start_of(sample) for sample in samples))
    hand.pass_samples(samples, window=window)
    hand.run(sample_ends=tuple(("job", sample.number) for sample in samples))
    hand.step(step, lr=lr)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.99), max_grad_norm=0.5),
        OptimizerSpec(name=OptimizerName.SGD, lr=1e-2, momentum=0.9, weight_decay=0.01),
    ],
)
def test_steps_follow_torch(optimizer: OptimizerSpec, tmp_path: Path) -> None:
    """Three steps against the reference's gradients under torch's own optimizer and clipping."""
    hand = hand_of()
    model, context = random_model(NAME), hand.context
    weights = random_weights(SPEC, context, seed=1)
    path = write_weights(SPEC, context, weights, tmp_path / "adapter")
    hand.start(SPEC, optimizer=optimizer, initial_adapter=path)
    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    if optimizer.name is OptimizerName.ADAMW:
        wanted: torch.optim.Optimizer = torch.optim.AdamW(
            leaves.values(), betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
    else:
        wanted = torch.optim.SGD(
            leaves.values(), momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        train_step(hand, step, lr)
        grads = reference_step(model, context, SPEC, leaves, samples_of(step)).grads
        for key, leaf in leaves.items():
            leaf.grad = grads[key].clone()
        norm = torch.nn.utils.clip_grad_norm_(
            leaves.values(), optimizer.max_grad_norm or float("inf")
        )
        assert abs(hand.outcomes[-1].steps[0].grad_norm - norm.item()) < 1e-10 * norm.item()
        wanted.param_groups[0]["lr"] = lr
        wanted.step()
    found = hand.weights(tmp_path)
    for key, leaf in leaves.items():
        assert relative_error(found[key], leaf.detach()) < 1e-10


@pytest.mark.parametrize("remat", Remat)
def test_windows_remat_and_company_leave_masks_as_they_are(remat: Remat, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for index, (window, level) in enumerate(((1000, Remat.NONE), (5, remat), (16, remat))):
        hand = hand_of()
        weights = random_weights(SPEC, hand.context, seed=1)
        path = write_weights(SPEC, hand.context, weights, tmp_path / "adapter")
        samples = samples_of(0)
        hand.start(SPEC, samples=samples, remat=level, initial_adapter=path)
        hand.pass_samples(samples, window=window)
        hand.step()
        found.append(gradients(weights, hand.weights(tmp_path / str(index))))
    for other in found[1:]:
        for key, grad in found[0].items():
            assert relative_error(other[key], grad) < 1e-12
    # Another step's masks are others.
    model, context = random_model(NAME), hand_of().context
    weights = random_weights(SPEC, context, seed=1)
    moved = [Sample(**{**vars(sample), "step": 1}) for sample in samples_of(0)]
    grads = reference_step(model, context, SPEC, weights, moved).grads
    assert relative_error(found[0]["0.q_proj.A"], grads["0.q_proj.A"]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resumed_job_ends_with_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    optimizer = OptimizerSpec(lr=1e-2)
    through = hand_of(dtype)
    through.start(SPEC, optimizer=optimizer)
    for step in range(4):
        train_step(through, step, 0.01)
    broken = hand_of(dtype)
    broken.start(SPEC, optimizer=optimizer)
    for step in range(2):
        train_step(broken, step, 0.01)
    path = tmp_path / "step-2"
    broken.run(saves=(SaveCheckpoint(job_id="job", path=str(path), num_steps=2),))
    resumed = hand_of(dtype)
    resumed.start(SPEC, optimizer=optimizer, resume_from=path)
    assert not resumed.outcomes[-1].failures
    for step in (2, 3):
        train_step(resumed, step, 0.01)
    wanted, found = through.weights(tmp_path / "a"), resumed.weights(tmp_path / "b")
    fresh = broken.weights(tmp_path / "c")
    for key, value in wanted.items():
        assert torch.equal(value, found[key]), key
    assert any(not torch.equal(value, fresh[key]) for key, value in wanted.items())


def test_the_next_steps_forward_in_the_iteration_of_a_step_changes_nothing(tmp_path: Path) -> None:
    samples = [
        replace(sample, step=step, number=step)
        for step in range(2)
        for sample in samples_of(step, 1)
    ]

    num_layers = hand_of().context.config.num_layers

    def spans(sample: Sample) -> tuple[Span, Span]:
        whole = Span(sample=sample, begin=0, end=sample.num_tokens)
        return whole, replace(whole, layers=(0, num_layers))

    def steps(step: int) -> tuple[OptimizerStep, ...]:
        return (OptimizerStep(job_id="job", step=step, lr=RATE),)

    (forward, backward), (next_forward, next_backward) = map(spans, samples)
    found: list[dict[str, Tensor]] = []
    for joins in (False, True):
        hand = hand_of()
        hand.start(SPEC, samples=samples)
        hand.run(forward=[forward])
        if joins:
            hand.run(
                forward=[next_forward], backward=[backward], steps=steps(0), is_backward_first=True
            )
        else:
            hand.run(backward=[backward], steps=steps(0))
            hand.run(forward=[next_forward])
        hand.run(backward=[next_backward], steps=steps(1))
        found.append(hand.weights(tmp_path / str(joins)))
    apart, joined = found
    assert all(torch.equal(apart[name], joined[name]) for name in apart)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_decodes_beside_a_backward_pass_run_as_recorded(has_adapter: bool, tmp_path: Path) -> None:
    (sample,) = samples_of(0, 1)
    whole = Span(sample=sample, begin=0, end=sample.num_tokens)
    found: list[list[int]] = []
    weights: list[dict[str, Tensor]] = []
    for apart in (True, False):
        hand = hand_of(torch.float32)
        num_layers = hand.context.config.num_layers
        backward = replace(whole, layers=(0, num_layers))
        hand.start(SPEC, samples=[sample])
        served = AdapterRef(id="served", version=1)
        drawn = random_weights(SPEC, hand.context, seed=1)
        path = write_weights(SPEC, hand.context, drawn, tmp_path / f"served-{apart}")
        hand.executor.load_adapter(served, str(path))
        prompt = Row(slot=0, tokens=[5, 6, 7])
        hand.run(rows=[prompt], forward=[whole], starts=[start(0, prompt.tokens)])
        rows: Any = [Row(slot=0, tokens=[8], begin=3, is_decode=True)]
        before = hand.executor.num_replayed
        batch = hand.batch(rows=rows) if apart else hand.batch(rows=rows, backward=[backward])
        if has_adapter:
            batch.adapters[0] = 0
            batch = replace(batch, adapter_refs=(served,))
        hand.executor.submit(batch)
        result = hand.executor.collect()
        if apart:
            hand.run(backward=[backward])
        assert hand.executor.num_replayed == before + 1
        found.append(result.tokens.tolist())
        hand.step()
        weights.append(hand.weights(tmp_path / str(apart)))
    assert found[0] == found[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_masters_stay_float32_under_bfloat16(tmp_path: Path) -> None:
    hand = hand_of(torch.bfloat16)
    hand.start(AdapterSpec(rank=4), optimizer=OptimizerSpec(lr=1e-6))
    before = hand.weights(tmp_path / "before")
    train_step(hand, 0, 1e-6)
    after = hand.weights(tmp_path / "after")
    (path,) = tmp_path.glob("after/*/adapter_model.safetensors")
    assert {value.dtype for value in load_file(path).values()} == {torch.float32}
    # A step too small for bfloat16 to notice is not lost.
    change = after["0.q_proj.B"] - before["0.q_proj.B"]
    assert 0 < float(change.abs().max()) < 1e-5


def test_first_weights_depend_on_seed_and_place_alone(tmp_path: Path) -> None:
    def first(name: str, **kwargs: object) -> dict[str, Tensor]:
        hand = hand_of()
        hand.start(AdapterSpec(rank=4, **kwargs), seed=len(name))  # type: ignore[arg-type]
        return hand.weights(tmp_path / name)

    whole, again, other = first("abc"), first("xyz"), first("other")
    some = first("sub", target_modules=("v_proj",))
    assert torch.equal(whole["1.v_proj.A"], again["1.v_proj.A"])
    assert torch.equal(whole["1.v_proj.A"], some["1.v_proj.A"])
    assert not torch.equal(whole["1.v_proj.A"], other["1.v_proj.A"])
    assert not torch.equal(whole["1.v_proj.A"], whole["2.v_proj.A"])
    assert float(whole["1.v_proj.B"].abs().max()) == 0
    bound = 64**-0.5  # kaiming's for 64 inputs and a = sqrt(5)
    assert 0.9 * bound < float(whole["1.v_proj.A"].abs().max()) <= bound


def test_validation_keeps_nothing_and_changes_nothing(tmp_path: Path) -> None:
    hand = hand_of()
    weights = random_weights(SPEC, hand.context, seed=1)
    path = write_weights(SPEC, hand.context, weights, tmp_path / "adapter")
    sample = random_sample(np.random.default_rng(0), 7, 30, is_validation=True)
    hand.start(SPEC, samples=[sample], initial_adapter=path)
    for begin, end in ((0, 11), (11, 30)):
        hand.run(forward=[Span(sample=sample, begin=begin, end=end)])
    model = random_model(NAME)
    wanted = reference_step(model, hand.context, SPEC, weights, [sample])
    loss = sum(loss.loss_sum for loss in hand.losses)
    assert abs(loss - wanted.losses[7]) < 1e-12 * loss
    hand.step()
    assert hand.outcomes[-1].steps[0].grad_norm == 0
    with pytest.raises(IntegrityError):
        hand.run(backward=[Span(sample=sample, begin=0, end=30, layers=(0, 3))])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 30, 0, 3)], "only 20 of 30"),
        ([(0, 10, 2, 3)], "done from 30"),
        ([(20, 30, 0, 2)], "layer 2 is done from 30"),
        ([(20, 30, 0, 3), (10, 20, 0, 2)], "layer 2 is done from 20"),
    ],
)
def test_an_illegal_order_is_refused(
    spans: Sequence[tuple[int, int, int, int]], message: str
) -> None:
    hand = hand_of()
    sample = random_sample(np.random.default_rng(0), 0, 30)
    hand.start(SPEC, samples=[sample])
    hand.run(forward=[Span(sample=sample, begin=0, end=20)])
    if "only" not in message:
        hand.run(forward=[Span(sample=sample, begin=20, end=30)])
    rows = [Span(sample=sample, begin=b, end=e, layers=(lo, hi)) for b, e, lo, hi in spans]
    with pytest.raises(IntegrityError, match=message):
        hand.run(backward=rows)


def test_exactly_what_backward_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = SavedTensors.keep

    def poisoned(self: SavedTensors, layer: int, name: str, begin: int, rows: Tensor) -> None:
        keep(self, layer, name, begin, rows)
        keep(self, layer, f"extra:{name}", begin, rows)

    hand = hand_of()
    sample = random_sample(np.random.default_rng(0), 0, 12)
    hand.start(SPEC, samples=[sample])
    monkeypatch.setattr(SavedTensors, "keep", poisoned)
    with pytest.raises(IntegrityError, match=r"layer 0 keeps .*'extra:"):
        hand.run(forward=[Span(sample=sample, begin=0, end=12)])


def test_a_loss_that_is_not_finite_fails_its_job_alone(tmp_path: Path) -> None:
    hand = hand_of()
    weights = random_weights(SPEC, hand.context, seed=1)
    weights["1.o_proj.B"][0] = 1.7e308  # finite, but not its products
    path = write_weights(SPEC, hand.context, weights, tmp_path / "adapter")
    bad, good = samples_of(0)
    hand.start(SPEC, samples=[bad], job_id="bad", initial_adapter=path)
    hand.start(SPEC, samples=[good])
    prompt = list(range(5, 20))
    result = hand.run(
        rows=[Row(slot=0, tokens=prompt)],
        starts=[start(0, prompt)],
        forward=[Span(sample=bad, begin=0, end=20)],
        job_id="bad",
    )
    alone = hand_of().run(rows=[Row(slot=0, tokens=prompt)], starts=[start(0, prompt)])
    assert np.array_equal(result.tokens, alone.tokens)
    (failure,) = hand.outcomes[-1].failures
    assert (failure.job_id, failure.step, failure.sample) == ("bad", 0, bad.number)
    # Whatever else is said of it is skipped; the other job goes on.
    hand.run(
        backward=[Span(sample=bad, begin=0, end=20, layers=(0, 3))],
        job_id="bad",
        steps=(OptimizerStep(job_id="bad", step=0, lr=RATE),),
        saves=(SaveCheckpoint(job_id="bad", path=str(tmp_path / "no"), num_steps=1),),
        publishes=(PublishAdapter(job_id="bad", id="bad", version=1),),
        job_ends=("bad",),
    )
    assert not hand.outcomes[-1].steps
    assert not (tmp_path / "no").exists()
    hand.pass_samples([good])
    assert hand.step().steps[0].grad_norm > 0


def test_a_gradient_that_is_not_finite_fails_at_the_step(tmp_path: Path) -> None:
    hand = hand_of(torch.float32)
    (sample, _) = samples_of(0)
    sample = Sample(**{**vars(sample), "loss_scale": 1e39})  # beyond float32
    hand.start(SPEC, samples=[sample])
    hand.pass_samples([sample])
    (failure,) = hand.step().failures
    assert (failure.job_id, failure.step) == ("job", 0)
    assert "not finite" in failure.message


@pytest.mark.parametrize(
    ("dtype", "rate", "problem"),
    [
        (torch.float16, 1e6, "weights not finite in torch.float16"),  # finite in float32
        (torch.float32, 1e39, "overflow"),
    ],
)
def test_weights_that_a_step_spoils_are_neither_saved_nor_served(
    dtype: torch.dtype, rate: float, problem: str, tmp_path: Path
) -> None:
    hand = hand_of(dtype)
    (sample, _) = samples_of(0)
    hand.start(SPEC, samples=[sample])
    hand.pass_samples([sample])
    path = tmp_path / "no"
    hand.run(
        steps=(OptimizerStep(job_id="job", step=4, lr=rate),),
        saves=(SaveCheckpoint(job_id="job", path=str(path), num_steps=5),),
        publishes=(PublishAdapter(job_id="job", id="job", version=1),),
    )
    outcome = hand.outcomes[-1]
    (failure,) = outcome.failures
    assert (failure.step, outcome.steps) == (4, ())
    assert f"step 5 at learning rate {rate:g} failed: " in failure.message
    assert problem in failure.message
    assert not path.exists()


def test_a_full_disk_fails_the_job_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = hand_of()
    hand.start(SPEC)
    hand.weights(tmp_path)
    (kept,) = tmp_path.iterdir()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finetune_checkpoint, "save_file", full)
    hand.run(saves=(SaveCheckpoint(job_id="job", path=str(kept), num_steps=2),))
    (failure,) = hand.outcomes[-1].failures
    assert "No space left" in failure.message
    assert list(tmp_path.iterdir()) == [kept]
    resumed = hand_of()
    resumed.start(SPEC, resume_from=kept)
    assert not resumed.outcomes[-1].failures


class SlowDisk:
    """Writes nothing before it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_asked, self.may_write = threading.Event(), threading.Event()
        self._save_file = finetune_checkpoint.save_file
        self.error: OSError | None = None
        monkeypatch.setattr(finetune_checkpoint, "save_file", self)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.is_asked.set()
        assert self.may_write.wait(20)
        if self.error is not None:
            raise self.error
        self._save_file(*args, **kwargs)


def begin_save(hand: FinetuneHand, path: Path) -> Row:
    """A step and its checkpoint in an iteration that a request waits for; the request's next."""
    prompt = list(range(5, 20))
    hand.run(
        rows=[Row(slot=0, tokens=prompt)],
        starts=[start(0, prompt)],
        saves=(SaveCheckpoint(job_id="job", path=str(path), num_steps=1),),
    )
    return Row(slot=0, tokens=[8], begin=len(prompt), is_decode=True)


def test_iterations_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, alone = hand_of(), hand_of()
    for each in (hand, alone):
        each.start(SPEC)
        train_step(each, 0, 0.01)
    wanted = alone.weights(tmp_path / "alone")
    disk, path = SlowDisk(monkeypatch), tmp_path / "step-1"
    decode = begin_save(hand, path)
    assert disk.is_asked.wait(20)
    hand.run(rows=[decode])
    samples = samples_of(1)
    hand.run(sample_starts=(), rows=[decode])
    assert not any(outcome.saves for outcome in hand.outcomes)
    assert not path.exists()
    # Before the next step, which changes the weights, the checkpoint must be there.
    threading.Timer(0.05, disk.may_write.set).start()
    hand.run(
        rows=[decode],
        sample_starts=tuple(start_of(sample) for sample in samples),
        forward=[Span(sample=sample, begin=0, end=sample.num_tokens) for sample in samples],
    )
    num_layers = hand.context.config.num_layers
    hand.run(
        rows=[decode],
        backward=[
            Span(sample=sample, begin=0, end=sample.num_tokens, layers=(0, num_layers))
            for sample in samples
        ],
        steps=(OptimizerStep(job_id="job", step=1, lr=0.5),),
    )
    told = [save for outcome in hand.outcomes for save in outcome.saves]
    assert [(save.path, save.num_steps) for save in told] == [(str(path), 1)]
    kept = load_file(path / "adapter_model.safetensors")
    (other,) = (tmp_path / "alone").iterdir()
    for name, weight in load_file(other / "adapter_model.safetensors").items():
        assert torch.equal(kept[name], weight), name
    changed = hand.weights(tmp_path / "after")
    assert not all(torch.equal(changed[name], wanted[name]) for name in wanted)


def test_a_checkpoint_that_cannot_be_written_fails_the_job_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = hand_of()
    hand.start(SPEC)
    hand.weights(tmp_path)
    (kept,) = tmp_path.iterdir()
    disk, path = SlowDisk(monkeypatch), tmp_path / "step-1"
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    decode = begin_save(hand, path)
    assert not hand.outcomes[-1].failures
    disk.may_write.set()
    hand.run()  # Nothing but waiting.
    (failure,) = hand.outcomes[-1].failures
    assert (failure.job_id, failure.path, failure.step) == ("job", str(path), 1)
    assert "No space left" in failure.message
    assert list(tmp_path.iterdir()) == [kept]
    hand.run(rows=[decode], steps=(OptimizerStep(job_id="job", step=1, lr=0.5),))
    assert not hand.outcomes[-1].steps


def test_a_job_that_fails_keeps_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = hand_of(torch.float32)
    (sample, _) = samples_of(0)
    sample = Sample(**{**vars(sample), "loss_scale": 1e39})  # Its gradient is beyond float32.
    hand.start(SPEC, samples=[sample])
    hand.pass_samples([sample])
    disk, path = SlowDisk(monkeypatch), tmp_path / "step-1"
    begin_save(hand, path)
    assert disk.is_asked.wait(20)
    threading.Timer(0.05, disk.may_write.set).start()
    hand.step()
    assert [save.path for save in hand.outcomes[-1].saves] == [str(path)]
    assert len(hand.outcomes[-1].failures) == 1
    assert path.is_dir()


def test_what_is_being_written_reaches_the_disk_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = hand_of()
    hand.start(SPEC)
    disk, path = SlowDisk(monkeypatch), tmp_path / "step-1"
    begin_save(hand, path)
    threading.Timer(0.05, disk.may_write.set).start()
    hand.executor.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("is_final", [False, True])
def test_a_file_system_that_takes_no_more_fails_the_job(is_final: bool, tmp_path: Path) -> None:
    """Really: what safetensors raises then is no OSError."""
    hand = hand_of()
    hand.start(SPEC)
    train_step(hand, 0, 0.01)
    hand.weights(tmp_path)
    (kept,) = tmp_path.iterdir()
    path = tmp_path / "final" if is_final else kept
    save = SaveCheckpoint(job_id="job", path=str(path), num_steps=1, is_final=is_final)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        hand.run(saves=(save,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (failure,) = hand.outcomes[-1].failures
    assert "cannot be written" in failure.message
    assert "too large" in failure.message
    assert list(tmp_path.iterdir()) == [kept]
    resumed = hand_of()
    resumed.start(SPEC, resume_from=kept)
    assert not resumed.outcomes[-1].failures


@pytest.mark.parametrize("damage", ["missing", "cut", "seed", "rank", "weights", "header"])
def test_a_checkpoint_that_does_not_fit_fails_the_job(damage: str, tmp_path: Path) -> None:
    hand = hand_of()
    hand.start(SPEC)
    hand.weights(tmp_path)
    (path,) = tmp_path.iterdir()
    spec, seed = SPEC, 5
    if damage == "missing":
        (path / "state.safetensors").unlink()
    elif damage == "cut":
        raw = (path / "state.safetensors").read_bytes()
        (path / "state.safetensors").write_bytes(raw[:-100])
    elif damage == "weights":
        (path / "adapter_model.safetensors").write_bytes(b"")
    elif damage == "header":
        save_file(load_file(path / "state.safetensors"), path / "state.safetensors")
    elif damage == "seed":
        seed = 6
    else:
        spec = AdapterSpec(rank=5)
    other = hand_of()
    other.start(spec, seed=seed, resume_from=path)
    (failure,) = other.outcomes[-1].failures
    assert str(path) in failure.message


def test_a_published_adapter_keeps_its_weights(tmp_path: Path) -> None:
    """It serves what the job had then, while the job trains on."""
    hand = hand_of()
    weights = random_weights(AdapterSpec(rank=4), hand.context, seed=1)
    path = write_weights(AdapterSpec(rank=4), hand.context, weights, tmp_path / "adapter")
    hand.start(AdapterSpec(rank=4), initial_adapter=path)
    ref = AdapterRef(id="mine", version=1)
    hand.run(publishes=(PublishAdapter(job_id="job", id="mine", version=1),))
    hand.executor.load_adapter(AdapterRef(id="disk", version=1), str(path))
    train_step(hand, 0, 1.0)
    prompt = list(range(5, 20))
    found = []
    for served in (ref, AdapterRef(id="disk", version=1)):
        batch = hand.hand.batch(
            [Row(slot=0, tokens=prompt)],
            starts=[start(0, prompt)],
            adapters=np.zeros(1, np.int32),
            adapter_refs=(served,),
        )
        hand.executor.submit(batch)
        result = hand.executor.collect()
        assert result.logprobs is not None
        found.append(result.logprobs.top)
    assert np.array_equal(found[0], found[1])


def test_a_version_that_is_there_already_fails_its_job_alone() -> None:
    hand = hand_of()
    hand.start(SPEC)
    (sample, _) = samples_of(0)
    hand.start(SPEC, samples=[sample], job_id="other")
    publish = PublishAdapter(job_id="job", id="mine", version=1)
    hand.run(publishes=(publish,))
    assert not hand.outcomes[-1].failures
    prompt = list(range(5, 20))
    result = hand.run(
        rows=[Row(slot=0, tokens=prompt)], starts=[start(0, prompt)], publishes=(publish,)
    )
    assert len(result.tokens) == 1
    (failure,) = hand.outcomes[-1].failures
    assert (failure.job_id, failure.step) == ("job", 0)
    assert "mine version 1 is loaded already" in failure.message
    # The other job is as it was.
    hand.run(forward=[Span(sample=sample, begin=0, end=20)], job_id="other")
    assert len(hand.losses) == 1
