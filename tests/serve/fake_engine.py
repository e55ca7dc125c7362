"""A model with closed-form behaviour behind the real policy, loop, processes and HTTP API.

Tokens are bytes (ids 0-255) and three special ids. The next token is a lower-case letter that is a
function of the last token, its position, and for draws the seed and the choice; after "Z" it is
EOS. So every expected answer can be computed without a model.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from serve.fake_finetune import FakeTrainer
from weft.engine.batch import (
    UNKNOWN_TOKEN,
    AdapterRef,
    Batch,
    CacheGroup,
    ExecutorInfo,
    PromptLogprobs,
    SampledLogprobs,
    SequenceStart,
    StepResult,
)
from weft.serve.engine_config import EngineConfig
from weft.serve.engine_core import BuiltExecutor

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259
MAX_MODEL_LEN = 256
NUM_PAGES = 129
PAGE_TOKENS = 16
CRASH = 1
"""A prompt that holds this byte ends the engine process at once."""
BAD_LOGITS = 2
"""A prompt that ends in this byte has logits that are not finite."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'weird' %}{{ raise_exception('no weird role') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if shout is defined and shout %}!{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def next_token(last: int, position: int, *, seed: int = 0, choice: int = 0) -> int:
    """The token after `last`, which stands at `position`; seed 0 stands for greedy."""
    if last == ord("Z"):
        return EOS
    return ord("a") + (last * 7 + position * 3 + seed % 1000 * 5 + choice) % 26


def greedy_text(prompt: str, num_tokens: int) -> str:
    """What the model says after a prompt."""
    tokens = list(prompt.encode())
    for _ in range(num_tokens):
        tokens.append(next_token(tokens[-1], len(tokens) - 1))
        if tokens[-1] == EOS:
            tokens.pop()
            break
    return bytes(tokens[len(prompt.encode()) :]).decode()


def top_logprobs(token: int, count: int) -> tuple[list[int], list[float]]:
    """The likeliest `count` tokens where `token` is the likeliest."""
    ids = [token, *(i for i in range(97, 97 + count + 1) if i != token)][:count]
    return ids, [-0.5 - rank for rank in range(count)]


