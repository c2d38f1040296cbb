"""A scheduled batch as one packed int32 buffer, padded to a bucket: one copy a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxllm.engine.sequence import NO_TOKEN, Batch, Sequence, mask_len
from jaxllm.sampling_params import SamplingParams

# What a step reads of each sequence. Floats travel bit-cast.
INT_FIELDS = (
    "seq_lens",  # tokens including those of this step
    "slots",  # row of the device state; num_slots in padding rows
    "prompt_lens",
    "samples",  # tokens that it may yield; 0 where the step does not compute its last token
    "next_token_ids",  # the known token after this step's last, for its prompt log-probability
    "output_lens",  # tokens generated so far
    "seed_low",
    "seed_high",
    "top_k",
    "min_tokens",
    "uses_table",  # 1: its row of the sampling table applies
    "is_constrained",  # 1: its mask of allowed tokens applies
    "wants_logprobs",  # one of NO_LOGPROBS, CHOSEN_LOGPROBS, TOP_LOGPROBS
    "wants_prompt_logprobs",
    "pooling",  # one of POOLING_CODES, 0: the sequence generates
    "num_candidates",  # of a beam: continuations that the host wants to see
)
FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
ROW_FIELDS = INT_FIELDS + FLOAT_FIELDS
MAX_STOP_IDS = 8  # of a sequence that decodes several tokens at a time
NO_LOGPROBS, CHOSEN_LOGPROBS, TOP_LOGPROBS = 0, 1, 2
POOLING_CODES = {"mean": 1, "last": 2}


@dataclass(frozen=True)
class Bucket:
    """The shape of one compiled step: T tokens of S sequences. decode_only: one token each."""

    num_tokens: int
    num_seqs: int
    decode_only: bool

    def __str__(self) -> str:
        kind = "decode" if self.decode_only else "mixed"
        return f"{kind} {self.num_tokens}x{self.num_seqs}"


@dataclass(frozen=True)
class PackedLayout:
    """Where each field of a bucket lies in its buffer. max_steps: how often its program may decode
    before it returns. max_drafts: how many of each sequence it may verify."""

    bucket: Bucket
    max_blocks: int  # M
    max_steps: int = 1
    max_drafts: int = 0

    @cached_property
    def arrays(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (offset, shape), in elements. row_fields holds one row for each ROW_FIELDS."""
        num_seqs = self.bucket.num_seqs
        shapes: dict[str, tuple[int, ...]] = {
            "token_ids": (self.bucket.num_tokens,),
            "query_start": (num_seqs + 1,),
            "distribution": (3,),
            "logit_rows": (num_seqs,),  # of the query tokens, the one that each row samples after
            "counts": (2,),  # rows that are real; blocks to copy
            "copies": (num_seqs, 2),  # source and destination
            "block_tables": (num_seqs, self.max_blocks),
            "row_fields": (len(ROW_FIELDS), num_seqs),
        }
        if self.max_steps > 1:
            shapes |= {"num_steps": (1,), "stop_ids": (num_seqs, MAX_STOP_IDS)}
        if self.max_drafts:
            # the draft that a row verifies; the row that samples before it, or itself
            shapes |= {"drafts": (num_seqs,), "previous_rows": (num_seqs,)}
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = (end, shape)
            end += math.prod(shape)
        return offsets

    @cached_property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.arrays.values())

    def view(self, buffer: np.ndarray, name: str) -> np.ndarray:
        """One of the arrays in a buffer."""
        offset, shape = self.arrays[name]
        return buffer[offset : offset + math.prod(shape)].reshape(shape)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """All arrays of a buffer with row_fields by name, floats as float32."""
        views = {name: self.view(buffer, name) for name in self.arrays}
        return views | fields_by_name(views.pop("row_fields"))


