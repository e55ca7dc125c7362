"""What the sampler does for each row of one iteration, worked out on the host from the slots.

Shape legend: S sampled rows, V vocabulary, W words of a mask, C rows of a subset, E edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.engine.batch import Batch
from weft.runtime.slots import SlotTable
from weft.runtime.transfer import upload


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyRows:
    """Rows that pay penalties."""

    rows: Tensor
    """[C] int64."""
    repetition: Tensor
    """[C] float64, as are the next two."""
    presence: Tensor
    frequency: Tensor
    pool_rows: Tensor
    """[C] int64: their rows of the penalty pool."""
    output_counts: Tensor
    """[pool, V] int32."""
    in_prompt: Tensor
    """[pool, V] bool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreEdits:
    """Changes to scores before anything is chosen."""

    masks: Tensor | None = None
    """[S, W] int32 words of allowed tokens."""
    banned: Tensor | None = None
    """[2, E] int64: row and token."""
    biased: Tensor | None = None
    """[2, E] int64: row and token."""
    biases: Tensor | None = None
    """[E] float64."""
    penalties: PenaltyRows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawRows:
    """Rows whose token is drawn at random."""

    rows: Tensor
    """[C] int64."""
    uniforms: Tensor
    """[C] float64 in [0, 1)."""
    temperature: Tensor
    """[C] float64."""
    min_p: Tensor
    """[C] float64; 0 keeps all."""
    top_k: Tensor
    """[C] int64; 0 keeps all."""
    top_p: Tensor
    """[C] float64; 1 keeps all."""
    has_min_p: bool
    has_cuts: bool
    """Any row has a top_k or a top_p."""
    has_top_p: bool

    def part(self, part: slice) -> DrawRows:
        """Some of the rows; the flags stay those of all."""
        return DrawRows(
            rows=self.rows[part],
            uniforms=self.uniforms[part],
            temperature=self.temperature[part],
            min_p=self.min_p[part],
            top_k=self.top_k[part],
            top_p=self.top_p[part],
            has_min_p=self.has_min_p,
            has_cuts=self.has_cuts,
            has_top_p=self.has_top_p,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """One iteration's sampling."""

    edits: ScoreEdits | None = None
    draws: DrawRows | None = None
    logprob_rows: npt.NDArray[np.int64] | None = None
    """[C] rows that want log-probabilities."""
    num_top_logprobs: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether every row takes the likeliest token of its raw logits, and nothing else."""
        return self.edits is None and self.draws is None and self.logprob_rows is None


PLAIN = SamplingPlan()


def plan_sampling(batch: Batch, slots: SlotTable, device: torch.device) -> SamplingPlan:
    """Work out the sampling of a batch's `sample_rows`."""
    picked = batch.slots[batch.sample_rows]
    if batch.logits_masks is None and not slots.is_special[picked].any():
        return PLAIN
    # The drawn token takes the position behind the row's last one.
    positions = batch.positions[batch.row_starts[batch.sample_rows + 1] - 1].astype(np.int64) + 1
    wants = np.flatnonzero(slots.num_logprobs[picked] >= 0)
    return SamplingPlan(
        edits=_edits(batch, picked, positions, slots, device),
        draws=_draws(picked, positions, slots, device),
        logprob_rows=wants if len(wants) else None,
        num_top_logprobs=int(slots.num_logprobs[picked].max(initial=0)),
    )


_Int64 = npt.NDArray[np.int64]


def _edits(
    batch: Batch,
    picked: npt.NDArray[np.int32],
    positions: _Int64,
    slots: SlotTable,
    device: torch.device,
) -> ScoreEdits | None:
    masks = None
    if batch.logits_masks is None and not slots.edits_scores[picked].any():
        return None
    if batch.logits_masks is not None:
        masks = upload(batch.logits_masks.view(np.int32), device)
    young = positions - slots.num_prompt[picked] < slots.min_tokens[picked]
    banned = [(row, slots.bans[picked[row]]) for row in np.flatnonzero(young).tolist()]
    banned = [(row, tokens) for row, tokens in banned if tokens is not None]
    biased = [(row, slots.bias[slot]) for row, slot in enumerate(picked)]
    biased = [(row, bias[0], bias[1]) for row, bias in biased if bias is not None]
    penalties = _penalties(picked, slots, device)
    if masks is None and not banned and not biased and penalties is None:
        return None
    biases = np.concatenate([values for _, _, values in biased]) if biased else None
    return ScoreEdits(
        masks=masks,
        banned=_pairs(banned, device),
        biased=_pairs([(row, tokens) for row, tokens, _ in biased], device),
        biases=None if biases is None else upload(biases, device),
        penalties=penalties,
    )


def _pairs(edits: list[tuple[int, _Int64]], device: torch.device) -> Tensor | None:
    """[2, E] of (row, token) from each row's tokens."""
    if not edits:
        return None
    rows = np.repeat([row for row, _ in edits], [len(tokens) for _, tokens in edits])
    tokens = np.concatenate([tokens for _, tokens in edits])
    return upload(np.stack((rows.astype(np.int64), tokens)), device)


def _penalties(
    picked: npt.NDArray[np.int32], slots: SlotTable, device: torch.device
) -> PenaltyRows | None:
    rows = np.flatnonzero(slots.penalty_row[picked] >= 0)
    if not len(rows):
        return None
    paying = picked[rows]
    pool_rows = upload(slots.penalty_row[paying], device)
    return PenaltyRows(
        rows=upload(rows, device),
        repetition=upload(slots.repetition[paying], device),
        presence=upload(slots.presence[paying], device),
        frequency=upload(slots.frequency[paying], device),
        pool_rows=pool_rows,
        output_counts=slots.penalty_pool.output_counts,
        in_prompt=slots.penalty_pool.in_prompt,
    )


def _draws(
    picked: npt.NDArray[np.int32], positions: _Int64, slots: SlotTable, device: torch.device
) -> DrawRows | None:
    rows = np.flatnonzero(slots.temperature[picked] > 0)
    if not len(rows):
        return None
    drawing = picked[rows]
    top_k, top_p, min_p = slots.top_k[drawing], slots.top_p[drawing], slots.min_p[drawing]
    drawn_at = slots.uniforms_at(drawing, positions[rows])
    reals = upload(np.stack((drawn_at, slots.temperature[drawing], min_p, top_p)), device)
    has_top_p = bool((top_p < 1).any())
    return DrawRows(
        rows=upload(rows, device),
        uniforms=reals[0],
        temperature=reals[1],
        min_p=reals[2],
        top_k=upload(top_k, device),
        top_p=reals[3],
        has_min_p=bool(min_p.any()),
        has_cuts=has_top_p or bool(top_k.any()),
        has_top_p=has_top_p,
    )