class FakeExecutor:
    """Closed-form next tokens at a given speed."""

    def __init__(self, *, step_s: float, max_num_seqs: int, num_pages: int = NUM_PAGES) -> None:
        self.info = ExecutorInfo(
            num_pages=num_pages,
            page_bytes=4096,
            groups=(CacheGroup(layers=(0,), page_tokens=PAGE_TOKENS),),
            num_layers=1,
            vocab_size=VOCAB_SIZE,
            max_num_seqs=max_num_seqs,
            max_finetune_samples=2,
        )
        self.trainer = FakeTrainer()
        self.max_in_flight = 2
        self._step_s = step_s
        self._starts: dict[int, SequenceStart] = {}
        self._last: dict[int, int] = {}
        self._num_sampled: dict[int, int] = {}
        self._results: deque[StepResult] = deque()

    def submit(self, batch: Batch) -> None:
        for start in batch.starts:
            self._starts[start.slot] = start
            self._num_sampled[start.slot] = len(start.token_ids) - start.num_prompt_tokens
        tokens = [self._sample(batch, row) for row in batch.sample_rows.tolist()]
        num_tokens = np.array([token >= 0 for token in tokens], np.int32)
        self._results.append(
            StepResult(
                batch_id=batch.batch_id,
                tokens=np.array(tokens, np.int32).reshape(-1, 1),
                num_tokens=num_tokens,
                logprobs=self._logprobs(tokens),
                prompt_logprobs=tuple(
                    self._prompt_logprobs(batch, row) for row in batch.prompt_logprob_rows.tolist()
                ),
                elapsed_s=self._step_s,
                finetune=self.trainer.run(batch),
            )
        )

    def load_adapter(self, ref: AdapterRef, path: str) -> None:
        self.trainer.load_adapter(ref, path)

    def unload_adapter(self, ref: AdapterRef) -> None:
        self.trainer.unload_adapter(ref)

    def has_adapter(self, ref: AdapterRef) -> bool:
        return ref in self.trainer.adapters

    def collect(self) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        return self._results.popleft()

    def abandon(self) -> None:
        self._results.clear()

    def close(self) -> None:
        self._results.clear()

    def _sample(self, batch: Batch, row: int) -> int:
        slot = int(batch.slots[row])
        end = int(batch.row_starts[row + 1]) - 1
        last = int(batch.token_ids[end])
        if last == UNKNOWN_TOKEN:
            last = self._last[slot]
        start = self._starts[slot]
        adapter = int(batch.adapters[row])
        if adapter >= 0:
            assert batch.adapter_refs[adapter] in self.trainer.adapters
        if CRASH in start.token_ids[: start.num_prompt_tokens]:
            os._exit(7)
        if last == BAD_LOGITS:
            self._last[slot] = PAD  # The next batch may be under way and ask for it.
            return -1
        sampling = start.sampling
        drawn = {} if sampling.is_greedy else {"seed": start.seed, "choice": start.choice}
        position = int(batch.positions[end])
        token = next_token(last, position, **drawn)
        if adapter >= 0:  # Adapters speak in capitals.
            token -= ord("a") - ord("A")
        if self._num_sampled[slot] < sampling.min_tokens and token in start.banned_until_min_tokens:
            token = ord("x")
        self._num_sampled[slot] += 1
        self._last[slot] = token
        return token

    def _logprobs(self, tokens: list[int]) -> SampledLogprobs:
        tops = [top_logprobs(token, 20) for token in tokens]
        return SampledLogprobs(
            chosen=np.full((len(tokens), 1), -0.5, np.float32),
            ranks=np.ones((len(tokens), 1), np.int32),
            top_ids=np.array([t[0] for t in tops], np.int32).reshape(-1, 1, 20),
            top=np.array([t[1] for t in tops], np.float32).reshape(-1, 1, 20),
        )

    def _prompt_logprobs(self, batch: Batch, row: int) -> PromptLogprobs:
        begin, end = batch.row_starts[row : row + 2].tolist()
        start = self._starts[int(batch.slots[row])]
        first = int(batch.positions[begin]) + 1
        targets = start.token_ids[first : first + end - begin].tolist()
        tops = [top_logprobs(token, 20) for token in targets]
        return PromptLogprobs(
            row=row,
            begin=first,
            chosen=np.full(len(targets), -0.5, np.float32),
            ranks=np.ones(len(targets), np.int32),
            top_ids=np.array([t[0] for t in tops], np.int32).reshape(-1, 20),
            top=np.array([t[1] for t in tops], np.float32).reshape(-1, 20),
        )


def _built(config: EngineConfig, step_s: float, num_pages: int = NUM_PAGES) -> BuiltExecutor:
    return BuiltExecutor(
        executor=FakeExecutor(
            step_s=step_s, max_num_seqs=config.max_num_seqs or 8, num_pages=num_pages
        ),
        max_model_len=config.max_model_len or MAX_MODEL_LEN,
        max_num_batched_tokens=config.max_num_batched_tokens or 64,
        eos_token_ids=(EOS,),
        dtype="float32",
        device="fake",
        model_path=config.model,
        sampling_defaults=json.loads(os.environ.get("FAKE_SAMPLING_DEFAULTS", "{}")),
    )


def build(config: EngineConfig) -> BuiltExecutor:
    """As fast as it goes."""
    return _built(config, 0.0)


def build_slow(config: EngineConfig) -> BuiltExecutor:
    """20 ms an iteration, so that a test can act while a request runs."""
    return _built(config, 0.02)


def build_tight(config: EngineConfig) -> BuiltExecutor:
    """Pages for one and a half sequences of full length, so that running ones are preempted."""
    return _built(config, 0.0, num_pages=25)


def build_failing(config: EngineConfig) -> BuiltExecutor:
    """A model that cannot be loaded."""
    from weft.base.errors import ModelLoadError

    raise ModelLoadError(f"{config.model}: model.safetensors is missing")


def build_dying(config: EngineConfig) -> BuiltExecutor:
    """A process that ends while its model loads, without a word."""
    os._exit(9)


def build_never(config: EngineConfig) -> BuiltExecutor:
    """A model that loads for a minute; writes the process id to the file $FAKE_LOADING."""
    Path(os.environ["FAKE_LOADING"]).write_text(str(os.getpid()))
    time.sleep(60)
    return _built(config, 0.0)


def write_model_directory(directory: Path) -> Path:
    """A tokenizer of bytes with a chat template: all that the API process reads."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    vocab = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # Without the split every prompt is one word, and the tokenizer remembers 10,000 words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory
