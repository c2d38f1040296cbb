"""A runner without a model. It keeps a KV pool that holds, instead of keys and values, which token
at which position of which salt they would belong to, and reads each sequence's whole context back
through its block table. So wrong sharing, stale blocks and overwritten ones are found."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import accepted_tokens
from jaxllm.engine.sequence import (
    NOT_FINITE,
    ON_DEVICE,
    Batch,
    CandidateRows,
    LogprobRows,
    RunnerFigures,
    Sequence,
    StepResult,
)
from jaxllm.sampling_params import MAX_LOGPROBS

LETTERS = "abcdefghijklmnopqrstuvwxyz "
EOS = len(LETTERS)
VOCAB_SIZE = EOS + 1
POISON, NONSENSE = -5, -6


def ids(text: str) -> list[int]:
    """Token ids of a text; "$" is the end of sequence."""
    return [EOS if char == "$" else LETTERS.index(char) for char in text]


def hashed_token(sequence: Sequence) -> int:
    """A token that depends on every token before it and on the seed."""
    content = array("i", sequence.token_ids).tobytes() + sequence.seed.to_bytes(
        8, "big", signed=True
    )
    token_id = int.from_bytes(blake2b(content, digest_size=4).digest()) % VOCAB_SIZE
    params = sequence.params
    stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else sequence.eos_token_ids)}
    while sequence.num_output_tokens < params.min_tokens and token_id in stops:
        token_id = (token_id + 1) % VOCAB_SIZE  # as the sampler bans them
    return token_id


def fake_rank(token_id: int) -> int:
    return 1 + token_id % 3


def fake_logprobs(token_ids: list[int]) -> LogprobRows:
    """The token's rank is 1 + id % 3, its neighbours rank around it, and rank r has -r / 4."""
    chosen = np.array(token_ids, np.int32).reshape(-1)  # [R]
    ranks = 1 + chosen % 3
    offsets = np.arange(MAX_LOGPROBS, dtype=np.int32)
    top_ids = (chosen[:, None] + offsets - (ranks[:, None] - 1)) % VOCAB_SIZE  # [R, MAX_LOGPROBS]
    top = np.broadcast_to(-(offsets + 1) / 4, top_ids.shape).astype(np.float32)
    return LogprobRows((-ranks / 4).astype(np.float32), ranks, top_ids, top)


def hashed_logprobs(token_ids: list[int]) -> np.ndarray:
    """[VOCAB_SIZE] float32: a distribution that depends on every token before it."""
    content = array("i", token_ids).tobytes()
    digest = blake2b(content, digest_size=2 * VOCAB_SIZE).digest()
    logits = np.frombuffer(digest, np.uint16) / 2.0**13  # [VOCAB_SIZE] in [0, 8)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


class FakeHandle:
    def __init__(self, result: StepResult, error: BaseException | None):
        self._result, self._error = result, error

    def result(self) -> StepResult:
        if self._error is not None:
            raise self._error
        return self._result


