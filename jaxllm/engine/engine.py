"""The engine: requests in, outputs out. One step is schedule, run, postprocess.

With overlap, step n + 1 is scheduled and dispatched before the result of step n is waited for: the
tokens that n yields are still on the device, where n + 1 reads them. What n then turns out to have
ended is rolled back by passing over its rows of n + 1.

Not thread-safe: one thread calls it. abort() may also come while a dispatched step is under way.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from jaxllm.config import EngineConfig
from jaxllm.engine.beam_search import NOTHING, Hypothesis
from jaxllm.engine.forms import forced_tokens
from jaxllm.engine.intake import Intake
from jaxllm.engine.request import QueueFullError, Request
from jaxllm.engine.request_state import RequestState, SequenceState, take_prompt_logprobs
from jaxllm.engine.scheduler import NO_DRAFTS, Scheduler
from jaxllm.engine.sequence import (
    NO_TOKEN,
    NOT_FINITE,
    Batch,
    Runner,
    Sequence,
    SequenceStatus,
    StepHandle,
    StepResult,
)
from jaxllm.engine.snapshot import EngineSnapshot, take_snapshot
from jaxllm.engine.speculation import Speculator
from jaxllm.engine.stats import EngineStats, StepMeter
from jaxllm.engine.timeline import Timeline
from jaxllm.engine.under_way import FailedStep, StepUnderWay
from jaxllm.outputs import RequestOutput
from jaxllm.request_error import RequestError

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineSnapshot", "EngineStats", "QueueFullError", "Request"]

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over a runner.

    tokenizer: without one, outputs have no text and stop strings are refused. max_num_waiting:
    add_request raises QueueFullError while that many sequences wait; None for no limit.
    round_budget, max_steps: see Scheduler. speculator: None for no speculation. last_error: what
    the last failed step raised, for the user.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Iterable[int] = (),
        max_num_waiting: int | None = None,
        round_budget: Callable[[int], int] | None = None,
        max_steps: Callable[[int], int] | None = None,
        timeline: Timeline | None = None,
        speculator: Speculator | None = None,
    ):
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_num_waiting = max_num_waiting
        self.scheduler = Scheduler(config, round_budget, max_steps)
        self.meter = StepMeter(timeline)
        self.speculator = speculator
        self.last_error: str | None = None
        self._requests: dict[str, RequestState] = {}
        self._states: dict[int, SequenceState] = {}  # by sequence_id, unfinished ones
        self._pending: list[RequestOutput] = []  # what the next step returns
        self._under_way: deque[StepUnderWay] = deque()  # between two calls of step() at most one
        self._intake = Intake(config, self.eos_token_ids, tokenizer)

    def check(self, request: Request) -> list[int]:
        """The request's prompt as a list of ints. Raises ValueError if it can never be served."""
        prompt_token_ids = request.check(self.vocab_size, self.config, self.eos_token_ids)
        if request.priority and self.config.policy != "priority":
            raise RequestError(
                f"priority {request.priority} has no effect; start the engine with "
                f"scheduling_policy='priority'",
                param="priority",
            )
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use by a live request")
        if request.params.stop and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and the engine was made without one", param="stop"
            )
        return prompt_token_ids

    @property
    def has_room(self) -> bool:
        """Whether the queue takes another request now."""
        return self.max_num_waiting is None or self.scheduler.num_waiting < self.max_num_waiting

    def add_request(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it can never be served, QueueFullError if not
        now."""
        prompt_token_ids = self.check(request)
        if not self.has_room:
            raise QueueFullError(
                f"{self.scheduler.num_waiting} sequences are waiting, the limit is "
                f"{self.max_num_waiting}; try again later"
            )
        state = self._intake.state_of(request, prompt_token_ids)
        self._requests[request.request_id] = state
        self._states.update((s.sequence.sequence_id, s) for s in state.sequences)
        self.scheduler.add(*(s.sequence for s in state.sequences))

    def abort(self, request_id: str) -> None:
        """Ends a request at once; the next step returns its final output. An unknown or finished
        request is passed over."""
        state = self._requests.get(request_id)
        if state is None:
            return
        for sequence_state in state.sequences:
            self._finish(sequence_state, "abort")
        self._emit([state])

    def has_unfinished_requests(self) -> bool:
        """Whether step() has something to do or to return."""
        return bool(self._requests or self._pending or self._under_way)

    def reset_prefix_cache(self) -> None:
        """Forgets cached prompts; running requests go on."""
        self.scheduler.pool.reset_prefix_cache()

    def step(self) -> list[RequestOutput]:
        """Dispatches a batch and returns what a step brought: that batch or, with overlap, the one
        before it. If the runner raises, the sequences of the batch end with "error" and the others
        are computed again."""
        try:
            started = time.monotonic()
            batch, num_left = self.scheduler.schedule(self._drafts()), 0
            self.meter.record("schedule", started)
            if batch is not None:
                self._dispatch(batch)
                num_left = int(self.config.overlap and not self._under_way[-1].needs_host)
            while len(self._under_way) > num_left:
                self._take_result(self._under_way.popleft())
            return self._take_pending()
        except BaseException:  # KeyboardInterrupt: some tokens are counted that nobody received
            self._restart()
            raise

    def _drafts(self) -> Mapping[int, tuple[int, ...]]:
        """What the next step shall verify. Where that is likely to pay, the step under way is
        waited for: drafts follow a known token."""
        speculator, scheduler = self.speculator, self.scheduler
        if speculator is None or scheduler.num_spare_rows <= 0:
            return NO_DRAFTS
        if self._under_way:
            if not speculator.wants_results(scheduler.running, scheduler.num_spare_rows):
                return NO_DRAFTS
            self._take_result(self._under_way.popleft())
        return speculator.drafts(scheduler.running, scheduler.num_spare_rows, scheduler.make_room)

    def _dispatch(self, batch: Batch) -> None:
        now = time.monotonic()
        needs_host = False
        try:
            handle: StepHandle = self.runner.execute(batch)
        except Exception as error:  # the step before it, if there is one, is not to blame
            handle, needs_host = FailedStep(error), True
        else:
            for sequence, _, _, samples, _, drafts in batch.sequences:
                if drafts or (samples and sequence.num_candidates):
                    needs_host = True  # how it goes on is decided when the tokens are known
                if samples and sequence.pooling is None and not sequence.num_candidates:
                    sequence.expect(samples)
                    if sequence.constraint is not None:
                        needs_host = True
        self.meter.dispatched(now, is_device_idle=not self._under_way)
        self._under_way.append(StepUnderWay(batch, handle, now, needs_host))

    def _take_result(self, step: StepUnderWay) -> None:
        """Waits for a step and takes in what it yielded."""
        waited = time.monotonic()
        try:
            result = step.handle.result()
        except Exception as error:
            self._fail(step.batch, error)
            return
        now = time.monotonic()
        self.meter.finished(step.batch, step.dispatch_time, waited, now)
        self._postprocess(step, result)
        self.meter.record("postprocess", now)

    def _fail(self, batch: Batch, error: Exception) -> None:
        """Ends the batch's sequences; everything else that runs loses its keys and values too, and
        what is under way is computed again."""
        logger.error("a step of %d sequences failed", len(batch.sequences), exc_info=error)
        self.last_error = f"{type(error).__name__}: {error}"
        self.meter.num_failed_steps += 1
        touched: dict[RequestState, None] = {}
        for scheduled in batch.sequences:
            state = self._states.get(scheduled.sequence.sequence_id)
            if state is not None and scheduled.attempt == scheduled.sequence.attempt:
                self._finish(state, "error")
                touched[state.request] = None
        self._emit(touched)
        self._restart()

    def _restart(self) -> None:
        """Nothing on the device is relied on any more, and a step may have been interrupted
        anywhere: unfinished sequences start over, finished requests are sent."""
        self._under_way.clear()
        self.meter.result_time = None
        self._states.clear()
        for request in self._requests.values():
            unfinished = [
                state
                for state in request.sequences
                if state.sequence.status is not SequenceStatus.FINISHED
            ]
            request.num_unfinished = len(unfinished)
            if request.search is not None and len(unfinished) < len(request.sequences):
                for state in unfinished:  # the interrupt came while the search was being ended
                    self.scheduler.finish(state.sequence, "error")
                request.num_unfinished, unfinished = 0, []
            self._states.update((state.sequence.sequence_id, state) for state in unfinished)
        self._emit([r for r in self._requests.values() if not r.num_unfinished])
        self.scheduler.restart(state.sequence for state in self._states.values())
        self.runner.reset()
        if self.speculator is not None:
            self.speculator.reset()

    def _postprocess(self, step: StepUnderWay, result: StepResult) -> None:
        """Takes the step's tokens, ends what has to end, and makes the outputs. Rows of sequences
        that ended, or began anew, since the step was scheduled are passed over."""
        if result.prompt_logprobs is not None:
            take_prompt_logprobs(step.batch, result, self._states, self.tokenizer)
        searches: dict[RequestState, list[int]] = {}  # the rows of their beams
        touched: list[RequestState] = []
        token_ids = result.token_ids.T.tolist()  # [number of scheduled sequences, num_steps]
        later_rows = {row: rows for row, _, rows in step.batch.draft_rows()}
        for row, scheduled in enumerate(step.batch.sequences):
            sequence, _, _, samples, attempt, drafts = scheduled
            state = self._states.get(sequence.sequence_id)
            if state is None or attempt != sequence.attempt:
                if NOT_FINITE in token_ids[row]:
                    self.scheduler.distrust(sequence)
                continue
            request = state.request
            if request.first_scheduled_time is None:
                request.first_scheduled_time = step.dispatch_time
            if not samples and token_ids[row][0] != NOT_FINITE:
                continue
            if request.search is not None:
                searches.setdefault(request, []).append(row)
                continue
            try:
                rows = (row, *later_rows.get(row, ()))
                if not self._take_row(state, rows, token_ids[row], samples, result):
                    continue
                if drafts:
                    self._take_drafts(sequence, len(drafts), token_ids[row])
                self._take_forced_tokens(state)
            except Exception as error:
                self._log_fault(request, error)
                self._finish(state, "error")
            if request.last_step != self.meter.num_steps:
                request.last_step = self.meter.num_steps
                touched.append(request)
        touched += [r for r, rows in searches.items() if self._advance(r, rows, result)]
        self._emit(touched)
        if not self._requests:
            self.meter.result_time = None

    def _advance(self, request: RequestState, rows: list[int], result: StepResult) -> bool:
        """Takes in a step of a request's search, of whose beams these are the rows. Whether it has
        ended."""
        search, leader = request.search, request.sequences[0].sequence
        assert search is not None
        assert result.candidates is not None
        found = result.candidates
        try:
            if (result.token_ids[0, rows] == NOT_FINITE).any():
                if self.scheduler.isolate(leader):
                    return False
                raise ArithmeticError("the model's logits are not finite")
            if not leader.num_output_tokens:
                self._count_first_token(request)
                search.restart()
            count = max(search.num_candidates, search.params.logprobs or 0)
            children = search.advance(
                leader.unit, found.token_ids[rows, :count], found.logprobs[rows, :count]
            )
            self.meter.num_generation_tokens += len(children)
            if children:
                self.scheduler.rearrange(leader, children)
            else:
                self._end_search(request, None)
        except Exception as error:
            self._log_fault(request, error)
            self._end_search(request, "error")
        return not request.num_unfinished

    def _end_search(self, request: RequestState, reason: str | None) -> None:
        """Ends a request's search, if it has not ended. Its first sequences become its answers, as
        far as it has any. reason: what cut the search short, None: nothing did."""
        if not request.num_unfinished:
            return
        search, leader = request.search, request.sequences[0].sequence
        assert search is not None
        found: list[Hypothesis] = []
        if reason is None:
            found = search.best()
            request.num_answers = max(1, len(found))
        elif reason != "error" and leader.num_output_tokens:  # else it has not begun, or not again
            found = search.best([beam.output_token_ids for beam in leader.unit])
        self.scheduler.end_search(leader)
        for state in request.sequences:
            hypothesis = found.pop(0) if found else NOTHING
            state.take_hypothesis(hypothesis, self.tokenizer)
            self._end(state, hypothesis.finish_reason or reason or "length")

    def _take_row(
        self, state: SequenceState, rows: tuple[int, ...], token_ids: list[int], samples: int,
        result: StepResult,
    ) -> bool:  # fmt: skip
        """The tokens of one sequence, up to one that ends it. False if there is none. rows: its
        own, and those of its drafts."""
        for index, token_id in enumerate(token_ids):
            if token_id == NOT_FINITE:
                if not self.scheduler.isolate(state.sequence):
                    raise ArithmeticError("the model's logits are not finite")
                return index > 0
            if token_id == NO_TOKEN:
                break
            row = rows[min(index, len(rows) - 1)]
            if self._take_token(state, row, token_id, result) or index + 1 == samples:
                break
        return True

    def _take_drafts(self, sequence: Sequence, num_drafts: int, token_ids: list[int]) -> None:
        """Counts how many of a sequence's drafts were right, and forgets the others."""
        assert self.speculator is not None
        num_yielded = sum(token_id != NO_TOKEN for token_id in token_ids)
        self.speculator.count(sequence, num_drafts, num_yielded - 1)
        if sequence.num_pending:
            self.scheduler.roll_back(sequence)

    def _take_token(
        self, state: SequenceState, row: int, token_id: int, result: StepResult
    ) -> bool:
        """The next token, or the embedding, of a sequence whose known tokens are computed. Whether
        it has ended."""
        request, sequence = state.request, state.sequence
        self._count_first_token(request)
        if sequence.pooling is not None:
            assert result.pooled is not None
            request.embedding = sequence.pooling.finish(result.pooled[row])
            self._finish(state, "stop")
            return True
        self.meter.num_generation_tokens += 1
        if state.is_scored:
            assert result.logprobs is not None
            state.add_logprobs(result.logprobs, row, token_id, self.tokenizer)
        finish_reason = state.append(token_id)
        if finish_reason is not None:
            self._finish(state, finish_reason)
        return finish_reason is not None

    def _count_first_token(self, request: RequestState) -> None:
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
            self.meter.num_prompt_tokens += len(request.prompt_token_ids)

    def _take_forced_tokens(self, state: SequenceState) -> None:
        """Those that come next in an unfinished sequence because its form leaves no choice."""
        sequence, constraint = state.sequence, state.sequence.constraint
        if constraint is None or sequence.status is SequenceStatus.FINISHED:
            return
        for token_id in forced_tokens(sequence, constraint):
            sequence.expect(1)
            self.meter.num_generation_tokens += 1
            if finish_reason := state.append(token_id):
                self._finish(state, finish_reason)
                return

    def _finish(self, state: SequenceState, reason: str) -> None:
        """Ends one sequence, if it has not ended, or the search that it belongs to."""
        if state.request.search is not None:
            self._end_search(state.request, reason)
        else:
            self._end(state, reason)

    def _end(self, state: SequenceState, reason: str) -> None:
        """What a sequence held is free before its text is made."""
        if self._states.pop(state.sequence.sequence_id, None) is None:
            return
        self.scheduler.finish(state.sequence, reason)
        state.request.num_unfinished -= 1
        try:
            state.flush()
        except Exception as error:
            self._log_fault(state.request, error)

    def _log_fault(self, request: RequestState, error: Exception) -> None:
        """A fault in one answer's text harms only that answer."""
        self.last_error = f"{type(error).__name__}: {error}"
        logger.error("request %s failed", request.request.request_id, exc_info=error)

    def _emit(self, requests: Iterable[RequestState]) -> None:
        """Adds what these requests have to send to what step() returns. Those that ended are
        forgotten."""
        now = time.monotonic()
        for state in requests:
            output = state.output(now)
            if output is not None:
                self._pending.append(output)
            if not state.num_unfinished:
                del self._requests[state.request.request_id]

    def _take_pending(self) -> list[RequestOutput]:
        pending, self._pending = self._pending, []
        return pending

    def snapshot(self) -> EngineSnapshot:
        """Who holds which blocks now."""
        return take_snapshot(self.scheduler, self.meter.num_generation_tokens)

    def stats(self) -> EngineStats:
        """The engine's counters; cheap enough for every scrape, not for every step."""
        speculation = None if self.speculator is None else self.speculator.stats()
        return self.meter.stats(self.scheduler, self.runner.figures(), speculation)
