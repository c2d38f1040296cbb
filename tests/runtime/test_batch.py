"""The packer: what it writes is what the step reads, for slots that come and go."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.engine.batch import (
    FLOAT_FIELDS,
    IN_PROMPT,
    INT_FIELDS,
    IS_STOP,
    BatchPacker,
    Bucket,
    PackedLayout,
    table_row,
    uses_table,
)
from jaxllm.engine.sequence import NO_TOKEN, ON_DEVICE, Batch, ScheduledSequence, Sequence
from jaxllm.runtime.step import unpack
from jaxllm.sampling_params import SamplingParams

MAX_BLOCKS = 5
NUM_SLOTS = 6
DECODE = PackedLayout(Bucket(8, 8, decode_only=True), MAX_BLOCKS)
MIXED = PackedLayout(Bucket(32, 8, decode_only=False), MAX_BLOCKS)


def sequence_of(
    slot: int,
    *,
    sequence_id: int = 0,
    prompt: tuple[int, ...] = (5, 6, 7),
    output: tuple[int, ...] = (),
    blocks: tuple[int, ...] = (3,),
    seed: int = 0,
    eos: tuple[int, ...] = (),
    **options: Any,
) -> Sequence:
    return Sequence(
        sequence_id, f"request-{sequence_id}", 0, SamplingParams(**options), seed,
        [*prompt, *output], len(prompt), eos_token_ids=eos, slot=slot, block_table=list(blocks),
    )  # fmt: skip


def prefill(sequence: Sequence, start: int = 0, num_tokens: int | None = None) -> ScheduledSequence:
    num_tokens = sequence.num_tokens - start if num_tokens is None else num_tokens
    samples = start + num_tokens == sequence.num_tokens
    return ScheduledSequence(sequence, start, num_tokens, int(samples))


def decode(sequence: Sequence) -> ScheduledSequence:
    return ScheduledSequence(sequence, sequence.num_tokens - 1, 1, 1)


def batch_of(*scheduled: ScheduledSequence, num_decodes: int = 0) -> Batch:
    return Batch(list(scheduled), sum(s.num_tokens for s in scheduled), num_decodes)


def pack(packer: BatchPacker, batch: Batch, layout: PackedLayout = MIXED) -> dict[str, np.ndarray]:
    packer.new_table_rows(batch)
    return layout.views(packer.pack(batch, layout))


@pytest.fixture
def packer() -> BatchPacker:
    return BatchPacker(NUM_SLOTS, MAX_BLOCKS)


@pytest.mark.parametrize("layout", [DECODE, MIXED], ids=str)
def test_the_device_reads_what_the_host_wrote(layout: PackedLayout) -> None:
    rng = np.random.default_rng(0)
    buffer = rng.integers(-(2**31), 2**31, layout.size).astype(np.int32)
    views = layout.views(buffer)
    for name in FLOAT_FIELDS:
        views[name][:] = rng.normal(size=8) * 10.0 ** rng.integers(-30, 30, 8)
    views["min_p"][:4] = (0.0, -0.0, np.inf, 2.0**-149)
    fields = jax.jit(lambda packed: unpack(packed, layout))(buffer)
    assert set(fields) == set(views) >= set(INT_FIELDS + FLOAT_FIELDS)
    for name, field in fields.items():
        host = np.asarray(field)
        assert host.dtype == views[name].dtype == (np.float32 if name in FLOAT_FIELDS else np.int32)
        np.testing.assert_array_equal(host.view(np.int32), views[name].view(np.int32), name)


def test_fields_cover_the_buffer_without_overlap() -> None:
    buffer = np.zeros(MIXED.size, np.int32)
    for view in MIXED.views(buffer).values():
        view.view(np.int32)[...] += 1
    assert (buffer == 1).all()


def test_a_mixed_batch(packer: BatchPacker) -> None:
    decoding = sequence_of(4, sequence_id=1, output=(8, 9), blocks=(2, 7), temperature=0.5, top_k=3)
    chunk = sequence_of(1, sequence_id=2, prompt=tuple(range(50, 60)), blocks=(0, 1, 4), top_p=0.25)
    whole = sequence_of(0, sequence_id=3, min_p=0.125, logprobs=2, seed=77)
    views = pack(
        packer, batch_of(decode(decoding), prefill(chunk, 2, 4), prefill(whole), num_decodes=1)
    )
    assert views["token_ids"][:8].tolist() == [9, 52, 53, 54, 55, 5, 6, 7]
    assert views["query_start"].tolist() == [0, 1, 5, 8, 8, 8, 8, 8, 8]
    assert views["distribution"].tolist() == [1, 1, 3]
    assert views["seq_lens"].tolist() == [5, 6, 3, 0, 0, 0, 0, 0]
    assert views["slots"].tolist() == [4, 1, 0] + [NUM_SLOTS] * 5
    assert views["samples"].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    assert views["prompt_lens"][:3].tolist() == [3, 10, 3]
    assert views["output_lens"][[0, 2]].tolist() == [2, 0]
    assert views["next_token_ids"][1] == 56
    assert views["block_tables"][:3].tolist() == [[2, 7, 0, 0, 0], [0, 1, 4, 0, 0], [3, 0, 0, 0, 0]]
    assert views["temperature"][:3].tolist() == [0.5, 1, 1]
    assert views["top_k"][:3].tolist() == [3, 0, 0]
    assert views["top_p"][:3].tolist() == [1, 0.25, 1]
    assert views["min_p"][:3].tolist() == [0, 0, 0.125]
    assert views["wants_logprobs"][:3].tolist() == [0, 0, 2]
    assert views["seed_low"][:3].tolist() == [0, 0, 77]


def test_padding_rows_ask_for_nothing(packer: BatchPacker) -> None:
    asking = sequence_of(
        NUM_SLOTS - 1, temperature=1.5, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0,
        presence_penalty=1.0, frequency_penalty=1.0, min_tokens=3, logprobs=1, prompt_logprobs=1,
        seed=9,
    )  # fmt: skip
    views = pack(packer, batch_of(prefill(asking)))
    neutral = {"slots": NUM_SLOTS, "top_p": 1, "repetition_penalty": 1}
    for name in INT_FIELDS + FLOAT_FIELDS:
        assert (views[name][1:] == neutral.get(name, 0)).all(), name
    assert (views["block_tables"][1:] == 0).all()
    assert (views["token_ids"][3:] == 0).all()


def test_greedy_is_temperature_zero(packer: BatchPacker) -> None:
    views = pack(packer, batch_of(prefill(sequence_of(0, temperature=9e-6))))
    assert views["temperature"][0] == 0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1, 2**63 + 3])
def test_seeds_travel_in_two_halves(packer: BatchPacker, seed: int) -> None:
    views = pack(packer, batch_of(prefill(sequence_of(2, seed=seed))))
    low, high = int(views["seed_low"][0]), int(views["seed_high"][0])
    assert (low % 2**32) + (high % 2**32 << 32) == seed % 2**64


def test_a_token_that_the_host_does_not_know_stays_on_the_device(packer: BatchPacker) -> None:
    sequence = sequence_of(2)
    assert pack(packer, batch_of(prefill(sequence)))["token_ids"][:3].tolist() == [5, 6, 7]
    for _ in range(2):
        sequence.expect(1)
        views = pack(packer, batch_of(decode(sequence), num_decodes=1), DECODE)
        assert views["token_ids"][0] == ON_DEVICE
    assert views["output_lens"][0] == 2
    assert views["seq_lens"][0] == 5


def test_a_token_that_the_host_knows_is_sent(packer: BatchPacker) -> None:
    cached = sequence_of(0, sequence_id=1)
    chunked = sequence_of(1, sequence_id=2)
    first = batch_of(prefill(cached, 2), prefill(chunked, 0, 2))
    assert pack(packer, first)["token_ids"][:3].tolist() == [7, 5, 6]
    cached.token_ids.append(9)
    second = batch_of(decode(cached), prefill(chunked, 2), num_decodes=2)
    assert pack(packer, second, DECODE)["token_ids"][:2].tolist() == [9, 7]


def test_rows_follow_the_batch_not_the_slots(packer: BatchPacker) -> None:
    first, second = (sequence_of(slot, sequence_id=slot, seed=slot) for slot in (0, 1))
    pack(packer, batch_of(prefill(first), prefill(second)))
    for sequence in (first, second):
        sequence.token_ids.append(1)
    batch = batch_of(decode(second), decode(first), num_decodes=2)
    views = pack(packer, batch, DECODE)
    assert views["slots"][:2].tolist() == [1, 0]
    assert views["seed_low"][:2].tolist() == [1, 0]


def test_a_slot_keeps_nothing_of_its_former_sequence(packer: BatchPacker) -> None:
    former = sequence_of(
        3, sequence_id=1, blocks=(1, 2, 4), seed=5, temperature=0.5, top_k=4, logprobs=1,
        repetition_penalty=1.5, min_tokens=1,
    )  # fmt: skip
    pack(packer, batch_of(prefill(former)))
    successor = sequence_of(3, sequence_id=2, prompt=(1, 2, 3, 4), output=(9,), blocks=(6,))
    views = pack(packer, batch_of(ScheduledSequence(successor, 3, 1, 0)))
    fresh = pack(
        BatchPacker(NUM_SLOTS, MAX_BLOCKS), batch_of(ScheduledSequence(successor, 3, 1, 0))
    )
    assert views["token_ids"][0] == 4  # not ON_DEVICE, though the slot sampled position 3
    assert views["block_tables"][0, 0] == 6
    for name in INT_FIELDS + FLOAT_FIELDS:
        if name not in ("output_lens", "samples"):  # read only where the row samples
            np.testing.assert_array_equal(views[name], fresh[name], name)


def test_a_sequence_comes_back_after_preemption_with_other_blocks(packer: BatchPacker) -> None:
    sequence = sequence_of(3, blocks=(1, 2), repetition_penalty=1.5)
    batch = batch_of(prefill(sequence))
    assert packer.new_table_rows(batch) == [sequence]
    packer.pack(batch, MIXED)
    sequence.token_ids.append(8)
    sequence.num_preemptions += 1
    sequence.block_table = [4, 0]
    again = batch_of(prefill(sequence))
    assert packer.new_table_rows(again) == [sequence]  # counts of its row may be of another
    views = MIXED.views(packer.pack(again, MIXED))
    assert views["block_tables"][0, :2].tolist() == [4, 0]
    assert views["token_ids"][:4].tolist() == [5, 6, 7, 8]
    assert views["output_lens"][0] == 1  # the same position as without the preemption


def test_a_block_table_grows(packer: BatchPacker) -> None:
    sequence = sequence_of(0, blocks=(4,))
    for block in (2, 7, 1):
        views = pack(packer, batch_of(decode(sequence), num_decodes=1), DECODE)
        num_blocks = len(sequence.block_table)
        assert views["block_tables"][0, :num_blocks].tolist() == sequence.block_table
        sequence.block_table.append(block)
    views = pack(packer, batch_of(decode(sequence), num_decodes=1), DECODE)
    assert views["block_tables"][0].tolist() == [4, 2, 7, 1, 0]


def test_table_rows_are_written_once_and_again_after_a_reset(packer: BatchPacker) -> None:
    plain, biased = sequence_of(0, sequence_id=1), sequence_of(1, sequence_id=2, logit_bias={1: 2})
    batch = batch_of(prefill(plain), prefill(biased))
    assert packer.new_table_rows(batch) == [biased]
    views = MIXED.views(packer.pack(batch, MIXED))
    assert views["uses_table"][:2].tolist() == [0, 1]
    assert packer.new_table_rows(batch) == []
    packer.reset()
    assert packer.new_table_rows(batch) == [biased]


# ---- the sampling table


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"temperature": 0.3, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "logprobs": 3}, False),
        ({"stop_token_ids": [1], "logit_bias": {}, "banned_token_ids": []}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"logit_bias": {0: 0.0}}, True),
        ({"allowed_token_ids": [0]}, True),
        ({"banned_token_ids": [0]}, True),
        ({"min_tokens": 1}, True),
    ],
)
def test_which_options_need_a_table_row(options: dict[str, Any], expected: bool) -> None:
    assert uses_table(sequence_of(0, **options)) is expected


def test_table_row_counts_output_and_marks_prompt_and_stops() -> None:
    sequence = sequence_of(
        0, prompt=(1, 1, 2), output=(2, 3, 3), eos=(4,), stop_token_ids=[3, 5], min_tokens=2
    )
    info, bias = table_row(sequence, 7)
    assert info.tolist() == [
        0, IN_PROMPT, IN_PROMPT + 1, IS_STOP + 2, IS_STOP, IS_STOP, 0,
    ]  # fmt: skip
    assert (info.dtype, bias.dtype) == (np.int32, np.float32)
    assert not bias.any()


def test_table_row_biases_allows_and_bans() -> None:
    sequence = sequence_of(
        0, prompt=(0,), allowed_token_ids=[1, 2, 4], banned_token_ids=[2],
        logit_bias={1: -1.5, 2: 100, 3: 100},
    )  # fmt: skip
    _, bias = table_row(sequence, 6)
    assert bias.tolist() == [-np.inf, -1.5, -np.inf, -np.inf, 0, -np.inf]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {4, 9}),
        ({"ignore_eos": True}, set()),
        ({"stop_token_ids": [1, 4]}, {1, 4, 9}),
        ({"stop_token_ids": [1], "ignore_eos": True}, {1}),
    ],
)
def test_stop_token_ids(options: dict[str, Any], expected: set[int]) -> None:
    assert SamplingParams(**options).all_stop_token_ids((4, 9)) == expected


def test_drafts_have_rows_after_all_others(packer: BatchPacker) -> None:
    layout = PackedLayout(MIXED.bucket, MAX_BLOCKS, max_drafts=3)
    plain = sequence_of(2, sequence_id=1, output=(8,), temperature=0.5)
    guessing = sequence_of(4, sequence_id=2, output=(9, 10), temperature=0.75)
    rows = decode(plain), ScheduledSequence(guessing, 4, 3, 3, 0, (11, 12))
    views = pack(packer, Batch([*rows], 4, 1, num_drafts=2), layout)
    assert views["token_ids"][:4].tolist() == [8, 10, 11, 12]
    assert views["query_start"].tolist() == [0, 1, 4, 4, 4, 4, 4, 4, 4]
    assert views["distribution"].tolist() == [1, 1, 2]
    assert views["counts"].tolist() == [4, 0]
    assert views["seq_lens"][:2].tolist() == [4, 7]
    assert views["logit_rows"][:4].tolist() == [0, 1, 2, 3]
    assert views["slots"].tolist() == [2, 4, 4, 4] + [NUM_SLOTS] * 4
    assert views["output_lens"][:4].tolist() == [1, 2, 3, 4]
    assert views["temperature"][:4].tolist() == [0.5, 0.75, 0.75, 0.75]
    assert views["drafts"].tolist() == [NO_TOKEN, 11, 12] + [NO_TOKEN] * 5
    assert views["previous_rows"].tolist() == [0, 1, 1, 2, 4, 5, 6, 7]


def test_a_step_without_drafts_verifies_none(packer: BatchPacker) -> None:
    layout = PackedLayout(MIXED.bucket, MAX_BLOCKS, max_drafts=3)
    views = pack(packer, batch_of(prefill(sequence_of(0))), layout)
    assert views["drafts"].tolist() == [NO_TOKEN] * 8
    assert views["previous_rows"].tolist() == list(range(8))
