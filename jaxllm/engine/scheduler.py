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
5. Where all decode and nobody waits, the device decodes several tokens at a time. Blocks for them
   are taken only from those that are free.
A preempted sequence goes back to its place by the policy's order, ahead of all that came later, and
is computed again, as far as the prefix cache has not kept it.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable
from itertools import islice

from jaxllm.config import EngineConfig
from jaxllm.engine.block_pool import BlockPool, extend_block_hashes
from jaxllm.engine.sequence import Batch, ScheduledSequence, Sequence, SequenceStatus

Key = tuple[float, ...]


def _fcfs_key(sequence: Sequence) -> Key:
    return (sequence.arrival_time, sequence.sequence_id)


def _priority_key(sequence: Sequence) -> Key:
    return (sequence.priority, sequence.arrival_time, sequence.sequence_id)


def _reads_whole_prompt(sequence: Sequence) -> bool:
    """Whether a mean of the hidden states is wanted, or the log-probabilities of the prompt are
    still to be delivered (by the first of a request's sequences, for all)."""
    if sequence.pooling is not None:
        return sequence.pooling.pooling == "mean"
    wants_logprobs = sequence.params.prompt_logprobs is not None and sequence.index == 0
    return wants_logprobs and sequence.num_output_tokens == 0


class WaitingQueue:
    """Sequences in the order of a key that never changes and is unique. O(log n) an operation:
    removed ones stay in the heap until they reach its top or outnumber the others."""

    def __init__(self, key: Callable[[Sequence], Key]):
        self._key = key
        self._heap: list[tuple[Key, Sequence]] = []
        self._ids: set[int] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (self._key(sequence), sequence))
        self._ids.add(sequence.sequence_id)

    def first(self) -> Sequence:
        """The next one; the queue is not empty."""
        while self._heap[0][1].sequence_id not in self._ids:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def pop_first(self) -> Sequence:
        sequence = self.first()
        heapq.heappop(self._heap)
        self._ids.discard(sequence.sequence_id)
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out for good (it must not be added again)."""
        self._ids.discard(sequence.sequence_id)
        if len(self._heap) > 2 * len(self._ids) + 16:
            self._heap = [entry for entry in self._heap if entry[1].sequence_id in self._ids]
            heapq.heapify(self._heap)


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
        self._key = _priority_key if config.policy == "priority" else _fcfs_key
        self._watermark = max(1, config.num_blocks // 100)
        self._clear()

    def _clear(self) -> None:
        self._waiting = WaitingQueue(self._key)
        self._running: list[Sequence] = []  # oldest first
        self._free_slots = list(range(self.config.max_num_seqs - 1, -1, -1))
        self._fresh: set[int] = set()  # blocks registered in this step, so not computed before it

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold a slot, oldest first."""
        return tuple(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence at any moment, whatever it is doing, and frees what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            # The last known token may be computed by a step whose result is not in yet.
            computed = min(sequence.num_computed_tokens, sequence.num_known_tokens - 1)
            self._register(sequence, computed, sequence.num_computed_tokens)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.discard(sequence)
        sequence.drop_pending()
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def distrust(self, sequence: Sequence) -> None:
        """What the sequence computed is wrong: none of its blocks is found any more, even if they
        are no longer its own."""
        self.pool.forget_content(sequence.block_hashes)

    def isolate(self, sequence: Sequence) -> bool:
        """What an unfinished sequence computed is wrong, be it by its own fault or by that of one
        whose blocks it shares. None of its blocks is found any more, and it is computed again
        without sharing any. False, and only the former, if it shared none."""
        self.distrust(sequence)
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
        """After the device lost its state: these unfinished sequences, which must be all, wait to
        be computed again; the pool is empty. Needs no consistent state to begin with."""
        self.pool.clear()
        self._clear()
        for sequence in sequences:
            if sequence.status is SequenceStatus.RUNNING:
                self._count_preemption(sequence)
            sequence.drop_pending()
            sequence.attempt += 1
            sequence.status = SequenceStatus.WAITING
            sequence.slot = -1
            sequence.num_computed_tokens = sequence.num_registered_blocks = 0
            sequence.block_table.clear()
            self._waiting.add(sequence)

    def schedule(self) -> Batch | None:
        """The next step's batch, or None if there is nothing to do. The step is taken as run:
        num_computed_tokens already counts its tokens."""
        self._fresh.clear()
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        num_preemptions = self.num_preemptions
        budget = self._schedule_running(decodes, chunks)
        if num_preemptions == self.num_preemptions:
            budget = self._admit(budget, decodes, chunks)
        num_tokens = self.config.max_num_batched_tokens - budget
        if chunks and self._round_budget is not None:
            num_tokens = self._shorten_last(chunks, num_tokens, self._round_budget(num_tokens))
        if not num_tokens:
            return None
        num_steps = self._num_steps(decodes) if not chunks and not len(self._waiting) else 1
        if num_steps > 1:
            decodes = [self._several(row, num_steps) for row in decodes]
        return Batch(decodes + chunks, num_tokens, len(decodes), num_steps)

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
            num_missing += -(-end // block_size) - len(sequence.block_table)
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
        self, decodes: list[ScheduledSequence], chunks: list[ScheduledSequence]
    ) -> int:
        """Gives the running sequences their tokens. Returns what is left of the budget."""
        running = self._running
        block_size = self.config.block_size
        budget = self.config.max_num_batched_tokens
        index = 0
        while index < len(running):  # preemption shortens the list from its end
            sequence = running[index]
            index += 1
            start, num_total = sequence.num_computed_tokens, len(sequence.token_ids)
            num_tokens = num_total - start
            if num_total >= sequence.max_num_tokens or not num_tokens:
                continue  # the step under way ends it
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget - (len(running) - index))
            end = start + num_tokens
            num_missing = -(-end // block_size) - len(sequence.block_table)
            if num_missing > 0 and not self._take_blocks(sequence, num_missing):
                break  # it was the youngest, and preempted itself
            samples = 1 if end == num_total else 0
            scheduled = ScheduledSequence(sequence, start, num_tokens, samples, sequence.attempt)
            (decodes if samples and num_tokens == 1 else chunks).append(scheduled)
            sequence.num_computed_tokens = end
            num_full = min(end, num_total - sequence.num_pending) // block_size
            if num_full > sequence.num_registered_blocks:
                self._register(sequence, end, start)
            budget -= num_tokens
        return budget

    def _take_blocks(self, sequence: Sequence, count: int) -> bool:
        """Allocates for a running sequence, preempting the youngest as long as that is needed."""
        while self.pool.num_free_blocks < count:
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.pool.allocate(count)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Puts a sequence that no longer counts as running back into the queue."""
        self._release(sequence)
        self._count_preemption(sequence)
        sequence.status = SequenceStatus.WAITING
        self._waiting.add(sequence)

    def _count_preemption(self, sequence: Sequence) -> None:
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Frees slot and blocks at once, even if a step under way still uses them. Steps run in
        the order of their dispatch, so what is handed out now is written after that step has run;
        and what that step writes is in blocks that are not registered, or registered with just
        that content (a prompt's chunk)."""
        self.pool.free(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed_tokens = sequence.num_registered_blocks = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _register(self, sequence: Sequence, end: int, fresh_from: int) -> None:
        """Makes the full blocks of the first end tokens findable, for others of this very step too.
        A block with a pending token has no hash yet; it is registered in a later call. This step
        writes the tokens from fresh_from on."""
        block_size = self.config.block_size
        first, num_known = sequence.num_registered_blocks, sequence.num_known_tokens
        num_full = sequence.num_registered_blocks = max(first, min(end, num_known) // block_size)
        if first == num_full or not self.pool.enable_prefix_caching or sequence.is_isolated:
            return
        self._extend_hashes(sequence)
        for index in range(first, num_full):
            block = sequence.block_table[index]
            is_new = self.pool.register(block, sequence.block_hashes[index])
            if is_new and index >= fresh_from // block_size:
                self._fresh.add(block)

    def _extend_hashes(self, sequence: Sequence) -> None:
        extend_block_hashes(
            sequence.block_hashes, sequence.token_ids, self.config.block_size, sequence.cache_salt,
            sequence.num_known_tokens,
        )  # fmt: skip

    def _admit(
        self, budget: int, decodes: list[ScheduledSequence], chunks: list[ScheduledSequence]
    ) -> int:
        """Moves waiting sequences into free slots, each with its first chunk. Returns what is left
        of the budget."""
        while budget and self._free_slots and len(self._waiting):
            if self.pool.num_free_blocks <= (self._watermark if self._running else 0):
                break  # before any look-up: a full pool costs nothing
            sequence = self._waiting.first()
            if sequence.num_pending:
                break
            cached = self._cached_blocks(sequence)
            if not self._fits(sequence, cached):
                break
            self._waiting.pop_first()
            start = self._start(sequence, cached)
            end = min(len(sequence.token_ids), start + budget)
            num_missing = -(-end // self.config.block_size) - len(cached)
            sequence.block_table += self.pool.allocate(num_missing)
            sequence.num_computed_tokens = end
            samples = 1 if end == len(sequence.token_ids) else 0
            scheduled = ScheduledSequence(sequence, start, end - start, samples, sequence.attempt)
            # A row that reads blocks of this very step has to come after the rows that write them.
            is_decode = samples and end - start == 1 and self._fresh.isdisjoint(cached)
            (decodes if is_decode else chunks).append(scheduled)
            self._register(sequence, end, start)
            budget -= end - start
        return budget

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks of the pool that the sequence can begin with. At least one token is left to
        compute; all are where something is wanted of each token of the prompt."""
        if not self.pool.enable_prefix_caching or sequence.is_isolated:
            return []
        if _reads_whole_prompt(sequence):
            return []
        self._extend_hashes(sequence)
        num_blocks = (len(sequence.token_ids) - 1) // self.config.block_size
        return self.pool.match_prefix(islice(sequence.block_hashes, num_blocks))

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether all known tokens find room, not only the first chunk's: else a long prompt would
        be admitted, run out of blocks half-way, and be preempted."""
        num_blocks = -(-len(sequence.token_ids) // self.config.block_size)
        num_needed = num_blocks - len(cached) + self.pool.num_free_among(cached)
        spare = self._watermark if self._running else 0
        return num_needed + spare <= self.pool.num_free_blocks

    def _start(self, sequence: Sequence, cached: list[int]) -> int:
        """Gives a sequence its slot and cached blocks. Returns the first token to compute."""
        self.pool.acquire(cached)
        start = len(cached) * self.config.block_size
        self.pool.num_queried_tokens += len(sequence.token_ids)
        self.pool.num_hit_tokens += start
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = start
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.block_table += cached
        sequence.num_registered_blocks = len(cached)
        insort(self._running, sequence, key=self._key)
        return start

    def _shorten_last(
        self, chunks: list[ScheduledSequence], num_tokens: int, preferred: int
    ) -> int:
        """Takes tokens off the last chunk until the step has the preferred number. Only the last:
        others of this step may share the blocks that an earlier one computes."""
        last = chunks[-1]
        surplus = num_tokens - preferred
        if not 0 < surplus < last.num_tokens:
            return num_tokens
        sequence, kept = last.sequence, last.num_tokens - surplus
        old_end, new_end = last.start + last.num_tokens, last.start + kept
        block_size = self.config.block_size
        for index in range(new_end // block_size, old_end // block_size):
            self.pool.forget(sequence.block_table[index])
        sequence.num_computed_tokens = new_end  # its blocks stay, the next step fills them
        sequence.num_registered_blocks = new_end // block_size
        chunks[-1] = last._replace(num_tokens=kept, samples=0)
        return preferred
