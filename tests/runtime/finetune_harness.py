"""Finetuning by hand-made batches: any windows, beside any inference rows; and the reference.

Weights go in as an adapter directory and come out of a checkpoint; gradients are what a step of
plain gradient descent subtracts, at a rate so large that the weights' own rounding does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model import finetune_reference as reference
from runtime.harness import HandMade, Row
from weft.engine.batch import NULL_PAGE, Batch, SegmentKind, StepResult
from weft.engine.finetune import (
    BackwardOrder,
    FinetuneOutcome,
    FinetuneSegment,
    FinetuneWork,
    JobStart,
    OptimizerName,
    OptimizerSpec,
    OptimizerStep,
    SampleStart,
    SaveCheckpoint,
    SegmentLoss,
)
from weft.graph.adapter_spec import AdapterSpec, BypassTarget
from weft.graph.pruning import Remat
from weft.model.adapters.files import read_adapter, write_adapter
from weft.model.adapters.weights import (
    AdapterWeights,
    FrozenBypass,
    collect_layers,
    model_targets,
    weight_shapes,
)
from weft.model.finetune.dropout import DropoutKey, dropout_scale
from weft.model.rope import rope_table
from weft.runtime.device_context import DeviceContext
from weft.runtime.torch_executor import TorchExecutor

NUM_SEQS = 3
NUM_SAMPLES = 3
RATE = 2.0**20
PLAIN_DESCENT = OptimizerSpec(name=OptimizerName.SGD, lr=1.0)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample, and the windows that it goes through."""

    number: int
    tokens: np.ndarray
    label_weights: np.ndarray
    loss_scale: float = 1.0
    step: int = 0
    index: int = 0
    is_validation: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Span:
    """One finetuning row: tokens [begin, end) of a sample; backward passes layers [first, stop)."""

    sample: Sample
    begin: int
    end: int
    layers: tuple[int, int] | None = None


