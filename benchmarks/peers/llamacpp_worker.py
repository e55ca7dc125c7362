"""llama.cpp through llama-cpp-python's low-level interface: many sequences in one llama_batch.

The wrapper class `Llama` runs one sequence at a time, so a batch is driven here: prompts are
submitted in pieces of the context's batch size, then every live sequence decodes one token a call.
Batches are filled through NumPy views of the C arrays and the argmax is one NumPy call, so that
the driver's own share of a step stays small.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as lc
import numpy as np
from protocol import serve

NUM_BATCH_TOKENS = 2048
NUM_MICRO_BATCH_TOKENS = 512


class TokenBatch:
    """A `llama_batch` whose arrays are NumPy's, so that it is filled without a loop."""

    def __init__(self, capacity: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.sequences = np.zeros(capacity, np.int32)
        self.wants_logits = np.zeros(capacity, np.int8)
        self._num_sequences = np.ones(capacity, np.int32)
        base = self.sequences.ctypes.data
        self._pointers = base + 4 * np.arange(capacity, dtype=np.uintp)
        self._batch = lc.llama_batch(
            n_tokens=0,
            token=_view(self.tokens, ctypes.c_int32),
            embd=None,
            pos=_view(self.positions, ctypes.c_int32),
            n_seq_id=_view(self._num_sequences, ctypes.c_int32),
            seq_id=ctypes.cast(
                self._pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
            ),
            logits=_view(self.wants_logits, ctypes.c_int8),
        )

    def decode(self, context: Any, num_tokens: int) -> None:
        """Run the first `num_tokens` rows."""
        self._batch.n_tokens = num_tokens
        status = lc.llama_decode(context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {num_tokens} tokens")


class LlamaCppEngine:
    """Continuous batching by hand: a finished sequence leaves the batch at once."""

    def load(self, spec: dict[str, Any]) -> dict[str, str]:
        lc.llama_backend_init()
        model_params = lc.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = lc.llama_model_load_from_file(spec["artifact"].encode(), model_params)
        params = lc.llama_context_default_params()
        params.n_seq_max = spec["max_num_seqs"]
        params.n_ctx = spec["max_num_seqs"] * spec["max_request_len"]
        params.n_batch = NUM_BATCH_TOKENS
        params.n_ubatch = NUM_MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = spec["num_threads"]
        params.no_perf = True
        for name, value in spec.get("options", {}).items():
            setattr(params, name, value)
        self._context = lc.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp cannot load {spec['artifact']}")
        self._num_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        self._batch = TokenBatch(NUM_BATCH_TOKENS)
        info = lc.llama_print_system_info().decode()
        return {"llama-cpp-python": lc.__version__, "system": info}

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        lc.llama_memory_clear(lc.llama_get_memory(self._context), False)
        first = self._prefill([np.asarray(prompt, np.int32) for prompt in prompts])
        out = np.zeros((len(prompts), max(num_new_tokens)), np.int32)
        out[:, 0] = first
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        counts = np.asarray(num_new_tokens)
        for step in range(1, out.shape[1]):
            live = np.flatnonzero(counts > step).astype(np.int32)
            rows = len(live)
            self._batch.tokens[:rows] = out[live, step - 1]
            self._batch.positions[:rows] = lengths[live] + step - 1
            self._batch.sequences[:rows] = live
            self._batch.wants_logits[:rows] = 1
            self._batch.decode(self._context, rows)
            out[live, step] = self._argmax(rows)
        return [row[:count].tolist() for row, count in zip(out, counts, strict=True)]

    def _prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        """First new token of each prompt."""
        tokens = np.concatenate(prompts)
        positions = np.concatenate([np.arange(len(p), dtype=np.int32) for p in prompts])
        owners = np.repeat(np.arange(len(prompts), dtype=np.int32), [len(p) for p in prompts])
        is_last = np.zeros(len(tokens), np.int8)
        is_last[np.cumsum([len(p) for p in prompts]) - 1] = 1
        first: list[np.ndarray] = []
        for start in range(0, len(tokens), NUM_BATCH_TOKENS):
            piece = slice(start, start + NUM_BATCH_TOKENS)
            size = len(tokens[piece])
            self._batch.tokens[:size] = tokens[piece]
            self._batch.positions[:size] = positions[piece]
            self._batch.sequences[:size] = owners[piece]
            self._batch.wants_logits[:size] = is_last[piece]
            self._batch.decode(self._context, size)
            num_outputs = int(is_last[piece].sum())
            if num_outputs:
                first.append(self._argmax(num_outputs))
        return np.concatenate(first)

    def _argmax(self, num_rows: int) -> np.ndarray:
        pointer = lc.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(pointer, shape=(num_rows, self._num_vocab))
        return logits.argmax(axis=1)


def _view(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


if __name__ == "__main__":
    serve(LlamaCppEngine())