def fields_by_name(row_fields: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of an array [number of ROW_FIELDS, n], floats as float32."""
    fields = dict(zip(ROW_FIELDS, row_fields, strict=True))
    return fields | {name: fields[name].view(np.float32) for name in FLOAT_FIELDS}


class BatchPacker:
    """Keeps what a step needs of each slot in numpy arrays, and gathers them into a buffer.

    A slot's constant fields are written once when a sequence takes it, its block table grows with
    the sequence's, and one gather fetches all fields; so packing costs little Python.
    """

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self._num_slots = num_slots
        self._max_blocks = max_blocks
        self.reset()

    def reset(self) -> None:
        """Forgets all slots, as after the device state was built anew."""
        rows = self._num_slots + 1  # the last one is what padding rows read
        self._block_tables = np.zeros((rows, self._max_blocks), np.int32)
        self._stop_ids = np.full((rows, MAX_STOP_IDS), NO_TOKEN, np.int32)
        self._row_fields = np.zeros((len(ROW_FIELDS), rows), np.int32)
        self._fields = fields_by_name(self._row_fields)
        self._fields["slots"][:] = np.arange(rows)
        for name in ("top_p", "repetition_penalty"):
            self._fields[name][:] = 1.0
        # Who holds each slot. A sequence that was preempted comes back as another owner, even to
        # the same slot: its blocks are others.
        self._owner = [(-1, 0)] * rows  # (sequence_id, num_preemptions)
        self._num_blocks = [0] * rows
        self._table_versions = [0] * rows

    def new_table_rows(self, batch: Batch) -> list[Sequence]:
        """Takes in the sequences that are new in their slots; returns those of them whose row of
        the sampling table has to be written before the step."""
        needing = []
        for scheduled in batch.sequences:
            sequence = scheduled.sequence
            # A row is made of the tokens that the host knows, so it must know all.
            assert sequence.constraint is None or not sequence.num_pending
            is_new = self._owner[sequence.slot] != (sequence.sequence_id, sequence.num_preemptions)
            if is_new:
                assert not sequence.num_pending
                self._take_slot(sequence)
            if is_new and self._fields["uses_table"][sequence.slot]:
                needing.append(sequence)
        return needing

    def _take_slot(self, sequence: Sequence) -> None:
        slot, params = sequence.slot, sequence.params
        self._owner[slot] = (sequence.sequence_id, sequence.num_preemptions)
        self._num_blocks[slot], self._table_versions[slot] = 0, sequence.table_version
        fields = self._fields
        fields["prompt_lens"][slot] = sequence.num_prompt_tokens
        fields["seed_low"][slot] = _as_int32(sequence.seed)
        fields["seed_high"][slot] = _as_int32(sequence.seed >> 32)
        fields["uses_table"][slot] = uses_table(sequence)
        fields["is_constrained"][slot] = sequence.constraint is not None
        is_beam = sequence.num_candidates > 0  # whose log-probabilities are its candidates'
        fields["wants_logprobs"][slot] = NO_LOGPROBS if is_beam else _wanted_logprobs(params)
        fields["wants_prompt_logprobs"][slot] = params.prompt_logprobs is not None
        stop_ids = sorted(params.all_stop_token_ids(sequence.eos_token_ids))[:MAX_STOP_IDS]
        self._stop_ids[slot] = NO_TOKEN
        self._stop_ids[slot, : len(stop_ids)] = stop_ids
        pooling = sequence.pooling
        fields["pooling"][slot] = 0 if pooling is None else POOLING_CODES[pooling.pooling]
        fields["num_candidates"][slot] = sequence.num_candidates
        fields["temperature"][slot] = 0.0 if params.greedy else params.temperature
        for name in ("top_k", "min_tokens", *FLOAT_FIELDS[1:]):
            fields[name][slot] = getattr(params, name)

    def pack(self, batch: Batch, layout: PackedLayout) -> np.ndarray:
        """The buffer of a batch that fits the layout's bucket; new_table_rows(batch) came first."""
        assert batch.num_tokens <= layout.bucket.num_tokens
        assert batch.num_rows <= layout.bucket.num_seqs
        assert batch.num_steps <= layout.max_steps
        token_ids: list[int] = []
        for scheduled in batch.sequences:
            sequence, start, num_tokens = scheduled.sequence, scheduled.start, scheduled.num_tokens
            # a pending one is ON_DEVICE, which is what the step understands
            token_ids += sequence.token_ids[start : start + num_tokens]
            token_ids += scheduled.drafts
            self._grow_block_table(sequence)
        slots = self._write_progress(batch)
        for _, scheduled, rows in batch.draft_rows():
            slots += [scheduled.sequence.slot] * len(rows)

        buffer = np.zeros(layout.size, np.int32)
        layout.view(buffer, "token_ids")[: len(token_ids)] = token_ids
        self._write_shape(batch, layout, buffer)
        padded_slots = np.full(layout.bucket.num_seqs, self._num_slots)
        padded_slots[: len(slots)] = slots
        # All slots exist; mode "clip" only lets numpy write into `out` without a buffer.
        tables, fields = layout.view(buffer, "block_tables"), layout.view(buffer, "row_fields")
        np.take(self._block_tables, padded_slots, axis=0, out=tables, mode="clip")
        np.take(self._row_fields, padded_slots, axis=1, out=fields, mode="clip")
        if layout.max_steps > 1:
            layout.view(buffer, "num_steps")[0] = batch.num_steps
            stop_ids = layout.view(buffer, "stop_ids")
            np.take(self._stop_ids, padded_slots, axis=0, out=stop_ids, mode="clip")
        if layout.max_drafts:
            self._write_drafts(batch, layout, buffer)
        return buffer

    @staticmethod
    def _write_shape(batch: Batch, layout: PackedLayout, buffer: np.ndarray) -> None:
        """Which rows have which tokens, what they sample after, and the blocks to copy. Rows
        without a token, the last ones, take no part in attention."""
        num_rows, num_leaders = len(batch.sequences), len(batch.leaders)
        num_seqs = num_rows - num_leaders
        query_start = layout.view(buffer, "query_start")
        query_start[1 : num_rows + 1] = [s.num_tokens for s in batch.sequences]
        np.cumsum(query_start, out=query_start)
        logit_rows = layout.view(buffer, "logit_rows")
        np.subtract(query_start[1 : num_seqs + 1], 1, out=logit_rows[:num_seqs])
        if num_leaders:
            logit_rows[num_seqs:num_rows] = logit_rows[batch.leaders]
        layout.view(buffer, "distribution")[:] = (batch.num_decodes, batch.num_decodes, num_seqs)
        layout.view(buffer, "counts")[:] = (batch.num_rows, len(batch.copies))
        if batch.copies:
            layout.view(buffer, "copies")[: len(batch.copies)] = batch.copies

    @staticmethod
    def _write_drafts(batch: Batch, layout: PackedLayout, buffer: np.ndarray) -> None:
        """What the rows of drafts verify and sample after. The first row of a sequence with drafts
        samples after its last known token, each other one after a draft."""
        drafts = layout.view(buffer, "drafts")
        previous_rows = layout.view(buffer, "previous_rows")
        query_start = layout.view(buffer, "query_start")
        logit_rows = layout.view(buffer, "logit_rows")
        output_lens = layout.view(buffer, "row_fields")[ROW_FIELDS.index("output_lens")]
        drafts[:] = NO_TOKEN
        previous_rows[:] = np.arange(len(previous_rows))
        for row, scheduled, later_rows in batch.draft_rows():
            chain = [row, *later_rows]
            offsets = np.arange(len(chain))
            drafts[chain[:-1]] = scheduled.drafts
            previous_rows[chain[1:]] = chain[:-1]
            logit_rows[chain] = query_start[row] + offsets
            output_lens[chain] = output_lens[row] - len(later_rows) + offsets

    def _write_progress(self, batch: Batch) -> list[int]:
        """Brings the fields that change from step to step up to date. Returns the rows' slots."""
        slots, ends, output_lens, next_token_ids = [], [], [], []
        for scheduled in batch.sequences:
            sequence, end = scheduled.sequence, scheduled.start + scheduled.num_tokens
            slots.append(sequence.slot)
            ends.append(end)
            output_lens.append(end - sequence.num_prompt_tokens)
            next_token_ids.append(0 if scheduled.samples else sequence.token_ids[end])
        fields = self._fields
        fields["seq_lens"][slots] = ends
        fields["samples"][slots] = [s.samples for s in batch.sequences]
        fields["output_lens"][slots] = output_lens  # negative, and not read, within a prompt
        fields["next_token_ids"][slots] = next_token_ids
        return slots

    def _grow_block_table(self, sequence: Sequence) -> None:
        slot, table = sequence.slot, sequence.block_table
        written = self._num_blocks[slot]
        if sequence.table_version != self._table_versions[slot]:
            self._table_versions[slot], written = sequence.table_version, 0
        if len(table) != written:
            self._block_tables[slot, written : len(table)] = table[written:]
            self._num_blocks[slot] = len(table)


def accepted_tokens(batch: Batch, tokens: np.ndarray) -> np.ndarray:
    """[1 + most drafts, number of scheduled sequences]: what each yields, given what all rows
    sampled, [num_rows]. Drafts are accepted as long as the model samples just them; the token that
    is sampled instead of the first other one, or after the last, counts too."""
    num_seqs = len(batch.sequences)
    most = max(len(scheduled.drafts) for scheduled in batch.sequences)
    yielded = np.full((1 + most, num_seqs), NO_TOKEN, np.int32)
    yielded[0] = tokens[:num_seqs]
    for row, scheduled, later_rows in batch.draft_rows():
        token_id = tokens[row]
        for index, (draft, later) in enumerate(zip(scheduled.drafts, later_rows, strict=True), 1):
            if token_id != draft:
                break
            token_id = yielded[index, row] = tokens[later]
    return yielded


def _wanted_logprobs(params: SamplingParams) -> int:
    if params.logprobs is not None:
        return TOP_LOGPROBS
    return CHOSEN_LOGPROBS if params.ranks_answers else NO_LOGPROBS


def pack_masks(batch: Batch, bucket: Bucket, vocab_size: int) -> np.ndarray | None:
    """[S, ceil(V / 32)] int32: which tokens may come in the rows that sample for an answer of a
    given form. None if there is no such row."""
    constrained = [
        (row, s.sequence.constraint.mask)
        for row, s in enumerate(batch.sequences)
        if s.sequence.constraint is not None and s.samples
    ]
    for _, scheduled, later_rows in batch.draft_rows():
        if scheduled.sequence.constraint is not None and scheduled.sequence.outlook is not None:
            constrained += zip(later_rows, scheduled.sequence.outlook.masks, strict=False)
    if not constrained:
        return None
    masks = np.zeros((bucket.num_seqs, mask_len(vocab_size)), np.int32)
    for row, mask in constrained:
        masks[row] = mask
    return masks


def is_host_bound(
    params: SamplingParams, eos_token_ids: tuple[int, ...], is_constrained: bool
) -> bool:
    """Whether the host has to look at each token of such a sequence before the next is computed, or
    wants more of each step than its token."""
    num_stop_ids = len(params.all_stop_token_ids(eos_token_ids))
    wants_more = _wanted_logprobs(params) != NO_LOGPROBS or bool(params.stop)
    return is_constrained or wants_more or num_stop_ids > MAX_STOP_IDS


def uses_table(sequence: Sequence) -> bool:
    """Whether an option of the sequence needs a number for each token of the vocabulary."""
    params = sequence.params
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.banned_token_ids
        or params.min_tokens
    )


# An entry of the sampling table's token_info: how often the token was generated, and two flags.
IN_PROMPT = 1 << 30
IS_STOP = 1 << 29  # must not be generated before min_tokens


def table_row(sequence: Sequence, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequence's row of the sampling table: token_info [V] int32, logit_bias [V] float32
    (minus infinity: never)."""
    params = sequence.params
    info = np.bincount(sequence.output_token_ids, minlength=vocab_size).astype(np.int32)
    info[sequence.token_ids[: sequence.num_prompt_tokens]] |= IN_PROMPT
    info[list(params.all_stop_token_ids(sequence.eos_token_ids))] |= IS_STOP
    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0.0
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] += value
    bias[list(params.banned_token_ids or ())] = -np.inf
    return info, bias


def _as_int32(value: int) -> int:
    """The low 32 bits, as a signed number."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
