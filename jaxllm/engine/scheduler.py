"""Which tokens the next step computes. There are no phases: each step gives a sequence tokens until
what is computed catches up with what is known.

The rules, in order:
1. Running sequences come first, oldest first. Each may claim one token of the budget, whether it
   decodes or is still at its prompt (the budget is at least max_num_seqs); what nobody claims goes
   to prompts, oldest first. So a prompt never displaces a decode, and with the budget full of
   decodes a prompt still progresses by at least one token a step.
2. A running sequence that finds no free block preempts the youngest running one, possibly itself.
   Since the youngest come last, the victim is never already part of this step. The oldest always
   gets its blocks: alone, it can have the whole pool, which holds max_model_len tokens.
3. Then waiting sequences are admitted in order, nobody overtakes: while a slot and budget are left
   and all blocks of the known tokens are free now, beyond a watermark of 1 % of the pool (at least
   a block). Nobody is admitted in a step that preempted. Both keep a sequence from going in and out
   of the pool. With nothing running there is no watermark, so admission cannot deadlock.
4. A sequence that has all the tokens it may have, some of them perhaps still pending (ON_DEVICE),
   is not scheduled; the result of the step under way ends it. One that was preempted while tokens
   of it were pending is not admitted before they are known.
5. Of a request's sequences the first computes the prompt. It is admitted when there are slots for
   all (at most max_num_seqs); the others begin in the step that computes the prompt's last token,
   and are sampled from its logits too. Those that found no slot then wait, each for itself.
6. The beams of a search are scheduled together or not at all, and their tokens are ranked before
   the next step is scheduled. A search that is preempted begins again from its prompt.
7. Where all decode and nobody waits, the device decodes several tokens at a time. Blocks for them
   are taken only from those that are free.
8. A sequence that decodes may bring drafts: tokens that may follow its last one. They take rows
   that no sequence needs, what is left of the budget, and blocks that are free; nobody is preempted
   for them. A model that makes them writes into these blocks (of its own pool) before.
A preempted sequence goes back to its place by the policy's order, ahead of all that came later, and
is computed again, as far as the prefix cache has not kept it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import groupby
from types import MappingProxyType

from jaxllm.config import EngineConfig
from jaxllm.engine.beam_search import Child
from jaxllm.engine.block_pool import BlockPool
from jaxllm.engine.holdings import Holdings
from jaxllm.engine.sequence import Batch, ScheduledSequence, Sequence, SequenceStatus
from jaxllm.engine.waiting_queue import WaitingQueue, fcfs_key, priority_key

NO_DRAFTS: Mapping[int, tuple[int, ...]] = MappingProxyType({})


class Scheduler:
    """Turns waiting and running sequences into the batch of the next step.

    round_budget: called with the number of tokens of a step that computes prompts; returns how many
    of them to take (a bucket's size), so that a bucket is filled instead of padded. The last
    prompt's chunk is shortened to that, if at least one of its tokens remains. max_steps: how many
    tokens each of a number of sequences can decode in one dispatch; None: what the config allows.
    """

    def __init__(
        self,
        config: EngineConfig,
        round_budget: Callable[[int], int] | None = None,
        max_steps: Callable[[int], int] | None = None,
    ):
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.num_preemptions = 0
        self._round_budget = round_budget
        self._max_steps = max_steps
        self._key = priority_key if config.policy == "priority" else fcfs_key
        self._holdings = Holdings(config, self.pool)
        self._watermark = max(1, config.num_blocks // 100)
        self._clear()

    def _clear(self) -> None:
        self._waiting = WaitingQueue(self._key)
        self._running: list[Sequence] = []  # oldest first
        self._holdings.clear()

    @property
    def num_running(self) -> int:
        return self._holdings.num_held_slots

    @property
    def num_waiting(self) -> int:
        """Those that wait for another's prompt included, until that is admitted."""
        return self._waiting.num_sequences

    @property
    def num_spare_rows(self) -> int:
        """How many drafts the next step has room for; none while anybody waits."""
        if len(self._waiting):
            return 0
        return self.config.max_num_rows - self.num_running - self._holdings.num_reserved_slots

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold a slot, oldest first."""
        return tuple(member for sequence in self._running for member in sequence.unit)

    def add(self, *sequences: Sequence) -> None:
        """Queues sequences of one request. Of those that have nothing but their prompt the first
        computes it for all."""
        leader: Sequence | None = None
        for sequence in sequences:
            if sequence.num_output_tokens:
                self._waiting.add(sequence)
            elif leader is None:
                leader = sequence
            else:
                leader.followers.append(sequence)
        if leader is not None:
            self._waiting.add(leader)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence at any moment, whatever it is doing, and frees what it holds. Followers
        that it has yet get another leader."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            # The last known token may be computed by a step whose result is not in yet.
            computed = min(sequence.num_computed_tokens, sequence.num_known_tokens - 1)
            self._holdings.register(sequence, computed, sequence.num_computed_tokens)
            self._holdings.release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.discard(sequence)
        sequence.drop_pending()
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        self.add(*_take_followers(sequence))

    def rearrange(self, leader: Sequence, children: Collection[Child]) -> None:
        """Continues a search: forks and prunes its beams."""
        self._holdings.rearrange(leader, children)

    def end_search(self, leader: Sequence) -> None:
        """Frees what a search holds, at any moment. Its sequences are still to be finished."""
        if leader.status is SequenceStatus.RUNNING:
            self._running.remove(leader)
        self._waiting.discard(leader)
        self._holdings.release_search(leader)
        leader.followers = []

    def distrust(self, sequence: Sequence) -> None:
        """What the sequence computed is wrong: none of its blocks is found any more, even if they
        are no longer its own."""
        self.pool.forget_content(sequence.block_hashes)

    def isolate(self, sequence: Sequence) -> bool:
        """What an unfinished sequence computed is wrong, be it by its own fault or by that of one
        whose blocks it shares. None of its blocks is found any more, and it is computed again
        without sharing any. False, and only the former, if it shared none."""
        for member in sequence.unit:
            self.distrust(member)
        if sequence.is_isolated or not self.pool.enable_prefix_caching:
            return False
        sequence.is_isolated = True
        sequence.drop_pending()
        sequence.attempt += 1
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._preempt(sequence)
        return True

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """After the device lost its state: these unfinished sequences, which must be all, those of
        a request in a row, wait to be computed again; the pool is empty. Needs no consistent state
        to begin with."""
        self.pool.clear()
        self._clear()
        all_sequences = list(sequences)
        for sequence in all_sequences:
            if sequence.status is SequenceStatus.RUNNING:
                self._count_preemption(sequence)
            sequence.drop_pending()
            sequence.attempt += 1
            sequence.status = SequenceStatus.WAITING
            sequence.slot = -1
            sequence.num_computed_tokens = sequence.num_registered_blocks = 0
            sequence.num_reserved_slots = 0
            sequence.is_forked = False
            sequence.block_table.clear()
            sequence.followers = []
            if sequence.num_candidates:
                self._holdings.forget_output(sequence)
        for _, group in groupby(all_sequences, lambda sequence: sequence.request_id):
            self.add(*group)

    def roll_back(self, sequence: Sequence) -> None:
        """A step has yielded fewer tokens than it computed drafts for."""
        sequence.drop_pending()
        sequence.num_computed_tokens = len(sequence.token_ids) - 1
        self._holdings.trim(sequence)

    def make_room(self, sequence: Sequence, num_drafts: int) -> int:
        """Gives a sequence that decodes blocks for its next token and so many drafts before these
        are made, or for as many as there are free blocks. Returns for how many."""
        if sequence.is_forked:  # its block is copied when it is scheduled
            return 0
        count = self._num_affordable(sequence, num_drafts, self.num_running)
        if count:
            start = sequence.num_computed_tokens
            self._holdings.extend((sequence,), start, start + 1 + count)
        return count

    def schedule(self, drafts: Mapping[int, tuple[int, ...]] = NO_DRAFTS) -> Batch | None:
        """The next step's batch, or None if there is nothing to do. The step is taken as run:
        num_computed_tokens already counts its tokens. drafts: at most num_spare_rows, of sequences
        by their sequence_id."""
        self._holdings.begin_step()
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        num_preemptions = self.num_preemptions
        budget = self._schedule_running(decodes, chunks, drafts)
        if num_preemptions == self.num_preemptions:
            budget = self._admit(budget, decodes, chunks)
        num_tokens = self.config.max_num_batched_tokens - budget
        if chunks and self._round_budget is not None:
            num_tokens = self._shorten_last(chunks, num_tokens, self._round_budget(num_tokens))
        if not num_tokens:
            return None
        followers, leaders = self._begin_followers(decodes + chunks)
        only_decodes = not chunks and not followers
        num_steps = self._num_steps(decodes) if only_decodes and not len(self._waiting) else 1
        if num_steps > 1:
            decodes = [self._several(row, num_steps) for row in decodes]
        num_drafts = sum(len(row.drafts) for row in chunks) if drafts else 0
        return Batch(
            decodes + chunks + followers, num_tokens, len(decodes), num_steps, leaders,
            self._holdings.copies, num_drafts,
        )  # fmt: skip

    def _begin_followers(
        self, rows: list[ScheduledSequence]
    ) -> tuple[list[ScheduledSequence], list[int]]:
        """Rows without a token for the followers of those whose prompts this step completes, and
        the numbers of the rows that they follow."""
        begun: list[ScheduledSequence] = []
        leaders: list[int] = []
        if not self._holdings.num_reserved_slots:
            return begun, leaders
        for number, (leader, start, num_tokens, samples, *_) in enumerate(rows):
            if not samples or not leader.followers or leader.num_candidates:
                continue
            for follower in _take_followers(leader):
                if not leader.num_reserved_slots:
                    self._waiting.add(follower)
                    continue
                self._holdings.fork(leader, leader, follower)
                insort(self._running, follower, key=self._key)
                end = start + num_tokens
                begun.append(ScheduledSequence(follower, end, 0, 1, follower.attempt))
                leaders.append(number)
            self._holdings.unreserve(leader)
        return begun, leaders

    def _num_steps(self, decodes: list[ScheduledSequence]) -> int:
        """How many tokens the device decodes before the host sees them, while nobody waits for a
        slot: as many as are allowed, are wanted, and find free blocks; nobody is preempted for
        more than one."""
        most, wanted = self.config.max_steps_per_dispatch, 1
        if most > 1 and self._max_steps is not None:
            most = self._max_steps(len(decodes))
        if most == 1:
            return 1
        for sequence, *_ in decodes:
            if sequence.is_host_bound or sequence.pooling is not None:
                return 1
            wanted = max(wanted, sequence.max_num_tokens - len(sequence.token_ids))
        num_steps = min(most, wanted)
        while num_steps > 1 and self._num_missing(decodes, num_steps) > self.pool.num_free_blocks:
            num_steps -= 1
        return num_steps

    def _num_missing(self, decodes: list[ScheduledSequence], num_steps: int) -> int:
        """Blocks that the sequences lack for so many tokens each."""
        block_size = self.config.block_size
        num_missing = 0
        for sequence, start, *_ in decodes:
            room = sequence.max_num_tokens - len(sequence.token_ids)
            end = start + min(num_steps, room)
            num_missing += max(0, -(-end // block_size) - len(sequence.block_table))
        return num_missing

    def _several(self, row: ScheduledSequence, num_steps: int) -> ScheduledSequence:
        """The row with as many tokens to yield as the sequence may have, and blocks for them."""
        sequence = row.sequence
        samples = min(num_steps, sequence.max_num_tokens - len(sequence.token_ids))
        end = sequence.num_computed_tokens = row.start + samples
        num_missing = -(-end // self.config.block_size) - len(sequence.block_table)
        if num_missing > 0:
            sequence.block_table += self.pool.allocate(num_missing)
        return ScheduledSequence(sequence, row.start, 1, samples, row.attempt)

    def _schedule_running(
        self,
        decodes: list[ScheduledSequence],
        chunks: list[ScheduledSequence],
        drafts: Mapping[int, tuple[int, ...]],
    ) -> int:
        """Gives the running sequences their tokens. Returns what is left of the budget."""
        running = self._running
        block_size = self.config.block_size
        budget = self.config.max_num_batched_tokens
        index = num_passed = 0
        while index < len(running):  # preemption shortens the list from its end
            sequence = running[index]
            index += 1
            if sequence.beams:
                if not self._schedule_beams(sequence, decodes):
                    break
                num_passed += len(sequence.beams)
                budget -= len(sequence.beams)
                continue
            num_passed += 1
            start, num_total = sequence.num_computed_tokens, len(sequence.token_ids)
            num_tokens = num_total - start
            if num_total >= sequence.max_num_tokens or not num_tokens:
                continue  # the step under way ends it
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget - (self.num_running - num_passed))
            verified: tuple[int, ...] = ()
            if sequence.sequence_id in drafts:
                assert num_tokens == 1
                num_later = self.num_running - num_passed
                room = min(budget - num_later - 1, sequence.max_num_tokens - num_total - 1)
                verified = drafts[sequence.sequence_id][:room]
                verified = verified[: self._num_affordable(sequence, len(verified), num_later)]
                num_tokens += len(verified)
            end = start + num_tokens
            lacks_blocks = end > len(sequence.block_table) * block_size or sequence.is_forked
            if lacks_blocks and not self._take_blocks(sequence, start, end):
                break  # it was the youngest, and preempted itself
            samples = max(0, end - num_total + 1)
            scheduled = ScheduledSequence(
                sequence, start, num_tokens, samples, sequence.attempt, verified
            )
            (decodes if samples and num_tokens == 1 else chunks).append(scheduled)
            sequence.num_computed_tokens = end
            num_full = min(end, num_total - sequence.num_pending) // block_size
            if num_full > sequence.num_registered_blocks:
                self._holdings.register(sequence, end, start)
            budget -= num_tokens
        return budget

    def _num_affordable(self, sequence: Sequence, num_drafts: int, num_others: int) -> int:
        """How many drafts there are free blocks for; a block is left for each other sequence."""
        start, num_free = sequence.num_computed_tokens, self.pool.num_free_blocks - num_others
        for count in range(num_drafts, 0, -1):
            num_missing = self._holdings.num_missing((sequence,), start, start + 1 + count)
            if not num_missing or num_missing <= num_free:
                return count
        return 0

    def _schedule_beams(self, leader: Sequence, decodes: list[ScheduledSequence]) -> bool:
        """One token for each beam of a search, or for none if it was the youngest and preempted
        itself."""
        start = leader.num_computed_tokens
        if not self._take_blocks(leader, start, start + 1):
            return False
        for beam in leader.beams:
            decodes.append(ScheduledSequence(beam, start, 1, 1, beam.attempt))
            beam.num_computed_tokens = start + 1
            self._holdings.register(beam, start + 1, start)
        return True

    def _take_blocks(self, sequence: Sequence, start: int, end: int) -> bool:
        """Blocks of its own for these tokens of a running sequence, or of all beams of its search,
        preempting the youngest as long as that is needed."""
        unit = sequence.unit
        while self._holdings.num_missing(unit, start, end) > self.pool.num_free_blocks:
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        self._holdings.extend(unit, start, end)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Puts a sequence that no longer counts as running back into the queue."""
        if sequence.num_candidates:
            self._holdings.release_search(sequence)
        else:
            self._holdings.release(sequence)
        self._count_preemption(sequence)
        self._waiting.add(sequence)

    def _count_preemption(self, sequence: Sequence) -> None:
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _admit(
        self, budget: int, decodes: list[ScheduledSequence], chunks: list[ScheduledSequence]
    ) -> int:
        """Moves waiting sequences into free slots, each with its first chunk. Returns what is left
        of the budget."""
        holdings = self._holdings
        while budget and holdings.num_free_slots and len(self._waiting):
            if self.pool.num_free_blocks <= (self._watermark if self._running else 0):
                break  # before any look-up: a full pool costs nothing
            sequence = self._waiting.first()
            if sequence.num_pending or holdings.num_slots_of(sequence) > holdings.num_free_slots:
                break
            cached = holdings.cached_blocks(sequence)
            if not self._fits(sequence, cached):
                break
            self._waiting.pop_first()
            start = holdings.start(sequence, cached)
            insort(self._running, sequence, key=self._key)
            end = min(len(sequence.token_ids), start + budget)
            holdings.extend((sequence,), start, end)
            sequence.num_computed_tokens = end
            samples = 1 if end == len(sequence.token_ids) else 0
            scheduled = ScheduledSequence(sequence, start, end - start, samples, sequence.attempt)
            # A row that reads blocks of this very step has to come after the rows that write them.
            is_decode = samples and end - start == 1 and not holdings.is_fresh(cached)
            (decodes if is_decode else chunks).append(scheduled)
            holdings.register(sequence, end, start)
            budget -= end - start
        return budget

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether all known tokens find room, not only the first chunk's: else a long prompt would
        be admitted, run out of blocks half-way, and be preempted. Each follower soon writes into a
        block of its own."""
        num_blocks = -(-len(sequence.token_ids) // self.config.block_size)
        num_needed = num_blocks - len(cached) + self.pool.num_free_among(cached)
        spare = max(self._watermark, len(sequence.followers)) if self._running else 0
        return num_needed + spare <= self.pool.num_free_blocks

    def _shorten_last(
        self, chunks: list[ScheduledSequence], num_tokens: int, preferred: int
    ) -> int:
        """Takes tokens off the last chunk until the step has the preferred number. Only the last:
        others of this step may share the blocks that an earlier one computes."""
        last = chunks[-1]
        surplus = num_tokens - preferred
        if not 0 < surplus < last.num_tokens or last.drafts:
            return num_tokens
        chunks[-1] = self._holdings.shorten(last, last.num_tokens - surplus)
        return preferred


def _take_followers(leader: Sequence) -> list[Sequence]:
    """Those that have not ended; the sequence leads nobody any more."""
    followers = [s for s in leader.followers if s.status is not SequenceStatus.FINISHED]
    leader.followers = []
    return followers
