"""Beam search: which beams to continue with which tokens, and when to end.

The scoring rules are those of transformers' generate(num_beams=...): candidates are the best
(1 + number of stop tokens) x beam_width continuations of all beams together, so that beam_width of
them go on; of those that end only such count as are among the best beam_width.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.config import EngineConfig
from jaxllm.engine.sequence import Constraint, LogprobRows
from jaxllm.request_error import RequestError

MAX_CANDIDATES = 256  # of each beam


class Beam(Protocol):
    """What a search needs of a running beam, which is an engine.sequence.Sequence."""

    constraint: Constraint | None

    @property
    def output_token_ids(self) -> list[int]: ...


class Child(NamedTuple):
    """A beam of the next step: which of the present ones it continues, the token, and what may come
    after that."""

    parent: int
    token_id: int
    constraint: Constraint | None = None


class Trace(NamedTuple):
    """What is known of a beam's last token, and of those before it. Beams share their past."""

    before: Trace | None
    logprob: float
    rank: int  # among the tokens that could have come
    top_token_ids: np.ndarray  # [n] int32, the likeliest of these
    top_logprobs: np.ndarray  # [n] float32


@dataclass(frozen=True)
class Hypothesis:
    """An answer. score: what answers are ordered by. finish_reason None: it could go on. trace: if
    log-probabilities are wanted."""

    score: float
    cumulative_logprob: float
    token_ids: list[int]
    finish_reason: str | None
    trace: Trace | None = None

    def logprob_rows(self) -> LogprobRows:
        """Of its tokens, which the trace is of."""
        steps, trace = [], self.trace
        while trace is not None:
            steps.append(trace)
            trace = trace.before
        steps.reverse()
        return LogprobRows(
            np.array([step.logprob for step in steps], np.float32),
            np.array([step.rank for step in steps], np.int32),
            np.stack([step.top_token_ids for step in steps]),
            np.stack([step.top_logprobs for step in steps]),
        )


NOTHING = Hypothesis(0.0, 0.0, [], None)  # in the place of one that was not found


