"""Engines on tiny random models, and what transformers says about their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.tiny_models import CONFIGS, random_model
from weft.base.clock import WallClock
from weft.engine.batch import NULL_PAGE, Batch, SegmentKind, SequenceStart
from weft.engine.config import PolicyConfig
from weft.engine.continuous import ContinuousBatching
from weft.engine.loop import EngineLoop
from weft.engine.request import EngineStats, FinishReason, Request, TokenLogprobs
from weft.engine.sampling import SamplingParams
from weft.model.config import ModelConfig
from weft.model.decoder import attention_shape
from weft.model.kernels.interface import Kernels
from weft.model.kernels.select import choose_kernels
from weft.model.weights import build_weights
from weft.runtime.device_context import DeviceContext, create_context
from weft.runtime.kv_layout import kv_layout
from weft.runtime.torch_executor import TorchExecutor


@dataclass(frozen=True, slots=True)
class StateDictSource:
    """A transformers model's own tensors as a checkpoint."""

    state: dict[str, Tensor]
    dtype: torch.dtype

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = self.state[name]
        assert tuple(value.shape) == shape, name
        return value.to(self.dtype, copy=True)


def make_context(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype = torch.float64,
    num_sequences: float = 8,
    max_model_len: int = 128,
    kernels: Kernels | None = None,
) -> DeviceContext:
    """Our decoder with a transformers model's weights and room for so many full sequences.

    `kernels` None takes the default ones.
    """
    config = ModelConfig.from_dict(model.config.to_dict())
    kernels = kernels or choose_kernels(attention_shape(config), dtype, torch.device("cpu"))
    layout = kv_layout(config, dtype)
    return create_context(
        config,
        build_weights(config, StateDictSource(model.state_dict(), dtype), kernels.make_linear),
        kernels,
        layout,
        num_pages=1 + int(num_sequences * layout.pages_for_sequence(max_model_len, chunk=24)),
        max_model_len=max_model_len,
    )


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Logits [tokens, V] of transformers for one sequence on its own."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


@dataclass(kw_only=True, slots=True)
class Output:
    """What one choice of a request produced."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All outputs by (request id, choice), and the engine's counters at the end."""

    outputs: dict[tuple[str, int], Output]
    stats: EngineStats
    num_steps: int
    num_replayed: int


def run_requests(
    context: DeviceContext,
    requests: Sequence[Request],
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 24,
    arrivals_per_step: int = 2,
    eos_token_ids: tuple[int, ...] = (),
) -> Run:
    """Serve requests that arrive a few at a time, with integrity checked on the way."""
    executor = TorchExecutor(context, max_num_seqs=max_num_seqs)
    policy = ContinuousBatching(
        PolicyConfig(
            max_model_len=context.max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            eos_token_ids=eos_token_ids,
        ),
        executor.info,
        WallClock(),
    )
    loop = EngineLoop(policy, executor)
    outputs: dict[tuple[str, int], Output] = {}
    coming = list(requests)[::-1]
    num_steps = 0
    while coming or loop.has_work:
        for _ in range(min(arrivals_per_step, len(coming))):
            policy.add(coming.pop())
        for update in loop.step():
            output = outputs.setdefault((update.request_id, update.choice), Output())
            output.tokens.extend(update.new_token_ids)
            output.logprobs.extend(update.logprobs)
            output.prompt_logprobs.extend(update.prompt_logprobs)
            output.finish_reason = update.finish_reason or output.finish_reason
        num_steps += 1
        if num_steps % 16 == 0:
            policy.check_integrity()
    policy.check_integrity()
    executor.close()
    return Run(
        outputs=outputs,
        stats=policy.stats(),
        num_steps=num_steps,
        num_replayed=executor.num_replayed,
    )


