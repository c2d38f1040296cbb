"""Speculation: guesses of how a sequence goes on, and how many of them to verify.

A proposer guesses tokens; the next step computes them together with the last known token, and the
model's own tokens say how many were right. The scheduler sees only the drafts, the step only how
they lie in the batch, so that another proposer (extra heads) changes neither.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from jaxllm.engine.forms import masks_ahead
from jaxllm.engine.sequence import NOT_LIMITED, Sequence

logger = logging.getLogger(__name__)

MIN_MATCH, MAX_MATCH = 2, 5  # tokens that have come before, as they do now
ADAPTION = 0.25  # weight of one more guess in the share of right ones
FADING = 1 / 64  # of what was learned, with each token that nobody guessed
FIRST_RATES = (0.25, 0.7)  # what these shares begin with: prudent, a good guess proves itself soon

MakeRoom = Callable[[Sequence, int], int]


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

    def see(self, token_ids: list[int], num_known: int) -> int:
        """Takes in what is known beyond num_seen. Returns how many of these nobody had guessed."""
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
                return len(new) - number - 1
        num_unguessed = max(0, len(new) - len(self.guess))
        del self.guess[: len(new)]
        return num_unguessed

    def fade(self, count: int, first_rates: tuple[float, float]) -> None:
        """So many tokens came that nobody had guessed, since it did not pay: what was learned is
        slowly forgotten, or guesses would never be tried again."""
        left = (1 - FADING) ** count
        self.rates = [
            first + left * (rate - first)
            for rate, first in zip(self.rates, first_rates, strict=True)
        ]

    def chances(self, count: int) -> Iterator[float]:
        """How likely it is that the next tokens are as guessed, up to the first, ..., count-th."""
        chance = 1.0
        for number in range(count):
            chance *= self.rates[self.was_right or number > 0]
            yield chance


class Proposer:
    """Guesses how sequences go on.

    cost: of one more token for each sequence, in steps of a single token. Where it is 0 guesses are
    made beforehand; else only those that are going to be verified. max_len: longest sequence that
    it can guess about, the guess included.
    """

    cost: float = 0.0
    first_rates: tuple[float, float] = FIRST_RATES
    max_len: int = NOT_LIMITED

    def propose(self, sequences: list[Sequence], count: int) -> list[list[int]]:
        """Up to count tokens that may follow the known ones of each; none if there is no idea."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Whether it can guess anything now."""
        return True

    def reset(self) -> None:
        """Nothing on the device is relied on any more."""


