"""Speculation: guesses of how a sequence goes on, and how many of them to verify.

A proposer guesses tokens; the next step computes them together with the last known token, and the
model's own tokens say how many were right. The scheduler sees only the drafts, the step only how
they lie in the batch, so that another proposer (a smaller model, extra heads) changes neither.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxllm.engine.forms import masks_ahead
from jaxllm.engine.sequence import Sequence

MIN_MATCH, MAX_MATCH = 2, 5  # tokens that have come before, as they do now
ADAPTION = 0.25  # weight of one more guess in the share of right ones
FIRST_RATES = (0.25, 0.7)  # what these shares begin with: prudent, a good guess proves itself soon


@dataclass(slots=True)
class Outlook:
    """What is expected of a sequence. guess: what may follow its first num_seen tokens. masks: of
    one with a constraint, what may come after each draft that is to be verified.

    rates: how many guesses were right lately, of those that followed a wrong one or none, and of
    those that followed a right one. All guesses count, verified by a step or not: the tokens that
    come say it in any case. So it costs nothing to find out that guesses have become good again.
    """

    num_seen: int
    tokens: array[int] = field(default_factory=lambda: array("i"))  # the first num_seen
    guess: list[int] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    asked_at: int = -1  # num_seen when the proposer was asked last
    rates: list[float] = field(default_factory=lambda: list(FIRST_RATES))
    was_right: bool = False

    def see(self, token_ids: list[int], num_known: int) -> None:
        """Takes in what is known beyond num_seen."""
        new = token_ids[self.num_seen : num_known]
        self.tokens.extend(new)
        self.num_seen = num_known
        for number, token_id in enumerate(new):
            if number == len(self.guess):
                break
            is_right = token_id == self.guess[number]
            self.rates[self.was_right] += ADAPTION * (is_right - self.rates[self.was_right])
            self.was_right = is_right
            if not is_right:
                self.guess.clear()
                return
        del self.guess[: len(new)]

    def chances(self) -> Iterator[float]:
        """How likely it is that the next tokens are as guessed, up to the first, second, ..."""
        chance = 1.0
        for number in range(len(self.guess)):
            chance *= self.rates[self.was_right or number > 0]
            yield chance


class Proposer(Protocol):
    """Guesses how sequences go on."""

    def propose(self, sequences: list[Sequence], count: int) -> list[list[int]]:
        """Up to count tokens that may follow the known ones of each; none if there is no idea."""


class PromptLookup:
    """Guesses that what came after the last few tokens before comes after them again, in prompt and
    output ("prompt lookup decoding"): the longest match of up to MAX_MATCH tokens counts, and of
    these the latest."""

    def propose(self, sequences: list[Sequence], count: int) -> list[list[int]]:
        """See Proposer. Costs some microseconds a sequence, growing with its length."""
        guesses = []
        for sequence in sequences:
            assert sequence.outlook is not None
            guesses.append(continuation(sequence.outlook.tokens, count))
        return guesses


def continuation(token_ids: AbstractSequence[int], count: int) -> list[int]:
    """count tokens, or none without a match. Where the match is so late that fewer have come after
    it, the text repeats itself already, and goes on doing so."""
    tokens = np.asarray(token_ids, np.int32)  # [n]; of an array it is a view
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    for length in range(1, MAX_MATCH):
        longer = ends[np.searchsorted(ends, length) :]  # those with a token so far before them
        if len(longer):
            longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            if length < MIN_MATCH:
                return []
            break
        ends = longer
    guess: list[int] = np.resize(tokens[ends[-1] + 1 :], count).tolist()
    return guess


@dataclass(frozen=True)
class SpeculationStats:
    """Counts since the start. num_accepted_by_position: of a sequence's drafts in a step, how often
    the first was right, the second, ..."""

    num_drafts: int  # how often a sequence had drafts in a step
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_by_position: tuple[int, ...]


class Speculator:
    """Decides what is verified, and counts.

    max_drafts: of a sequence in a step. row_cost: what one more token in a step costs, in steps of
    a single token. max_rows: how many rows a step can have now; None: what the scheduler allows.
    """

    def __init__(
        self,
        proposer: Proposer,
        max_drafts: int,
        row_cost: float,
        max_rows: Callable[[], int] | None = None,
    ) -> None:
        self._proposer = proposer
        self._max_drafts = max_drafts
        self._row_cost = row_cost
        self._max_rows = max_rows
        self._num_drafts = self._num_draft_tokens = 0
        self._num_accepted_by_position = [0] * max_drafts

    def wants_results(self, running: AbstractSequence[Sequence], num_spare_rows: int) -> bool:
        """Whether drafts are likely to pay once the tokens under way are known, without which they
        cannot be made."""
        return any(s.num_pending for s, _ in self._plan(running, num_spare_rows))

    def drafts(
        self, running: AbstractSequence[Sequence], num_spare_rows: int
    ) -> dict[int, tuple[int, ...]]:
        """What the next step shall verify, by sequence_id."""
        drafts = {}
        for sequence, count in self._plan(running, num_spare_rows):
            outlook = sequence.outlook
            if sequence.num_pending or outlook is None:
                continue
            guess = outlook.guess[:count]
            if sequence.constraint is not None:
                outlook.masks = masks_ahead(sequence, guess)
                guess = guess[: len(outlook.masks)]
            if guess:
                drafts[sequence.sequence_id] = tuple(guess)
        return drafts

    def count(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """A step has verified drafts of a sequence."""
        sequence.num_draft_tokens += num_drafts
        sequence.num_accepted_tokens += num_accepted
        self._num_drafts += 1
        self._num_draft_tokens += num_drafts
        for position in range(num_accepted):
            self._num_accepted_by_position[position] += 1

    def stats(self) -> SpeculationStats:
        """What was counted."""
        by_position = tuple(self._num_accepted_by_position)
        return SpeculationStats(
            self._num_drafts, self._num_draft_tokens, sum(by_position), by_position
        )

    def _plan(
        self, running: AbstractSequence[Sequence], num_spare_rows: int
    ) -> list[tuple[Sequence, int]]:
        """Sequences, oldest first, with how many drafts pay for each, at least one.

        A step of R tokens costs 1 + row_cost (R - 1) and is expected to yield Y of them. One more
        draft pays if the chance that it is right, and all before it, is more than its part in the
        cost times Y: then more tokens come a second with it than without.
        """
        num_rows, num_expected = len(running), float(len(running))
        most_rows = num_rows + num_spare_rows
        if self._max_rows is not None:
            most_rows = min(most_rows, self._max_rows())
        plan = []
        for sequence in self._guessed(running):
            assert sequence.outlook is not None
            num_pending, count = sequence.num_pending, 0
            most = min(self._max_drafts, sequence.max_num_tokens - sequence.num_tokens - 1)
            for number, chance in enumerate(sequence.outlook.chances()):
                if number < num_pending:
                    continue
                step_cost = 1 + self._row_cost * (num_rows - 1)
                if count >= most or num_rows >= most_rows:
                    break
                if chance * step_cost <= self._row_cost * num_expected:
                    break
                count += 1
                num_rows += 1
                num_expected += chance
            if count:
                plan.append((sequence, count))
        return plan

    def _guessed(self, running: AbstractSequence[Sequence]) -> list[Sequence]:
        """Those that decode and may have drafts, with guesses that are up to date."""
        decoding = [s for s in running if s.num_computed_tokens == s.num_tokens - 1]
        sequences, asking = [], []
        most_pending = 0
        for sequence in decoding:
            if not may_speculate(sequence):
                continue
            if sequence.outlook is None:
                sequence.outlook = Outlook(0)
            outlook = sequence.outlook
            outlook.see(sequence.token_ids, sequence.num_known_tokens)
            sequences.append(sequence)
            is_short = len(outlook.guess) < sequence.num_pending + self._max_drafts
            if is_short and outlook.asked_at != outlook.num_seen:
                outlook.asked_at = outlook.num_seen
                most_pending = max(most_pending, sequence.num_pending)
                asking.append(sequence)
        if asking:
            # twice as many as can be verified: the next steps need not ask
            guesses = self._proposer.propose(asking, most_pending + 2 * self._max_drafts)
            for sequence, guess in zip(asking, guesses, strict=True):
                assert sequence.outlook is not None
                sequence.outlook.guess = guess
        return sequences


def may_speculate(sequence: Sequence) -> bool:
    """Whether a step may yield several tokens for it: not where the host wants more of each step
    than tokens."""
    params = sequence.params
    wants_more = params.logprobs is not None or params.prompt_logprobs is not None
    wants_more = wants_more or params.ranks_answers or sequence.pooling is not None
    return not (wants_more or sequence.num_candidates)
