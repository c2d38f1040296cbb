"""A live request: its sequences' text and log-probabilities, and what is sent of them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from jaxllm.engine.beam_search import BeamSearch, Hypothesis
from jaxllm.engine.request import Request
from jaxllm.engine.sequence import NOT_FINITE, Batch, LogprobRows, Sequence, StepResult
from jaxllm.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from jaxllm.sampling_params import RequestOutputKind


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
        "cumulative_logprob", "detokenizer", "is_scored", "logprobs", "request", "sequence",
    )  # fmt: skip

    def __init__(
        self,
        request: RequestState,
        sequence: Sequence,
        detokenizer: Detokenizer | None,
    ):
        params = sequence.params
        self.is_scored = params.is_scored
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
        self.cumulative_logprob += float(rows.logprobs[row])
        num_top = self.sequence.params.logprobs
        if num_top is not None:
            self.logprobs.append(token_logprobs(rows, row, token_id, num_top, strings))

    @property
    def rank(self) -> tuple[bool, float]:
        """The smallest is the best; answers that failed come last."""
        return self.sequence.finish_reason == "error", -self.cumulative_logprob

    def take_hypothesis(self, hypothesis: Hypothesis, strings: TokenStrings | None) -> None:
        """Becomes one of the answers that a search has found; its sequence holds nothing more."""
        sequence = self.sequence
        prompt = self.request.prompt_token_ids
        sequence.token_ids = [*prompt, *hypothesis.token_ids]
        self.cumulative_logprob = hypothesis.cumulative_logprob
        if hypothesis.token_ids and hypothesis.token_ids[-1] in self._stop_ids:
            self._stop_at(hypothesis.token_ids[-1], len(hypothesis.token_ids))
        num_top = sequence.params.logprobs
        if hypothesis.trace is not None and num_top is not None:
            rows = hypothesis.logprob_rows()
            self.logprobs = [
                token_logprobs(rows, row, token_id, num_top, strings)
                for row, token_id in enumerate(hypothesis.token_ids)
            ]

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
            self.cumulative_logprob if wants_logprobs or self.request.returns_best else None,
            self.logprobs[start:] if wants_logprobs else None,
            sequence.finish_reason,
            sequence.stop_reason,
        )


class RequestState:
    """A live request: its sequences and what belongs to all of them. search: if its answers are
    found by beam search."""

    def __init__(self, request: Request, prompt_token_ids: list[int]):
        self.request = request
        self.prompt_token_ids = prompt_token_ids
        self.sequences: list[SequenceState] = []
        # Whether its answers are ordered by how likely they are, the best of all that are computed.
        self.returns_best = request.beam_search is not None or request.params.ranks_answers
        self.search: BeamSearch | None = None
        self.num_answers = request.params.n  # a search may find fewer
        self.num_unfinished = request.num_sequences
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
        """What is sent at this moment; None if there is to be only the final output."""
        finished, kind = not self.num_unfinished, self.request.params.output_kind
        if (kind is RequestOutputKind.FINAL_ONLY or self.returns_best) and not finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        outputs = []
        for index, state in enumerate(self._answers()):
            output = state.output(delta)
            if output is not None:
                outputs.append(replace(output, index=index) if self.returns_best else output)
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

    def _answers(self) -> list[SequenceState]:
        """Those that are returned, in order. A search's are in order already."""
        if not self.returns_best:
            return self.sequences
        answers = self.sequences
        if self.search is None:
            answers = sorted(answers, key=lambda answer: answer.rank)
        return answers[: self.num_answers]

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


def take_prompt_logprobs(
    batch: Batch,
    result: StepResult,
    states: Mapping[int, SequenceState],
    strings: TokenStrings | None,
) -> None:
    """Gives each request that wants them what a step says of its prompt's tokens. Of a request's
    answers only the first computes the whole prompt."""
    first_row = 0
    assert result.prompt_logprobs is not None
    for row, (sequence, start, num_tokens, _, attempt, _) in enumerate(batch.sequences):
        if sequence.params.prompt_logprobs is not None and sequence.index == 0:
            state = states.get(sequence.sequence_id)
            # rows that are not finite are computed again, or their request ends
            is_valid = attempt == sequence.attempt and result.token_ids[0, row] != NOT_FINITE
            if state is not None and is_valid:
                state.request.add_prompt_logprobs(
                    result.prompt_logprobs, first_row, start, start + num_tokens, strings
                )
        first_row += num_tokens