class BeamSearch:
    """The search of one request: scores of its running beams, and the best of those that ended.

    stop_token_ids: those that end an answer. max_len: the most tokens of an answer.
    """

    def __init__(
        self, params: BeamSearchParams, stop_token_ids: Collection[int], max_len: int
    ) -> None:
        self.params = params
        self._stop_token_ids = frozenset(stop_token_ids)
        self._max_len = max_len
        self.num_candidates = num_candidates(params, self._stop_token_ids)
        self.restart()

    def restart(self) -> None:
        """Back to the prompt, which is the only beam."""
        self._scores = np.zeros(1, np.float32)  # of the running beams
        self._traces: list[Trace | None] = [None]  # of these
        self._ended: list[Hypothesis] = []  # best first, at most beam_width
        self._len = 0

    def advance(
        self,
        beams: AbstractSequence[Beam],  # R
        token_ids: np.ndarray,  # [R, k] int32, continuations of each beam, best first
        logprobs: np.ndarray,  # [R, k] float32, minus infinity: there is none
    ) -> list[Child]:
        """The beams to go on with, none if the search has ended. Raises ValueError as
        Constraint.accept does."""
        width, self._len = self.params.beam_width, self._len + 1
        totals = (self._scores[:, None] + logprobs).ravel()  # [R k]
        best = np.argsort(-totals, kind="stable")[: self.num_candidates]
        best = best[totals[best] > -np.inf]
        children: list[Child] = []
        scores: list[np.float32] = []
        traces: list[Trace | None] = []
        ended: list[Hypothesis] = []
        for rank, index in enumerate(best.tolist()):
            if rank >= width and len(children) == width:
                break
            parent, place = divmod(index, logprobs.shape[1])
            child = self._child(beams[parent], parent, int(token_ids[parent, place]))
            reason = self._finish_reason(child)
            trace = self._trace(parent, place, token_ids[parent], logprobs[parent])
            if reason is None and len(children) < width:
                children.append(child)
                scores.append(totals[index])
                traces.append(trace)
            elif reason is not None and rank < width:
                tokens = [*beams[parent].output_token_ids, child.token_id]
                ended.append(self._hypothesis(totals[index], tokens, reason, trace))
        self._ended = _best([*self._ended, *ended], width)
        self._scores, self._traces = np.array(scores, np.float32), traces
        return children if children and self._may_improve() else []

    def _child(self, beam: Beam, parent: int, token_id: int) -> Child:
        if beam.constraint is None or token_id in self._stop_token_ids:
            return Child(parent, token_id)
        constraint = beam.constraint.copy()
        constraint.accept(token_id)
        return Child(parent, token_id, constraint)

    def _finish_reason(self, child: Child) -> str | None:
        is_complete = child.constraint is not None and child.constraint.is_complete
        if is_complete or child.token_id in self._stop_token_ids:
            return "stop"
        return "length" if self._len == self._max_len else None

    def _trace(
        self, parent: int, place: int, token_ids: np.ndarray, logprobs: np.ndarray
    ) -> Trace | None:
        """What there is to say of the continuation at a place of a beam's [k], if it is wanted."""
        num_top = self.params.logprobs
        if num_top is None:
            return None
        found = np.flatnonzero(logprobs[:num_top] > -np.inf)
        top_ids = np.full(num_top, token_ids[place])  # where fewer could have come: the chosen one
        top_logprobs = np.full(num_top, logprobs[place])
        top_ids[found], top_logprobs[found] = token_ids[found], logprobs[found]
        return Trace(self._traces[parent], float(logprobs[place]), place + 1, top_ids, top_logprobs)

    def _hypothesis(
        self, total: np.float32, token_ids: list[int], reason: str | None, trace: Trace | None
    ) -> Hypothesis:
        return Hypothesis(
            float(self._score(total, len(token_ids))), float(total), token_ids, reason, trace
        )

    def _score(self, total: np.float32, length: int) -> np.float32:
        return np.float32(total / np.float32(length**self.params.length_penalty))

    def _may_improve(self) -> bool:
        """Whether a running beam may still come among those that ended."""
        params = self.params
        if len(self._ended) < params.beam_width:
            return True
        if params.early_stopping is True:
            return False
        is_patient = params.early_stopping == "never" and params.length_penalty > 0
        best = self._score(self._scores.max(), self._max_len if is_patient else self._len)
        return bool(best > self._ended[-1].score)

    def best(self, outputs: list[list[int]] | None = None) -> list[Hypothesis]:
        """The answers as they stand, best first. outputs: the tokens of the running beams, which
        count too where the search is cut short."""
        running = []
        if outputs is not None:
            running = [
                self._hypothesis(score, tokens, None, trace)
                for score, tokens, trace in zip(self._scores, outputs, self._traces, strict=True)
            ]
        return _best([*self._ended, *running], self.params.num_answers)


def _best(hypotheses: list[Hypothesis], count: int) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:count]


def num_candidates(params: BeamSearchParams, stop_token_ids: Collection[int]) -> int:
    """How many continuations are looked at in a step: enough that beam_width of them go on."""
    return params.beam_width * max(2, 1 + len(stop_token_ids))


def check_search(
    params: BeamSearchParams, prompt_len: int, stop_token_ids: Collection[int], config: EngineConfig
) -> None:
    """Raises RequestError for a search that an engine can never run."""
    if params.beam_width > config.max_num_seqs:
        raise RequestError(
            f"beam_width {params.beam_width} is more than max_num_seqs, {config.max_num_seqs}, the "
            f"sequences that are computed at once",
            param="beam_width",
        )
    wanted = num_candidates(params, stop_token_ids)
    if wanted > MAX_CANDIDATES:
        raise RequestError(
            f"beam_width {params.beam_width} with {len(stop_token_ids)} stop tokens needs {wanted} "
            f"candidates of each beam, and there are {MAX_CANDIDATES}; lower beam_width",
            param="beam_width",
        )
    longest = config.max_model_len
    if params.max_tokens is not None:
        longest = min(longest, prompt_len + params.max_tokens)
    num_shared = prompt_len // config.block_size
    num_own = -(-(longest - 1) // config.block_size) - num_shared
    num_blocks = num_shared + params.beam_width * max(0, num_own)
    if num_blocks > config.num_blocks:
        raise RequestError(
            f"{params.beam_width} beams of {longest} tokens may need {num_blocks} blocks of the "
            f"pool, which has {config.num_blocks}; lower beam_width or max_tokens",
            param="max_tokens",
        )