class PromptLookup(Proposer):
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
    proposer: what is asked; no more once it has_failed, which is that it raised something.
    """

    def __init__(
        self,
        proposer: Proposer,
        max_drafts: int,
        row_cost: float,
        max_rows: Callable[[], int] | None = None,
    ) -> None:
        self.proposer = proposer
        self._max_drafts = max_drafts
        self._row_cost = row_cost
        self._max_rows = max_rows
        self.has_failed = False
        self._num_drafts = self._num_draft_tokens = 0
        self._num_accepted_by_position = [0] * max_drafts

    def wants_results(self, running: AbstractSequence[Sequence], num_spare_rows: int) -> bool:
        """Whether drafts are likely to pay once the tokens under way are known, without which they
        cannot be made."""
        return any(s.num_pending for s in self._plan(running, num_spare_rows))

    def drafts(
        self,
        running: AbstractSequence[Sequence],
        num_spare_rows: int,
        make_room: MakeRoom = lambda _, count: count,
    ) -> dict[int, tuple[int, ...]]:
        """What the next step shall verify, by sequence_id. make_room: gives a sequence blocks for
        so many drafts, and returns for how many there are any."""
        plan = self._plan(running, num_spare_rows)
        plan = {s: count for s, count in plan.items() if not s.num_pending}
        if self.proposer.cost and plan:
            self._guess_as_planned(plan, make_room)
        drafts = {}
        for sequence, count in plan.items():
            outlook = sequence.outlook
            assert outlook is not None
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

    def reset(self) -> None:
        """Nothing on the device is relied on any more."""
        self.proposer.reset()

    def _plan(
        self, running: AbstractSequence[Sequence], num_spare_rows: int
    ) -> dict[Sequence, int]:
        """Sequences with how many drafts pay for each, at least one.

        A step of R tokens costs 1 + row_cost (R - 1) and is expected to yield Y of them. One more
        draft pays if the chance that it is right, and all before it, is more than its part in the
        cost times Y: then more tokens come a second with it than without. First drafts are decided
        on before second ones, since all first ones are guessed at the cost of one.
        """
        num_rows, num_expected = len(running), float(len(running))
        most_rows = num_rows + num_spare_rows
        if self._max_rows is not None:
            most_rows = min(most_rows, self._max_rows())
        going = self._guessed(running)
        step_cost = 1 + self._row_cost * (num_rows - 1)
        plan: dict[Sequence, int] = {}
        for count in range(1, self._max_drafts + 1):
            guess_cost = self.proposer.cost * (1 + self._row_cost * (len(going) - 1))
            cost, expected = step_cost + guess_cost, num_expected
            deeper: list[tuple[Sequence, Iterator[float]]] = []
            for sequence, chances in going:
                chance = next(chances, None)
                if chance is None or num_rows + len(deeper) >= most_rows:
                    continue
                if chance * cost > self._row_cost * expected:
                    deeper.append((sequence, chances))
                    cost += self._row_cost
                    expected += chance
            if expected * step_cost <= num_expected * cost:
                break
            plan |= {sequence: count for sequence, _ in deeper}
            going, step_cost, num_expected = deeper, cost, expected
            num_rows += len(deeper)
        return plan

    def _guessed(
        self, running: AbstractSequence[Sequence]
    ) -> list[tuple[Sequence, Iterator[float]]]:
        """Those that decode and may have drafts, with the chances of as many as they may have."""
        proposer, sequences = self.proposer, []
        may_ask = not self.has_failed and proposer.is_ready()
        for sequence in running if may_ask else ():
            is_decoding = sequence.num_computed_tokens == sequence.num_tokens - 1
            if not is_decoding or not may_speculate(sequence):
                continue
            if sequence.outlook is None:
                sequence.outlook = Outlook(0, rates=list(proposer.first_rates))
            num_unguessed = sequence.outlook.see(sequence.token_ids, sequence.num_known_tokens)
            if proposer.cost and num_unguessed:
                sequence.outlook.fade(num_unguessed, proposer.first_rates)
            sequences.append(sequence)
        if not proposer.cost:
            self._guess_beforehand(sequences)
        return [(sequence, self._chances(sequence)) for sequence in sequences]

    def _chances(self, sequence: Sequence) -> Iterator[float]:
        outlook, num_tokens = sequence.outlook, sequence.num_tokens
        assert outlook is not None
        max_len = min(sequence.max_num_tokens - 1, self.proposer.max_len)
        most = max(0, min(self._max_drafts, max_len - num_tokens))
        if self.proposer.cost:  # asked when all tokens are known
            return outlook.chances(most)
        num_pending = sequence.num_pending
        return islice(
            outlook.chances(min(len(outlook.guess), num_pending + most)), num_pending, None
        )

    def _guess_beforehand(self, sequences: list[Sequence]) -> None:
        """Brings the guesses up to date."""
        asking, most_pending = [], 0
        for sequence in sequences:
            outlook, num_pending = sequence.outlook, sequence.num_pending
            assert outlook is not None
            is_short = len(outlook.guess) < num_pending + self._max_drafts
            if is_short and outlook.asked_at != outlook.num_seen:
                outlook.asked_at = outlook.num_seen
                most_pending = max(most_pending, num_pending)
                asking.append(sequence)
        if asking:
            # twice as many as can be verified: the next steps need not ask
            self._ask(asking, most_pending + 2 * self._max_drafts)

    def _guess_as_planned(self, plan: dict[Sequence, int], make_room: MakeRoom) -> None:
        """Asks for what is going to be verified. A proposer that fails is not asked again."""
        for sequence, count in plan.items():
            assert sequence.outlook is not None
            sequence.outlook.guess = []  # what is left of the last one
            plan[sequence] = make_room(sequence, count)
        asking = [sequence for sequence, count in plan.items() if count]
        try:
            if asking:
                self._ask(asking, max(plan.values()))
        except Exception as error:
            self.has_failed = True
            logger.error("no more drafts, since making them failed", exc_info=error)

    def _ask(self, sequences: list[Sequence], count: int) -> None:
        guesses = self.proposer.propose(sequences, count)
        for sequence, guess in zip(sequences, guesses, strict=True):
            assert sequence.outlook is not None
            sequence.outlook.guess = guess


def may_speculate(sequence: Sequence) -> bool:
    """Whether a step may yield several tokens for it: not where the host wants something of each
    query token, or where others begin in that step."""
    if sequence.num_candidates or sequence.followers:
        return False
    return sequence.pooling is None and sequence.params.prompt_logprobs is None
