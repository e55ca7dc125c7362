"""Co-serving that writes the windows of its jobs down, and one that goes by what was written."""

from __future__ import annotations

from typing import Any

from weft.base.errors import ConfigError
from weft.engine.batch import Batch, StepResult
from weft.engine.batch_builder import Span
from weft.engine.coserve import CoServing
from weft.engine.finetune_limits import FinetunePolicy
from weft.engine.finetune_part import FinetunePart
from weft.engine.request import Request, SequenceUpdate
from weft.engine.sampling import SamplingParams
from weft.engine.window_log import WindowRecorder, WindowReplay

_FILLER = "filler:"
"""Before the ids of requests that stand in for those of a recorded iteration."""


class RecordingPolicy(CoServing):
    """Tells a recorder of every iteration; decides as ever."""

    def __init__(self, *args: Any, recorder: WindowRecorder, **kwargs: Any) -> None:
        """`recorder` and whatever `CoServing` takes."""
        super().__init__(*args, **kwargs)
        self._recorder = recorder
        self._jobs.windows = recorder

    def _emit(
        self, spans: list[Span], num_decodes: int, finetune: FinetunePart | None
    ) -> Batch | None:
        if finetune is not None:
            self._recorder.write(finetune, num_tokens=sum(span.count for span in spans))
        return super()._emit(spans, num_decodes, finetune)


class ReplayingPolicy(CoServing):
    """Gives a job, alone, the iterations of a log.

    How a product of matrices is rounded may depend on its number of rows, so the rows that a
    recorded iteration had beside the job's are made up for by prompts of as many tokens.

    Raises:
        ConfigError: the policy is another than `finetune-only`.
    """

    def __init__(self, *args: Any, replay: WindowReplay, **kwargs: Any) -> None:
        """`replay` and whatever `CoServing` takes."""
        super().__init__(*args, **kwargs)
        if self.finetune.policy is not FinetunePolicy.FINETUNE_ONLY:
            raise ConfigError(
                f"replay_windows needs the policy finetune-only, not {self.finetune.policy}: no "
                "other gives a job the iterations of a log one by one"
            )
        self._replay = replay
        self._jobs.windows = replay
        self._num_fillers = 0

    def _emit(
        self, spans: list[Span], num_decodes: int, finetune: FinetunePart | None
    ) -> Batch | None:
        if finetune is not None and finetune.forward and not spans:
            spans = self._fillers(self._replay.num_beside)
        return super()._emit(spans, num_decodes, finetune)

    def _fillers(self, num_tokens: int) -> list[Span]:
        """Prompts of so many tokens together, all of them in this iteration."""
        if not num_tokens:
            return []
        left, most = num_tokens, self.config.max_model_len - 1
        while left:
            count = min(left, most)
            name = f"{_FILLER}{self._num_fillers}"
            self._num_fillers += 1
            # A salt of its own: what is cached would not run.
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            self.add(
                Request(
                    id=name,
                    prompt_token_ids=(0,) * count,
                    sampling=sampling,
                    cache_salt=name,
                )
            )
            left -= count
        spans, _ = self._take_inference(num_tokens)
        found = sum(span.count for span in spans)
        if found != num_tokens:
            raise ConfigError(
                f"the recorded iteration had {num_tokens} tokens beside the job's, and {found} fit "
                "here: give the engine as much KV cache, and as many sequences, as it had then"
            )
        return spans

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """As ever; nobody hears of the stand-ins."""
        updates = super().apply(result)
        return [update for update in updates if not update.request_id.startswith(_FILLER)]
