"""The engine: requests in, outputs out. One step is schedule, run, postprocess.

Not thread-safe: one thread calls it. abort() may also come while a dispatched step is under way.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from jaxllm.config import EngineConfig
from jaxllm.engine.histogram import Histogram, HistogramStats
from jaxllm.engine.request import (
    Detokenizer,
    QueueFullError,
    Request,
    RequestState,
    SequenceState,
)
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.sequence import (
    NOT_FINITE,
    Batch,
    Runner,
    RunnerFigures,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    StepResult,
)
from jaxllm.engine.snapshot import EngineSnapshot, take_snapshot
from jaxllm.outputs import RequestOutput
from jaxllm.request_error import RequestError

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineSnapshot", "EngineStats", "QueueFullError", "Request"]

logger = logging.getLogger(__name__)

NUM_TIMES_KEPT = 1000  # for the medians of stats()
STEP_SECONDS = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08,
    0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
STEP_TOKENS = tuple(float(2**i) for i in range(15))


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state of this moment.

    prefix_queries and prefix_hits are tokens. median_host_seconds: from a step's result on the host
    to the next call of the runner; median_dispatch_seconds: that call (packing, copy, dispatch).
    Both over the last 1,000 steps, None before there are any. step_seconds: from the call of the
    runner to the result on the host.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    num_prompt_tokens: int  # of the requests that have their first token
    num_generation_tokens: int
    num_computed_tokens: int  # all that the steps computed, recomputation included
    num_steps: int
    num_failed_steps: int
    median_host_seconds: float | None
    median_dispatch_seconds: float | None
    step_seconds: HistogramStats
    step_tokens: HistogramStats
    runner: RunnerFigures


class Engine:
    """Continuous batching over a runner.

    tokenizer: without one, outputs have no text and stop strings are refused. max_num_waiting:
    add_request raises QueueFullError while that many sequences wait; None for no limit.
    round_budget: see Scheduler. last_error: what the last failed step raised, for the user.
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
    ):
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_num_waiting = max_num_waiting
        self.scheduler = Scheduler(config, round_budget)
        self.last_error: str | None = None
        self._requests: dict[str, RequestState] = {}
        self._states: dict[int, SequenceState] = {}  # by sequence_id, unfinished ones
        self._pending: list[RequestOutput] = []  # final outputs that the next step returns
        self._next_sequence_id = 0
        self._random = random.Random(config.seed)
        self._num_prompt_tokens = self._num_generation_tokens = self._num_computed_tokens = 0
        self._num_steps = self._num_failed_steps = 0
        self._scheduled_time = 0.0
        self._result_time: float | None = None  # None after idling, which is not host time
        self._host_seconds: deque[float] = deque(maxlen=NUM_TIMES_KEPT)
        self._dispatch_seconds: deque[float] = deque(maxlen=NUM_TIMES_KEPT)
        self._step_seconds = Histogram(STEP_SECONDS)
        self._step_tokens = Histogram(STEP_TOKENS)

    def check(self, request: Request) -> list[int]:
        """The request's prompt as a list of ints. Raises ValueError if it can never be served."""
        prompt_token_ids = request.check(
            self.vocab_size, self.config.max_model_len, self.eos_token_ids
        )
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
        state = RequestState(request, prompt_token_ids)
        self._requests[request.request_id] = state
        for sequence in self._make_sequences(request, prompt_token_ids):
            detokenizer = self._make_detokenizer(sequence)
            sequence_state = SequenceState(state, sequence, detokenizer, self.config.max_model_len)
            state.sequences.append(sequence_state)
            self._states[sequence.sequence_id] = sequence_state
        for sequence_state in state.sequences:
            self.scheduler.add(sequence_state.sequence)

    def _make_sequences(self, request: Request, prompt_token_ids: list[int]) -> list[Sequence]:
        seed = request.params.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        first_id = self._next_sequence_id
        self._next_sequence_id += request.params.n
        constraint = request.constraint
        return [
            Sequence(
                sequence_id=first_id + index,
                request_id=request.request_id,
                index=index,
                params=request.params,
                seed=(seed + index + 2**63) % 2**64 - 2**63,  # stays a signed 64-bit number
                token_ids=list(prompt_token_ids),
                num_prompt_tokens=len(prompt_token_ids),
                eos_token_ids=self.eos_token_ids,
                priority=request.priority,
                arrival_time=request.arrival_time,
                cache_salt=request.cache_salt,
                pooling=request.pooling,
                constraint=None if constraint is None else constraint.copy(),
            )
            for index in range(request.params.n)
        ]

    def _make_detokenizer(self, sequence: Sequence) -> Detokenizer | None:
        params = sequence.params
        if self.tokenizer is None or not params.detokenize:
            return None
        from jaxllm.text.detokenizer import IncrementalDetokenizer

        return IncrementalDetokenizer(
            self.tokenizer,
            sequence.token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop or (),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def abort(self, request_id: str) -> None:
        """Ends a request at once; the next step returns its final output. An unknown or finished
        request is passed over."""
        state = self._requests.get(request_id)
        if state is None:
            return
        for sequence_state in state.sequences:
            self._finish(sequence_state, "abort")
        self._emit([state], self._pending)

    def has_unfinished_requests(self) -> bool:
        """Whether step() has something to do or to return."""
        return bool(self._requests or self._pending)

    def reset_prefix_cache(self) -> None:
        """Forgets cached prompts; running requests go on."""
        self.scheduler.pool.reset_prefix_cache()

    def step(self) -> list[RequestOutput]:
        """Computes one batch and returns what it brought. If the runner raises, the sequences of
        the batch end with "error" and the others are computed again."""
        try:
            batch = self.scheduler.schedule()
            if batch is None:
                return self._take_pending()
            try:
                result = self._run(batch)
            except Exception as error:
                self._fail(batch, error)
                return self._take_pending()
            return self._postprocess(batch, result)
        except BaseException:  # KeyboardInterrupt: some tokens are counted that nobody received
            self._restart()
            raise

    def _run(self, batch: Batch) -> StepResult:
        scheduled_time = time.monotonic()
        if self._result_time is not None:
            self._host_seconds.append(scheduled_time - self._result_time)
        self._scheduled_time = scheduled_time
        handle = self.runner.execute(batch)
        self._dispatch_seconds.append(time.monotonic() - scheduled_time)
        result = handle.result()
        self._result_time = time.monotonic()
        self._num_steps += 1
        self._num_computed_tokens += batch.num_tokens
        self._step_seconds.observe(self._result_time - scheduled_time)
        self._step_tokens.observe(batch.num_tokens)
        return result

    def _fail(self, batch: Batch, error: Exception) -> None:
        """Ends the batch's sequences; everything else that runs loses its keys and values too."""
        logger.error("a step of %d sequences failed", len(batch.sequences), exc_info=error)
        self.last_error = f"{type(error).__name__}: {error}"
        self._num_failed_steps += 1
        touched: dict[RequestState, None] = {}
        for scheduled in batch.sequences:
            state = self._states.get(scheduled.sequence.sequence_id)
            if state is not None:
                self._finish(state, "error")
                touched[state.request] = None
        self._emit(touched, self._pending)
        self._restart()

    def _restart(self) -> None:
        """Nothing on the device is relied on any more, and a step may have been interrupted
        anywhere: unfinished sequences start over, finished requests are sent."""
        self._result_time = None
        self._states.clear()
        for request in self._requests.values():
            unfinished = [
                state
                for state in request.sequences
                if state.sequence.status is not SequenceStatus.FINISHED
            ]
            request.num_unfinished = len(unfinished)
            self._states.update((state.sequence.sequence_id, state) for state in unfinished)
        self._emit([r for r in self._requests.values() if not r.num_unfinished], self._pending)
        self.scheduler.restart(state.sequence for state in self._states.values())
        self.runner.reset()

    def _postprocess(self, batch: Batch, result: StepResult) -> list[RequestOutput]:
        """Appends the step's tokens, ends what has to end, and makes the outputs."""
        if result.prompt_logprobs is not None:
            self._take_prompt_logprobs(batch, result)
        touched: list[RequestState] = []
        token_ids = result.token_ids.tolist()  # [number of scheduled sequences]
        for row, scheduled in enumerate(batch.sequences):
            state = self._states.get(scheduled.sequence.sequence_id)
            if state is None:  # aborted while the step was under way
                continue
            request = state.request
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self._scheduled_time
            is_finite = token_ids[row] != NOT_FINITE
            if is_finite and not scheduled.samples:
                continue
            try:
                if not is_finite:
                    if self.scheduler.isolate(scheduled.sequence):
                        continue
                    raise ArithmeticError("the model's logits are not finite")
                self._take_result(state, row, token_ids[row], result)
            except Exception as error:
                self._log_fault(request, error)
                self._finish(state, "error")
            if request.last_step != self._num_steps:
                request.last_step = self._num_steps
                touched.append(request)
        outputs = self._take_pending()
        self._emit(touched, outputs)
        if not self._requests:
            self._result_time = None
        return outputs

    def _take_result(
        self, state: SequenceState, row: int, token_id: int, result: StepResult
    ) -> None:
        """The next token, or the embedding, of a sequence whose known tokens are computed."""
        request = state.request
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
            self._num_prompt_tokens += len(request.prompt_token_ids)
        pooling = state.sequence.pooling
        if pooling is not None:
            assert result.pooled is not None
            request.embedding = pooling.finish(result.pooled[row])
            self._finish(state, "stop")
            return
        self._num_generation_tokens += 1
        if state.sequence.params.logprobs is not None:
            assert result.logprobs is not None
            state.add_logprobs(result.logprobs, row, token_id, self.tokenizer)
        finish_reason = state.append(token_id)
        if finish_reason is not None:
            self._finish(state, finish_reason)

    def _take_prompt_logprobs(self, batch: Batch, result: StepResult) -> None:
        first_row = 0
        rows = result.prompt_logprobs
        assert rows is not None
        for row, scheduled in enumerate(batch.sequences):
            if self._wants_prompt_logprobs(scheduled):
                state = self._states.get(scheduled.sequence.sequence_id)
                # rows that are not finite are computed again, or their request ends
                if state is not None and result.token_ids[row] != NOT_FINITE:
                    start, end = scheduled.start, scheduled.start + scheduled.num_tokens
                    state.request.add_prompt_logprobs(rows, first_row, start, end, self.tokenizer)
            first_row += scheduled.num_tokens

    @staticmethod
    def _wants_prompt_logprobs(scheduled: ScheduledSequence) -> bool:
        """Of a request's answers only the first computes the whole prompt."""
        sequence = scheduled.sequence
        return sequence.params.prompt_logprobs is not None and sequence.index == 0

    def _finish(self, state: SequenceState, reason: str) -> None:
        """Ends one sequence, if it has not ended. What it held is free before its text is made."""
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

    def _emit(self, requests: Iterable[RequestState], outputs: list[RequestOutput]) -> None:
        """Adds what these requests have to send. Those that ended are forgotten."""
        now = time.monotonic()
        for state in requests:
            output = state.output(now)
            if output is not None:
                outputs.append(output)
            if not state.num_unfinished:
                del self._requests[state.request.request_id]

    def _take_pending(self) -> list[RequestOutput]:
        pending, self._pending = self._pending, []
        return pending

    def snapshot(self) -> EngineSnapshot:
        """Who holds which blocks now."""
        return take_snapshot(self.scheduler, self._num_generation_tokens)

    def stats(self) -> EngineStats:
        """The engine's counters; cheap enough for every scrape, not for every step."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_usage=pool.usage,
            prefix_queries=pool.num_queried_tokens,
            prefix_hits=pool.num_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_computed_tokens=self._num_computed_tokens,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            median_host_seconds=median(self._host_seconds) if self._host_seconds else None,
            median_dispatch_seconds=(
                median(self._dispatch_seconds) if self._dispatch_seconds else None
            ),
            step_seconds=self._step_seconds.stats(),
            step_tokens=self._step_tokens.stats(),
            runner=self.runner.figures(),
        )
