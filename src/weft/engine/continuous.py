"""Continuous batching with chunked prefill, prefix caching and preemption by recompute.

An iteration carries one token of every running decode, then chunks of prompts under a token budget,
first come, first served within a priority. (Orca, OSDI'22; Sarathi-Serve, OSDI'24; vLLM, SOSP'23.)
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import Any

from weft.base.clock import Clock
from weft.base.errors import IntegrityError, OutOfMemoryError
from weft.engine.admission import Admission
from weft.engine.batch import AdapterRef, Batch, ExecutorInfo, SequenceStart, StepResult
from weft.engine.batch_builder import Span, build_batch
from weft.engine.config import PolicyConfig
from weft.engine.finetune_part import FinetunePart
from weft.engine.kv_cache import KvCache, PrefixMatch
from weft.engine.request import EngineStats, FinishReason, Request, SequenceUpdate
from weft.engine.results import prompt_logprobs, token_logprobs
from weft.engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, kw_only=True, slots=True)
class _InFlight:
    batch: Batch
    spans: list[Span]


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class ContinuousBatching:
    """The serving policy. Decides and remembers; computes nothing and imports no torch.

    Raises:
        OutOfMemoryError: the pages cannot hold one sequence of `max_model_len` tokens.
    """

    def __init__(self, config: PolicyConfig, info: ExecutorInfo, clock: Clock) -> None:
        self.config = config
        self.info = info
        self._clock = clock
        self.kv = KvCache(
            groups=info.groups,
            num_pages=info.num_pages,
            max_slots=info.max_num_seqs + info.max_finetune_samples,
            max_len=config.max_model_len,
        )
        self._check_pages()
        self._admission = Admission(config, vocab_size=info.vocab_size)
        self._waiting: list[tuple[tuple[int, int], int, Sequence]] = []
        self._running: list[Sequence] = []
        self._free_slots = list(range(info.max_num_seqs - 1, -1, -1))
        self._by_request: dict[str, list[Sequence]] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._starts: list[SequenceStart] = []
        self._freed_slots: list[int] = []
        self._updates: list[SequenceUpdate] = []
        self._reserve = int(config.admission_reserve * self.kv.pool.num_total)
        self._num_batches = 0
        self._num_waiting = 0
        self._counters = {
            "prefix_cache_queries": 0,
            "prefix_cache_hits": 0,
            "num_preemptions": 0,
            "num_finished": 0,
            "num_prompt_tokens": 0,
            "num_generated_tokens": 0,
            "num_chunked_prefills": 0,
        }

    # ---- requests in ----

    def validate(self, request: Request) -> None:
        """Check a request without adding it.

        Raises:
            InvalidRequestError: its prompt or parameters cannot be served; `param` names which.
        """
        self._admission.validate(request)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it cannot be served, or its id is in use.
            QueueFullError: `max_waiting` requests are waiting already.
        """
        sequences = self._admission.sequences(request, self._by_request, self._num_waiting)
        now_s = self._clock.now_s()
        # A caller that does not say when its request came gets the present instant.
        arrived_s = min(request.arrival_s, now_s) or now_s
        for sequence in sequences:
            sequence.arrived_s = arrived_s
        self._by_request[request.id] = sequences
        self._enqueue(sequences[0])

    def cancel(self, request_id: str) -> bool:
        """End all choices of a request now and free their pages; False if it is not here."""
        sequences = self._by_request.get(request_id)
        if sequences is None:
            return False
        for sequence in list(sequences):
            self._finish(sequence, FinishReason.ABORT)
        return True

    def finish(self, request_id: str, choice: int) -> bool:
        """End one choice because its caller saw a stop string; False if it is not here."""
        for sequence in self._by_request.get(request_id, ()):
            if sequence.choice == choice:
                self._finish(sequence, FinishReason.STOP)
                return True
        return False

    def uses_adapter(self, ref: AdapterRef) -> bool:
        """Whether a request that waits or runs names a version."""
        return any(
            sequence.request.adapter == ref
            for sequences in self._by_request.values()
            for sequence in sequences
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished, or any batch not collected."""
        return bool(self._by_request or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Batches scheduled and not applied."""
        return len(self._in_flight)

    # ---- one iteration: out ----

    def schedule(self) -> Batch | None:
        """The next batch, or None if nothing can run before a result is applied."""
        spans, num_decodes = self._take_inference(self.config.max_num_batched_tokens)
        if not spans:
            self._check_not_stuck()
        return self._emit(spans, num_decodes, None)

    def _check_not_stuck(self) -> None:
        if self._num_waiting and not self._running and not self._in_flight:
            raise IntegrityError(f"{self._num_waiting} requests wait and can never start")

    def _take_inference(self, budget: int) -> tuple[list[Span], int]:
        """The inference rows of an iteration of at most `budget` tokens; how many are decodes."""
        spans: list[Span] = []
        num_preempted = self._counters["num_preemptions"]
        budget = self._schedule_decodes(spans, budget)
        num_decodes = len(spans)
        budget = self._schedule_chunks(spans, budget)
        if self._counters["num_preemptions"] == num_preempted:
            self._admit(spans, budget)
        return spans, num_decodes

    def _emit(
        self, spans: list[Span], num_decodes: int, finetune: FinetunePart | None
    ) -> Batch | None:
        """Put an iteration in flight; None if it would hold nothing."""
        if not spans and finetune is None:
            return None
        batch = build_batch(
            self._num_batches,
            spans,
            num_decodes,
            kv=self.kv,
            info=self.info,
            starts=self._starts,
            freed_slots=self._freed_slots,
            finetune=finetune,
        )
        self._num_batches += 1
        self._starts = []
        self._freed_slots = []
        self._in_flight.append(_InFlight(batch=batch, spans=spans))
        return batch

    def _schedule_decodes(self, spans: list[Span], budget: int) -> int:
        index = 0
        running = self._running
        while index < len(running) and budget > 0:
            sequence = running[index]
            index += 1
            length = len(sequence.tokens) + sequence.num_pending
            if length - sequence.num_computed != 1:
                continue
            if length >= sequence.max_len and length > sequence.num_prompt:
                continue  # Its last token is in flight.
            if sequence.capacity < length and not self._make_room(sequence, length):
                continue
            self._take_span(sequence, spans, 1, samples=True)
            budget -= 1
        return budget

    def _take_span(
        self, sequence: Sequence, spans: list[Span], count: int, *, samples: bool
    ) -> None:
        spans.append(
            Span(
                sequence=sequence,
                begin=sequence.num_computed,
                count=count,
                samples=samples,
                epoch=sequence.epoch,
            )
        )
        sequence.num_computed += count
        sequence.num_pending += samples
        sequence.last_batch = self._num_batches

    def _schedule_chunks(self, spans: list[Span], budget: int) -> int:
        index = len(self._running) if len(spans) == len(self._running) else 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            index += 1
            if sequence.num_remaining > 1:
                budget -= self._schedule_chunk(sequence, spans, budget)
        return budget

    def _schedule_chunk(self, sequence: Sequence, spans: list[Span], budget: int) -> int:
        """Take what budget and pages allow of the rest of a prompt; returns how many tokens."""
        remaining = sequence.num_remaining
        begin = sequence.num_computed
        count = min(remaining, budget)
        if begin + count > sequence.capacity and not self._make_room(sequence, begin + count):
            count = min(count, sequence.capacity - begin)
            if count <= 0:
                return 0
        samples = count == remaining
        self._counters["num_chunked_prefills"] += not samples
        self._take_span(sequence, spans, count, samples=samples)
        return count

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Find pages for `num_tokens`, preempting sequences that come later in order if it must.

        False if that was not enough: `capacity` then says how far the pages reach, or the sequence
        itself, being the last that runs, was preempted.
        """
        kv = self.kv
        kv.pass_window(sequence.slot, sequence.num_computed)
        while not kv.extend(sequence.slot, num_tokens):
            victim = self._victim(sequence)
            if victim is None:
                sequence.capacity = kv.extend_as_far_as_possible(sequence.slot, num_tokens)
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.capacity = kv.capacity(sequence.slot)
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The last in order that is not in the batch being built, `sequence` included.

        A prompt does not give up its own pages to itself: it waits for others to finish, since
        whatever it lacks, a decode that comes earlier holds.
        """
        for candidate in reversed(self._running):
            if candidate is sequence:
                return sequence if sequence.num_remaining == 1 else None
            if candidate.last_batch != self._num_batches:
                return candidate
        return None

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it will recompute what it had."""
        self._counters["num_preemptions"] += 1
        self._leave(sequence)
        sequence.num_computed = sequence.num_confirmed = sequence.capacity = 0
        sequence.epoch += 1
        self._enqueue(sequence)

    # ---- admission ----

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self._num_waiting += 1
        heapq.heappush(self._waiting, (sequence.order, sequence.id, sequence))

    def _admit(self, spans: list[Span], budget: int) -> None:
        while self._waiting and budget > 0 and self._free_slots:
            sequence = self._waiting[0][2]
            if sequence.state is not SequenceState.WAITING:
                heapq.heappop(self._waiting)  # Cancelled while it waited.
                continue
            if sequence.num_pending:
                return  # Preempted; the token that it sampled last is still in flight.
            match = self._match(sequence)
            if not self._fits(sequence, match):
                return
            heapq.heappop(self._waiting)
            self._enter(sequence, match)
            budget -= self._schedule_chunk(sequence, spans, budget)

    def _match(self, sequence: Sequence) -> PrefixMatch:
        length = len(sequence.tokens)
        if sequence.wants_prompt_logprobs:
            return self.kv.no_match  # Every prompt token must run to report its log-probability.
        parent = sequence.parent
        if parent is not None and parent.slot >= 0 and not sequence.num_output:
            shared = self.kv.share(parent.slot, length)
            if 0 < shared.num_tokens <= parent.num_confirmed:
                return shared
        if not self.config.enable_prefix_caching:
            return self.kv.no_match
        sequence.extend_hashes(self.kv.block_tokens)
        return self.kv.match(sequence.hashes, length)

    def _fits(self, sequence: Sequence, match: PrefixMatch) -> bool:
        chunk = self.config.max_num_batched_tokens
        held = sum(len([page for page in pages if page]) for pages in match.pages)
        needed = self.kv.pages_for(len(sequence.tokens), chunk) - held + self.kv.num_idle(match)
        # Prompts that run already take their remaining pages later, but were promised them.
        promised = sum(
            self.kv.num_missing(other.slot, len(other.tokens))
            for other in self._running
            if len(other.tokens) - other.num_computed > 1
        )
        reserve = promised + self._reserve + self._num_promised_elsewhere if self._running else 0
        return needed + reserve <= self.kv.pool.num_available

    def _enter(self, sequence: Sequence, match: PrefixMatch) -> None:
        slot = self._free_slots.pop()
        self._num_waiting -= 1
        sequence.state = SequenceState.RUNNING
        sequence.slot = slot
        self.kv.adopt(slot, match)
        sequence.num_computed = sequence.num_confirmed = match.num_tokens
        sequence.num_registered = match.num_tokens
        sequence.capacity = self.kv.capacity(slot)
        insort(self._running, sequence, key=_order)
        self._starts.append(self._admission.start(sequence))
        if not sequence.is_admitted_before:
            sequence.is_admitted_before = True
            sequence.num_cached = match.num_tokens
            sequence.first_scheduled_s = self._clock.now_s()
            self._counters["prefix_cache_queries"] += len(sequence.tokens)
            self._counters["prefix_cache_hits"] += match.num_tokens
            self._counters["num_prompt_tokens"] += sequence.num_prompt

    # ---- one iteration: back ----

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """Take the result of the oldest batch in flight; returns what its callers should hear.

        Raises:
            IntegrityError: the result is not of that batch.
        """
        flight = self._in_flight.popleft()
        if result.batch_id != flight.batch.batch_id:
            raise IntegrityError(
                f"result of batch {result.batch_id} came for batch {flight.batch.batch_id}"
            )
        self._updates = []
        self._take_prompt_logprobs(flight, result)
        counts = result.num_tokens.tolist()
        tokens = result.tokens.tolist()
        block = self.kv.block_tokens
        sample = 0
        for span in flight.spans:
            sequence = span.sequence
            is_current = span.epoch == sequence.epoch
            if is_current:
                sequence.num_confirmed = span.begin + span.count
            if span.samples:
                sequence.num_pending -= 1
                if sequence.state is not SequenceState.FINISHED:
                    self._take_tokens(sequence, tokens[sample][: counts[sample]], result, sample)
                sample += 1
            if is_current and sequence.num_confirmed - sequence.num_registered >= block:
                self._register(sequence)
        return self._updates

    def _take_tokens(
        self, sequence: Sequence, tokens: list[int], result: StepResult, sample: int
    ) -> None:
        if not tokens:
            self._end(sequence, (), (), FinishReason.ERROR)
            return
        if sequence.children:
            self._release_children(sequence)
        if len(sequence.tokens) >= sequence.max_len:
            self._end(sequence, (), (), FinishReason.LENGTH)  # max_tokens is 0.
            return
        kept, reason = self._append(sequence, tokens)
        self._counters["num_generated_tokens"] += len(kept)
        logprobs = () if result.logprobs is None else token_logprobs(sequence, result, sample, kept)
        if reason is None:
            self._updates.append(
                SequenceUpdate(
                    request_id=sequence.request.id,
                    choice=sequence.choice,
                    new_token_ids=tuple(kept),
                    logprobs=logprobs,
                    num_cached_tokens=sequence.num_cached,
                    first_scheduled_s=sequence.first_scheduled_s,
                )
            )
        else:
            self._end(sequence, tuple(kept), logprobs, reason)

    def _append(
        self, sequence: Sequence, tokens: list[int]
    ) -> tuple[list[int], FinishReason | None]:
        """Add tokens up to the first that ends the sequence; returns those and why it ended."""
        for index, token in enumerate(tokens):
            sequence.tokens.append(token)
            if token in sequence.stop_ids and (
                sequence.num_output >= sequence.request.sampling.min_tokens
            ):
                return tokens[: index + 1], FinishReason.STOP
            if len(sequence.tokens) >= sequence.max_len:
                return tokens[: index + 1], FinishReason.LENGTH
        return tokens, None

    def _take_prompt_logprobs(self, flight: _InFlight, result: StepResult) -> None:
        for report in result.prompt_logprobs:
            sequence = flight.spans[report.row].sequence
            if sequence.state is SequenceState.FINISHED:
                continue
            fresh = prompt_logprobs(sequence, report)
            if fresh:
                self._updates.append(
                    SequenceUpdate(
                        request_id=sequence.request.id,
                        choice=sequence.choice,
                        prompt_logprobs=fresh,
                        num_cached_tokens=sequence.num_cached,
                        first_scheduled_s=sequence.first_scheduled_s,
                    )
                )

    def _register(self, sequence: Sequence) -> None:
        """Make pages that are full of computed, known tokens findable."""
        if sequence.slot < 0 or not self.config.enable_prefix_caching:
            return
        block = self.kv.block_tokens
        end = min(sequence.num_confirmed, len(sequence.tokens)) // block * block
        begin = sequence.num_registered
        if end > begin:
            sequence.extend_hashes(block)
            self.kv.register(sequence.slot, sequence.hashes, begin, end)
            sequence.num_registered = end

    def _release_children(self, sequence: Sequence) -> None:
        """The shared prompt is computed: the further choices may join."""
        for child in sequence.children:
            if child.state is SequenceState.BLOCKED:
                self._enqueue(child)
        sequence.children = []

    def abandon(self) -> None:
        """Forget the batches in flight, which will have no result; their sequences start again.

        What the executor does with a batch may have failed half-way, so nothing that was in it is
        taken as computed.
        """
        sequences = {span.sequence for flight in self._in_flight for span in flight.spans}
        self._in_flight.clear()
        for sequence in sequences:
            sequence.num_pending = 0
            if sequence.state is SequenceState.RUNNING:
                self._preempt(sequence)

    # ---- endings ----

    def _end(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        logprobs: tuple[Any, ...],
        reason: FinishReason,
    ) -> None:
        last = sequence.tokens[-1]
        is_eos = last in self.config.eos_token_ids and not sequence.request.sampling.ignore_eos
        is_stop_token = reason is FinishReason.STOP and not is_eos
        self._updates.append(
            SequenceUpdate(
                request_id=sequence.request.id,
                choice=sequence.choice,
                new_token_ids=tokens,
                logprobs=logprobs,
                num_cached_tokens=sequence.num_cached,
                finish_reason=reason,
                stop_token_id=last if is_stop_token else None,
                first_scheduled_s=sequence.first_scheduled_s,
            )
        )
        if reason is not FinishReason.ERROR:
            self._register(sequence)
        self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._num_waiting -= 1
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        self._counters["num_finished"] += 1
        siblings = self._by_request[sequence.request.id]
        siblings.remove(sequence)
        self._release_children(sequence)
        if not siblings:
            del self._by_request[sequence.request.id]

    def _leave(self, sequence: Sequence) -> None:
        """Give back a running sequence's slot and pages."""
        self._running.remove(sequence)
        self.kv.release(sequence.slot)
        self._freed_slots.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.num_registered = 0

    # ---- looking in ----

    @property
    def _num_promised_elsewhere(self) -> int:
        """Pages that something other than a sequence may claim."""
        return 0

    @property
    def _slots_held_elsewhere(self) -> list[int]:
        """Slots beyond the sequences' that hold pages."""
        return []

    def stats(self) -> EngineStats:
        """Gauges and counters of this instant."""
        pool = self.kv.pool
        return EngineStats(
            num_running=len(self._running),
            num_waiting=self._num_waiting,
            kv_cache_usage=pool.num_held / pool.num_total,
            **self._counters,
        )

    def snapshot(self) -> list[dict[str, Any]]:
        """Every unfinished choice as plain data: what a restarted engine needs to go on."""
        return [
            self._admission.snapshot(sequence)
            for sequences in self._by_request.values()
            for sequence in sequences
        ]

    def restore(self, snapshot: list[dict[str, Any]]) -> None:
        """Queue the choices of a snapshot; each recomputes the tokens that it had."""
        for sequence in self._admission.restore(snapshot):
            self._by_request.setdefault(sequence.request.id, []).append(sequence)
            self._enqueue(sequence)

    def check_integrity(self) -> None:
        """Verify every invariant of pages, slots and sequences.

        Raises:
            IntegrityError: one is broken.
        """
        slots = [sequence.slot for sequence in self._running]
        if sorted(slots + self._free_slots) != list(range(self.info.max_num_seqs)):
            raise IntegrityError("slots are not exactly the running and the free ones")
        if self._running != sorted(self._running, key=_order):
            raise IntegrityError("running sequences are out of order")
        elsewhere = self._slots_held_elsewhere
        self.kv.check_integrity([*slots, *elsewhere])
        alive = [s for sequences in self._by_request.values() for s in sequences]
        for sequence in alive:
            known = len(sequence.tokens) + sequence.num_pending
            if not 0 <= sequence.num_confirmed <= sequence.num_computed <= known:
                raise IntegrityError(f"sequence {sequence.id} has computed more than it has")
            if sequence.num_computed > self.config.max_model_len:
                raise IntegrityError(f"sequence {sequence.id} is longer than the model's context")
        waiting = sum(s.state is SequenceState.WAITING for s in alive)
        if waiting != self._num_waiting:
            raise IntegrityError(f"{waiting} sequences wait, {self._num_waiting} are counted")
        if not self._by_request and not elsewhere and self.kv.pool.num_held:
            raise IntegrityError("pages are held while no request is here")

    def _check_pages(self) -> None:
        need = self.kv.pages_for(self.config.max_model_len, self.config.max_num_batched_tokens)
        have = self.kv.pool.num_total
        if need > have:
            raise OutOfMemoryError(
                f"the KV cache holds {have} pages, one sequence of max_model_len "
                f"{self.config.max_model_len} tokens needs {need}: raise kv_cache_memory_bytes to "
                f"{(need + 1) * self.info.page_bytes} or lower max_model_len"
            )