@dataclass
class FinetuneHand:
    """Slots 0 to NUM_SEQS - 1 are sequences', those behind samples' (by number, in turn)."""

    context: DeviceContext
    seed: int = 0
    hand: HandMade = field(init=False)
    losses: list[SegmentLoss] = field(default_factory=list)
    outcomes: list[FinetuneOutcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hand = HandMade(self.context, max_num_seqs=NUM_SEQS + NUM_SAMPLES, seed=self.seed)
        self.executor = TorchExecutor(
            self.context, max_num_seqs=NUM_SEQS, max_finetune_samples=NUM_SAMPLES
        )

    def batch(
        self,
        *,
        rows: Sequence[Row] = (),
        forward: Sequence[Span] = (),
        backward: Sequence[Span] = (),
        job_id: str = "job",
        starts: Sequence[object] = (),
        **commands: object,
    ) -> Batch:
        """Inference rows, then forward and backward rows of one job."""
        all_rows = [*rows]
        for span in forward:
            tokens = span.sample.tokens[span.begin : span.end].tolist()
            all_rows.append(Row(slot=_slot(span), tokens=tokens, begin=span.begin, samples=False))
        for span in backward:
            all_rows.append(Row(slot=_slot(span), tokens=[], begin=span.end, samples=False))
        segments = tuple(
            FinetuneSegment(
                row=len(rows) + index,
                job_id=job_id,
                sample=span.sample.number,
                begin=span.begin,
                end=span.end,
            )
            for index, span in enumerate((*forward, *backward))
        )
        work = FinetuneWork(segments=segments, **commands)  # type: ignore[arg-type]
        if not all_rows:
            return self._empty(work)
        batch = self.hand.batch(all_rows, starts=starts, finetune=work)  # type: ignore[arg-type]
        first = len(rows)
        batch.kinds[first:] = SegmentKind.FT_FORWARD
        first += len(forward)
        batch.kinds[first:] = SegmentKind.FT_BACKWARD
        for row, span in enumerate(backward, start=first):
            assert span.layers is not None
            batch.layers[row] = span.layers
        for group, (used, table) in enumerate(
            zip(batch.page_tables, self.hand.tables, strict=True)
        ):
            # Samples keep all of their pages, also behind a sliding window.
            size = self.context.layout.groups[group].page_tokens
            for row, span in enumerate((*forward, *backward), start=len(rows)):
                num = -(-span.end // size)
                used[row] = NULL_PAGE
                used[row, :num] = table[_slot(span), :num]
        return batch

    def _empty(self, work: FinetuneWork) -> Batch:
        batch = self.hand.batch([Row(slot=0, tokens=[0])])
        columns = (
            "kinds",
            "slots",
            "layers",
            "adapters",
            "models",
            "token_ids",
            "positions",
            "prefix_lens",
            "sample_rows",
        )
        changes: dict[str, object] = {name: getattr(batch, name)[:0] for name in columns}
        changes["row_starts"] = np.zeros(1, np.int32)
        changes["page_tables"] = tuple(table[:0] for table in batch.page_tables)
        changes["write_slots"] = tuple(slots[:0] for slots in batch.write_slots)
        return replace(batch, finetune=work, **changes)  # type: ignore[arg-type]

    def run(self, **parts: object) -> StepResult:
        """Submit one batch and keep what it says of jobs."""
        self.executor.submit(self.batch(**parts))  # type: ignore[arg-type]
        result = self.executor.collect()
        assert result.finetune is not None
        self.outcomes.append(result.finetune)
        self.losses += result.finetune.losses
        return result

    def start(
        self,
        spec: AdapterSpec,
        *,
        samples: Sequence[Sample] = (),
        remat: Remat = Remat.PRUNED,
        optimizer: OptimizerSpec = PLAIN_DESCENT,
        job_id: str = "job",
        seed: int = 5,
        initial_adapter: Path | None = None,
        resume_from: Path | None = None,
    ) -> None:
        """A job, and samples of it."""
        start = JobStart(
            job_id=job_id,
            adapter=spec,
            optimizer=optimizer,
            seed=seed,
            remat=remat,
            backward_order=BackwardOrder.LAYER_MAJOR,
            initial_adapter=None if initial_adapter is None else str(initial_adapter),
            resume_from=None if resume_from is None else str(resume_from),
        )
        self.run(job_starts=(start,), sample_starts=tuple(start_of(s, job_id) for s in samples))

    def pass_samples(self, samples: Sequence[Sample], *, window: int = 1 << 30) -> None:
        """Each sample forward and backward in windows of at most so many tokens."""
        num_layers = self.context.config.num_layers
        for sample in samples:
            bounds = [*range(0, sample.num_tokens, window), sample.num_tokens]
            windows = list(pairwise(bounds))
            for begin, end in windows:
                self.run(forward=[Span(sample=sample, begin=begin, end=end)])
            for begin, end in reversed(windows):
                span = Span(sample=sample, begin=begin, end=end, layers=(0, num_layers))
                self.run(backward=[span])

    def step(self, step: int = 0, lr: float = RATE, job_id: str = "job") -> FinetuneOutcome:
        """An optimizer step."""
        self.run(steps=(OptimizerStep(job_id=job_id, step=step, lr=lr),))
        return self.outcomes[-1]

    def weights(self, directory: Path, job_id: str = "job") -> dict[str, Tensor]:
        """The job's masters, by way of a checkpoint."""
        path = directory / f"step-{len(self.outcomes)}"
        self.run(saves=(SaveCheckpoint(job_id=job_id, path=str(path), num_steps=1),))
        assert [str(path)] == [save.path for save in self.outcomes[-1].saves]
        dtype = torch.promote_types(self.context.layout.dtype, torch.float32)
        adapter = read_adapter(path, self.context.config, dtype=dtype)
        return {
            f"{bypass.target.layer}.{bypass.target.module}.{name}": weight
            for bypass in adapter
            for name, weight in bypass.weights.items()
        }


def start_of(sample: Sample, job_id: str = "job") -> SampleStart:
    """The command that makes a sample known."""
    return SampleStart(
        job_id=job_id,
        sample=sample.number,
        slot=NUM_SEQS + sample.number % NUM_SAMPLES,
        token_ids=sample.tokens.astype(np.int32),
        label_weights=sample.label_weights.astype(np.float32),
        loss_scale=sample.loss_scale,
        step=sample.step,
        index=sample.index,
        is_validation=sample.is_validation,
    )


def _slot(span: Span) -> int:
    return NUM_SEQS + span.sample.number % NUM_SAMPLES


def random_sample(
    rng: np.random.Generator, number: int, num_tokens: int, vocab_size: int = 97, **kwargs: object
) -> Sample:
    """Random tokens, about a third of them not labelled."""
    weights = rng.random(num_tokens) * (rng.random(num_tokens) < 0.7)
    weights[-1] = 1.0
    return Sample(
        number=number,
        tokens=rng.integers(0, vocab_size, num_tokens),
        label_weights=weights.astype(np.float32),
        **kwargs,  # type: ignore[arg-type]
    )


def random_weights(
    spec: AdapterSpec, context: DeviceContext, seed: int, scale: float = 0.2
) -> dict[str, Tensor]:
    """Weights of an adapter that does something, by `layer.module.name`."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for target in model_targets(spec, context.config):
        for name, shape in weight_shapes(target).items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            weights[f"{target.layer}.{target.module}.{name}"] = value + (name == "l")
    return weights


def write_weights(
    spec: AdapterSpec, context: DeviceContext, weights: Mapping[str, Tensor], directory: Path
) -> Path:
    """An adapter directory with given weights."""
    bypasses = [
        FrozenBypass(
            target=target,
            weights={
                name: weights[f"{target.layer}.{target.module}.{name}"]
                for name in weight_shapes(target)
            },
            activation=spec.activation,
        )
        for target in model_targets(spec, context.config)
    ]
    layers = collect_layers(bypasses, context.config.num_layers)
    write_adapter(directory, spec, AdapterWeights(kind=spec.kind, layers=layers))
    return directory


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the reference says of one step."""

    losses: dict[int, float]
    """By sample: weighted sums."""
    grads: dict[str, Tensor]


def reference_step(
    model: PreTrainedModel,
    context: DeviceContext,
    spec: AdapterSpec,
    weights: Mapping[str, Tensor],
    samples: Sequence[Sample],
    *,
    seed: int = 5,
) -> Wanted:
    """Losses and gradients of a step by autograd, in float64."""
    config = context.config
    rope = rope_table(config.rope, config.head_dim, 1024, torch.float64)
    plain = reference.ReferenceModel(
        config=model.config,
        state=model.state_dict(),
        cos=rope.cos,
        sin=rope.sin,
        windows=config.windows,
    )
    adapter = reference.make_adapter(spec, model_targets(spec, config), weights)
    losses: dict[int, float] = {}
    for sample in samples:
        if spec.dropout and not sample.is_validation:
            adapter.masks = _masks(spec, sample, seed)
        tokens = torch.from_numpy(sample.tokens)
        run = reference.run(plain, adapter, tokens)
        label_weights = torch.from_numpy(sample.label_weights)
        loss = reference.loss(plain, run.hidden, tokens, label_weights)
        losses[sample.number] = loss.item()
        if not sample.is_validation:
            (sample.loss_scale * loss).backward()
    zeros = torch.zeros(())
    grads = {k: zeros if v.grad is None else v.grad for k, v in adapter.weights.items()}
    return Wanted(losses=losses, grads=grads)


def _masks(spec: AdapterSpec, sample: Sample, seed: int) -> reference.Masks:
    key = DropoutKey(seed=seed, step=sample.step, index=sample.index, probability=spec.dropout)

    def masks(target: BypassTarget, num_tokens: int) -> Tensor:
        return dropout_scale(
            key,
            layer=target.layer,
            module=target.module,
            positions=torch.arange(num_tokens),
            num_features=target.in_features,
            dtype=torch.float64,
        )

    return masks


def gradients(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], lr: float = RATE
) -> dict[str, Tensor]:
    """What a step of plain descent was taken along."""
    return {key: (before[key] - after[key]) / lr for key in before}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm wanted."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-300))
