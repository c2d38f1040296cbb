"""What running sequences hold: a slot each, and blocks, of which several may share one.

A sequence writes only into blocks that nobody else reads: full ones are shared for ever, and of a
shared block that is not full yet a writer gets its own copy first (copy on write). Who is given
anything, and from whom it is taken, is the scheduler's affair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice

from jaxllm.config import EngineConfig
from jaxllm.engine.beam_search import Child
from jaxllm.engine.block_pool import BlockPool, extend_block_hashes
from jaxllm.engine.sequence import ScheduledSequence, Sequence, SequenceStatus


def reads_whole_prompt(sequence: Sequence) -> bool:
    """Whether a mean of the hidden states is wanted, or the log-probabilities of the prompt are
    still to be delivered (by the first of a request's sequences, for all)."""
    if sequence.pooling is not None:
        return sequence.pooling.pooling == "mean"
    wants_logprobs = sequence.params.prompt_logprobs is not None and sequence.index == 0
    return wants_logprobs and sequence.num_output_tokens == 0


class Holdings:
    """Slots and blocks of the running sequences. copies: the (source, destination) of blocks that
    the step being scheduled has to copy."""

    def __init__(self, config: EngineConfig, pool: BlockPool):
        self.pool = pool
        self._block_size = config.block_size
        self._num_slots = config.max_num_seqs
        self.clear()

    def clear(self) -> None:
        """Nobody holds a slot; the pool was cleared too."""
        self._free_slots = list(range(self._num_slots - 1, -1, -1))
        self._num_reserved = 0  # of the free ones
        self._fresh: set[int] = set()  # blocks registered in this step, so not computed before it
        self.copies: list[tuple[int, int]] = []

    def begin_step(self) -> None:
        """Another step is scheduled."""
        self._fresh.clear()
        self.copies = []

    @property
    def num_held_slots(self) -> int:
        """How many sequences run."""
        return self._num_slots - len(self._free_slots)

    @property
    def num_free_slots(self) -> int:
        """Slots for sequences that nobody has reserved."""
        return len(self._free_slots) - self._num_reserved

    @property
    def num_reserved_slots(self) -> int:
        """Free slots that are kept for followers."""
        return self._num_reserved

    def num_slots_of(self, leader: Sequence) -> int:
        """Slots for a sequence and its followers, or as many of them as there are slots."""
        return min(1 + len(leader.followers), self._num_slots)

    def is_fresh(self, blocks: Iterable[int]) -> bool:
        """Whether the step being scheduled writes one of these blocks."""
        return not self._fresh.isdisjoint(blocks)

    def cached_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks of the pool that the sequence can begin with. At least one token is left to
        compute; all are where something is wanted of each token of the prompt."""
        if not self.pool.enable_prefix_caching or sequence.is_isolated:
            return []
        if reads_whole_prompt(sequence):
            return []
        self._extend_hashes(sequence)
        num_blocks = (len(sequence.token_ids) - 1) // self._block_size
        return self.pool.match_prefix(islice(sequence.block_hashes, num_blocks))

    def start(self, sequence: Sequence, cached: list[int]) -> int:
        """Gives a sequence its slot and cached blocks, and reserves slots for its followers.
        Returns the first token to compute."""
        self.pool.acquire(cached)
        start = len(cached) * self._block_size
        self.pool.num_queried_tokens += len(sequence.token_ids)
        self.pool.num_hit_tokens += start
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = start
        sequence.num_reserved_slots = self.num_slots_of(sequence) - 1
        self._num_reserved += sequence.num_reserved_slots
        self._take_slot(sequence)
        sequence.block_table += cached
        sequence.num_registered_blocks = len(cached)
        return start

    def _take_slot(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()

    def fork(self, leader: Sequence, parent: Sequence, child: Sequence) -> None:
        """Gives a follower one of its leader's reserved slots and all that the parent, which may be
        the leader, has computed: both hold the same blocks from now on."""
        assert leader.num_reserved_slots
        leader.num_reserved_slots -= 1
        self._num_reserved -= 1
        self._take_slot(child)
        self._share(parent, child)

    def rearrange(self, leader: Sequence, children: Collection[Child]) -> None:
        """The beams of a search give way to these, with their new tokens. A beam's first child
        takes its place. The others share its blocks in the place of beams that have no child, or of
        followers. The leader is a beam whatever happens."""
        beams = leader.unit
        parents = [beams[child.parent] for child in children]
        first_child = {parent: number for number, parent in reversed(list(enumerate(parents)))}
        at = {number: parent for parent, number in first_child.items()}
        spare = [beam for beam in beams if beam not in first_child] + leader.followers
        if leader not in first_child:  # the last child takes its place
            spare.remove(leader)
            spare.insert(0, leader)
            if len(at) == len(parents):
                del at[len(parents) - 1]
        for number, parent in enumerate(parents):
            if number not in at:
                at[number] = spare.pop(0)
                self._branch(leader, parent, at[number])
        leader.beams = [at[number] for number in range(len(parents))]
        for beam, new in zip(leader.beams, children, strict=True):
            beam.token_ids.append(new.token_id)
            beam.constraint = new.constraint
        alive = set(leader.beams)
        leader.followers = [s for s in (*leader.followers, *beams) if s not in alive]
        for beam in leader.followers:
            self._give_up(leader, beam)

    def _branch(self, leader: Sequence, parent: Sequence, child: Sequence) -> None:
        """The child becomes what the parent is."""
        if child.status is SequenceStatus.RUNNING:
            self.pool.free(child.block_table)
            self._share(parent, child)
        else:
            self.fork(leader, parent, child)
        child.token_ids = parent.token_ids.copy()

    def _give_up(self, leader: Sequence, beam: Sequence) -> None:
        """A beam that is not needed now follows its leader again."""
        if beam.status is SequenceStatus.RUNNING:
            self.release(beam)
            leader.num_reserved_slots += 1
            self._num_reserved += 1

    def release_search(self, leader: Sequence) -> None:
        """Frees what all beams hold; the search is back at its prompt."""
        leader.followers = [*leader.followers, *(b for b in leader.beams if b is not leader)]
        for beam in leader.unit:
            if beam.status is SequenceStatus.RUNNING:
                self.release(beam)
        self.forget_output(leader)

    def forget_output(self, sequence: Sequence) -> None:
        """Of a search: nothing but the prompt is known."""
        sequence.beams = []
        sequence.constraint = sequence.first_constraint
        del sequence.token_ids[sequence.num_prompt_tokens :]
        del sequence.block_hashes[sequence.num_prompt_tokens // self._block_size :]

    def _share(self, parent: Sequence, child: Sequence) -> None:
        num_blocks = -(-parent.num_computed_tokens // self._block_size)
        child.block_table = parent.block_table[:num_blocks]
        self.pool.acquire(child.block_table)
        child.block_hashes = parent.block_hashes.copy()
        child.num_registered_blocks = parent.num_registered_blocks
        child.num_computed_tokens = parent.num_computed_tokens
        child.table_version += 1
        child.is_forked = parent.is_forked = True

    def unreserve(self, leader: Sequence) -> None:
        """What is still reserved for its followers is not needed."""
        self._num_reserved -= leader.num_reserved_slots
        leader.num_reserved_slots = 0

    def release(self, sequence: Sequence) -> None:
        """Frees slot and blocks at once, even if a step under way still uses them. Steps run in
        the order of their dispatch, so what is handed out now is written after that step has run;
        and what that step writes is in blocks that are not registered, or registered with just
        that content (a prompt's chunk)."""
        self.pool.free(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed_tokens = sequence.num_registered_blocks = 0
        sequence.is_forked = False
        self.unreserve(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.status = SequenceStatus.WAITING

    def num_missing(self, sequences: Iterable[Sequence], start: int, end: int) -> int:
        """Blocks that these lack for writing their tokens start to end, copies included. Of a block
        that several hold the last one to write needs no copy."""
        missing, needed = 0, -(-end // self._block_size)
        shared: Counter[int] = Counter()
        for sequence in sequences:
            missing += max(0, needed - len(sequence.block_table))
            if sequence.is_forked and start % self._block_size:
                shared[sequence.block_table[start // self._block_size]] += 1
        for block, num_writers in shared.items():
            missing += min(num_writers, self.pool.num_holders(block) - 1)
        return missing

    def extend(self, sequences: Iterable[Sequence], start: int, end: int) -> None:
        """Gives each of these blocks of its own for its tokens start to end; there are as many."""
        needed = -(-end // self._block_size)
        for sequence in sequences:
            if sequence.is_forked:
                self._own_block(sequence, start)
            missing = needed - len(sequence.block_table)
            if missing > 0:
                sequence.block_table += self.pool.allocate(missing)

    def _own_block(self, sequence: Sequence, start: int) -> None:
        """Copy on write: nobody else holds the block of this token any more."""
        sequence.is_forked = False
        index, offset = divmod(start, self._block_size)
        if not offset:
            return  # it begins a block
        block = sequence.block_table[index]
        if self.pool.num_holders(block) > 1:
            own = sequence.block_table[index] = self.pool.replace(block)
            sequence.table_version += 1
            self.copies.append((block, own))

    def trim(self, sequence: Sequence) -> None:
        """Takes back the blocks beyond those of its known tokens."""
        needed = -(-len(sequence.token_ids) // self._block_size)
        surplus = sequence.block_table[needed:]
        if surplus:
            del sequence.block_table[needed:]
            sequence.table_version += 1
            self.pool.free(surplus)

    def register(self, sequence: Sequence, end: int, fresh_from: int) -> None:
        """Makes the full blocks of the first end tokens findable, for others of this very step too.
        A block with a pending token has no hash yet; it is registered in a later call. This step
        writes the tokens from fresh_from on."""
        block_size = self._block_size
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
            sequence.block_hashes, sequence.token_ids, self._block_size, sequence.cache_salt,
            sequence.num_known_tokens,
        )  # fmt: skip

    def shorten(self, row: ScheduledSequence, num_tokens: int) -> ScheduledSequence:
        """The row with fewer tokens. Its blocks stay, the next step fills them."""
        sequence = row.sequence
        old_end, new_end = row.start + row.num_tokens, row.start + num_tokens
        for index in range(new_end // self._block_size, old_end // self._block_size):
            self.pool.forget(sequence.block_table[index])
        sequence.num_computed_tokens = new_end
        sequence.num_registered_blocks = new_end // self._block_size
        return row._replace(num_tokens=num_tokens, samples=0)
