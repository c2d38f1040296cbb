"""Drafts from a smaller model with the same vocabulary.

It has parameters, programs and a block pool of its own, but neither an allocator nor a prefix
cache: its pool has as many blocks as the model's, and what it computes of a token lies in the
block, and at the place in it, where the model's keys and values of that token are. So blocks are
shared, evicted and given back without its doing. It only has to know which of them hold what it
computed itself: of each full block the hash of its content, and of each sequence how far it is.

It draws as the request asks, with the same seed: the random numbers of a position are those that
the model draws with too, and two similar distributions then often yield the same token, at any
temperature. What it says decides nothing but how fast the answer comes.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxllm.config import EngineConfig
from jaxllm.engine.block_pool import extend_block_hashes
from jaxllm.engine.sequence import (
    NOT_LIMITED,
    Batch,
    Runner,
    ScheduledSequence,
    Sequence,
    StepHandle,
)
from jaxllm.engine.speculation import Proposer
from jaxllm.sampling_params import SamplingParams

FIRST_RATES = (0.7, 0.7)  # of right guesses, before any was made


class DraftModel(Proposer):
    """Guesses what the model will say by what another says.

    runner: of the other model. config: its engine's; blocks and slots are those of the model's.
    cost: of its step, in steps of the model. max_rows, max_steps: of sequences and of tokens that
    it can compute now without waiting for a program, see ModelRunner; None: what the config allows.
    """

    first_rates = FIRST_RATES

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        cost: float,
        *,
        max_len: int = NOT_LIMITED,
        max_rows: Callable[[], int] | None = None,
        max_steps: Callable[[int], int] | None = None,
    ) -> None:
        assert cost > 0
        self.cost = cost
        self.max_len = max_len
        self._runner = runner
        self._config = config
        self._max_rows = max_rows
        self._max_steps = max_steps
        self._clear()

    def _clear(self) -> None:
        self._readers: dict[int, Sequence] = {}  # by slot
        self._content: dict[int, bytes] = {}  # of full blocks, see block_pool

    def is_ready(self) -> bool:
        """See Proposer. No step is waited for before the first programs are compiled."""
        return self._max_rows is None or self._max_rows() > 0

    def reset(self) -> None:
        """See Proposer."""
        self._clear()
        self._runner.reset()

    def propose(self, sequences: list[Sequence], count: int) -> list[list[int]]:
        """See Proposer. All tokens of the sequences are known, and they have the blocks that they
        need for their last one and all guesses but one. Takes at most one step that computes what
        it has not seen yet, and then one dispatch; a sequence that it still has not caught up with
        gets no guess."""
        num_rows = len(sequences) if self._max_rows is None else self._max_rows()
        readers = [self._reader(sequence) for sequence in sequences[:num_rows]]
        dispatched: list[tuple[Batch, StepHandle]] = []
        ready = readers
        if any(reader.num_tokens - reader.num_computed_tokens > 1 for reader in readers):
            batch = self._catching_up(readers)
            dispatched.append(self._dispatch(batch))
            ready = [row.sequence for row in batch.sequences if row.samples]
        most = count - len(dispatched)
        if ready and most and (batch := self._decoding(ready, most)).sequences:
            dispatched.append(self._dispatch(batch))
        guesses: dict[int, list[int]] = {}
        for batch, handle in dispatched:
            columns = handle.result().token_ids.T.tolist()
            for row, column in zip(batch.sequences, columns, strict=True):
                guess = guesses.setdefault(row.sequence.sequence_id, [])
                # a token that is not finite is a wrong guess: they soon end if there are more
                guess += [max(0, token_id) for token_id in column[: row.samples]]
        for reader in readers:
            reader.drop_pending()
            reader.token_ids += guesses.get(reader.sequence_id, [])
        return [guesses.get(sequence.sequence_id, []) for sequence in sequences]

    def _reader(self, sequence: Sequence) -> Sequence:
        """The sequence as this model sees it: with the same tokens, in the same slot and blocks,
        but with as many computed tokens as it has computed itself."""
        reader = self._readers.get(sequence.slot)
        if (
            reader is None
            or reader.sequence_id != sequence.sequence_id
            or reader.num_preemptions != sequence.num_preemptions
        ):
            reader = self._readers[sequence.slot] = _new_reader(sequence)
        size, token_ids = self._config.block_size, reader.token_ids
        num_same = len(reader.block_hashes) * size  # what follows may be guesses that were wrong
        for token_id, said in zip(
            token_ids[num_same:], sequence.token_ids[num_same:], strict=False
        ):
            if token_id != said:
                break
            num_same += 1
        token_ids[num_same:] = sequence.token_ids[num_same:]
        reader.num_computed_tokens = min(reader.num_computed_tokens, num_same, len(token_ids) - 1)
        reader.block_table, reader.table_version = sequence.block_table, sequence.table_version
        extend_block_hashes(reader.block_hashes, token_ids, size, reader.cache_salt)
        self._remember(reader)
        self._skip_computed(reader)
        return reader

    def _catching_up(self, readers: list[Sequence]) -> Batch:
        """What these have not computed yet, those who lack least first, as far as the budget of a
        step allows; and a token of each that has caught up. A row that reads what another one of
        the step computes comes after it."""
        budget = self._config.max_num_batched_tokens
        rows = []
        for reader in sorted(readers, key=lambda r: r.num_tokens - r.num_computed_tokens):
            self._skip_computed(reader)
            start, num_tokens = reader.num_computed_tokens, reader.num_tokens
            end = min(num_tokens, start + budget)
            if start == end:
                break
            self._write(reader, end)
            rows.append(ScheduledSequence(reader, start, end - start, int(end == num_tokens)))
            budget -= end - start
        return Batch(rows, sum(row.num_tokens for row in rows), num_decodes=0)

    def _decoding(self, readers: list[Sequence], count: int) -> Batch:
        """Up to count tokens of each, as far as its blocks reach."""
        if self._max_steps is not None:
            count = min(count, self._max_steps(len(readers)))
        rows = []
        for reader in readers:
            start = reader.num_tokens - 1
            samples = min(count, len(reader.block_table) * self._config.block_size - start)
            if samples > 0:
                self._write(reader, start + samples)
                rows.append(ScheduledSequence(reader, start, 1, samples))
        num_steps = max((row.samples for row in rows), default=0)
        return Batch(rows, len(rows), num_decodes=len(rows), num_steps=num_steps)

    def _dispatch(self, batch: Batch) -> tuple[Batch, StepHandle]:
        handle = self._runner.execute(batch)
        for row in batch.sequences:
            row.sequence.expect(row.samples)
        return batch, handle

    def _write(self, reader: Sequence, end: int) -> None:
        """A step computes the tokens up to end: from now on others find this in their blocks, and
        not what was there before."""
        first = reader.num_computed_tokens // self._config.block_size
        for block in reader.block_table[first : -(-end // self._config.block_size)]:
            self._content.pop(block, None)
        reader.num_registered_blocks = min(reader.num_registered_blocks, first)
        reader.num_computed_tokens = end
        self._remember(reader)

    def _remember(self, reader: Sequence) -> None:
        """The content of its full blocks, for others that hold them too, or will."""
        num_full = min(
            reader.num_computed_tokens // self._config.block_size, len(reader.block_hashes)
        )
        for index in range(reader.num_registered_blocks, num_full):
            self._content[reader.block_table[index]] = reader.block_hashes[index]
        reader.num_registered_blocks = max(num_full, reader.num_registered_blocks)

    def _skip_computed(self, reader: Sequence) -> None:
        """Blocks that hold what this model computed for another sequence need not be computed. One
        token is left to draw after."""
        table, hashes, size = reader.block_table, reader.block_hashes, self._config.block_size
        index = reader.num_computed_tokens // size
        while index < len(hashes) and self._content.get(table[index]) == hashes[index]:
            index += 1
        num_computed = max(reader.num_computed_tokens, index * size)
        reader.num_computed_tokens = min(num_computed, reader.num_tokens - 1)


def _new_reader(sequence: Sequence) -> Sequence:
    """One that has computed nothing. Options that need a number for each token of the vocabulary
    are left out; guesses are less often right without."""
    params = sequence.params
    return Sequence(
        sequence_id=sequence.sequence_id,
        request_id=sequence.request_id,
        index=sequence.index,
        params=SamplingParams(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            min_p=params.min_p, ignore_eos=True,
        ),
        seed=sequence.seed,
        token_ids=[],
        num_prompt_tokens=sequence.num_prompt_tokens,
        cache_salt=sequence.cache_salt,
        slot=sequence.slot,
        num_preemptions=sequence.num_preemptions,
    )  # fmt: skip