class FakeRunner:
    """next_token: what a sequence samples. on_batch: called with each batch; what it raises is
    raised by execute(). result_error: asked after each batch for what result() shall raise. is_ok:
    whether a sequence's logits are finite. A token's hidden state is its id and its position."""

    def __init__(
        self,
        config: EngineConfig,
        next_token: Callable[[Sequence], int] = hashed_token,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        result_error: Callable[[], BaseException | None] = lambda: None,
        is_ok: Callable[[Sequence], bool] = lambda sequence: True,
    ):
        self.config = config
        self.next_token = next_token
        self.on_batch = on_batch
        self.result_error = result_error
        self.is_ok = is_ok
        self.batches: list[Batch] = []
        self.num_resets = 0
        self._make_pool()

    def _make_pool(self) -> None:
        num_cells = self.config.num_blocks * self.config.block_size
        self._pool = np.full((num_cells, 3), -1, np.int64)  # token, position, salt
        self._hidden_sums = np.full((self.config.max_num_seqs, 2), np.nan)
        self._ended: set[tuple[int, int]] = set()  # sequence_id, attempt
        self._last_tokens = np.full(self.config.max_num_seqs, -99)

    def reset(self) -> None:
        self.num_resets += 1
        self._make_pool()

    def figures(self) -> RunnerFigures:
        num_tokens = sum(batch.num_tokens for batch in self.batches)
        return RunnerFigures(num_tokens=num_tokens, num_padded_tokens=2 * num_tokens)

    def execute(self, batch: Batch) -> FakeHandle:
        self.batches.append(batch)
        self._check_batch(batch)
        self.on_batch(batch)
        for source, destination in batch.copies:
            self._pool[self._block(destination)] = self._pool[self._block(source)]
        written: set[int] = set()
        rows, following, pooled, contexts, later_rows = [], [], [], [], []
        for scheduled in batch.sequences:
            sequence, start = scheduled.sequence, scheduled.start
            end = start + scheduled.num_tokens
            drafts = list(scheduled.drafts)
            token_ids = self._token_ids(sequence, end - len(drafts)) + drafts
            following += [*token_ids, *sequence.token_ids[end:], 0][start + 1 : end + 1]
            num_looped = 0 if drafts else max(0, scheduled.samples - 1)
            new = self._cells(sequence, end + num_looped)[start:].tolist()
            assert written.isdisjoint(new), "two sequences write the same place in one step"
            written.update(new)
            # In batch order: a row must not read what a later row writes.
            view = replace(sequence, token_ids=token_ids, num_pending=0)
            contexts.append(token_ids)
            if (sequence.sequence_id, scheduled.attempt) in self._ended:
                # What a loop ended is not known to the host yet. It writes and yields nonsense.
                self._pool[new] = NONSENSE
                rows.append([0])
                pooled.append(np.zeros(2))
                continue
            is_ok = self._compute(view, start)
            hidden = self._content(view, end)[min(start, end - 1) :, :2]
            pooled.append(self._pooled(sequence, start, hidden))
            if drafts:
                first, *others = self._verify(view, len(drafts))
                later_rows += others
                rows.append([first if is_ok else NOT_FINITE])
                continue
            rows.append(self._decode(view, scheduled.samples) if is_ok else [NOT_FINITE])
            if len(rows[-1]) < scheduled.samples:
                self._ended.add((sequence.sequence_id, scheduled.attempt))
        columns = [row + [0] * (batch.num_steps - len(row)) for row in rows]
        tokens = np.array(columns, np.int32).T  # [num_steps, number of scheduled sequences]
        if later_rows:
            tokens = accepted_tokens(batch, np.append(tokens[0], later_rows))
        result = self._result(batch, [*(row[0] for row in rows), *later_rows], tokens, following)
        result = replace(
            result,
            pooled=np.array(pooled, np.float32),
            candidates=self._candidates(batch, contexts),
        )
        return FakeHandle(result, self.result_error())

    @staticmethod
    def _candidates(batch: Batch, contexts: list[list[int]]) -> CandidateRows | None:
        most = max(row.sequence.num_candidates for row in batch.sequences)
        if not most:
            return None
        found = np.stack([hashed_logprobs(context) for context in contexts])  # [R, VOCAB_SIZE]
        best = np.argsort(-found, axis=-1)[:, :most]
        missing = ((0, 0), (0, most - best.shape[1]))
        return CandidateRows(
            np.pad(best.astype(np.int32), missing),
            np.pad(np.take_along_axis(found, best, -1), missing, constant_values=-np.inf),
        )

    def _token_ids(self, sequence: Sequence, end: int) -> list[int]:
        """Those that the host knows, the others as the device has them: all but the last in the
        pool, the last in the slot's state."""
        num_known = min(end, sequence.num_known_tokens)
        token_ids = sequence.token_ids[:num_known]
        assert ON_DEVICE not in token_ids
        if end > num_known:
            cells = self._cells(sequence, end)
            token_ids += self._pool[cells[num_known : end - 1], 0].tolist()
            token_ids.append(int(self._last_tokens[sequence.slot]))
        return token_ids

    def _compute(self, view: Sequence, start: int) -> bool:
        """Writes the tokens from start on and reads the whole context back. Whether it is finite;
        what is computed from something that is not, is not either."""
        end = len(view.token_ids)
        cells, expected = self._cells(view, end), self._content(view, end)
        if not self.is_ok(view) or (self._pool[cells[:start]] == POISON).any():
            self._pool[cells[start:]] = POISON
            return False
        self._pool[cells[start:]] = expected[start:]
        np.testing.assert_array_equal(self._pool[cells], expected)
        return True

    def _block(self, block: int) -> slice:
        size = self.config.block_size
        return slice(block * size, (block + 1) * size)

    def is_poisoned(self, block: int) -> bool:
        return bool((self._pool[self._block(block)] == POISON).any())

    def _decode(self, view: Sequence, samples: int) -> list[int]:
        """The tokens that a row yields: up to as many as asked for, or to one that ends it."""
        tokens: list[int] = []
        stops = view.params.all_stop_token_ids(view.eos_token_ids)
        for index in range(samples):
            if index:
                view.token_ids.append(tokens[-1])
                if not self._compute(view, len(view.token_ids) - 1):
                    return [*tokens, NOT_FINITE]
            tokens.append(self.next_token(view))
            self._last_tokens[view.slot] = tokens[-1]
            if tokens[-1] in stops and view.num_output_tokens + 1 >= view.params.min_tokens:
                break
        return tokens or [-7]

    def _verify(self, view: Sequence, num_drafts: int) -> list[int]:
        """What the model samples before each draft and after the last."""
        ends = range(len(view.token_ids) - num_drafts, len(view.token_ids) + 1)
        tokens = [self.next_token(replace(view, token_ids=view.token_ids[:end])) for end in ends]
        self._last_tokens[view.slot] = -99  # nobody reads it before the host knows how many count
        return tokens

    def _pooled(self, sequence: Sequence, start: int, hidden: np.ndarray) -> np.ndarray:
        """[2]: of the last token, or the mean of all so far; only the slot's sums are at hand."""
        if sequence.pooling is None or sequence.pooling.pooling == "last":
            return hidden[-1]
        before = self._hidden_sums[sequence.slot] if start else 0
        self._hidden_sums[sequence.slot] = before + hidden.sum(axis=0)
        return self._hidden_sums[sequence.slot] / sequence.num_prompt_tokens

    def _cells(self, sequence: Sequence, end: int) -> np.ndarray:
        positions = np.arange(end)
        table = np.array(sequence.block_table)
        block_size = self.config.block_size
        return table[positions // block_size] * block_size + positions % block_size

    def _content(self, sequence: Sequence, end: int) -> np.ndarray:
        salt = -1 if sequence.cache_salt is None else len(sequence.cache_salt)
        positions = np.arange(end)
        return np.stack([np.array(sequence.token_ids[:end]), positions, np.full(end, salt)], axis=1)

    @staticmethod
    def _result(
        batch: Batch, sampled: list[int], token_ids: np.ndarray, following: list[int]
    ) -> StepResult:
        params = [scheduled.sequence.params for scheduled in batch.sequences]
        return StepResult(
            token_ids,
            fake_logprobs(sampled)
            if any(p.logprobs is not None or p.ranks_answers for p in params)
            else None,
            fake_logprobs(following)
            if any(p.prompt_logprobs is not None for p in params)
            else None,
        )

    def _check_batch(self, batch: Batch) -> None:
        rows, config = batch.sequences, self.config
        assert 0 < batch.num_tokens == sum(row.num_tokens for row in rows)
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert len({row.sequence.sequence_id for row in rows}) == len(rows)
        slots = {row.sequence.slot for row in rows}
        assert len(slots) == len(rows) <= config.max_num_seqs
        assert batch.num_drafts == sum(len(row.drafts) for row in rows)
        assert batch.num_rows <= config.max_num_rows
        assert slots <= set(range(config.max_num_seqs))
        num_seqs = len(rows) - len(batch.leaders)
        for leader, row in zip(batch.leaders, rows[num_seqs:], strict=True):
            assert leader < num_seqs
            assert rows[leader].samples == row.samples == batch.num_steps == 1
            assert rows[leader].sequence.request_id == row.sequence.request_id
            assert rows[leader].sequence.token_ids == row.sequence.token_ids
        for index, row in enumerate(rows):
            end = row.start + row.num_tokens
            assert (row.num_tokens >= 1) == (index < num_seqs)
            num_written = max(row.num_tokens, row.samples) if row.num_tokens else 0
            assert row.start + num_written == row.sequence.num_computed_tokens
            assert bool(row.samples) == (end - len(row.drafts) == row.sequence.num_tokens)
            assert row.samples <= batch.num_steps + len(row.drafts)
            assert len(row.drafts) <= config.num_speculative_tokens
            assert not row.drafts or (row.samples == row.num_tokens == len(row.drafts) + 1)
            assert row.sequence.num_tokens + row.samples <= row.sequence.max_num_tokens
            assert len(row.sequence.block_table) <= config.max_blocks_per_seq
            if index < batch.num_decodes:
                assert row.num_tokens == 1
                assert row.samples