def mixed_requests(
    name: str, num: int, *, seed: int = 0, sampling: SamplingParams | None = None, **params: object
) -> list[Request]:
    """Prompts of 1 to 70 tokens, half of them behind one of three shared prefixes."""
    rng = np.random.default_rng(seed)
    vocab_size = CONFIGS[name].vocab_size
    prefixes = [rng.integers(0, vocab_size, size).tolist() for size in (17, 33, 48)]
    requests: list[Request] = []
    for index in range(num):
        own = rng.integers(0, vocab_size, int(rng.integers(1, 22))).tolist()
        prefix = prefixes[int(rng.integers(3))] if rng.random() < 0.5 else []
        requests.append(
            Request(
                id=str(index),
                prompt_token_ids=tuple(prefix + own),
                sampling=sampling
                or SamplingParams(
                    max_tokens=int(rng.integers(1, 20)),
                    **{"temperature": 0.0, **params},  # type: ignore[arg-type]
                ),
            )
        )
    return requests


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a batch made by hand: tokens [begin, begin + len(tokens)) of a slot."""

    slot: int
    tokens: Sequence[int]
    begin: int = 0
    is_decode: bool = False
    samples: bool = True
    ranks_prompt: bool = False


class HandMade:
    """Builds batches whose pages lie scattered over the arena, and runs them."""

    def __init__(
        self,
        context: DeviceContext,
        *,
        max_num_seqs: int = 4,
        seed: int = 0,
        replays_decodes: bool = True,
    ) -> None:
        self.context = context
        self.executor = TorchExecutor(
            context, max_num_seqs=max_num_seqs, replays_decodes=replays_decodes
        )
        rng = np.random.default_rng(seed)
        free = iter((rng.permutation(context.num_pages - 1) + 1).tolist())
        self.tables = []
        for group in context.layout.groups:
            per_slot = -(-context.max_model_len // group.page_tokens)
            table = [[next(free) for _ in range(per_slot)] for _ in range(max_num_seqs)]
            self.tables.append(np.array(table, np.int32))
        self._num_batches = 0

    @property
    def num_replayed(self) -> int:
        """Iterations that ran as one recorded launch."""
        return self.executor.num_replayed

    def batch(
        self, rows: Sequence[Row], *, starts: Sequence[SequenceStart] = (), **changes: object
    ) -> Batch:
        """Lay out rows; what lies behind a window is NULL_PAGE, as the policy would have it."""
        counts = np.array([len(row.tokens) for row in rows])
        row_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        positions = np.concatenate([row.begin + np.arange(len(row.tokens)) for row in rows])
        slots = np.array([row.slot for row in rows], np.int32)
        of_token = np.repeat(slots, counts)
        tables, write_slots = [], []
        for group, table in zip(self.context.layout.groups, self.tables, strict=True):
            size = group.page_tokens
            longest = max(row.begin + len(row.tokens) for row in rows)
            used = table[slots, : -(-longest // size)].copy()
            for index, row in enumerate(rows):
                used[index, -(-(row.begin + len(row.tokens)) // size) :] = NULL_PAGE
                if group.window is not None:
                    used[index, : max(0, row.begin + 1 - group.window) // size] = NULL_PAGE
            tables.append(used)
            pages = table[of_token, positions // size].astype(np.int64)
            write_slots.append(pages * size + positions % size)
        kinds = [SegmentKind.DECODE if row.is_decode else SegmentKind.PREFILL for row in rows]
        fields: dict[str, object] = {
            "kinds": np.array(kinds, np.uint8),
            "slots": slots,
            "row_starts": row_starts,
            "layers": np.tile(
                np.array([0, self.context.config.num_layers], np.int16), (len(rows), 1)
            ),
            "adapters": np.full(len(rows), -1, np.int32),
            "models": np.zeros(len(rows), np.uint8),
            "token_ids": np.concatenate([np.asarray(row.tokens) for row in rows]).astype(np.int32),
            "positions": positions.astype(np.int32),
            "prefix_lens": (positions + 1).astype(np.int32),
            "page_tables": tuple(tables),
            "write_slots": tuple(write_slots),
            "sample_rows": np.array([r for r, row in enumerate(rows) if row.samples], np.int32),
            "prompt_logprob_rows": np.array(
                [r for r, row in enumerate(rows) if row.ranks_prompt], np.int32
            ),
            "starts": tuple(starts),
        }
        self._num_batches += 1
        return Batch(batch_id=self._num_batches, **{**fields, **changes})  # type: ignore[arg-type]


def start(slot: int, prompt: Sequence[int], seed: int = 0, **params: object) -> SequenceStart:
    """A sequence that takes a slot, greedy and with 20 logprobs unless told otherwise."""
    given = {"temperature": 0.0, "logprobs": 20, "max_tokens": None, **params}
    return SequenceStart(
        slot=slot,
        sequence_id=slot,
        token_ids=np.array(prompt, np.int32),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(**given),  # type: ignore[arg-type]
        seed=seed,
    )


__all__ = [
    "HandMade",
    "Output",
    "Row",
    "Run",
    "make_context",
    "mixed_requests",
    "random_model",
    "reference_logits",
    "run_requests",
    "start",
]
