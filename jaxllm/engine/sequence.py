"""One sequence, a batch of them, what a step returns: what scheduler and runner share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from jaxllm.pooling_params import PoolingParams
from jaxllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.speculation import Outlook

ON_DEVICE = -1  # as a token id: what the sequence's slot sampled last, not yet known to the host
NOT_LIMITED = 1 << 62


class SequenceStatus(Enum):
    WAITING = auto()  # holds no slot; its blocks, if any, were freed
    RUNNING = auto()  # holds a slot and blocks
    FINISHED = auto()


def mask_len(vocab_size: int) -> int:
    """Words of 32 bits with a bit for each token."""
    return -(-vocab_size // 32)


class Constraint(Protocol):
    """What a sequence whose answer must have a given form needs of jaxllm.text.constraint.

    mask: [ceil(V / 32)] int32, a bit for each token that may come next, the lowest first.
    is_complete: nothing may come any more.
    """

    mask: np.ndarray
    is_complete: bool

    def accept(self, token_id: int) -> None:
        """Takes the next token. Raises ValueError if the form cannot be kept."""

    def forced(self) -> list[int]:
        """The tokens that come next in any case; they are still to be accepted."""

    def copy(self) -> Constraint:
        """For another answer that goes on from here."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens: a prompt and what was generated after it.

    token_ids holds prompt and output. The keys and values of the first num_computed_tokens are in
    the pool (or will be when the step under way ends), in the blocks of block_table:
    token i lies in block_table[i // B] at i % B. A sequence whose num_computed_tokens is
    len(token_ids) - 1 is decoding.

    A dispatched step that samples appends ON_DEVICE for each token it will yield; its result
    replaces them. The last num_pending of token_ids are such. Only what is known is shown to a
    user, hashed, or written to a sampling table.

    followers: sequences of the same request that are not scheduled before this one's prompt is
    computed; then they begin with its blocks. beams: of a beam search that has begun, the sequences
    that are its beams now; the search's first sequence is one of them and stands for all.
    """

    sequence_id: int  # unique within the engine, never reused
    request_id: str
    index: int  # which of the request's n answers
    params: SamplingParams
    seed: int  # already resolved: params.seed + index, or drawn by the engine
    token_ids: list[int]
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str | None = None
    max_num_tokens: int = NOT_LIMITED  # prompt and output; with so many it has ended
    is_host_bound: bool = False  # yields one token a dispatch, see batch.is_host_bound
    pooling: PoolingParams | None = None  # given: it ends with its prompt, which it embeds
    constraint: Constraint | None = None
    first_constraint: Constraint | None = None  # of a beam: as it is before any token
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = -1
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, chained
    num_computed_tokens: int = 0
    num_pending: int = 0
    num_registered_blocks: int = 0  # the first ones of block_table, which the pool has been told of
    followers: list[Sequence] = field(default_factory=list)
    num_reserved_slots: int = 0  # kept free for followers
    beams: list[Sequence] = field(default_factory=list)
    num_candidates: int = 0  # continuations that a beam search wants to see; 0: it is none
    is_forked: bool = False  # the block of its last token may be in other tables too
    table_version: int = 0  # raised when block_table changes otherwise than at its end
    attempt: int = 0  # raised when what steps under way yield for it must not be used
    num_cached_tokens: int = 0  # of the prompt, found in the pool at first admission
    num_preemptions: int = 0
    is_isolated: bool = False  # shares no blocks, neither as reader nor as writer
    outlook: Outlook | None = None  # how it will go on, if it may speculate
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of the drafts
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending

    @property
    def unit(self) -> list[Sequence]:
        """What is scheduled and preempted with it: itself, or all beams of its search."""
        return self.beams or [self]

    @property
    def output_token_ids(self) -> list[int]:
        """Those that are known."""
        return self.token_ids[self.num_prompt_tokens : self.num_known_tokens]

    def expect(self, count: int) -> None:
        """A step that yields so many tokens was dispatched."""
        if count == 1:
            self.token_ids.append(ON_DEVICE)
        else:
            self.token_ids += [ON_DEVICE] * count
        self.num_pending += count

    def take(self, token_id: int) -> int:
        """The first of the expected tokens is known. Returns the number of known output tokens."""
        position = len(self.token_ids) - self.num_pending
        self.token_ids[position] = token_id
        self.num_pending -= 1
        return position + 1 - self.num_prompt_tokens

    def drop_pending(self) -> None:
        """What is expected will not be used. Goes by the tokens: an interrupt may have come between
        the two lines of `expect` or `take`."""
        self.num_pending = 0
        while self.token_ids and self.token_ids[-1] == ON_DEVICE:
            self.token_ids.pop()


class ScheduledSequence(NamedTuple):
    """num_tokens query tokens of a sequence, from token start on; none of one that only samples,
    see Batch.leaders. samples: how many tokens the step may yield for it; 0 unless the last of
    token_ids is computed. More than one only in a batch of several steps, where fewer come only if
    the sequence ends with the last of them, or with drafts. attempt: the sequence's, when it was
    scheduled. drafts: tokens that may follow the last known one and are computed with it; the step
    yields those that the model generates too, and one token more."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: int
    attempt: int = 0
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes. Decoding sequences (one query token, sampling) come first. num_steps:
    how often the device decodes before it returns; above 1 only if all sequences decode. leaders:
    one entry for each of the last rows of ``sequences``, those without a query token; it is the row
    from whose logits they sample. Each draft has a row of its own after all of these. copies:
    (source, destination) of whole blocks, made in this order before anything else."""

    sequences: list[ScheduledSequence]
    num_tokens: int
    num_decodes: int
    num_steps: int = 1
    leaders: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that sample, those of drafts included."""
        return len(self.sequences) + self.num_drafts

    def draft_rows(self) -> Iterator[tuple[int, ScheduledSequence, range]]:
        """Of each sequence with drafts its row, and the rows that sample after its drafts."""
        first = len(self.sequences)
        for row, scheduled in enumerate(self.sequences if self.num_drafts else ()):
            if scheduled.drafts:
                end = first + len(scheduled.drafts)
                yield row, scheduled, range(first, end)
                first = end

    @property
    def num_computed_tokens(self) -> int:
        """Those of all its steps; a sequence that ends early has fewer."""
        if self.num_steps == 1:
            return self.num_tokens
        return sum(row.samples for row in self.sequences)


@dataclass(frozen=True)
class LogprobRows:
    """Log-probabilities of R rows before any sampling option changed them."""

    logprobs: np.ndarray  # [R] float32, of the chosen token
    ranks: np.ndarray  # [R] int32, of the chosen token, 1 is the most likely
    top_token_ids: np.ndarray  # [R, MAX_LOGPROBS] int32, most likely first
    top_logprobs: np.ndarray  # [R, MAX_LOGPROBS] float32


@dataclass(frozen=True)
class CandidateRows:
    """The likeliest next tokens of R beams, best first; minus infinity: there are no more."""

    token_ids: np.ndarray  # [R, k] int32
    logprobs: np.ndarray  # [R, k] float32


NOT_FINITE = -1  # as a sampled token
NO_TOKEN = -2


@dataclass(frozen=True)
class StepResult:
    """Column i of token_ids and row i of others belong to batch.sequences[i]. They mean nothing
    where that sequence does not sample, but NOT_FINITE says even there that its logits are not
    finite; nor do tokens after one that ends the sequence. Where drafts yield fewer tokens than
    others of the batch, NO_TOKEN comes after them, and logprobs goes on with the rows of drafts,
    see Batch.draft_rows. Rows of prompt_logprobs are the step's query tokens in batch order: row j
    is about the known token that follows query token j."""

    token_ids: np.ndarray  # [num_steps or 1 + most drafts, number of scheduled sequences] int32
    logprobs: LogprobRows | None = None  # None unless a sequence of the batch asked
    prompt_logprobs: LogprobRows | None = None
    pooled: np.ndarray | None = None  # [number of scheduled sequences, E] float32, if one embeds
    candidates: CandidateRows | None = None  # None unless a sequence is a beam


@dataclass(frozen=True)
class RunnerFigures:
    """Counts of the device side since the start. Tokens: those asked for; padded tokens: those
    that the compiled programs computed. Seconds of compilation are summed over its threads; waits
    are those of steps."""

    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_programs: int = 0
    num_ready_programs: int = 0
    num_compiled: int = 0
    num_loaded: int = 0  # of the ready ones, from the program cache
    compile_seconds: float = 0.0
    compile_wait_seconds: float = 0.0


class StepHandle(Protocol):
    """A step under way on the device."""

    def result(self) -> StepResult:
        """Waits for the step. Raises what the step raised."""


class Runner(Protocol):
    """What the engine needs of the device side."""

    def execute(self, batch: Batch) -> StepHandle:
        """Dispatches a step and returns at once."""

    def reset(self) -> None:
        """Builds the device state anew after a failed step; the pool's content is lost."""

    def figures(self) -> RunnerFigures:
        """What it has counted."""
