"""A request inside the engine: its sequences' text, log-probabilities, and what is sent of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxllm.engine.sequence import Constraint, LogprobRows, Sequence
from jaxllm.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from jaxllm.pooling_params import PoolingParams
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

# What the step reads of a sequence that embeds. Its token is not used, so it is not drawn either.
NO_SAMPLING = SamplingParams(
    temperature=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)


TOO_LONG = "context_length_exceeded"  # as OpenAI's clients know it


class QueueFullError(RuntimeError):
    """The engine takes no more requests now; later it will."""


@dataclass(frozen=True)
class Request:
    """What a user sent, tokenized. The engine makes params.n sequences of it.

    prompt: the text, only to be handed back. priority: smaller runs earlier, under the priority
    policy. cache_salt: cached blocks are shared only between requests of the same salt.
    arrival_time: on the clock of ``time.monotonic``. pooling: if given, the request returns the
    embedding of its prompt and generates nothing; params is NO_SAMPLING then. constraint: that of
    params.structured_outputs, at the start of an answer; it takes time to make, so it comes made.
    """

    request_id: str
    prompt_token_ids: AbstractSequence[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    pooling: PoolingParams | None = None
    constraint: Constraint | None = None

    def check(
        self, vocab_size: int, max_model_len: int, eos_token_ids: AbstractSequence[int] = ()
    ) -> list[int]:
        """The prompt as a list of ints. Raises ValueError with what is wrong."""
        if not isinstance(self.request_id, str) or not self.request_id:
            raise RequestError(
                f"request_id must be a non-empty string, got {self.request_id!r}",
                param="request_id",
            )
        if not isinstance(self.params, SamplingParams):
            raise RequestError(
                f"params must be SamplingParams, got {type(self.params).__name__}", param="params"
            )
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise RequestError(
                f"priority must be an integer, got {self.priority!r}", param="priority"
            )
        if not isinstance(self.cache_salt, str | None):
            raise RequestError(
                f"cache_salt must be a string, got {self.cache_salt!r}", param="cache_salt"
            )
        if not isinstance(self.arrival_time, int | float) or not math.isfinite(self.arrival_time):
            raise RequestError(
                f"arrival_time must be a finite number, got {self.arrival_time!r}",
                param="arrival_time",
            )
        prompt = _as_list(self.prompt_token_ids)
        self._check_prompt_len(len(prompt), max_model_len)
        token_ids = _checked_token_ids(prompt, vocab_size)
        if self.pooling is not None:
            self._check_pooling()
            return token_ids
        if (self.params.structured_outputs is None) != (self.constraint is None):
            raise RequestError(
                "structured_outputs needs its constraint, and no other has one",
                param="structured_outputs",
            )
        self.params.check_vocabulary(vocab_size)
        self._check_some_token_can_come(vocab_size, eos_token_ids)
        return token_ids

    def _check_prompt_len(self, num_tokens: int, max_model_len: int) -> None:
        """Comes before the tokens are looked at, of which there may be millions."""
        room = max_model_len - (self.pooling is None)  # for a token to be generated
        if num_tokens > room:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, and there is room for {room}: max_model_len "
                f"is {max_model_len}; shorten the prompt or raise max_model_len",
                param="prompt",
                code=TOO_LONG,
            )

    def _check_pooling(self) -> None:
        if not isinstance(self.pooling, PoolingParams):
            raise RequestError(
                f"pooling must be PoolingParams, got {type(self.pooling).__name__}", param="pooling"
            )
        if self.params != NO_SAMPLING:
            raise RequestError(
                "a request that embeds takes no SamplingParams; give NO_SAMPLING", param="params"
            )

    def _check_some_token_can_come(
        self, vocab_size: int, eos_token_ids: AbstractSequence[int]
    ) -> None:
        """Before min_tokens no stop token may be generated, and something has to be."""
        params = self.params
        excluded = {*(params.banned_token_ids or ())}
        if params.min_tokens:
            excluded.update(params.all_stop_token_ids(eos_token_ids))
        if params.allowed_token_ids is None:
            if len(excluded) == vocab_size:
                raise RequestError(
                    f"banned tokens (and before min_tokens stop tokens) are the whole vocabulary "
                    f"of {vocab_size}; leave some to be generated",
                    param="banned_token_ids",
                )
        elif excluded.issuperset(params.allowed_token_ids):
            raise RequestError(
                f"allowed_token_ids holds only stop tokens, and min_tokens is {params.min_tokens}; "
                f"allow another token or set min_tokens to 0",
                param="allowed_token_ids",
            )


def _as_list(token_ids: AbstractSequence[int]) -> list[int] | tuple[int, ...]:
    if isinstance(token_ids, np.ndarray):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, list | tuple):
        raise RequestError(
            f"prompt_token_ids must be a list, got {type(token_ids).__name__}", param="prompt"
        )
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    return token_ids


def _checked_token_ids(token_ids: AbstractSequence[int], vocab_size: int) -> list[int]:
    for position, token_id in enumerate(token_ids):
        if type(token_id) is not int and not isinstance(token_id, np.integer):
            raise RequestError(
                f"prompt_token_ids must be integers, got {token_id!r} at position {position}",
                param="prompt",
            )
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt token id {token_id} at position {position} is outside the vocabulary "
                f"of {vocab_size}",
                param="prompt",
            )
    return [int(token_id) for token_id in token_ids]


class Detokenizer(Protocol):
    """What a sequence needs of jaxllm.text.detokenizer.IncrementalDetokenizer."""

    @property
    def text(self) -> str: ...

    def push(self, token_ids: AbstractSequence[int]) -> str | None: ...

    def take_delta(self) -> str: ...

    def finish(self) -> str | None: ...


class TokenStrings(Protocol):
    """What log-probabilities need of a tokenizer."""

    def token_string(self, token_id: int) -> str: ...


def token_logprobs(
    rows: LogprobRows, row: int, chosen: int, num_top: int, strings: TokenStrings | None
) -> TokenLogprobs:
    """One position: the chosen token first, then the num_top most likely ones."""

    def entry(token_id: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, strings.token_string(token_id) if strings else None)

    found = {chosen: entry(chosen, float(rows.logprobs[row]), int(rows.ranks[row]))}
    top_ids = rows.top_token_ids[row, :num_top].tolist()  # [num_top]
    top_logprobs = rows.top_logprobs[row, :num_top].tolist()  # [num_top]
    for rank, (token_id, logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
        # beside the chosen one, what fills up the row of a vocabulary smaller than MAX_LOGPROBS
        if token_id not in found:
            found[token_id] = entry(token_id, logprob, rank)
    return found


class SequenceState:
    """What the host keeps of one answer beside its Sequence: text and log-probabilities."""

    __slots__ = (
        "_end_sent", "_lazy", "_num_pushed", "_num_sent", "_stop_ids", "_text_end",
        "cumulative_logprob", "detokenizer", "logprobs", "request", "sequence",
    )  # fmt: skip

    def __init__(
        self,
        request: RequestState,
        sequence: Sequence,
        detokenizer: Detokenizer | None,
    ):
        params = sequence.params
        self.request = request
        self.sequence = sequence
        self.detokenizer = detokenizer
        self.logprobs: list[TokenLogprobs] = []
        self.cumulative_logprob = 0.0
        self._stop_ids = params.all_stop_token_ids(sequence.eos_token_ids)
        # Nobody sees the text before the end and nothing stops at it: detokenized in one go then.
        self._lazy = params.output_kind is RequestOutputKind.FINAL_ONLY and not params.stop
        self._num_pushed = 0
        self._text_end: int | None = None  # output tokens from here on are not in the text
        self._num_sent = 0
        self._end_sent = False

    def append(self, token_id: int) -> str | None:
        """Takes the first of the expected tokens. Returns the finish reason if it is the last."""
        sequence = self.sequence
        num_output_tokens = sequence.take(token_id)
        if token_id in self._stop_ids and num_output_tokens >= sequence.params.min_tokens:
            return self._stop_at(token_id, num_output_tokens)
        if sequence.constraint is not None:
            sequence.constraint.accept(token_id)
        if self.detokenizer is not None and not self._lazy:
            self._num_pushed = num_output_tokens
            stop = self.detokenizer.push((token_id,))
            if stop is not None:
                sequence.stop_reason = stop
                return "stop"
        if sequence.constraint is not None and sequence.constraint.is_complete:
            return "stop"
        num_tokens = sequence.num_prompt_tokens + num_output_tokens
        return "length" if num_tokens >= sequence.max_num_tokens else None

    def _stop_at(self, token_id: int, num_output_tokens: int) -> str:
        """A stop token stays in token_ids; its text is left out unless the request wants it."""
        params = self.sequence.params
        if params.ignore_eos or token_id not in self.sequence.eos_token_ids:
            self.sequence.stop_reason = token_id
        if not params.include_stop_str_in_output:
            self._text_end = num_output_tokens - 1
        return "stop"

    def add_logprobs(
        self, rows: LogprobRows, row: int, token_id: int, strings: TokenStrings | None
    ) -> None:
        """Takes the log-probabilities of the token that comes next."""
        num_top = self.sequence.params.logprobs
        assert num_top is not None
        found = token_logprobs(rows, row, token_id, num_top, strings)
        self.logprobs.append(found)
        self.cumulative_logprob += found[token_id].logprob

    def flush(self) -> None:
        """The sequence has ended: all its text is text now."""
        if self.detokenizer is None:
            return
        rest = self.sequence.output_token_ids[self._num_pushed : self._text_end]
        if rest:
            self.detokenizer.push(rest)
        self._num_pushed = self.sequence.num_output_tokens
        stop = self.detokenizer.finish()
        if stop is not None:  # it may have been waiting for the rest of a character
            self.sequence.stop_reason = stop
            if self.sequence.finish_reason == "length":
                self.sequence.finish_reason = "stop"

    def output(self, delta: bool) -> CompletionOutput | None:
        """The answer so far, or with delta what is new in it, None if nothing is."""
        sequence, start = self.sequence, 0
        end = len(sequence.token_ids) - sequence.num_pending
        if delta:
            start, self._num_sent = self._num_sent, end - sequence.num_prompt_tokens
            if start == self._num_sent and (sequence.finish_reason is None or self._end_sent):
                return None
            self._end_sent = sequence.finish_reason is not None
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take_delta() if delta else self.detokenizer.text
        wants_logprobs = sequence.params.logprobs is not None
        return CompletionOutput(
            sequence.index,
            text,
            sequence.token_ids[sequence.num_prompt_tokens + start : end],
            self.cumulative_logprob if wants_logprobs else None,
            self.logprobs[start:] if wants_logprobs else None,
            sequence.finish_reason,
            sequence.stop_reason,
        )


class RequestState:
    """A live request: its sequences and what belongs to all of them."""

    def __init__(self, request: Request, prompt_token_ids: list[int]):
        self.request = request
        self.prompt_token_ids = prompt_token_ids
        self.sequences: list[SequenceState] = []
        self.num_unfinished = request.params.n
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_step = -1  # in which it was last given a token
        self.embedding: np.ndarray | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self._prompt_logprobs_sent = False
        self._metrics: RequestMetrics | None = None

    def add_prompt_logprobs(
        self, rows: LogprobRows, first_row: int, start: int, end: int, strings: TokenStrings | None
    ) -> None:
        """Takes rows about the tokens start + 1 .. end. Those that are known already (the
        sequence is computed again after a preemption) or are not of the prompt are passed over."""
        known, num_top = self.prompt_logprobs, self.request.params.prompt_logprobs
        assert known is not None
        assert num_top is not None
        prompt = self.prompt_token_ids
        for position in range(len(known), min(end + 1, len(prompt))):
            row = first_row + position - 1 - start
            known.append(token_logprobs(rows, row, prompt[position], num_top, strings))

    def output(self, now: float) -> RequestOutput | None:
        """What is sent at this moment; None if the request wants only the final output."""
        finished, kind = not self.num_unfinished, self.request.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        outputs = []
        for state in self.sequences:
            output = state.output(delta)
            if output is not None:
                outputs.append(output)
        known = self.prompt_logprobs
        return RequestOutput(
            self.request.request_id,
            self.request.prompt,
            self.prompt_token_ids,
            outputs,
            finished,
            None if known is None else self._prompt_logprobs_to_send(known, delta),
            self.metrics(now if finished else None),
            self.sequences[0].sequence.num_cached_tokens,
            self.embedding,
        )

    def _prompt_logprobs_to_send(
        self, known: list[TokenLogprobs | None], delta: bool
    ) -> list[TokenLogprobs | None] | None:
        """Once they are complete: with every output, or with delta once."""
        if len(known) < len(self.prompt_token_ids):
            return None
        if delta and self._prompt_logprobs_sent:
            return None
        self._prompt_logprobs_sent = True
        return known

    def metrics(self, finished_time: float | None = None) -> RequestMetrics:
        """The request's times; the same object as before while nothing in it changes."""
        num_preemptions = 0
        for state in self.sequences:
            num_preemptions += state.sequence.num_preemptions
        last = self._metrics
        if (
            last is None
            or finished_time is not None
            or last.num_preemptions != num_preemptions
            or last.first_token_time != self.first_token_time
        ):
            self._metrics = RequestMetrics(
                self.request.arrival_time,
                self.first_scheduled_time,
                self.first_token_time,
                finished_time,
                num_preemptions,
                sum(state.sequence.num_draft_tokens for state in self.sequences),
                sum(state.sequence.num_accepted_tokens for state in self.sequences),
            )
        assert self._metrics is not None
        return self._metrics
